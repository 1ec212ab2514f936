"""
Stage 2 with the paper's hyper-parameters: speech -> speech, one pass over the whole dialogues.

Cost: not run here. By arithmetic 0.9e18 FLOP for 200K dialogues, and 12.6 GB plus activations at 0.5B.
"""
stage = "stage2"
corpus = "corpus/instructs2s_heard"     # with recordings, see config/data_instructs2s.py
init_from = "out/stage1_tts"
out_dir = "out/stage2"
batch_size = 32
epochs = 1
lr = 1e-3
eval_every = 500
save_every = 500
workers = 4
