"""
Texts only: the user's turns are synthesized in a voice drawn for each dialogue, the replies in one voice.

Nothing to download: espeak-ng is installed. Any command that writes a WAV file can take its place, such as
piper with voices from huggingface.co/rhasspy/piper-voices. It runs once per turn, without a shell, and gets
the text on stdin or in place of {text}:
    python data.py config/data_text.py --tts "piper --model {voice}.onnx --output_file {wav}" \
        --voices en_US-amy-low,en_US-ryan-low --assistant en_US-lessac-medium
Another language of espeak-ng: --voices de (all its voices) --assistant de+f2:155:50; see
reference/your_data.md.
Cost: the synthesizer's. With espeak-ng and the nano codec, 50 s of one core (AMD EPYC, Zen 5) and 0.35 GB of
disk per 1,000 dialogues of 2.1 turns, with 17 words per question and 32 per reply.

dialogues.jsonl, one dialogue per line and one list item per turn; the id decides the split, may be missing:
    {"id": "rain", "users": ["What is rain?", "And snow?"], "replies": ["Water.", "Ice."]}
As CSV (--path dialogues.csv), with turns divided by "|":
    id,users,replies
    rain,What is rain?|And snow?,Water.|Ice.
"""
source = "text"
path = "dialogues.jsonl"
out_dir = "corpus/text"
shard = 100
held_out = 0.01
