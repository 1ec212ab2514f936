"""
Stage 1 in the embedded world: speech -> text. The adapter and the whole LLM learn to answer what the frozen
Whisper hears.

At commit 500b012, in an easier world: 649 s on 2 cores of an AMD EPYC (Zen 5), loss 3.8 -> 0.005,
validation loss 0.03, 95 % of the validation replies exactly right.
"""
stage = "stage1"
out_dir = "out/tiny_stage1"
batch_size = 32
micro_tokens = 16384
epochs = 2
lr = 4e-3
muon = True
eval_every = 200
save_every = 200
