"""
Stage 1 with the paper's hyper-parameters, at 0.5B: speech -> text. For another size, name its file after this
one: accelerate launch train.py config/stage1.py config/7b.py

Cost: not run here; by arithmetic in reference/real_sizes.md. The paper trained on four L40 (48 GB each) and
does not say for how long. A checkpoint is 6.1 GB and takes 15 to 20 s, and so does each validation that is
the best so far, since it saves one. Hence few of both: with 5,000 steps between, 4 in 18,750.
"""
stage = "stage1"
corpus = "corpus/instructs2s_heard"     # with recordings, see config/data_instructs2s.py
out_dir = "out/stage1"
llm = "hf:Qwen/Qwen2.5-0.5B-Instruct"
whisper = "large-v3"
speech_lm = "hf:Qwen/Qwen2.5-0.5B"
batch_size = 32
epochs = 3
lr = 5e-5
micro_tokens = 4096
eval_every = 5000
save_every = 5000
workers = 4
