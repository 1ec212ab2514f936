"""
Build the corpus that train.py reads, and read it.

Why: a spoken dialogue becomes three things that a network can learn from: the user's speech, the text of the reply,
and the reply's speech as units (25 integers a second). Each step below turns a datasets folder into the next one,
on all cores, and is skipped if its folder is there: a killed run continues at the step it had reached.

    dialogues   text, 1 to 5 turns                                  tiny/world.py
    units       + the replies, said by the assistant, as units      espeak-ng, codec.py
    speech      + the user's turns, said in many voices             espeak-ng

How: `python data.py` builds the embedded corpus in corpus/tiny. Rows are dialogues:
    id, voice, topics [str], users [str], speech [audio], replies [str], answers [str], units [[int]]
where an answer is the part of a reply that makes it right ("Paris"), for eval.py.
The second half of this file is what train.py and eval.py use: `Dialogues` lays out a row, `collate` makes a batch.
"""
import hashlib
import io
import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass

import librosa
import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict, List, disable_caching, load_from_disk
from torch.nn.utils.rnn import pad_sequence

from codec import UNIT_RATE, UNIT_VOCAB, NanoCodec
from configure import configure, fail
from model import IGNORE, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, SPEECH, expand_speech, log_mel, replace_folder, speech_sequence
from tiny.world import ASSISTANT, SPLITS, dialogue, draw_voice, speak   # by name: datasets would pickle a whole module


@dataclass(frozen=True)
class DataConfig:
    out_dir: str = "corpus/tiny"       # where the corpus goes
    train: int = 20000                 # dialogues for training
    validation: int = 200              # dialogues for the loss and the figures during training
    test: int = 400                    # dialogues for eval.py: other sentences, other voices
    codec: str = "tiny/codec.pt"       # the codec that makes the units
    processes: int = os.cpu_count()    # how many work at once
    seed: int = 1337                   # of the dialogues and the voices

    def __post_init__(self):
        if min(self.train, self.validation, self.test, self.processes) < 1:
            raise ValueError("train, validation, test and processes must be at least 1")


# --------------------------------------------------------------------------------------------------- building

def dialogues(cfg):
    """Step 1: the texts. No two rows of a split are alike, and no split holds a question of another."""
    splits = {}
    for split in SPLITS:
        rng, rows, seen = random.Random(f"{cfg.seed} {split}"), [], set()
        while len(rows) < getattr(cfg, split):
            turns = dialogue(rng, split)
            key = tuple(t["user"] for t in turns)
            if key in seen and rng.random() < 0.9:    # the shortest ones run out of texts: then another voice says them
                continue
            seen.add(key)
            rows.append({"id": f"{split}-{len(rows):06d}", "voice": draw_voice(rng, split),
                         "topics": [t["topic"] for t in turns], "users": [t["user"] for t in turns],
                         "replies": [t["assistant"] for t in turns], "answers": [t["answer"] for t in turns]})
        splits[split] = Dataset.from_list(rows)
    return DatasetDict(splits)


def wav_bytes(wav):
    """float (samples,) 16 kHz -> the bytes of a 16-bit WAV file, so that the corpus plays in any tool."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(wav, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def read_wav(audio):
    """{"bytes": ...} of a corpus row -> float32 (samples,) at 16 kHz."""
    wav, rate = soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")
    assert rate == SAMPLE_RATE, rate
    return wav


def read_audio(path):
    """Any file that soundfile reads -> float32 tensor (samples,), mono, 16 kHz. Raises ValueError that names the file
    if it is missing, not audio, empty, silent, not finite, of an absurd rate, or shorter or longer than a clip may be."""
    try:
        info = soundfile.info(path)
    except (OSError, RuntimeError) as e:              # soundfile's own error is a RuntimeError
        raise ValueError(f"{path}: " + ("cannot be read as audio; give a WAV, FLAC, OGG or MP3 file" if os.path.isfile(path)
                                        else "there is no such file")) from e
    if not 8000 <= info.samplerate <= 192000:
        raise ValueError(f"{path}: its sample rate is {info.samplerate} Hz; it must be from 8000 to 192000")
    seconds = info.frames / info.samplerate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"{path}: it lasts {seconds:.2f} s; a question must last from {MIN_SECONDS} to {MAX_SECONDS:.0f} s")
    try:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: it is damaged ({e}); record or export it again") from e
    wav = wav.mean(1)
    if not 1e-4 < np.abs(wav).max(initial=0) < 1e4:   # NaN and infinity fail this too
        raise ValueError(f"{path}: it is silent or holds no numbers; record it again, closer to the microphone")
    return torch.from_numpy(librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE))


def unit_row(row, codec):
    """Step 2: the replies as units, by way of the assistant's voice."""
    torch.set_num_threads(1)                          # one of several processes
    return {"units": [codec.encode(torch.from_numpy(speak(t, ASSISTANT))).tolist() for t in row["replies"]]}


def speech_row(row):
    """Step 3: the user's turns, said in the row's voice."""
    return {"speech": [{"bytes": wav_bytes(speak(t, row["voice"])), "path": None} for t in row["users"]]}


def reason_to_leave_out(row):
    """Why a row cannot be trained on, or None."""
    for text in row["users"] + row["replies"]:
        if not text.strip() or "<|" in text or "<speech>" in text:
            return "an empty text or one with a special token"
    for audio in row["speech"]:
        seconds = len(read_wav(audio)) / SAMPLE_RATE
        if not MIN_SECONDS <= seconds <= MAX_SECONDS:
            return f"a clip shorter than {MIN_SECONDS} s or longer than {MAX_SECONDS:.0f} s"
    if any(not u or min(u) < 0 or max(u) >= UNIT_VOCAB for u in row["units"]):
        return f"no units, or units outside 0 .. {UNIT_VOCAB - 1}"


def step(cfg, name, number, make):
    """Run one step, unless its folder is there from an earlier run with the same settings."""
    folder = os.path.join(cfg.out_dir, name)
    if os.path.isdir(folder):
        print(f"[{number}/3] {name}: there already")
        return load_from_disk(folder)
    print(f"[{number}/3] {name}")
    start = time.time()
    result = make()
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    result.save_to_disk(folder + ".tmp")
    replace_folder(folder + ".tmp", folder)
    print(f"[{number}/3] {name}: {time.time() - start:.0f} s")
    return load_from_disk(folder)


def table(corpus):
    """Print what was made, a line a split."""
    print(f"\n{'split':12}{'dialogues':>10}{'turns':>8}{'hours in':>10}{'hours out':>10}{'units':>10}{'voices':>8}{'questions':>11}")
    for split, rows in corpus.items():
        turns = sum(map(len, rows["users"]))
        heard = sum((len(a["bytes"]) - 44) / 2 / SAMPLE_RATE for clips in rows["speech"] for a in clips) / 3600
        units = sum(len(u) for row in rows["units"] for u in row)
        print(f"{split:12}{len(rows):10,}{turns:8,}{heard:10.2f}{units / UNIT_RATE / 3600:10.2f}{units:10,}"
              f"{len(set(v.split(':')[0] for v in rows['voice'])):8}{len({q for row in rows['users'] for q in row}):11,}")


def main():
    cfg = configure(DataConfig)
    if not os.path.exists(cfg.codec):
        fail(f"there is no codec {cfg.codec}; run `python tiny/backbones.py` first, it trains one")
    with open(cfg.codec, "rb") as f:
        settings = asdict(cfg) | {"codec_sha256": hashlib.file_digest(f, "sha256").hexdigest()}
    settings.pop("processes")
    meta = os.path.join(cfg.out_dir, "meta.json")
    if os.path.exists(meta):
        with open(meta) as f:
            before = json.load(f)
        changed = [k for k in settings if settings[k] != before.get(k)]
        if changed:
            fail(f"{cfg.out_dir} was built with another {', '.join(changed)}; delete it or choose another --out_dir")
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open(meta + ".tmp", "w") as f:
        json.dump(settings, f, indent=2)
    os.replace(meta + ".tmp", meta)

    disable_caching()                                 # a step's folder is its cache; datasets would keep copies beside it
    texts = step(cfg, "dialogues", 1, lambda: dialogues(cfg))
    codec = NanoCodec.load(cfg.codec)
    with_units = step(cfg, "units", 2, lambda: texts.map(unit_row, fn_kwargs={"codec": codec}, num_proc=cfg.processes,
                                                         desc="encoding"))

    def speech():
        rows = with_units.map(speech_row, num_proc=cfg.processes, desc="speaking")
        rows = rows.cast_column("speech", List(Audio(sampling_rate=SAMPLE_RATE, decode=False)))
        reasons = {split: [reason_to_leave_out(row) for row in rows[split]] for split in rows}
        for split, why in reasons.items():
            for reason in sorted({r for r in why if r}):
                ids = [i for i, r in zip(rows[split]["id"], why) if r == reason]
                print(f"left out of {split}: {len(ids)} dialogues with {reason}: {', '.join(ids[:10])}" + " ..." * (len(ids) > 10))
        if not any(r for why in reasons.values() for r in why):
            print("left out: nothing")
        return DatasetDict({s: rows[s].select([i for i, r in enumerate(reasons[s]) if not r]) for s in rows})
    table(step(cfg, "speech", 3, speech))
    print(f"\nThe corpus is {cfg.out_dir}. Next: accelerate launch train.py config/tiny_stage1.py")


# ---------------------------------------------------------------------------------------------------- reading

def load_corpus(folder, split):
    """The rows of a split. `folder` is data.py's out_dir, or a datasets folder of the same columns."""
    try:
        built = os.path.join(folder, "speech")        # the last step of data.py
        return load_from_disk(built if os.path.isdir(built) else folder)[split]
    except (FileNotFoundError, KeyError):
        fail(f"there is no corpus with a split {split!r} in {folder}; run `python data.py` first, or set --corpus")


def chat_ids(tokenizer, replies):
    """Token ids of a spoken dialogue, as far as the assistant's next turn: user, reply, user, reply ... user.

    replies  the texts of the assistant's earlier turns, a list of n
    Returns  the ids up to and including the generation prompt, one SPEECH for each of the n + 1 user turns.
    """
    messages = [{"role": "user", "content": "<speech>"}]
    for reply in replies:
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "<speech>"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    speech = tokenizer.convert_tokens_to_ids("<speech>")
    return [SPEECH if i == speech else i for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


class Dialogues(torch.utils.data.Dataset):
    """The corpus as train.py wants it: item i is a dialogue, laid out for all stages.

    ids           (L,) the LLM's input, SPEECH at every position that a clip fills
    labels        (L,) the assistant's text (every turn, `<|im_end|>` included), elsewhere IGNORE
    mels          the user turns, each (n_mels, frames)
    turns         for each reply (ids, rows, labels) of the speech LM, as `speech_sequence` lays it out, but with
                  rows pointing at the position in `ids` whose state predicted the token
    """

    def __init__(self, rows, tokenizer, tts_tokenizer, n_mels, R, W, pad_audio=False, hear=True):
        """hear=False leaves the user's speech out: stage 1 TTS does not need it."""
        self.rows, self.tokenizer, self.n_mels, self.R, self.W, self.pad = rows, tokenizer, n_mels, R, W, pad_audio
        self.hear = hear
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.sep, self.unit_offset = tts_tokenizer.convert_tokens_to_ids(["<sep>", "<0>"])
        self.eos = tts_tokenizer.eos_token_id

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        mels = [log_mel(torch.from_numpy(read_wav(a)), self.n_mels, self.pad) for a in row["speech"]] if self.hear else []
        frames = [m.shape[-1] for m in mels] or [0] * len(row["replies"])
        ids, labels, turns = [], [], []
        for t, (reply, units) in enumerate(zip(row["replies"], row["units"])):
            prompt = expand_speech(chat_ids(self.tokenizer, row["replies"][:t]), frames[:t + 1])
            text = self.tokenizer(reply, add_special_tokens=False)["input_ids"] + [self.end]
            if prompt[:len(ids)] != ids:
                raise ValueError(f"row {row['id']}: the chat template does not continue its own beginning at turn {t}")
            labels += [IGNORE] * (len(prompt) - len(ids)) + text
            ids = prompt + text
            speech, at, targets = speech_sequence(text, units, self.sep, self.unit_offset, self.eos, self.R, self.W)
            turns.append((speech, [len(prompt) - 1 + n if n >= 0 else -1 for n in at], targets))
        return {"id": row["id"], "ids": ids, "labels": labels, "mels": mels, "turns": turns}


def collate(items):
    """Items of `Dialogues` -> a batch of tensors, padded at the right. B dialogues, C clips, T replies:

    names [B], ids and labels (B, L), mel (C, n_mels, frames), frames (C,), speech_lengths (T,), speech_ids, speech_rows,
    speech_labels (T, M). speech_rows points into the flattened (B L) states, -1 where no row is read.
    """
    pad = lambda lists, value: pad_sequence([torch.tensor(x) for x in lists], batch_first=True, padding_value=value)
    mels = [m for item in items for m in item["mels"]]
    ids = pad([item["ids"] for item in items], 0)
    turns = [(speech, [r + b * ids.shape[1] if r >= 0 else -1 for r in rows], labels)
             for b, item in enumerate(items) for speech, rows, labels in item["turns"]]
    speech, rows, targets = zip(*turns)
    return {"names": [item["id"] for item in items], "ids": ids, "labels": pad([i["labels"] for i in items], IGNORE),
            "mel": pad_sequence([m.T for m in mels], batch_first=True).transpose(1, 2) if mels else None,
            "frames": torch.tensor([m.shape[-1] for m in mels]),
            "speech_lengths": torch.tensor([len(x) for x in speech]), "speech_ids": pad(speech, 0), "speech_rows": pad(rows, -1), "speech_labels": pad(targets, IGNORE)}


if __name__ == "__main__":
    main()
