"""
Stage 2, embedded world: speech -> speech. Gate fusion and the speech LM learn to speak from the LLM's states too.
"""
stage = "stage2"
init_from = "out/tiny_stage1_tts"
out_dir = "out/tiny_stage2"
batch_size = 32
micro_batch = 32
epochs = 0.8
lr = 1e-3
eval_every = 200
save_every = 200
