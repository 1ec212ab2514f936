"""
Stage 1 TTS of the paper: text -> speech units. It does not use the LLM, so any size can share its result. With --init_from none
it comes first, from the three backbones below, and stage 1 then starts from it.
"""
stage = "stage1_tts"
corpus = "corpus/instructs2s"
init_from = "out/stage1"
out_dir = "out/stage1_tts"
llm = "Qwen/Qwen2.5-0.5B-Instruct"
whisper = "large-v3"
speech_lm = "Qwen/Qwen2.5-0.5B"
batch_size = 32
epochs = 5
lr = 5e-4
eval_every = 500
save_every = 500
workers = 4
