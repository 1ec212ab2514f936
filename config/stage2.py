"""
Stage 2 of the paper: speech -> speech, over the whole dialogues, once.
"""
stage = "stage2"
corpus = "corpus/instructs2s"
init_from = "out/stage1_tts"
out_dir = "out/stage2"
batch_size = 32
epochs = 1
lr = 1e-3
eval_every = 500
save_every = 500
workers = 4
