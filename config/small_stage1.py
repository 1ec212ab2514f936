"""
Stage 1 of the middle rung: speech -> text. Whisper small.en hears, Qwen2.5-0.5B learns with LoRA to answer;
the adapter begins from nothing. `bash runs/small.sh` runs all of it.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.

What ran: three steps of 4 dialogues of stage 1 and of stage 1 TTS, on random weights of these shapes, except
that the speech LM had 6 of its 24 layers (memory), and units of the nano codec; two busy CPU cores. Loss 12.1
-> 11.7 and 12.2 -> 11.5. Stage 1 peaked at 11.2 GB of host memory (/usr/bin/time, with a second copy of the
model for final/). Stage 1 TTS saved its checkpoint and had reached 10.1 GB when it was killed (signal 9),
before final/, on a machine that others shared. Stage 2 was not run. The script is not kept.
"""
stage = "stage1"
corpus = "corpus/small"
out_dir = "out/small_stage1"
llm = "hf:Qwen/Qwen2.5-0.5B-Instruct"
whisper = "small.en"
speech_lm = "hf:Qwen/Qwen2.5-0.5B"
lora_rank = 16
batch_size = 16
micro_tokens = 4096
recompute = True
epochs = 6
lr = 2e-4
eval_every = 200
save_every = 200
