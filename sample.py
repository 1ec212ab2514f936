"""
Ask a spoken question, hear the spoken answer.

Why: this is what the training was for, and the quickest way to notice that something is wrong with it.

How: python sample.py --ckpt out/tiny_stage2                       answers a held-out question of the corpus
     python sample.py --ckpt ... --wav q1.wav,q2.wav               answers your own; a file is a turn
     python sample.py --ckpt ... --text                            only the text of the answer
The text is printed as it comes. Units leave the speech LM in bursts, the codec turns each burst into sound
while the next one is written, and the whole reply is saved as --out.
"""
import os
import time
from dataclasses import dataclass

import accelerate
import numpy as np
import soundfile
import torch

from data import chat_ids, clips
from omni import checkpoint
from omni.audio import log_mel, read_audio
from omni.codec import load_codec, stream
from omni.configure import configure, fail
from omni.corpus import load_corpus
from omni.engine import Engine, quicken
from omni.trace import trace


@dataclass(frozen=True)
class SampleConfig:
    ckpt: str = "out/tiny_stage2"      # a run's folder, a checkpoint, or hf:owner/name on the hub
    wav: tuple[str, ...] = ()          # spoken questions, one turn each; none: a dialogue of the corpus
    corpus: str = "corpus/tiny"        # where a question comes from when there is no --wav
    index: int = 0                     # which dialogue of the test split
    out: str = "reply.wav"             # the spoken reply; with several turns reply-1.wav, reply-2.wav, ...
    text: bool = False                 # text only, no speech
    play: bool = False                 # play it as it is made (needs the package sounddevice)
    codec: str = "tiny/codec.pt"       # units -> waveform: a file, or a folder like ICTNLP/cosy2_decoder
    voice: str | None = None           # CosyVoice 2: a clip, a .npy or .pt vector, or a name in spk2info.pt
    max_tokens: int = 128              # longest text
    max_units: int = 1024              # longest speech, in units of 40 ms
    temperature: float = 0.3           # of the units; 0 takes the likeliest. The paper samples at 1.0
    top_p: float = 1.0                 # draw units from the likeliest that together have this probability
    repeats: float = 0.0               # redraw units that fill this share of the last 10 (VALL-E 2); 0: never
    trace: bool = False                # print what passes through each part, and how long it takes
    seed: int = 1337                   # of the sampling

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.repeats <= 1:
            raise ValueError("temperature must be 0 or more, top_p above 0 and up to 1, repeats from 0 to 1")
        if self.max_tokens < 1 or self.max_units < 1:
            raise ValueError("max_tokens and max_units must be at least 1")
        if os.path.splitext(self.out)[1][1:].upper() not in soundfile.available_formats():
            raise ValueError(f"out is {self.out!r}; it must end in .wav, .flac, .ogg or the like")


def answer(engine, tokenizer, codec, mels, replies, temperature, on_text, on_audio):
    """One turn, streaming.

    mels     log-mels of all the user's turns so far;  replies: the texts of the assistant's turns so far
    codec    None: text only;  temperature: of the units
    Returns  (text, wav (samples,), notes, seconds until the first text, the first audio and the end)
    """
    start, first = time.time(), {}
    tokens, notes, shown, pieces = [], [], "", []
    events = engine.generate(chat_ids(tokenizer, replies), mels, speak=codec is not None,
                             temperature=temperature)

    def bursts():
        nonlocal shown
        for kind, x in events:
            if kind == "text":
                first.setdefault("text", time.time() - start)
                tokens.append(x)
                whole = tokenizer.decode(tokens)
                if not whole.endswith("\ufffd"):      # else a letter's other bytes come with the next token
                    on_text(whole[len(shown):])
                    shown = whole
            elif kind == "units":
                yield x
            else:
                notes.append(x)

    for piece in stream(codec, bursts()) if codec else bursts():
        first.setdefault("audio", time.time() - start)
        pieces.append(piece.cpu().numpy())
        on_audio(pieces[-1])
    text = tokenizer.decode(tokens)
    on_text(text[len(shown):])
    wav = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return text, wav, notes, (first.get("text"), first.get("audio"), time.time() - start)


def open_player(rate):
    """A sound device that plays at `rate` Hz; fail() if there is none."""
    try:
        import sounddevice
        player = sounddevice.OutputStream(samplerate=rate, channels=1, dtype="float32")
        player.start()
    except (ImportError, OSError) as e:               # OSError: no PortAudio;  its own errors come from start
        fail(f"--play: no sound device can be opened ({e}); `pip install sounddevice`, or leave out --play")
    except sounddevice.PortAudioError as e:
        fail(f"--play: no sound device can be opened ({e}); leave out --play and open the file")
    return player


def main():
    cfg = configure(SampleConfig)
    torch.manual_seed(cfg.seed)
    device = accelerate.PartialState().device
    if not os.access(os.path.dirname(cfg.out) or ".", os.W_OK):
        fail(f"--out {cfg.out}: there is no such folder, or it cannot be written")
    try:
        if cfg.wav:
            questions = [read_audio(path) for path in cfg.wav]
            asked = [os.path.basename(path) for path in cfg.wav]
        else:
            rows = load_corpus(cfg.corpus, "test", hear=True)
            if not 0 <= cfg.index < len(rows):
                fail(f"--index {cfg.index}: the test split has dialogues 0 to {len(rows) - 1}")
            row = rows[cfg.index]
            questions = clips(row)
            asked = [f"{text}   (voice {row['voice']})" for text in row["users"]]
        codec = None if cfg.text else load_codec(cfg.codec, cfg.voice).to(device)    # before a long download
        omni, tokenizer, _ = checkpoint.load(cfg.ckpt)
        mels = [log_mel(wav, omni.model.speech_encoder.n_mels, omni.pad_audio) for wav in questions]
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    engine = Engine(quicken(omni.eval(), device=device), max_tokens=cfg.max_tokens, max_units=cfg.max_units,
                    top_p=cfg.top_p, repeats=cfg.repeats)
    show = trace(engine, codec) if cfg.trace else None
    player = open_player(codec.sample_rate) if cfg.play and codec else None
    replies = []
    for turn, question in enumerate(asked):
        print(f"\nuser       {question}\nassistant  ", end="", flush=True)
        text, wav, notes, (first_text, first_audio, total) = answer(
            engine, tokenizer, codec, mels[:turn + 1], replies, cfg.temperature,
            on_text=lambda piece: print(piece, end="", flush=True),
            on_audio=lambda piece: player.write(piece[:, None]) if player else None)
        print()
        replies.append(text)
        for note in notes:
            print(f"note: {note}")
        times = f"first text {1000 * first_text:.0f} ms" if first_text else "no text"
        if len(wav):
            path, seconds = cfg.out, len(wav) / codec.sample_rate
            if len(asked) > 1:
                stem, ending = os.path.splitext(cfg.out)
                path = f"{stem}-{turn + 1}{ending}"
            soundfile.write(path, np.clip(wav, -1, 1), codec.sample_rate)
            times += f", first audio {1000 * first_audio:.0f} ms, {seconds:.2f} s of speech in {total:.2f} s"
            times += f": real-time factor {total / seconds:.2f}\nsaved {path}"
        print(times)
        if show:
            show()
    if player:
        player.stop()                                 # waits until the last piece has been played
        player.close()


if __name__ == "__main__":
    main()
