"""
Stage 1 TTS of the middle rung: text -> speech units. Qwen2.5-0.5B becomes the speech LM.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.
"""
