"""
Stage 1 TTS with the paper's hyper-parameters: text -> speech units. It does not use the LLM, so every size
can share its result. With --init_from none it runs first, from the three backbones named below; stage 1 then
starts from it (config/stage1.py --init_from out/stage1_tts).

Cost: not run here; by arithmetic in reference/real_sizes.md. Whisper and the LLM are in memory, though
nobody asks them here: the model stays whole, and so does final/. A checkpoint is 6.0 GB; 7 in 31,250 steps.
"""
stage = "stage1_tts"
corpus = "corpus/instructs2s"           # texts and units are enough
init_from = "out/stage1"
out_dir = "out/stage1_tts"
llm = "hf:Qwen/Qwen2.5-0.5B-Instruct"
whisper = "large-v3"
speech_lm = "hf:Qwen/Qwen2.5-0.5B"
batch_size = 32
epochs = 5
lr = 5e-4
micro_tokens = 4096
eval_every = 5000
save_every = 5000
workers = 4
