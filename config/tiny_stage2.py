"""
Stage 2 in the embedded world: speech -> speech. Gate fusion and the speech LM learn to speak from the LLM's
hidden states too.

At commit 883fb35, 2 cores of an AMD EPYC (Zen 5), two processes: 232 s, loss 0.23 -> 0.21, validation loss
0.22, 95 % of the validation units guessed right.
"""
stage = "stage2"
init_from = "out/tiny_stage1_tts"
out_dir = "out/tiny_stage2"
batch_size = 16
micro_tokens = 16384
epochs = 0.5
lr = 1e-3
muon = True
codec = "tiny/codec.pt"
eval_every = 300
save_every = 300
