"""
Stage 1 of the middle rung: speech -> text. Whisper small.en hears, Qwen2.5-0.5B learns with LoRA to answer;
the adapter begins from nothing. `bash runs/small.sh` runs all of it.

Nobody has trained it yet, so lr and epochs are guesses. Cost: by arithmetic in reference/real_sizes.md.

What ran: three steps of 4 dialogues of all three stages one after the other, with random weights of these
shapes and units of the nano codec, on two CPU cores. Loss 12.1 -> 11.7, 12.1 -> 11.5 and 10.5 -> 11.1; each
wrote its final/. Host memory peaked at 11.3, 15.5 and 15.5 GB. The script is not kept.
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
