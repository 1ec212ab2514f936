"""
Your own recordings: a folder of audio files, and a JSONL or CSV file with one dialogue per line.

Nothing to download. Cost: not measured on its own; less than data_text.py, which synthesizes everything.
Recordings may have any sample rate and any format that soundfile reads, and last 0.1 s to 10 minutes. They
stay where they are; the corpus refers to them.

recordings/dialogues.jsonl, with one list item per turn:
    {"id": "rain", "speech": ["q1.wav", "q2.wav"], "users": ["What is rain?", "And snow?"],
     "replies": ["Water.", "Ice."], "reply_speech": ["a1.wav", "a2.wav"]}
speech         the user's recordings, below audio_root
replies        the texts of the assistant's turns; transcribe a reply first if you only have its recording
reply_speech   their recordings, in one voice. Missing or null: the text is synthesized (--tts, --assistant)
users          the texts of the user's turns, which training does not read. May be missing
id             decides the split. Missing: the number of the line

As CSV (--path recordings/dialogues.csv), with turns divided by "|":
    id,speech,users,replies,reply_speech
    rain,q1.wav|q2.wav,What is rain?|And snow?,Water.|Ice.,a1.wav|a2.wav
"""
source = "folder"
path = "recordings/dialogues.jsonl"
audio_root = "recordings"
out_dir = "corpus/folder"
held_out = 0.05
