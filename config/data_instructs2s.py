"""
The released corpus of LLaMA-Omni 2: 200K dialogues of 1 to 5 turns (ICTNLP/InstructS2S-200K, CC BY-NC 4.0).

Download into downloads/ from huggingface.co/datasets/ICTNLP/InstructS2S-200K:
    instruct_en_200k_data_cosy2.json     0.5 to 1 GB, texts and units
    en_part_00 ... en_part_32            345 GB, the speech: cat en_part_* | tar xz. Only for stages 1 and 2

    python data.py config/data_instructs2s.py                         texts and units, enough for stage 1 TTS
    python data.py config/data_instructs2s.py --audio_root downloads --out_dir corpus/instructs2s_heard
                                                                      with speech

audio_root is the folder that the JSON's paths start from. The recordings stay where they are; the corpus
refers to them.

Cost: we did not have these files; their sizes and form are what other people's loaders show. Of dialogues
that we made up in this form (1.7 turns, 300 units per reply), 1,000 took 0.3 s of one core (Intel Xeon) and
1.6 MB of disk; memory was 0.65 GB for 4,000 and 20,000. With audio, every question is decoded once to find
the unreadable ones: 2 s per 1,000 (AMD EPYC, Zen 5; one clip of 7.5 s again and again), plus the time to read
the files, which we did not measure.

The JSON is an array of objects like this one; `unit` may also be a text, "1270 43 6560". Other keys, and
units of the user, are not read:
    {"id": "instruct_en_0", "conversation": [
        {"from": "human", "text": "What is rain?", "speech": "wav/instruct_en_0-1-user.wav"},
        {"from": "gpt", "text": "Water that falls from clouds.", "unit": [1270, 43, 6560]}]}
"""
source = "instructs2s"
path = "downloads/instruct_en_200k_data_cosy2.json"
out_dir = "corpus/instructs2s"
shard = 1000
