"""
Stage 1 of the middle rung: speech -> text. Whisper small.en hears, Qwen2.5-0.5B learns with LoRA to answer;
the adapter begins from nothing. `bash runs/small.sh` runs all of it.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.
"""
