"""
Stage 1 with the paper's hyper-parameters, at 0.5B: speech -> text. For another size, name its file after this
one: accelerate launch train.py config/stage1.py config/7b.py

Cost: not run here. By arithmetic 1.2e18 FLOP for 200K dialogues, and 12.7 GB plus activations;
runs/speedrun.sh shows how we count. The paper trained on four L40 (48 GB each) and does not say for how long.
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
eval_every = 500
save_every = 500
workers = 4
