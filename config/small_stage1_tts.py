"""
Stage 1 TTS of the middle rung: text -> speech units. Qwen2.5-0.5B becomes the speech LM.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.
"""
stage = "stage1_tts"
corpus = "corpus/small"
init_from = "out/small_stage1"
out_dir = "out/small_stage1_tts"
batch_size = 16
micro_tokens = 4096
recompute = True
epochs = 12
lr = 3e-4
eval_every = 400
save_every = 400
