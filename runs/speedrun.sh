#!/usr/bin/env bash
# LLaMA-Omni 2 at 0.5B on a rented machine with N GPUs: downloads -> corpus -> three stages -> spoken replies.
#
#     bash runs/speedrun.sh                    all of it
#     LIMIT=2000 bash runs/speedrun.sh         a rehearsal on 2,000 dialogues: same downloads, other folders
#
# Expect, by arithmetic and NOT measured (200K dialogues of 2.1 turns, 7.5 s a question, 19 s a reply, clips
# at their own length; python bench.py --what sizes, which has the other sizes, memory and disk, too):
#     stage 1       1.8 TFLOP a dialogue (encoder 1.1, the rest 0.7)   x 200K x 3 epochs   1.1e+18 FLOP
#     stage 1 TTS   3.3 TFLOP (1,090 positions of a 0.5B)              x 200K x 5 epochs   3.3e+18 FLOP
#     stage 2       4.5 TFLOP (encoder, LLM forward, speech LM)        x 200K x 1 epoch    9.1e+17 FLOP
# Together 4.9 hours of one H100 that reaches 297 TFLOP/s (30 % of its peak), so 37 minutes of eight at best,
# and 12 dollars at 2.50 per GPU hour.
# What comes on top:
#     checkpoints   4 + 7 + 3 in the three stages, 15 to 20 s each: 4 to 5 minutes, however many GPUs
#     starts        7 GB are read and written, the corpus is counted: some minutes a stage, not measured
#     validations   as many as checkpoints; batched, but not measured
#     small steps   the paper's 32 dialogues a step are 4 a GPU on eight (4,400 positions in stage 1 TTS,
#                   1,100 in stage 1), too few to reach 30 %. A larger batch helps, but is not the paper's
# So expect 5 1/4 hours on one GPU (13 dollars), and on eight an hour or more (20 dollars), not 37 minutes.
#
# Memory: 21.5 GB, of which 12.7 are weights and optimizer: a card of 24 GB is just enough.
#
# Disk: 850 GB. The recordings are 345 GB packed and as much unpacked. Each stage keeps up to three
# checkpoints of 6.1 GB (the newest two and the best), one more while it saves, and final/ with 6.6 GB;
# stage 1 also base/ with as much: 99 GB. Delete step-*/ and base/ of a stage once it has its final/.
# The recordings take longer than the training: an hour at 100 MB/s, and another to unpack. Eight idle GPUs
# would cost 40 dollars meanwhile, so download on a machine without GPUs, onto a disk that you can move.
# If the GPUs wait for data (nvidia-smi shows them idle), raise --workers: the CPU decodes every clip in each
# epoch. Workers hand batches over in /dev/shm; in Docker say --shm-size 1g.
#
# Licenses: Qwen2.5-0.5B Apache-2.0, Whisper MIT, CosyVoice 2 Apache-2.0. The corpus is CC BY-NC 4.0, so
# neither it nor what you train on it is for commercial use.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
GPUS=${GPUS:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}
LIMIT=${LIMIT:-0} CORPUS=corpus/instructs2s OUT=out
[ "$LIMIT" = 0 ] || CORPUS=corpus/rehearsal-$LIMIT OUT=out/rehearsal-$LIMIT
launch() { accelerate launch --num_processes "$GPUS" --mixed_precision no --dynamo_backend no "$@"; }

# 1. Downloads: decoder, the authors' voice, corpus. Training downloads Whisper and Qwen2.5 when it starts.
hf download ICTNLP/cosy2_decoder --local-dir downloads/cosy2_decoder
[ -e downloads/prompt_en.wav ] || curl -fL -o downloads/prompt_en.wav \
    https://github.com/ictnlp/LLaMA-Omni2/raw/HEAD/llama_omni2/inference/prompt_en.wav
hf download ICTNLP/InstructS2S-200K --repo-type dataset --local-dir downloads
[ -e downloads/unpacked ] || { cat downloads/en_part_* | tar xz -C downloads && touch downloads/unpacked; }

# 2. The corpus, with the speech. (Stage 1 TTS would need only the JSON.)
python data.py config/data_instructs2s.py --audio_root downloads --limit "$LIMIT" --out_dir "$CORPUS"

# 3. Three stages. An interrupted stage resumes; a finished one says so.
launch train.py config/stage1.py --corpus "$CORPUS" --out_dir "$OUT/stage1"
launch train.py config/stage1_tts.py --corpus "$CORPUS" --init_from "$OUT/stage1" --out_dir "$OUT/stage1_tts"
launch train.py config/stage2.py --corpus "$CORPUS" --init_from "$OUT/stage1_tts" --out_dir "$OUT/stage2"

# 4. Spoken replies to held-out questions.
for i in 0 1 2; do
    python sample.py --ckpt "$OUT/stage2" --corpus "$CORPUS" --codec downloads/cosy2_decoder \
        --voice downloads/prompt_en.wav --index $i --out "$OUT/reply$i.wav"
done
