"""
Train the three backbones of the embedded world; at real size these are downloads.

Why: LLaMA-Omni 2 starts from a recognizer (Whisper), a language model (Qwen2.5) and a speech codec
(CosyVoice 2) that others trained. Where nothing can be downloaded we train small ones, in the same file
formats, so that train.py and sample.py cannot tell the difference:

    tiny/whisper.pt   openai-whisper's own classes and format: `whisper.load_model("tiny/whisper.pt")`
    tiny/qwen2/       transformers' Qwen2ForCausalLM and its tokenizer: `from_pretrained("tiny/qwen2")`
    tiny/codec.pt     tiny/codec.py's NanoCodec

and a part that is no network: clips of voices made from recordings of people, for the corpus to hear where
their synthesizers are not installed:

    tiny/people.parquet

The repository ships them, and tiny/backbones.log is the log of the run that made them.

How: `python tiny/backbones.py` synthesizes speech of the train split (tiny/world.py), trains each backbone
for a fixed number of steps, prints its figure of merit on held-out sentences and voices, and writes it. It
skips what is there already. Muon updates the matrices of the blocks and AdamW everything else: that learned
faster than AdamW alone.

Whisper also hears voices that were made from recordings of people (tiny/voices.py); their synthesizers have
to be installed, and it says which are missing. On CPU two processes with a thread each train almost twice as
fast as one with two threads: `torchrun --nproc_per_node 2 tiny/backbones.py --parts whisper`.

In another language: `--texts dialogues.jsonl --accents de --assistant de+f2:150:50 --init_from tiny` trains
them for dialogues of your own, which runs/second_language.sh does.
"""
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass

import librosa
import numpy as np
import pyarrow.parquet
import soundfile
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import whisper
from tokenizers import pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import IGNORE, SpeechEncoder
from omni.audio import DOWNSAMPLE, MEL_RATE, SAMPLE_RATE, read_audio
from omni.augment import CONDITIONS, augment
from omni.checkpoint import load_whisper
from omni.configure import configure, fail
from omni.corpus import SPLITS, LeftOut, from_json, parse_turns, split_by_name
from omni.espeak import ACCENTS, ASSISTANT, UNSEEN_ACCENT, draw_voice, plain, speak
from omni.files import replace_folder
from omni.judges import by_sphinx, language_model
from omni.packing import round_up
from omni.score import word_error_rate
from tiny import voices
from tiny.codec import FSQ, NanoCodec
from tiny.unclear import draw_unclear, voice_of
from tiny.world import SHARED, dialogue, dialogues, split_of


@dataclass(frozen=True)
class BackbonesConfig:
    out_dir: str = "tiny"          # where the three backbones go
    parts: tuple[str, ...] = ("qwen2", "codec", "whisper", "people")   # which to make, or one of
                                   # hearing (measure Whisper), voice (the codec's decoder, on --recordings)
    recordings: str | None = None  # voice: JSONL of one speaker's recordings and their texts
    qwen2_dialogues: int = 100000  # how many dialogues Qwen2 reads
    qwen2_steps: int = 4000        # steps of 64 dialogues
    codec_sentences: int = 5000    # how many different sentences the codec hears, in the assistant's voice
    codec_steps: int = 2000        # steps of 32 crops of 2 s
    whisper_clips: int = 20000     # how many utterances Whisper hears, each in three rooms
    whisper_steps: int = 3000      # steps of 64 clips
    whisper_people: float = 0.6    # share of the voices made from recordings of people; 0 needs none of them
    people: tuple[str, ...] = ("flite/awb",)   # other voices that Whisper is measured on, see tiny/voices.py
    people_clips: int = 1500       # how many clips of people's voices to ship
    figures: int = 400             # held-out items that each figure of merit is measured on
    texts: str | None = None       # dialogues as in config/data_text.py, instead of those of tiny/world.py
    held_out: float = 0.005        # texts: as data.py was told
    accents: tuple[str, ...] = tuple(ACCENTS)          # of espeak-ng's voices that ask: another language
    assistant: str = ASSISTANT     # the voice that the codec speaks in
    init_from: str | None = None   # a folder whose codec and Whisper to start from; their heads are new
    seed: int = 1337               # of the sentences, the voices and the initial weights


# ------------------------------------------------------------------------------------------------- training

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))       # of torchrun


def log(cfg, text):
    """Print a line, and append it to backbones.log; the first process alone."""
    if RANK:
        return
    tqdm.write(text)
    with open(f"{cfg.out_dir}/backbones.log", "a") as file:
        file.write(text + "\n")


def optimizers(model, lr):
    """Muon for the matrices inside blocks, AdamW at a tenth of its rate for everything else."""
    inside, rest = [], []
    for name, p in model.named_parameters():
        if p.ndim == 2 and ("blocks" in name or "layers" in name or ".mlp" in name):
            inside.append(p)
        else:
            rest.append(p)
    return [torch.optim.Muon(inside, lr=lr, weight_decay=0.01, adjust_lr_fn="original"),
            torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.01)]


def fit(cfg, name, model, loss_of_batch, steps, lr=0.02):
    """Train for `steps` steps. loss_of_batch() draws a batch and returns {name: loss}, to be summed. With
    several processes each draws its own, and the gradients are averaged."""
    opts = optimizers(model, lr)
    model.train()
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=1, dynamic_ncols=True, disable=RANK > 0)
    for step in bar:
        # warm-up over 50 steps, flat, then linear to zero over the second half
        scale = min(1, (step + 1) / 50) * min(1, (steps - step) / (0.5 * steps))
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of_batch()
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            fail(f"{name}: the loss is {loss.item()} at step {step}; try another --seed")
        loss.backward()
        if PROCESSES > 1:
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            dist.all_reduce(gradients)
            sizes = [p.numel() for p in model.parameters()]
            for p, gradient in zip(model.parameters(), gradients.split(sizes)):
                p.grad.copy_(gradient.view_as(p) / PROCESSES)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, base in zip(opts, (lr, lr / 10)):
            opt.param_groups[0]["lr"] = base * scale
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            values = [f"{key} {value.item():.3f}" for key, value in losses.items()]
            log(cfg, f"{name} step {step}/{steps} | {' | '.join(values)}")
    return model.eval()


def side_by_side(rows, padding_value=0):
    """Rows (L, ...) of several lengths -> (B, longest L rounded up to 16, ...): few shapes, see
    omni/packing.py."""
    L = round_up(max(len(row) for row in rows), 16)
    first = torch.cat([rows[0], rows[0].new_full((L - len(rows[0]), *rows[0].shape[1:]), padding_value)])
    return pad_sequence([first, *rows[1:]], True, padding_value=padding_value)


def bucketed(rng, lengths, size):
    """Endless batches of indices, each of items of similar length, so that little of a batch is padding."""
    while True:
        rows = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
        batches = [rows[i:i + size] for i in range(0, len(rows) - size + 1, size)]
        yield from rng.sample(batches, len(batches))


@functools.cache
def processes():
    """A pool of processes, this one's share of the cores. To start it takes seconds."""
    return multiprocessing.get_context("spawn").Pool(max(1, os.cpu_count() // PROCESSES))


def run_all(function, jobs):
    """[function(job) for job in jobs], on all cores."""
    results = processes().imap(function, jobs, chunksize=max(1, min(64, len(jobs) // 16)))
    return list(tqdm(results, total=len(jobs), desc="speaking", unit="utterance"))


def speak_job(job):
    """(text, voice) or (text, voice, True) -> what `speak` returns for it."""
    return speak(*job)


def source(cfg):
    """Where dialogues come from: a function draw(rng, split) -> [turn, ...], of tiny/world.py or --texts."""
    if cfg.texts is None:
        return dialogue
    found = {split: [] for split in SPLITS}
    try:
        with open(cfg.texts, encoding="utf-8") as file:
            for number, line in enumerate(filter(str.strip, file)):
                row = parse_turns(from_json(line), hear=False, table=False)
                turns = [{"user": user, "assistant": reply, "spoken": reply, "topic": "all"}
                         for user, reply in zip(row["users"], row["replies"])]
                found[split_by_name(str(row["id"] or number), cfg.held_out)].append(turns)
    except (OSError, ValueError) as e:
        fail(f"--texts {cfg.texts} cannot be read ({e})")
    except LeftOut as e:
        fail(f"--texts {cfg.texts}, line {number + 1}: {': '.join(e.args)}")
    for split, rows in found.items():
        if not rows:
            fail(f"--texts {cfg.texts} has no dialogues in the split {split}; raise --held_out")
    return lambda rng, split: rng.choice(found[split])


def replies(rng, split, count, draw=dialogue):
    """What the assistant says in `count` dialogues, with marks for how it is said."""
    return [turn["spoken"] for _ in range(count) for turn in draw(rng, split)]


# ---------------------------------------------------------------------------------------------------- codec

UNIT = NanoCodec.hop * NanoCodec.frames               # samples in a unit: 640
CROP = 50                                             # units that a training example has: 2 s


def pitch(wav, hop=NanoCodec.hop, low=65, high=300):
    """Pitch of a clean voice by normalized autocorrelation.

    wav (samples,) at 16 kHz -> f0 in Hz, and how sure it is, 0..1; both (frames,) at 100 Hz
    """
    size = 800                                        # 50 ms window
    hann = torch.hann_window(size)
    frames = F.pad(wav, (size // 2, size // 2)).unfold(0, size, hop)[:len(wav) // hop] * hann
    auto = torch.fft.irfft(torch.fft.rfft(frames, 2 * size).abs() ** 2)[:, :size]
    window = torch.fft.irfft(torch.fft.rfft(hann, 2 * size).abs() ** 2)[:size]
    auto = auto / (auto[:, :1] + 1e-4) / (window / window[0]).clamp(min=0.05)
    shortest, longest = SAMPLE_RATE // high, SAMPLE_RATE // low       # periods in samples
    lags = auto[:, shortest:longest]
    strength = lags.max(-1).values
    peak = (lags > lags[:, :1]) & (lags >= 0.92 * strength[:, None])  # the first peak, not its multiples
    peak[:, 1:-1] &= (lags[:, 1:-1] >= lags[:, :-2]) & (lags[:, 1:-1] >= lags[:, 2:])
    lag = torch.where(peak.any(-1), peak.float().argmax(-1), lags.argmax(-1)) + shortest
    return SAMPLE_RATE / lag, strength.clamp(0, 1)


def labelled_clip(wav, events, names):
    """A sentence, padded to 2 s -> wav (640 U,), and for each frame (4 U,): phoneme, pitch, its strength."""
    units = max(CROP, -(-len(wav) // UNIT))
    wav = torch.from_numpy(np.pad(wav, (0, units * UNIT - len(wav))))
    middle = torch.arange(len(wav) // NanoCodec.hop) / MEL_RATE + 0.005       # seconds, of each frame
    starts = torch.tensor([second for second, _ in events])
    phonemes = torch.tensor([names.index(phoneme) for _, phoneme in events])
    label = phonemes[(torch.searchsorted(starts, middle) - 1).clamp(0)]
    return wav, label, *pitch(wav)


def draw_crops(rng, clips):
    """32 crops of 2 s of random clips -> their columns, each (32, ...). A clip is a list of columns, its
    waveform first; the others have one value a frame, or one a unit."""
    crops = []
    for _ in range(32):
        clip = clips[rng.randrange(len(clips))]
        units = len(clip[0]) // UNIT
        start = rng.randint(0, units - CROP)
        rates = [len(column) // units for column in clip]             # values a unit
        crops.append([column[start * n:(start + CROP) * n] for column, n in zip(clip, rates)])
    return [torch.stack(column) for column in zip(*crops)]


def decoder_losses(codec, codes, wav, f0, strength):
    """How far the decoder is from the recordings. codes (B, U, 8), wav (B, 640 U); f0 and strength, as
    `pitch` has them, (B, 4 U)."""
    def log_power(power):
        return torch.log(power + 1e-5)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        target = codec.stft(wav).abs()
        pulse_in = codec.stft(codec.pulses(f0)).abs()
        noise_in = codec.window.square().sum().sqrt()
    f0_hat, pulse, noise = codec.render(codes)
    power = (pulse_in * pulse.exp()) ** 2 + (noise_in * noise.exp()) ** 2
    voiced = strength > 0.6
    bands = codec.curve.T                             # (257, bands)
    return {"spectrum": (log_power(power) - log_power(target ** 2)).abs().mean() * 0.5,
            "envelope": (log_power(power @ bands) - log_power(target ** 2 @ bands)).abs().mean(),
            "pitch": ((f0_hat.log() - f0.log()).abs() * voiced).sum() / voiced.sum().clamp(1) * 3}


def read_recordings(path):
    """The lines of a JSONL file {"speech": a path beside the file, "text": what is said} -> [(wav (samples,)
    at 16 kHz, text)]. fail() names what cannot be read."""
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in filter(str.strip, file):
                row = json.loads(line)
                wav = read_audio(os.path.join(os.path.dirname(path), row["speech"])).numpy()
                found.append((wav, row["text"]))
    except KeyError as e:
        fail(f"--recordings {path}: a line has no {e}")
    except (OSError, ValueError, TypeError) as e:
        fail(f"--recordings {path}: {e}; give a JSONL file of lines with speech and text")
    if not found:
        fail(f"--recordings {path} is empty")
    return found


def in_time(codec, assistant, wav):
    """The units of the assistant's speech, slowed and hurried as `wav` says the same. Both (samples,) at 16
    kHz -> (U,), U = samples of wav / 640. Dynamic time warping finds which of its frames is which of ours."""
    def cepstrum(wav):
        x = librosa.feature.mfcc(S=whisper.log_mel_spectrogram(wav, 80).numpy(), n_mfcc=13)
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    _, path = librosa.sequence.dtw(cepstrum(wav), cepstrum(assistant))
    theirs = np.zeros(len(wav) // NanoCodec.hop, int)
    theirs[path[:, 0]] = path[:, 1]                   # frame of ours -> frame of theirs
    units = codec.encode(assistant)
    return units[torch.from_numpy(theirs[2::4] // 4).clamp(max=len(units) - 1)]


def train_voice(cfg, rng):
    """The shipped codec with another voice: its decoder anew, on --recordings. Tokenizer and units stay as
    they are, and so does every speech LM that writes these units.

    The tokenizer knows one voice, and hears another one wrongly. So the units of a recording are those of the
    assistant who says the same, in the recording's time."""
    codec = NanoCodec.load(f"{cfg.init_from or 'tiny'}/codec.pt")
    for part in (codec.stem, codec.encoder, codec.fsq, codec.recognise):
        part.requires_grad_(False)
    recordings = read_recordings(cfg.recordings)
    clips = []
    for wav, text in recordings:
        wav = 0.13 * wav / max(1e-4, np.sqrt(np.mean(wav ** 2)))      # as loud as espeak-ng
        wav, _, *melody = labelled_clip(wav, [(0.0, None)], [None])
        units = in_time(codec, torch.from_numpy(speak(text, cfg.assistant)), wav)
        clips.append((wav, FSQ.to_codes(units), *melody))
    minutes = sum(len(wav) for wav, _ in recordings) / SAMPLE_RATE / 60
    log(cfg, f"voice: {len(clips)} recordings, {minutes:.1f} minutes")

    def loss():
        wav, codes, *melody = draw_crops(rng, clips)
        return decoder_losses(codec, codes, wav, *melody)

    fit(cfg, "voice", codec, loss, cfg.codec_steps)
    codec.save(f"{cfg.out_dir}/codec.pt")


def train_codec(cfg, rng):
    texts, draw = set(), source(cfg)
    for _ in range(100 * cfg.codec_sentences):        # a file may hold fewer sentences
        if len(texts) >= cfg.codec_sentences:
            break
        for turn in draw(rng, "train"):
            texts.add(turn["spoken"])
            if turn["topic"] != "unclear":
                texts.add(turn["user"])
    spoken = run_all(speak_job, [(text, cfg.assistant, True) for text in sorted(texts)])
    names = sorted({phoneme for _, events in spoken for _, phoneme in events})
    clips = [labelled_clip(wav, events, names) for wav, events in spoken]
    torch.manual_seed(cfg.seed)
    codec = NanoCodec(phonemes=names)
    if cfg.init_from:                                 # all but the layer that names the phonemes
        weights = NanoCodec.load(f"{cfg.init_from}/codec.pt").state_dict()
        kept = {name: x for name, x in weights.items() if not name.startswith("recognise.2")}
        codec.load_state_dict(codec.state_dict() | kept)

    def loss():
        wav, label, *melody = draw_crops(rng, clips)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            mel = codec.log_mel(wav)
        codes = codec.tokenize(mel)
        phoneme = codec.recognise(codes).unflatten(-1, (codec.frames, -1)).flatten(1, 2)
        # the decoder does not train the tokenizer: its units serve the recognizer only, see project.md
        return {"phoneme": F.cross_entropy(phoneme.float().transpose(1, 2), label),
                **decoder_losses(codec, codes.detach(), wav, *melody)}

    fit(cfg, "codec", codec, loss, cfg.codec_steps)
    codec.save(f"{cfg.out_dir}/codec.pt")
    if cfg.texts is None:                             # pocketsphinx judges it, and knows only English
        measure_codec(cfg, rng, codec)


def measure_codec(cfg, rng, codec):
    """Word error rates of an independent recognizer, on unseen replies and on what the codec returns."""
    spoken = replies(rng, "test", cfg.figures)[:cfg.figures]
    unseen = [plain(text) for text in spoken]
    original = run_all(speak_job, [(text, cfg.assistant) for text in spoken])
    decoded = [codec.decode(codec.encode(torch.from_numpy(wav))).numpy() for wav in original]
    for judge, bigram in (("bigram", True), ("word loop", False)):
        arpa = language_model([plain(text) for text in replies(rng, "train", 2000)], bigram)
        before = 100 * word_error_rate(unseen, list(by_sphinx(processes(), original, arpa)))
        after = 100 * word_error_rate(unseen, list(by_sphinx(processes(), decoded, arpa)))
        log(cfg, f"codec: {judge} judge, WER on unseen replies {after:.1f} %, on the original speech "
                 f"{before:.1f} %: excess {after - before:.1f}")


# -------------------------------------------------------------------------------------------------- whisper

def log_mel(wav):
    """wav (samples,) at 16 kHz -> log-mel, a float16 array (80, frames)."""
    return whisper.log_mel_spectrogram(torch.from_numpy(wav), 80).half().numpy()


def clean_job(job):
    """([(text, voice)], condition of omni/augment.py or None) -> [the log-mel of its speech]."""
    torch.set_num_threads(1)
    jobs, condition = job
    wavs = voices.say_all(jobs)
    if condition:
        wavs = [CONDITIONS[condition](wav, random.Random(text)) for wav, (text, _) in zip(wavs, jobs)]
    return [log_mel(wav) for wav in wavs]


def room_job(job):
    """([(text, voice)], seed) -> for each text three log-mels, of three rooms and microphones."""
    torch.set_num_threads(1)
    jobs, seed = job
    rng = random.Random(seed)
    return [[log_mel(augment(wav, rng)) for _ in range(3)] for wav in voices.say_all(jobs)]


def encode_clips(encoder, mels):
    """Log-mels, arrays (80, frames) -> the encoder's states at 50 Hz (B, longest, 128), zeros past a clip's
    end, and how many each clip has (B,)."""
    frames = [mel.shape[1] for mel in mels]
    counts = [(n + 1) // 2 for n in frames]
    end_to_end = torch.cat([torch.from_numpy(mel).float() for mel in mels], 1)
    states = encoder(end_to_end, frames)
    return side_by_side(states.split(counts)), torch.tensor(counts)


@torch.no_grad()
def whisper_transcribe(model, tokenizer, mels, limit=40):
    """Greedy decoding of a batch of log-mels -> texts of at most `limit` tokens."""
    end = tokenizer.eos_token_id
    audio, _ = encode_clips(model.encoder, mels)
    tokens = torch.full((len(mels), 1), end)
    for _ in range(limit):
        token = model.decoder(tokens, audio)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], 1)
        if (tokens[:, 1:] == end).any(1).all():
            break
    texts = [tokenizer.decode(row[1:].tolist() + [end]) for row in tokens]
    return [text.split(tokenizer.eos_token)[0] for text in texts]


def questions(rng, split, count, accents=ACCENTS, draw=dialogue):
    """[(text, voice)]: what users ask in this world, in voices of espeak-ng. Only sentences that belong to
    the split themselves: not those that every split shares, nor those that are held out for their reply."""
    shared = {topic.__name__ for topic in SHARED}
    asked = []
    while len(asked) < count:
        turns = [turn for turn in draw(rng, split) if turn["topic"] not in shared]
        asked += [turn["user"] for turn in turns if draw != dialogue or split_of(turn["user"]) == split]
    return [(text, draw_voice(rng, split, accents)) for text in asked[:count]]


def clips_to_hear(rng, count, people, accents=ACCENTS, draw=dialogue):
    """[(text, voice)] that Whisper learns from: questions, replies, words in any order, sounds, whose text is
    empty, and English of other worlds if this is English. people: share of the voices made from recordings of
    people."""
    turns = [turn for _ in range(6000) for turn in draw(rng, "train") if turn["topic"] != "unclear"]
    known = [word for turn in turns for word in turn["user"].strip(".?").replace(",", "").split()]
    jobs = []
    while len(jobs) < count:
        kind = rng.choices(["question", "reply", "words", "unclear"], [55, 8, 22, 15])[0]
        voice = None
        if kind == "question":
            turn = rng.choice(turns)
            text = turn["user"]
        elif kind == "reply":
            text = rng.choice(turns)["assistant"]
        elif kind == "words":
            text = " ".join(rng.sample(known, rng.randint(2, 7)))
        else:
            text = draw_unclear(rng, "train")
            voice = voice_of(rng, text, "train")
        if voice and voice.startswith("sound/"):
            text = ""
        elif voice or draw != dialogue and kind == "unclear":
            continue                                  # other languages have other letters
        if not voice and rng.random() < people:
            voice = voices.draw_voice(rng, "train")
        elif not voice:
            voice = draw_voice(rng, "train", accents)
        jobs.append((text, voice))
    return jobs


def letters_of(text):
    """A text as classes for CTC: 1 to 26 for the letters, without accents and dots, 27 for a space."""
    letters = []
    for c in unicodedata.normalize("NFKD", text.lower().replace("ß", "ss")):
        if c == " ":
            letters.append(27)
        elif "a" <= c <= "z":
            letters.append(1 + ord(c) - ord("a"))
    return letters


def ctc(logits, counts, targets, blank):
    """CTC's loss: logits (B, T, classes), of which counts (B,) are a clip's; targets: list of its labels."""
    log_p = logits.float().log_softmax(-1).transpose(0, 1)
    lengths = torch.tensor([len(x) for x in targets])
    return F.ctc_loss(log_p, torch.cat(targets), counts, lengths, blank, zero_infinity=True)


def hear_all(jobs, seed):
    """[(text, voice)] -> [(text, log-mel)], three for each job, on this process's share of the cores."""
    by_voice = sorted(jobs, key=lambda job: job[1].split(":")[0])    # festival says many at once
    chunks = [by_voice[i:i + 100] for i in range(0, len(by_voice), 100)]
    random.Random(seed).shuffle(chunks)
    seeded = [(chunk, f"{seed} {i}") for i, chunk in enumerate(chunks)]
    done = processes().imap(room_job, seeded)
    heard = list(tqdm(done, total=len(chunks), desc="speaking", unit="hundred", disable=RANK > 0))
    return [(text, mel) for chunk, mels in zip(chunks, heard)
            for (text, _), versions in zip(chunk, mels) for mel in versions]


def train_whisper(cfg, tokenizer):
    """Whisper's loss, the next token given the sound, plus CTC from the encoder, which tells it directly what
    was said where; without it the cross-attention takes minutes to find the words. CTC on letters teaches it
    to hear, CTC on the LLM's tokens to gather a word in one place: it reads the mean of five states, the
    stretch of time that the adapter of stage 1 turns into one position of the LLM. It joins after a third of
    the steps; from the start it kept the letters from being learned.

    All see the encoder's states through noise, which grows to the strength of the states over that third.
    What is said must get through, and nothing else is worth the energy, so the states say little about the
    voice."""
    rng = random.Random(f"{cfg.seed} whisper {RANK}")
    jobs = clips_to_hear(rng, cfg.whisper_clips // PROCESSES, cfg.whisper_people, cfg.accents, source(cfg))
    clips = hear_all(jobs, f"{cfg.seed} {RANK}")
    end = tokenizer.eos_token_id
    tokens = [torch.tensor([end, *tokenizer(text)["input_ids"], end]) for text, _ in clips]
    letters = [torch.tensor(letters_of(text), dtype=torch.long) for text, _ in clips]
    blank = len(tokenizer)
    torch.manual_seed(cfg.seed)
    D, layers = 192, 6
    dims = whisper.model.ModelDimensions(
        n_mels=80, n_audio_ctx=1500, n_audio_state=D, n_audio_head=D // 64, n_audio_layer=layers,
        n_vocab=len(tokenizer), n_text_ctx=64, n_text_state=D, n_text_head=D // 64, n_text_layer=1)
    model = whisper.model.Whisper(dims)
    nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    nn.init.normal_(model.decoder.token_embedding.weight, std=0.02)
    model.encoder = SpeechEncoder(80, 1500, D, D // 64, layers)
    if cfg.init_from:
        model.encoder.load_state_dict(load_whisper(f"{cfg.init_from}/whisper.pt").state_dict())
    model.ctc = nn.ModuleDict({"letters": nn.Linear(D, 28), "tokens": nn.Linear(D, blank + 1)})
    torch.manual_seed(cfg.seed + RANK)                # of the noise
    batches = bucketed(rng, [mel.shape[1] for _, mel in clips], 64 // PROCESSES)

    steps = itertools.count()

    def loss():
        rows = next(batches)
        ready = min(1, 3 * next(steps) / cfg.whisper_steps)
        states, counts = encode_clips(model.encoder, [clips[i][1] for i in rows])
        states = states + ready * torch.randn_like(states) * states.square().mean().sqrt()
        text = side_by_side([tokens[i] for i in rows], IGNORE)
        logits = model.decoder(text[:, :-1].clamp(min=0), states)
        T = states.shape[1] // DOWNSAMPLE * DOWNSAMPLE
        groups = states[:, :T].unflatten(1, (-1, DOWNSAMPLE)).mean(2)
        tokens_loss = ctc(model.ctc["tokens"](groups), counts // DOWNSAMPLE, [tokens[i][1:-1] for i in rows],
                          blank)
        return {"text": F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), ignore_index=IGNORE),
                "letters": ctc(model.ctc["letters"](states), counts, [letters[i] for i in rows], 0),
                "tokens": tokens_loss * (ready == 1)}

    whisper.model.MultiHeadAttention.use_sdpa = False # on CPU its backward is slower than two products
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        fit(cfg, "whisper", model, loss, cfg.whisper_steps)
    if RANK:
        return
    weights = {name: x.half() for name, x in model.state_dict().items() if not name.startswith("ctc.")}
    file = f"{cfg.out_dir}/whisper.pt"
    torch.save({"dims": dataclasses.asdict(dims), "model_state_dict": weights}, f"{file}.tmp")
    os.replace(f"{file}.tmp", file)
    measure_whisper(cfg, model, tokenizer)


def measure_whisper(cfg, model, tokenizer):
    """Word error rates on unseen sentences: in unseen voices of espeak-ng, clean and under each condition of
    omni/augment.py, in an accent that it never heard, and in voices made from recordings of people."""
    if cfg.texts:
        return measure_texts(cfg, model, tokenizer)
    rng = random.Random(cfg.seed)
    asked = questions(rng, "test", cfg.figures)
    tests = {"unseen sentences and voices": (asked, None),
             "... in an unseen accent": (questions(rng, "test", cfg.figures, [UNSEEN_ACCENT]), None)}
    for name in CONDITIONS:
        tests[f"... with {name}"] = asked, name
    for name in cfg.people:
        lines = voices.missing([name])
        if lines:
            log(cfg, f"whisper: {name} is not measured: {'; '.join(lines)}")
        else:
            tests[f"... of {name}"] = [(text, f"{name}:1.00:1.00:1.00") for text, _ in asked], None
    chunks = []
    for jobs, condition in tests.values():
        chunks += [(jobs[i:i + 100], condition) for i in range(0, len(jobs), 100)]
    heard = (mel for mels in run_all(clean_job, chunks) for mel in mels)
    for name, (jobs, _) in tests.items():
        texts = []
        for i in range(0, len(jobs), 50):
            mels = list(itertools.islice(heard, min(50, len(jobs) - i)))
            texts += whisper_transcribe(model, tokenizer, mels)
        log(cfg, f"whisper: WER on {name}: {100 * word_error_rate([text for text, _ in jobs], texts):.1f} %")


def measure_texts(cfg, model, tokenizer):
    """The same of --texts: on unseen questions in unseen voices, on unseen replies in the assistant's voice,
    and on what the codec makes of these, which is also how the codec is measured."""
    rng, draw = random.Random(cfg.seed), source(cfg)
    codec = NanoCodec.load(f"{cfg.out_dir}/codec.pt")
    asked = questions(rng, "test", cfg.figures, cfg.accents, draw)
    said = [(text, cfg.assistant) for text in replies(rng, "test", cfg.figures, draw)]
    wavs = run_all(speak_job, asked + said)
    original = wavs[len(asked):]
    decoded = [codec.decode(codec.encode(torch.from_numpy(wav))).numpy() for wav in original]
    for name, jobs, clips in (("unseen questions and voices", asked, wavs[:len(asked)]),
                              ("unseen replies", said, original), ("... after the codec", said, decoded)):
        texts = []
        for i in range(0, len(clips), 50):
            texts += whisper_transcribe(model, tokenizer, [log_mel(wav) for wav in clips[i:i + 50]])
        log(cfg, f"whisper: WER on {name}: {100 * word_error_rate([text for text, _ in jobs], texts):.1f} %")


# --------------------------------------------------------------------------------------------------- people

def make_people(cfg, rng):
    """The first questions of the corpus, each in one of people's voices -> people.parquet. Opus at some
    11 kbit/s, so that they are small; a corpus puts them into rooms and noise like all others."""
    texts = set()
    for d in dialogues(cfg.seed, {"train": cfg.people_clips}, people=False):
        texts |= {text for text, voice in zip(d["users"], d["voices"]) if voice == d["voice"]}
        if len(texts) >= cfg.people_clips:
            break
    jobs = [(text, voices.draw_voice(rng, "train")) for text in sorted(texts)]
    clips = []
    for wav in voices.speak_all(jobs):
        file = io.BytesIO()
        soundfile.write(file, wav, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.98)
        clips.append(file.getvalue())
    columns = {"text": [text for text, _ in jobs], "voice": [voice for _, voice in jobs], "speech": clips}
    file = f"{cfg.out_dir}/people.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), f"{file}.tmp")
    os.replace(f"{file}.tmp", file)
    log(cfg, f"people: {len(clips)} clips, {os.path.getsize(file) / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------- qwen2

CHAT = ("{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHAT_USER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"    # around what the user says


def make_tokenizer(texts):
    """Qwen2's own tokenizer (byte-level BPE), trained on the world's texts: most words are one token."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = texts + ["system user assistant"] * 100
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[]).train_new_from_iterator(
        texts, vocab_size=256 + 700 + len(special), new_special_tokens=special)
    tokenizer.chat_template = CHAT
    return tokenizer


def heard(rng, tokens, lengths):
    """A question as the adapter of stage 1 may show it: a row every 100 ms. Between words are empty rows,
    short words share a row, and some words fill two.

    tokens, lengths   ids of a text, and how many characters each has
    Returns           rows [first id or -1, second id or -1]
    """
    speed, now = rng.uniform(0.9, 2.2), rng.uniform(0, 7)             # characters per row; silence before
    rows = {}
    for token, length in zip(tokens, lengths):
        at = int(now + rng.uniform(0.3, 0.9) * length / speed)
        now += length / speed
        while len(rows.get(at, ())) == 2:
            at += 1
        rows.setdefault(at, []).append(token)
        if rng.random() < 0.4 and at + 1 not in rows:
            rows[at + 1] = [token]
    end = max(max(rows) + 1, int(now + rng.uniform(0, 7)))
    return [(rows.get(at, []) + [-1, -1])[:2] for at in range(end)]


def labelled_dialogue(rng, tokenizer, turns, spoken):
    """A dialogue -> (L, 4): two ids whose embeddings are added up (-1: none), what the assistant says next,
    and whether the row is `heard`. spoken: are the user's turns heard or typed?"""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    before, after = (tokenizer(text)["input_ids"] for text in CHAT_USER)
    newline = tokenizer("\n")["input_ids"]
    rows = []
    for turn in turns:
        asked = tokenizer(turn["user"])["input_ids"]
        said = [*tokenizer(turn["assistant"])["input_ids"], end]
        question = [[id, -1] for id in asked]
        if spoken:
            question = heard(rng, asked, [len(tokenizer.decode([id])) for id in asked])
        rows += [[id, -1, IGNORE, 0] for id in before]
        rows += [[*ids, IGNORE, int(spoken)] for ids in question]
        rows += [[id, -1, IGNORE, 0] for id in after]
        rows += [[id, -1, id, 0] for id in said]
        rows += [[id, -1, IGNORE, 0] for id in newline]
    return torch.tensor(rows)


def embed_rows(model, first, second):
    """Ids (B, L), -1 for none -> the sum of their embeddings (B, L, H)."""
    table = model.model.embed_tokens
    return sum(table(ids.clamp(min=0)) * (ids >= 0)[..., None] for ids in (first, second))


def train_qwen2(cfg, rng):
    """A language model that has read only this world's sentences, words side by side, is lost where words
    come with gaps between them, as from the adapter of stage 1; a large one has read so much that it is not.
    So two dialogues in three are `heard`, through noise of up to the embeddings' own strength."""
    draw = source(cfg)
    drawn = [draw(rng, "train") for _ in range(cfg.qwen2_dialogues // PROCESSES)]
    tokenizer = make_tokenizer([turn[who] for d in drawn for turn in d for who in ("user", "assistant")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    data = [labelled_dialogue(rng, tokenizer, d, rng.random() < 0.67) for d in drawn]
    torch.manual_seed(cfg.seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None, eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id, use_cache=True, attn_implementation="eager"))
    torch.manual_seed(cfg.seed + RANK)                # of the noise
    batches = bucketed(rng, [len(x) for x in data], 64 // PROCESSES)

    def loss():
        rows = side_by_side([data[i] for i in next(batches)], IGNORE)
        first, second, labels, spoken = rows.unbind(-1)
        x = embed_rows(model, first, second)
        noise = torch.rand(len(x), 1, 1) * x.detach().square().mean().sqrt() * torch.randn_like(x)
        x = x + noise * (spoken == 1)[..., None]
        hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
        at = labels[:, 1:] != IGNORE
        return {"text": F.cross_entropy(model.lm_head(hidden[at]).float(), labels[:, 1:][at])}

    fit(cfg, "qwen2", model, loss, cfg.qwen2_steps)
    if RANK:
        return
    measure_qwen2(cfg, model, tokenizer)
    model.half().save_pretrained(f"{cfg.out_dir}/qwen2.tmp")
    tokenizer.save_pretrained(f"{cfg.out_dir}/qwen2.tmp")
    replace_folder(f"{cfg.out_dir}/qwen2.tmp", f"{cfg.out_dir}/qwen2")


@torch.no_grad()
def measure_qwen2(cfg, model, tokenizer):
    """How many unseen questions are answered exactly, by topic, when the last turn of a dialogue is asked:
    typed, and as `heard`."""
    end, draw = tokenizer.convert_tokens_to_ids("<|im_end|>"), source(cfg)
    for how in ("typed", "heard"):
        rng = random.Random(cfg.seed)
        right, count = Counter(), Counter()
        for _ in range(cfg.figures):
            turns = draw(rng, "test")
            rows = labelled_dialogue(random.Random(cfg.seed), tokenizer, turns, how == "heard")
            reply = tokenizer(turns[-1]["assistant"])["input_ids"]
            prompt = rows[:len(rows) - len(reply) - 2]           # without `<|im_end|>` and the newline
            x = embed_rows(model, *prompt[None, :, :2].unbind(-1))
            out = model.generate(inputs_embeds=x, max_new_tokens=40, do_sample=False, eos_token_id=end,
                                 pad_token_id=end)
            topic = turns[-1]["topic"]
            count[topic] += 1
            right[topic] += tokenizer.decode(out[0], skip_special_tokens=True) == turns[-1]["assistant"]
        share = 100 * right.total() / count.total()
        topics = ", ".join(f"{topic} {100 * right[topic] / n:.0f}" for topic, n in count.items())
        log(cfg, f"qwen2: exact answers to unseen {how} questions: {share:.1f} %  ({topics})")


# ----------------------------------------------------------------------------------------------------- main

def main():
    cfg = configure(BackbonesConfig)
    if PROCESSES > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(max(1, os.cpu_count() // PROCESSES))
    os.makedirs(cfg.out_dir, exist_ok=True)
    if cfg.parts == ("hearing",):
        model = whisper.load_model(f"{cfg.out_dir}/whisper.pt", device="cpu")
        model.encoder = load_whisper(f"{cfg.out_dir}/whisper.pt")     # hears clips at their own length
        measure_whisper(cfg, model, Qwen2Tokenizer.from_pretrained(f"{cfg.out_dir}/qwen2"))
        return
    lines = voices.missing(voices.VOICES["train"])
    files = {"qwen2": "qwen2", "codec": "codec.pt", "voice": "codec.pt", "whisper": "whisper.pt",
             "people": "people.parquet"}
    if set(cfg.parts) - files.keys():
        fail(f"--parts {','.join(cfg.parts)}: known are {', '.join(files)}, and hearing alone")
    if ("voice" in cfg.parts) != (cfg.recordings is not None):
        fail("--parts voice and --recordings, a JSONL file, belong together; give both or none")
    new = {part for part in cfg.parts if not os.path.exists(f"{cfg.out_dir}/{files[part]}")}
    if lines and ("people" in new or "whisper" in new and cfg.whisper_people):    # better now than later
        fail(f"synthesizers that Whisper is to hear are not installed ({'; '.join(lines)}); install them, or "
             "give --parts qwen2,codec,whisper --whisper_people 0 for a Whisper that understands only "
             "espeak-ng")
    for part, file in files.items():
        if part not in cfg.parts:
            continue
        if os.path.exists(f"{cfg.out_dir}/{file}"):
            log(cfg, f"{part}: {cfg.out_dir}/{file} is there already")
            continue
        start, rng = time.time(), random.Random(f"{cfg.seed} {part}")
        if part == "qwen2":
            train_qwen2(cfg, rng)
        elif part == "codec":
            train_codec(cfg, rng)
        elif part == "voice":
            train_voice(cfg, rng)
        elif part == "people":
            make_people(cfg, rng)
        else:
            train_whisper(cfg, Qwen2Tokenizer.from_pretrained(f"{cfg.out_dir}/qwen2"))
        log(cfg, f"{part}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
