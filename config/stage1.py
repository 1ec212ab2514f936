"""
Stage 1 of the paper: speech -> text, at 0.5B. Other sizes: --llm Qwen/Qwen2.5-7B-Instruct and so on.
The paper trained on four L40 (48 GB each); it does not say for how long. Not run here.
"""
stage = "stage1"
corpus = "corpus/instructs2s"
out_dir = "out/stage1"
llm = "Qwen/Qwen2.5-0.5B-Instruct"
whisper = "large-v3"
speech_lm = "Qwen/Qwen2.5-0.5B"
batch_size = 32
epochs = 3
lr = 5e-5
eval_every = 500
save_every = 500
workers = 4
