"""
Stage 2 with the paper's hyper-parameters: speech -> speech, one pass over the whole dialogues.

Cost: not run here; by arithmetic in reference/real_sizes.md.
"""
stage = "stage2"
corpus = "corpus/instructs2s"
init_from = "out/stage1_tts"
out_dir = "out/stage2"
batch_size = 32
micro_tokens = 8192
epochs = 1
lr = 1e-3
eval_every = 500
save_every = 500
workers = 4
