#!/usr/bin/env bash
# From a blank machine to a chatbot that talks back: `bash runs/demo.sh`. It starts from the backbones in
# tiny/, as the real sizes start from downloads. `bash runs/demo.sh --from-scratch` trains those backbones
# here as well; that takes two hours more, and tiny/voices.py says which synthesizers it needs.
#
# It needs Linux, Python 3.11, two CPU cores, 8 GB of memory and 8 GB of disk; no GPU, no root, no model hub.
# Each step says why it is there and how long it took. Interrupted? Run the same command again: finished steps
# are skipped.
set -euo pipefail
started=$SECONDS
machine="$(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
times=()
step() {                               # step "name" "why" command...
    local name=$1 why=$2 start=$SECONDS
    shift 2
    printf '\n=== %s\n    %s\n    $ %s\n' "$name" "$why" "$*"
    "$@"
    times+=("$(printf '%-34s %5d s' "$name" $((SECONDS - start)))")
    printf '=== %s: %d s on %s\n' "$name" $((SECONDS - start)) "$machine"
}
setup() { source runs/setup.sh; }
# A process per GPU; without one, a process per core, up to four: two processes are faster than two threads.
train() {
    local processes
    processes=$(python -c "import os, torch; print(torch.cuda.device_count() or min(4, os.cpu_count()))")
    torchrun --nproc_per_node "$processes" train.py "$1"
}

cd "$(dirname "$0")/.."
step "environment" "A virtual environment with the packages of requirements.txt." setup
if [ "${1:-}" = --from-scratch ]; then
    # The shipped backbones are deleted once; a second call resumes. `git checkout tiny` restores them.
    python -m tiny.voices                             # stops if a synthesizer is missing
    [ -e tiny/grown ] || rm -rf tiny/whisper.pt tiny/codec.pt tiny/qwen2 tiny/backbones.log
    touch tiny/grown
    step "backbones" "A language model, a codec and a recognizer to start from; at real size, downloads." \
        python tiny/backbones.py
fi
step "corpus" "What the stages learn from: dialogues spoken in many voices, and replies as units." \
    python data.py
step "stage 1: speech -> text" "The LLM learns to answer what the frozen Whisper hears." \
    train config/tiny_stage1.py
step "stage 1 TTS: text -> speech" "The speech LM learns to write speech units from text only." \
    train config/tiny_stage1_tts.py
step "stage 2: speech -> speech" "The speech LM learns to speak from the LLM's hidden states too." \
    train config/tiny_stage2.py
step "evaluation" "Held-out questions in held-out voices, judged by an independent recognizer." \
    python eval.py --ckpt out/tiny_stage2 --runs out/tiny_stage1,out/tiny_stage1_tts,out/tiny_stage2
step "a conversation" "One held-out dialogue, streaming, as you would use it." \
    python sample.py --ckpt out/tiny_stage2 --index 5 --out out/reply.wav

printf '\n%s\n' "Time on $machine"
printf '  %s\n' "${times[@]}" "$(printf '%-34s %5d s' "total" $((SECONDS - started)))"
printf '\n%s\n' \
    "Every reply, to listen to: out/tiny_stage2_eval/report.html   picture: out/tiny_stage2_eval/demo.png" \
    "Another question: source .venv/bin/activate && python sample.py --ckpt out/tiny_stage2 --index 7"
