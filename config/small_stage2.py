"""
Stage 2 of the middle rung: speech -> speech. Gate fusion and the speech LM learn from the LLM's states.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.
"""
stage = "stage2"
corpus = "corpus/small"
init_from = "out/small_stage1_tts"
out_dir = "out/small_stage2"
batch_size = 16
micro_tokens = 4096
recompute = True
epochs = 3
lr = 3e-4
eval_every = 200
save_every = 200
