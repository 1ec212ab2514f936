#!/usr/bin/env bash
# A chatbot that speaks German, in another voice: `bash runs/second_language.sh`, after `source runs/setup.sh`
# or runs/demo.sh. It shows what a second language needs: texts, a synthesizer that asks and answers, and, at
# this size, all three backbones again, since the shipped ones know only English. They take more than half of
# the time; at real size, where Whisper and Qwen2.5 are multilingual, they are downloads.
#
# The cost and the figures it reached are in reference/your_data.md. Interrupted? Run the same command again:
# finished steps are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=2                            # one per core; each of torchrun's has one thread
language=de                            # espeak-ng's name: it has a hundred. The texts must be in it
voice=de+f2:155:50                     # of the replies: language+variant:words/min:pitch
texts=corpus/german.jsonl              # your dialogues, as config/data_text.py describes them
held_out=0.04                          # share of them for validation, and as much for test
at=out/german                          # the new backbones
TIMEFORMAT="=== took %0R s, %0U s of one core"
step() {                               # step "what and why" command...
    printf '\n=== %s\n    $ %s\n' "$1" "${*:2}"
    time "${@:2}"
}
train() { torchrun --nproc_per_node $processes train.py "$@" --corpus corpus/german; }
backbones="--texts $texts --held_out $held_out --accents $language --assistant $voice --out_dir $at"
backbones="$backbones --init_from tiny --whisper_people 0"

step "texts: 5,240 questions and answers of 200 words" \
    python -m tiny.german --path $texts
step "a text model and its tokenizer: the English one splits German words into pieces" \
    torchrun --nproc_per_node $processes tiny/backbones.py $backbones --parts qwen2 \
    --qwen2_dialogues 20000 --qwen2_steps 1500
step "a codec of the new voice and of German phonemes, from the English one" \
    python tiny/backbones.py $backbones --parts codec --codec_sentences 3000 --codec_steps 1000
step "a recognizer of German, from the English one; it is also what judges the replies below" \
    torchrun --nproc_per_node $processes tiny/backbones.py $backbones --parts whisper \
    --whisper_clips 4000 --whisper_steps 600
step "the corpus: questions in the language's voices, replies as units of the new codec" \
    python data.py config/data_text.py --path $texts --voices $language --assistant $voice \
    --codec $at/codec.pt --held_out $held_out --out_dir corpus/german
step "stage 1" \
    train config/tiny_stage1.py --llm $at/qwen2 --speech_lm $at/qwen2 --whisper $at/whisper.pt \
    --epochs 4 --out_dir out/german_stage1
step "stage 1 TTS" \
    train config/tiny_stage1_tts.py --init_from out/german_stage1 --codec $at/codec.pt \
    --epochs 6 --out_dir out/german_stage1_tts
step "stage 2" \
    train config/tiny_stage2.py --init_from out/german_stage1_tts --codec $at/codec.pt \
    --epochs 0.8 --out_dir out/german_stage2
step "evaluation: held-out questions in held-out voices" \
    python eval.py --ckpt out/german_stage2 --corpus corpus/german --codec $at/codec.pt \
    --llm $at/qwen2 --recognizer nano:$at
