"""
The middle rung's corpus: 5,000 questions and short answers that people wrote, one turn each, spoken by
espeak-ng. `bash runs/small.sh` downloads and chooses the texts; it says from where, under which license, and
what is left out. Nobody has built it whole.

Cost: not measured on its own. Speaking is as quick as config/data_text.py says, 1 GB of disk in all; how long
CosyVoice 2's tokenizer takes for seven hours of replies, on CPU or a GPU, we do not know.

The questions come in the 60 training voices of omni/espeak.py. Whisper has heard people, but the adapter
hears only espeak-ng: how well it carries over is not known. With --tts and --voices a better synthesizer asks
and answers (config/data_text.py shows piper).

The replies become CosyVoice 2's units, which it speaks in the voice of any clip. The nano codec
(--codec tiny/codec.pt) needs no download and has the voice of these replies, but it learned that voice from
the 280 words of the embedded world. On 20 sentences of ordinary English pocketsphinx errs in 31 % of the
words of espeak-ng itself and in 62 % after the codec; if it knows the sentences' words, in 35 and 54 %; if it
knows which follow which, in 3 and 10 % (the script is not kept). So the nano codec is good for trying the
way, not for speaking.
"""
source = "text"
path = "downloads/dolly_short.jsonl"
out_dir = "corpus/small"
shard = 100
codec = "downloads/cosy2_decoder"
held_out = 0.02
