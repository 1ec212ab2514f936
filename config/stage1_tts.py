"""
Stage 1 TTS of the paper: text -> speech units. It does not use the LLM, so any size can share its result.
"""
stage = "stage1_tts"
corpus = "corpus/instructs2s"
init_from = "out/stage1"
out_dir = "out/stage1_tts"
batch_size = 32
epochs = 5
lr = 5e-4
eval_every = 500
save_every = 500
workers = 4
