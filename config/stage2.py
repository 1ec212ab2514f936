"""
Stage 2 with the paper's hyper-parameters: speech -> speech, one pass over the whole dialogues.

Cost: not run here; by arithmetic in reference/real_sizes.md. A checkpoint is 6.1 GB; 3 in 6,250 steps.
"""
stage = "stage2"
corpus = "corpus/instructs2s_heard"     # with recordings, see config/data_instructs2s.py
init_from = "out/stage1_tts"
out_dir = "out/stage2"
batch_size = 32
epochs = 1
lr = 1e-3
micro_tokens = 4096
eval_every = 2500
save_every = 2500
workers = 4
