"""
Stage 2 of the middle rung: speech -> speech. Gate fusion and the speech LM learn from the LLM's states.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.
"""
