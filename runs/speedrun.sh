#!/usr/bin/env bash
# LLaMA-Omni 2 at 0.5B on a rented machine with N GPUs: downloads -> corpus -> three stages -> spoken replies.
#
#     bash runs/speedrun.sh                    all of it
#     LIMIT=2000 bash runs/speedrun.sh         a rehearsal on the first 2,000 dialogues, before you pay for the rest
#
# Expect, by arithmetic and NOT measured (200K dialogues of 2.1 turns, 7.5 s a question, 19 s a reply, clips at their own length):
#     stage 1       2.0 TFLOP a dialogue (encoder 1.0, LLM 1.0)       x 200K x 3 epochs   1.2e18 FLOP    13 GB + activations
#     stage 1 TTS   3.3 TFLOP (1,090 positions of a 0.5B)             x 200K x 5 epochs   3.3e18          13 GB
#     stage 2       4.6 TFLOP (encoder, LLM forward, speech LM)       x 200K x 1 epoch    0.9e18          13 GB
# Together 5.4e18 FLOP: 5 hours of one H100 that reaches 300 TFLOP/s (30 % of its peak), so 40 minutes on eight, some 13 dollars
# at 2.50 an hour and GPU. The 345 GB of recordings take longer: an hour at 100 MB/s, and as long again to unpack; keep 800 GB of
# disk. Memory: 16 bytes for a trained parameter and 4 for a frozen one (python bench.py --what sizes); activations come on top.
# If the GPUs wait for data (nvidia-smi shows them idle), raise --workers: each clip is decoded on the CPU in every epoch.
#
# Licences: Qwen2.5-0.5B Apache-2.0, Whisper MIT, CosyVoice 2 Apache-2.0; the corpus, and so what you train on it, CC BY-NC 4.0:
# not for commercial use.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
GPUS=${GPUS:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}
LIMIT=${LIMIT:-0}
launch() { accelerate launch --num_processes "$GPUS" --mixed_precision no --dynamo_backend no "$@"; }

# 1. Downloads. Qwen2.5 and Whisper come by themselves when training starts.
hf download ICTNLP/cosy2_decoder --local-dir downloads/cosy2_decoder
hf download ICTNLP/InstructS2S-200K --repo-type dataset --local-dir downloads
[ -e downloads/unpacked ] || { cat downloads/en_part_* | tar xz -C downloads && touch downloads/unpacked; }

# 2. The corpus, with the speech. (Stage 1 TTS would need the JSON alone.)
python data.py config/data_instructs2s.py --audio_root downloads --limit "$LIMIT"

# 3. Three stages. A stage that was stopped goes on where it was; one that is complete says so.
for stage in stage1 stage1_tts stage2; do
    launch train.py config/$stage.py
done

# 4. Spoken replies to held-out questions.
for i in 0 1 2; do
    python sample.py --ckpt out/stage2 --corpus corpus/instructs2s --codec downloads/cosy2_decoder --index $i --out out/reply$i.wav
done
