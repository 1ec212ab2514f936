#!/usr/bin/env bash
# The middle rung: a chatbot that hears people, in an evening on one card of 16 GB. `bash runs/small.sh`.
# Between the embedded world, which knows 280 words, and the released corpus, which takes 690 GB of disk:
# real Whisper, a real Qwen2.5-0.5B, and 5,000 real questions, spoken by espeak-ng.
#
#     bash runs/small.sh                 downloads -> texts -> corpus -> three stages -> a spoken reply
#     bash runs/small.sh --texts IN OUT  only choose the texts: dolly's JSONL -> JSONL
#
# NOBODY HAS TRAINED IT YET. What it takes is arithmetic (python bench.py --what sizes): 13.1 GB of GPU
# memory, 67 GB of disk for checkpoints, and 40 minutes on a card that reaches 30 % of 70 TFLOP/s in bf16.
# Steps this small reach less, hence the evening. A Mac needs 24 GB or more; we had none. We do not know how
# well it will answer or speak, nor whether 5,000 questions are enough for the adapter: the paper took 200,000
# dialogues. What did run is a few steps on random weights, see config/small_stage1.py.
#
# Downloads: Whisper small.en (0.5 GB, MIT), Qwen2.5-0.5B and -Instruct (1 GB each, Apache-2.0), CosyVoice 2's
# codec (1 GB, Apache-2.0) with a clip of the authors' for a voice, and databricks-dolly-15k (13 MB, CC BY-SA
# 3.0, also for commercial use), questions and answers that people wrote. Left out, counted and printed:
# questions about a given text, answers of more than 30 words, which are long to listen to, and questions of
# more than 25. That leaves about a third: 30 of 93 that we read.
set -euo pipefail

choose() {
    "${PYTHON:-python}" - "$1" "$2" <<'PY'
import collections, json, os, sys
kept, left_out = [], collections.Counter()
for i, line in enumerate(open(sys.argv[1], encoding="utf-8")):
    row = json.loads(line)
    question, answer = (" ".join(row[key].split()) for key in ("instruction", "response"))
    if row["context"].strip():
        left_out["about a given text"] += 1
    elif len(answer.split()) > 30:
        left_out["an answer of more than 30 words"] += 1
    elif len(question.split()) > 25:
        left_out["a question of more than 25 words"] += 1
    else:
        kept.append(json.dumps({"id": f"dolly-{i}", "users": [question], "replies": [answer]}) + "\n")
with open(sys.argv[2] + ".part", "w", encoding="utf-8") as file:
    file.writelines(kept)
os.replace(sys.argv[2] + ".part", sys.argv[2])
print(f"{len(kept)} questions chosen; left out:")
for why, n in left_out.items():
    print(f"    {n} {why}")
PY
}

if [ "${1:-}" = --texts ]; then
    choose "$2" "$3"
    exit
fi
cd "$(dirname "$0")/.."
source runs/setup.sh
hf download databricks/databricks-dolly-15k databricks-dolly-15k.jsonl --repo-type dataset \
    --local-dir downloads
hf download ICTNLP/cosy2_decoder --local-dir downloads/cosy2_decoder
[ -e downloads/prompt_en.wav ] || curl -fL -o downloads/prompt_en.wav \
    https://github.com/ictnlp/LLaMA-Omni2/raw/HEAD/llama_omni2/inference/prompt_en.wav
choose downloads/databricks-dolly-15k.jsonl downloads/dolly_short.jsonl
python data.py config/data_small.py
for stage in stage1 stage1_tts stage2; do
    accelerate launch train.py "config/small_$stage.py"
done
python sample.py --ckpt out/small_stage2 --corpus corpus/small --codec downloads/cosy2_decoder \
    --voice downloads/prompt_en.wav --out out/small_reply.wav
