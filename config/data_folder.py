"""
Your own recordings: a folder of audio files, and a JSONL or CSV file with a dialogue in each line.

Nothing to download. Cost: not measured by itself; below that of data_text.py, where all is spoken first. Recordings may have
any rate and any format that soundfile reads, from 0.1 s to 10 minutes; they stay where they are.

recordings/dialogues.jsonl, a list item for each turn:
    {"id": "rain", "speech": ["q1.wav", "q2.wav"], "users": ["What is rain?", "And snow?"],
     "replies": ["Water.", "Ice."], "reply_speech": ["a1.wav", "a2.wav"]}
speech         the user's recordings, below audio_root
replies        the texts of the assistant's turns; a reply that was only recorded has to be written down first
reply_speech   their recordings, in one voice. Missing or null: the synthesiser says the text (--tts, --assistant)
users          the texts of the user's turns, which training does not read. May be missing
id             decides the split. Missing: the number of the line

As CSV (--path recordings/dialogues.csv), turns are divided by "|":
    id,speech,users,replies,reply_speech
    rain,q1.wav|q2.wav,What is rain?|And snow?,Water.|Ice.,a1.wav|a2.wav
"""
source = "folder"
path = "recordings/dialogues.jsonl"
audio_root = "recordings"
out_dir = "corpus/folder"
held_out = 0.05
