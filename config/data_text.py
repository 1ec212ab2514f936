"""
Text dialogues alone: a synthesiser says the user's turns, in a voice drawn for each dialogue, and the replies in one voice.

Nothing to download: espeak-ng is there. Any command that writes a WAV file will do instead, such as piper with voices from
huggingface.co/rhasspy/piper-voices. It is run once a turn, without a shell; the text comes on its stdin, or in the
place of {text}:
    python data.py config/data_text.py --tts "piper --model {voice}.onnx --output_file {wav}" \
        --voices en_US-amy-low,en_US-ryan-low --assistant en_US-lessac-medium
Cost: the synthesiser's. With espeak-ng and the nano codec 50 s of one core (AMD EPYC, Zen 5) and 0.35 GB of disk for each
1,000 dialogues of 2.1 turns, 17 words asked and 32 answered.

dialogues.jsonl, a dialogue a line and a list item a turn; the id decides the split and may be missing:
    {"id": "rain", "users": ["What is rain?", "And snow?"], "replies": ["Water.", "Ice."]}
As CSV (--path dialogues.csv), turns are divided by "|":
    id,users,replies
    rain,What is rain?|And snow?,Water.|Ice.
"""
source = "text"
path = "dialogues.jsonl"
out_dir = "corpus/text"
shard = 100
held_out = 0.01
