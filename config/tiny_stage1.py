"""
Stage 1, embedded world: speech -> text. The adapter and the whole LLM learn to answer what the frozen Whisper hears.
"""
stage = "stage1"
out_dir = "out/tiny_stage1"
batch_size = 32
micro_batch = 32
epochs = 3
lr = 1e-3
eval_every = 200
save_every = 200
