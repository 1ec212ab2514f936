"""
Build the corpus that train.py reads, and read it.

Why: a spoken dialogue becomes three things that a network can learn from: the user's speech, the text of the reply,
and the reply's speech as units (25 integers a second). Dialogues come from four sources, and what a source lacks is
made here: a synthesiser says what was not recorded, a codec turns the replies' speech into units.

    source        the dialogues                     the user's speech       the replies' units
    tiny          tiny/world.py draws them          espeak-ng, 74 voices    espeak-ng, codec.py
    instructs2s   the released JSON                 its recordings or none  from the JSON
    folder        --path, a JSONL or CSV file       your recordings         your recordings or --tts, codec.py
    text          --path, a JSONL or CSV file       --tts, several voices   --tts, codec.py

How: `python data.py` builds the embedded corpus in corpus/tiny, `python data.py config/data_*.py` the others; those files
say how the input looks. Dialogues are read one at a time and written in shards, so neither the memory nor the time that a
thousand of them take depends on how many there are. A killed run continues with the shards that are missing. Ranks share
the shards, over machines too if all of them see the folder: `accelerate launch data.py ...`, or without GPUs `torchrun`, or
`RANK=0 WORLD_SIZE=2 python data.py ...` on the first of two. Rows are dialogues:
    id, voice, topics [str], users [str], speech [audio], samples [int], replies [str], answers [str], units [[int]]
where speech holds WAV bytes or a path below audio_root, samples its length at 16 kHz, and an answer is the part of a reply that makes it right
("Paris"), for eval.py. What cannot be trained on is left out, counted, and listed with its reason in left_out.jsonl.
The second half of this file is what train.py and eval.py use: `Dialogues` lays out a row, `collate` makes a batch.
"""
import csv
import ctypes
import hashlib
import heapq
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial

import librosa
import numpy as np
import pyarrow
import soundfile
import torch
from datasets import Audio, Features, List, Value, load_from_disk

from codec import UNIT_RATE, UNIT_VOCAB, load_encoder
from configure import configure, did_you_mean, fail
from model import IGNORE, MAX_SECONDS, MIN_SECONDS, SAMPLE_RATE, SPEECH, clip_frames, expand_speech, log_mel, speech_positions, speech_sequence
from tiny.world import ASSISTANT, SPLITS, dialogue, draw_voice, speak

SOURCES = ("tiny", "instructs2s", "folder", "text")
FEATURES = Features({
    "id": Value("string"), "voice": Value("string"), "topics": List(Value("string")), "users": List(Value("string")),
    "speech": List(Audio(sampling_rate=SAMPLE_RATE, decode=False)), "samples": List(Value("int32")), "replies": List(Value("string")),
    "answers": List(Value("string")), "units": List(List(Value("int16")))})
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # as accelerate and torchrun set them


@dataclass(frozen=True)
class DataConfig:
    source: str = "tiny"               # tiny (the embedded world), instructs2s, folder or text: see above
    out_dir: str = "corpus/tiny"       # where the corpus goes
    path: str | None = None            # all but tiny: the dialogues, a .json array, a .jsonl or a .csv file
    audio_root: str | None = None      # the folder that recordings are in; without it instructs2s gets no speech
    tts: str | None = None             # command that says its stdin, or {text}, into {wav}, in {voice}; none: espeak-ng
    voices: tuple[str, ...] = ()       # text: of the users, drawn for each dialogue; none: those of tiny/world.py
    assistant: str = ASSISTANT         # the voice of the replies
    held_out: float = 0.005            # all but tiny: share of the dialogues for validation, and as much for test
    limit: int = 0                     # all but tiny: stop after so many dialogues; 0: never
    train: int = 20000                 # tiny: dialogues for training
    validation: int = 200              # tiny: dialogues for the loss and the figures during training
    test: int = 400                    # tiny: dialogues for eval.py: other sentences, other voices
    codec: str = "tiny/codec.pt"       # what makes the units: a file, or CosyVoice 2's folder; instructs2s needs none
    shard: int = 500                   # dialogues between two savings: what a killed process loses
    processes: int = os.cpu_count()    # how many work at once on this machine
    seed: int = 1337                   # of the dialogues and the voices

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; it must be one of {', '.join(SOURCES)}")
        if min(self.train, self.validation, self.test, self.processes, self.shard) < 1:
            raise ValueError("train, validation, test, processes and shard must be at least 1")
        if self.limit < 0 or not 0 <= self.held_out < 0.5:
            raise ValueError("limit must be 0 or more, held_out at least 0 and below 0.5")
        if self.source != "tiny" and not self.path:
            raise ValueError(f"source {self.source} needs --path, the file with the dialogues")
        if self.source == "folder" and not self.audio_root:
            raise ValueError("source folder needs --audio_root, the folder that the recordings are in")
        if self.tts is not None:
            words = shlex.split(self.tts)              # its ValueError names an open quotation mark
            if "{wav}" not in self.tts or not shutil.which(words[0]):
                raise ValueError(f"tts {self.tts!r} must be a command that is installed and writes its speech to {{wav}}")
            if "{voice}" in self.tts and not self.voices and self.source == "text":
                raise ValueError("the tts command asks for a {voice}; name some with --voices, and one with --assistant")


class LeftOut(Exception):
    """Why a dialogue cannot be trained on: LeftOut(reason, detail), of which the reasons are counted."""


# ---------------------------------------------------------------------------------------------- the four sources

def embedded(cfg):
    """The embedded world's dialogues. No two rows of a split are alike, and no split holds a question of another."""
    for split in SPLITS:
        rng, n, seen = random.Random(f"{cfg.seed} {split}"), 0, set()
        while n < getattr(cfg, split):
            turns = dialogue(rng, split)
            key = tuple(t["user"] for t in turns)
            if key in seen and rng.random() < 0.9:    # the shortest ones run out of texts: then another voice says them
                continue
            seen.add(key)
            yield {"id": f"{split}-{n:06d}", "split": split, "voice": draw_voice(rng, split),
                   "topics": [t["topic"] for t in turns], "users": [t["user"] for t in turns],
                   "replies": [t["assistant"] for t in turns], "answers": [t["answer"] for t in turns]}
            n += 1


def json_array(file, chunk=1 << 16):
    """The elements of a JSON array, one at a time: the file as a whole is never in memory. Raises ValueError."""
    decoder, between, n = json.JSONDecoder(), " \t\r\n,", 0
    text = file.read(chunk).lstrip()
    if text[:1] != "[":
        raise ValueError("it is not a JSON array, which begins with [")
    text = text[1:].lstrip(between)
    while text[:1] != "]":
        try:
            element, end = decoder.raw_decode(text)
        except json.JSONDecodeError:                  # its end is not in sight yet, or never will be
            more = file.read(max(chunk, len(text)))
            if not more or len(text) > 1 << 26:
                raise ValueError(f"it is damaged or cut off after {n} dialogues; download it again") from None
            text = (text + more).lstrip(between)
            continue
        yield element
        text, n = text[end:].lstrip(between), n + 1


def records(cfg):
    """The dialogues as the source holds them, one at a time and always in the same order. Raises ValueError, which names
    the file, if it cannot be read."""
    if cfg.source == "tiny":
        yield from embedded(cfg)
        return
    try:
        with open(cfg.path, encoding="utf-8-sig", newline="") as file:
            kind = os.path.splitext(cfg.path)[1]
            rows = json_array(file) if kind == ".json" else csv.DictReader(file) if kind == ".csv" else filter(str.strip, file)
            yield from itertools.islice(rows, cfg.limit or None)
    except UnicodeDecodeError as e:
        raise ValueError(f"{cfg.path}: it is not UTF-8 text ({e.reason} at byte {e.start} of a piece); save it as such") from e
    except (OSError, ValueError, RecursionError, csv.Error) as e:
        raise ValueError(f"{cfg.path}: {e}") from e


def from_json(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise LeftOut("a line that is not JSON", str(e)) from e


def parse(cfg, record):
    """A record of any source -> {"id", "users", "replies", "speech", "said", "units", ...}, a list item for each turn; speech
    and said are the paths of the user's and the assistant's recordings. Raises LeftOut if it has not the source's form."""
    if not isinstance(record, dict):
        raise LeftOut("a record that is no JSON object", repr(record)[:80])
    if cfg.source == "tiny":
        return record
    if cfg.source == "instructs2s":
        turns = record.get("conversation")
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise LeftOut("a record without a conversation", f"it has {', '.join(map(str, record))}"[:80])
        roles = [t.get("from") for t in turns]
        if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
            raise LeftOut("turns that do not alternate", f"human and gpt by turns are expected, not {roles}"[:200])
        users, replies = turns[::2], turns[1::2]
        return {"id": record.get("id"), "users": [t.get("text") for t in users], "replies": [t.get("text") for t in replies],
                "speech": [t.get("speech") for t in users], "units": [t.get("unit") for t in replies]}
    keys = {"id", "users", "replies"} | ({"speech", "reply_speech"} if cfg.source == "folder" else set())
    for key in record:
        if key not in keys:
            raise LeftOut("an unknown key", f"{key!r}; " + did_you_mean(str(key), keys, f"known are {', '.join(sorted(keys))}"))

    def turns(key):
        value = record.get(key) or []
        if isinstance(value, str):
            value = [v.strip() for v in value.split("|")] if cfg.path.endswith(".csv") else [value]
        return value if isinstance(value, list) else [value]
    speech, replies = turns("speech"), turns("replies")
    users = turns("users") or [os.path.basename(str(path)) for path in speech]
    said = turns("reply_speech") or [None] * len(replies)
    counts = {"users": len(users), "replies": len(replies), "reply_speech": len(said)}
    counts |= {"speech": len(speech)} if cfg.source == "folder" else {}
    if len(set(counts.values())) > 1 or not replies:
        raise LeftOut("turns that do not alternate", ", ".join(f"{n} {key}" for key, n in counts.items()))
    return {"id": record.get("id"), "users": users, "replies": replies, "speech": speech, "said": said}


# ----------------------------------------------------------------------------------------------- sound and units

def wav_bytes(wav):
    """float (samples,) 16 kHz -> the bytes of a 16-bit WAV file, so that the corpus plays in any tool."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(wav, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def read_wav(audio):
    """{"bytes", "path"} of a corpus row, one of the two being None -> float32 (samples,) at 16 kHz."""
    if audio["bytes"] is None:
        return read_audio(audio["path"]).numpy()
    wav, rate = soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")
    if rate != SAMPLE_RATE:
        raise ValueError(f"a clip of {rate} Hz in the corpus, where {SAMPLE_RATE} is due; build it with data.py")
    return wav


def read_audio(path):
    """Any file that soundfile reads -> float32 tensor (samples,), mono, 16 kHz. Raises ValueError that names the file
    if it is missing, not audio, empty, silent, not finite, of an absurd rate, or shorter or longer than a clip may be."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    try:
        info = soundfile.info(path)
    except (OSError, RuntimeError) as e:              # soundfile's own error is a RuntimeError
        raise ValueError(f"{path}: cannot be read as audio; give a WAV, FLAC, OGG or MP3 file") from e
    if not 8000 <= info.samplerate <= 192000:
        raise ValueError(f"{path}: its sample rate is {info.samplerate} Hz; it must be from 8000 to 192000")
    if info.channels > 16:                            # a small file may declare 1,024 of them, and fill the memory
        raise ValueError(f"{path}: it has {info.channels} channels; it must have at most 16")
    seconds = info.frames / info.samplerate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"{path}: it lasts {seconds:.2f} s; a clip must last from {MIN_SECONDS} to {MAX_SECONDS:.0f} s")
    try:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: it is damaged ({e}); record or export it again") from e
    wav = wav.mean(1)
    if not 1e-4 < np.abs(wav).max(initial=0) < 1e4:   # NaN and infinity fail this too
        raise ValueError(f"{path}: it is silent or holds no numbers; record it again, closer to the microphone")
    return torch.from_numpy(librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE))


def below_root(cfg, path):
    """The path of a recording as the corpus keeps it, from audio_root on. Raises LeftOut if it leads out of there, be it
    by "..", from "/", or through a link."""
    if not path or not isinstance(path, str) or "\0" in path:
        raise LeftOut("a turn without a recording", repr(path))
    root = os.path.realpath(cfg.audio_root)
    whole = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, whole]) != root:
        raise LeftOut("a path that leaves audio_root", path)
    return os.path.relpath(whole, root)


def recording(cfg, path):
    """The sound of a recording below audio_root, float32 tensor (samples,) at 16 kHz. Raises LeftOut."""
    try:
        return read_audio(os.path.join(cfg.audio_root, below_root(cfg, path)))
    except ValueError as e:
        raise LeftOut("unreadable audio", str(e)) from e


def say(cfg, text, voice):
    """A synthesiser says `text`: the command cfg.tts, run without a shell, or espeak-ng. Returns float32 tensor
    (samples,) at 16 kHz. Raises LeftOut, with the last line that the command wrote to stderr."""
    if cfg.tts is None:
        try:
            return torch.from_numpy(speak(text, voice))
        except ValueError as e:
            raise LeftOut("the synthesiser failed", str(e)) from e
    text = " ".join(text.split())                     # one line: some synthesisers say line by line
    with tempfile.TemporaryDirectory() as folder:
        wav = os.path.join(folder, "speech.wav")
        values = {"{wav}": wav, "{voice}": voice, "{text}": text.lstrip("-")}      # a text must not look like an option
        command = [re.sub(r"\{(wav|voice|text)\}", lambda m: values[m[0]], word) for word in shlex.split(cfg.tts)]
        try:
            done = subprocess.run(command, input=None if "{text}" in cfg.tts else text + "\n", capture_output=True,
                                  text=True, errors="replace", timeout=600)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it wrote nothing to stderr"])[-1]
                raise LeftOut("the synthesiser failed", f"exit code {done.returncode}: {last}")
            return read_audio(wav)
        except (OSError, ValueError, subprocess.TimeoutExpired) as e:
            raise LeftOut("the synthesiser failed", str(e).replace(wav, "{wav}")) from e


def check_text(text):
    """Raises LeftOut unless it is one that can be said, and that says nothing to the tokenizer."""
    if not isinstance(text, str) or not text.strip():
        raise LeftOut("an empty text", repr(text))
    if "<|" in text or "<speech>" in text:
        raise LeftOut("a text with a special token", text[:80])
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise LeftOut("a text that is not Unicode", repr(text)[:80]) from e


def to_units(units):
    """A list of integers, or a text of them such as "12 7" or "[12, 7]" -> a list of integers. Raises LeftOut unless each
    is in 0 .. 6560 and there is one."""
    if isinstance(units, str) and re.fullmatch(r"[-\d\s,\[\]]*", units):
        units = [int(u) for u in re.findall(r"-?\d{1,9}", units)]      # int() refuses a text of thousands of digits
    if not isinstance(units, list) or not units or not all(type(u) is int for u in units):
        raise LeftOut("no units, or no whole numbers", repr(units)[:80])
    if min(units) < 0 or max(units) >= UNIT_VOCAB:
        raise LeftOut(f"units outside 0 .. {UNIT_VOCAB - 1}", f"from {min(units)} to {max(units)}")
    return units


# ----------------------------------------------------------------------------------------------------- building

def make_row(cfg, encode, number, record):
    """Record `number` of the source -> (split, row of the corpus). encode: speech -> units. Raises LeftOut."""
    turns = parse(cfg, record)
    n, name = len(turns["replies"]), str(turns["id"] or number)
    for text in (name, *turns["users"], *turns["replies"]):
        check_text(text)
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2 ** 64        # of the id alone, from 0 to 1
    split = turns.get("split") or SPLITS[(share < 2 * cfg.held_out) + (share < cfg.held_out)]
    voice, speech, samples = turns.get("voice", ""), [], []
    if cfg.source == "text":
        rng = random.Random(f"{cfg.seed} {name}")
        voice = rng.choice(cfg.voices) if cfg.voices else draw_voice(rng, split)
    for text, path in zip(turns["users"], turns.get("speech") or [None] * n):
        if cfg.source in ("tiny", "text"):
            wav = say(cfg, text, voice)
            speech.append({"bytes": wav_bytes(wav.numpy()), "path": None})
        elif cfg.audio_root:
            path = below_root(cfg, path)
            wav = recording(cfg, path)
            speech.append({"bytes": None, "path": path})
        else:
            break                                     # the JSON alone
        samples.append(len(wav))
    if cfg.source == "instructs2s":
        units = [to_units(u) for u in turns["units"]]
    else:
        units = [encode(recording(cfg, path) if path else say(cfg, text, cfg.assistant)).tolist()
                 for text, path in zip(turns["replies"], turns.get("said") or [None] * n)]
    return split, {"id": name, "voice": voice, "topics": turns.get("topics", [""] * n), "users": turns["users"], "speech": speech,
                   "samples": samples, "replies": turns["replies"], "answers": turns.get("answers", [""] * n), "units": units}


def replace_file(path, text):
    """The file appears whole or not at all."""
    with open(f"{path}.{os.getpid()}.tmp", "w") as file:
        file.write(text)
    os.replace(file.name, path)


def marker(cfg, number):
    """The file that says that a shard is complete, with its figures and what was left out of it."""
    return os.path.join(cfg.out_dir, "shards", f"{number:05d}.json")


def write_shard(cfg, encode, number, numbered):
    """The rows of a shard, in an Arrow file for each split, and then its marker. numbered: iterable of (number, record)."""
    start, left, buffers = time.time(), [], {split: [] for split in SPLITS}
    figures = {split: Counter(dialogues=0, turns=0, seconds=0, units=0) for split in SPLITS}
    paths = {split: os.path.join(cfg.out_dir, split, f"data-{number:05d}.arrow") for split in SPLITS}
    files = {split: pyarrow.OSFile(f"{path}.{os.getpid()}.tmp", "wb") for split, path in paths.items()}
    writers = {split: pyarrow.ipc.new_stream(file, FEATURES.arrow_schema) for split, file in files.items()}

    def flush(split):
        writers[split].write_batch(pyarrow.RecordBatch.from_pylist(buffers[split], schema=FEATURES.arrow_schema))
        buffers[split].clear()
    for i, record in numbered:
        try:
            record = from_json(record) if isinstance(record, str) else record
            split, row = make_row(cfg, encode, i, record)
        except LeftOut as e:
            left.append({"record": i, "id": record.get("id") if isinstance(record, dict) else None,
                         "reason": e.args[0], "detail": e.args[1]})
            continue
        figures[split].update(dialogues=1, turns=len(row["replies"]), seconds=sum(row["samples"]) / SAMPLE_RATE, units=sum(map(len, row["units"])))
        buffers[split].append(row)
        if len(buffers[split]) == 50:                 # with their sound: some 40 MB
            flush(split)
    for split, path in paths.items():
        flush(split)
        writers[split].close()
        files[split].close()
        os.replace(f"{path}.{os.getpid()}.tmp", path)
    replace_file(marker(cfg, number), json.dumps({"figures": figures, "left_out": left}))
    print(f"shard {number:05d}: {sum(f['dialogues'] for f in figures.values())} dialogues, {len(left)} left out, "
          f"{time.time() - start:.0f} s", flush=True)


def start_process():
    """A process of the pool ends with the one that started it, whatever ended that one, and at once on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)    # PR_SET_PDEATHSIG


def work(cfg, processes, process):
    """One of the processes of this rank: read the source from its beginning, and write the shards that are this process's
    and not there yet. Returns how many shards there are in all."""
    torch.set_num_threads(1)                          # one of several processes
    encode = None if cfg.source == "instructs2s" else load_encoder(cfg.codec)
    number = -1
    for number, numbered in itertools.groupby(enumerate(records(cfg)), lambda x: x[0] // cfg.shard):
        if number % WORLD == RANK and number // WORLD % processes == process and not os.path.exists(marker(cfg, number)):
            write_shard(cfg, encode, number, numbered)
    return number + 1


def join(cfg, shards):
    """Make the shards one datasets folder, without copying them: its index is a few small files, the last of which makes
    it whole. Several ranks may do so at once, they write the same."""
    with open(os.path.join(cfg.out_dir, "meta.json")) as f:
        fingerprint = hashlib.sha256(f.read().encode()).hexdigest()[:16]
    lines = []
    for number in range(shards):
        with open(marker(cfg, number)) as f:
            lines += [json.dumps(x) + "\n" for x in json.load(f)["left_out"]]
    replace_file(os.path.join(cfg.out_dir, "left_out.jsonl"), "".join(lines))
    for split in SPLITS:
        folder = os.path.join(cfg.out_dir, split)
        replace_file(os.path.join(folder, "dataset_info.json"), json.dumps({"features": FEATURES.to_dict()}))
        replace_file(os.path.join(folder, "state.json"), json.dumps({
            "_data_files": [{"filename": f"data-{number:05d}.arrow"} for number in range(shards)],
            "_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
            "_output_all_columns": False, "_split": split}))
    for folder, _, names in os.walk(cfg.out_dir):     # of killed processes
        for name in names:
            if name.endswith(".tmp") and ".arrow." in name:
                os.remove(os.path.join(folder, name))
    replace_file(os.path.join(cfg.out_dir, "dataset_dict.json"), json.dumps({"splits": SPLITS}))


def report(cfg):
    """Print what was made, a line a split, and what was left out, a line a reason."""
    total, reasons, ids = {split: Counter() for split in SPLITS}, Counter(), {}
    for name in sorted(os.listdir(os.path.join(cfg.out_dir, "shards"))):
        with open(os.path.join(cfg.out_dir, "shards", name)) as f:
            shard = json.load(f)
        for split in SPLITS:
            total[split].update(shard["figures"][split])
        for x in shard["left_out"]:
            reasons[x["reason"]] += 1
            ids.setdefault(x["reason"], f"{x['id'] or 'record ' + str(x['record'])}: {x['detail']}"[:200])
    print(f"\n{'split':12}{'dialogues':>10}{'turns':>8}{'hours in':>10}{'hours out':>10}{'units':>14}")
    for split, n in total.items():
        print(f"{split:12}{n['dialogues']:10,}{n['turns']:8,}{n['seconds'] / 3600:10.2f}{n['units'] / UNIT_RATE / 3600:10.2f}"
              f"{n['units']:14,}" + "   empty: train.py needs some, raise --held_out" * (not n["dialogues"]))
    print(f"\nleft out: {sum(reasons.values())}" + f", listed in {cfg.out_dir}/left_out.jsonl" * bool(reasons))
    for reason, n in reasons.most_common():
        print(f"{n:8,}  {reason}, such as {ids[reason]}")


def claim(cfg):
    """Make out_dir the folder of this corpus: meta.json holds the settings, and nothing else may be built there. fail()
    if something is there already, or missing."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("processes", "out_dir")}
    mend = {"path": "the file of the dialogues", "codec": "the nano codec's file, or CosyVoice 2's folder"}
    for key in mend:                                  # it is the content that counts
        if cfg.source != ("tiny" if key == "path" else "instructs2s"):
            try:
                name = getattr(cfg, key)              # of CosyVoice 2, a folder, the tokenizer makes the units
                with open(os.path.join(name, "speech_tokenizer_v2.onnx") if os.path.isdir(name) else name, "rb") as f:
                    settings[f"{key}_sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
            except OSError as e:
                fail(f"there is no {key} {getattr(cfg, key)} ({e.strerror}); give {mend[key]}")
    if cfg.audio_root:
        settings["audio_root"] = os.path.abspath(cfg.audio_root)
        if not os.path.isdir(cfg.audio_root):
            fail(f"there is no folder --audio_root {cfg.audio_root}; give the one that the recordings are in")
    meta, settings = os.path.join(cfg.out_dir, "meta.json"), json.loads(json.dumps(settings))    # tuples become lists
    if os.path.exists(meta):
        with open(meta) as f:
            before = json.load(f)
        changed = [k for k in settings if settings[k] != before.get(k)]
        if changed:
            fail(f"{cfg.out_dir} was built with another {', '.join(changed)}; delete it or choose another --out_dir")
        return
    try:
        for folder in ("shards", *SPLITS):
            os.makedirs(os.path.join(cfg.out_dir, folder), exist_ok=True)
        replace_file(meta, json.dumps(settings, indent=2))
    except OSError as e:
        fail(f"--out_dir {cfg.out_dir} cannot be written ({e.strerror}); choose another")


def try_out(cfg):
    """Do the tools work? A codec that does not load would stop every process, a synthesiser that cannot say one word would
    cost all the rows. fail() if not, before anything is written."""
    if cfg.source != "instructs2s":
        try:
            load_encoder(cfg.codec)
        except (OSError, ValueError, RuntimeError) as e:
            fail(e)
    if cfg.source in ("folder", "text"):
        for voice in (*cfg.voices, cfg.assistant):
            try:
                say(cfg, "Hello.", voice)
            except LeftOut as e:
                fail(f"voice {voice!r} does not speak: {e.args[1]}; try --tts, --voices and --assistant by hand first")


def main():
    cfg = configure(DataConfig)
    complete = os.path.exists(os.path.join(cfg.out_dir, "dataset_dict.json"))
    if not complete:
        try_out(cfg)
    claim(cfg)
    if complete:
        print(f"{cfg.out_dir} is complete already")
        return report(cfg)
    processes = max(1, cfg.processes // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))     # the ranks of a machine share it
    try:
        if processes == 1:
            shards = work(cfg, 1, 0)
        else:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_process) as pool:
                shards = max(pool.map(partial(work, cfg, processes), range(processes)))
    except ValueError as e:                           # the source is damaged; mended it is another corpus
        fail(f"{e}; then delete {cfg.out_dir} and begin again")
    except OSError as e:                              # the disk is full
        fail(f"{e}; the shards that are complete stay, the same command continues")
    except BrokenProcessPool:
        fail("a process was killed, perhaps for want of memory; run the same command again, with fewer --processes")
    except KeyboardInterrupt:
        fail("stopped; the shards that are complete stay, the same command continues")
    missing = sum(not os.path.exists(marker(cfg, number)) for number in range(shards))
    if missing:
        print(f"{missing} of {shards} shards are not there yet: other ranks are at work on them, and the last one completes the "
              "corpus. If none is, run the same command again")
        return
    if not shards:
        fail(f"{cfg.path} holds no dialogues; give another --path, and delete {cfg.out_dir}")
    join(cfg, shards)
    report(cfg)
    heard = cfg.source != "instructs2s" or cfg.audio_root
    print(f"\nThe corpus is {cfg.out_dir}. Next: accelerate launch train.py " + (
        "config/tiny_stage1.py" if cfg.source == "tiny" else f"config/stage1.py --corpus {cfg.out_dir}" if heard else
        f"config/stage1_tts.py --init_from none --corpus {cfg.out_dir}"))


# ---------------------------------------------------------------------------------------------------- reading

def at_root(root, batch):
    """Give the recordings of a batch of rows their whole paths."""
    for clips in batch.get("speech", []):
        for clip in clips:
            clip["path"] = clip["path"] and os.path.join(root, clip["path"])
    return batch


def load_corpus(folder, split):
    """The rows of a split of data.py's out_dir, or of a datasets folder of the same columns. The recordings that it refers
    to are looked for in the audio_root of its meta.json."""
    try:
        rows = load_from_disk(folder)[split]
    except (FileNotFoundError, KeyError):
        fail(f"there is no corpus with a split {split!r} in {folder}; run `python data.py` first, or set --corpus")
    if not len(rows):
        fail(f"the split {split!r} of {folder} is empty; build it again with a larger --held_out")
    meta = os.path.join(folder, "meta.json")
    if os.path.exists(meta):
        with open(meta) as f:
            root = json.load(f).get("audio_root")
        if root:
            return rows.with_transform(partial(at_root, root))
    return rows


def clips(row):
    """The user's turns of a row, each float32 (samples,) at 16 kHz. fail() if the corpus was built without them."""
    if not row["speech"]:
        fail(f"dialogue {row['id']} holds no speech: its corpus was built without recordings, which is enough for "
             "config/stage1_tts.py alone; build it again with --audio_root")
    return [torch.from_numpy(read_wav(a)) for a in row["speech"]]


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
    mels          the user turns, each (n_mels, frames); left out with `frozen`
    frozen        (n, D) bfloat16, if `keep` was called: what Omni.frozen makes of the dialogue
    turns         for each reply (ids, rows, labels) of the speech LM, as `speech_sequence` lays it out, but with
                  rows pointing at the position in `ids` whose state predicted the token
    """

    def __init__(self, rows, tokenizer, tts_tokenizer, n_mels, R, W, pad_audio=False, hear=True):
        """hear=False leaves the user's speech out: stage 1 TTS does not need it. Otherwise fail() if there is none."""
        self.rows, self.tokenizer, self.n_mels, self.R, self.W, self.pad = rows, tokenizer, n_mels, R, W, pad_audio
        self.hear, self.frozen = hear, None
        if hear:
            clips(rows[0])                            # rather now than in a worker of the loader
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.sep, self.unit_offset = tts_tokenizer.convert_tokens_to_ids(["<sep>", "<0>"])
        self.eos = tts_tokenizer.eos_token_id

    def __len__(self):
        return len(self.rows)

    def keep(self, path, lengths, width):
        """From now on items hold, in the place of their sound, lengths[i] rows of `width` bfloat16 from the file `path`."""
        self.frozen = path, [0, *itertools.accumulate(lengths)], width

    def kept(self, i):
        path, starts, width = self.frozen
        with open(path, "rb") as file:
            file.seek(2 * width * starts[i])
            return torch.frombuffer(bytearray(file.read(2 * width * (starts[i + 1] - starts[i]))), dtype=torch.bfloat16).view(-1, width)

    def lengths(self):
        """Without touching the sound: for each dialogue (10 Hz positions of its clips, tokens of its replies with
        `<|im_end|>`, positions of the LLM, positions of the speech LM)."""
        count = lambda texts: [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        samples = self.rows["samples"] if self.hear else [()] * len(self)
        replies, units = self.rows["replies"], self.rows["units"]
        tokens = iter(count([reply for row in replies for reply in row]))
        first = len(chat_ids(self.tokenizer, [])) - 1                        # of the template, without `<speech>`
        more = len(chat_ids(self.tokenizer, [""])) - first - 3               # of each further turn, without `<|im_end|>` too
        for clips, row, written in zip(samples, replies, units):
            speech = sum(speech_positions(clip_frames(n, self.pad)) for n in clips)
            text = sum(next(tokens) + 1 for _ in row)
            yield speech, text, first + more * (len(row) - 1) + speech + text, text + len(row) + sum(map(len, written))

    def mels(self, row):
        return [log_mel(wav, self.n_mels, self.pad) for wav in clips(row)]

    def __getitem__(self, i):
        row = self.rows[i]
        item = {"id": row["id"], "mels": []}
        try:
            if self.frozen:
                item["frozen"] = self.kept(i)
            elif self.hear:
                item["mels"] = self.mels(row)
        except (OSError, ValueError, RuntimeError) as e:
            raise ValueError(f"dialogue {row['id']} cannot be read: {e}") from e
        frames = [clip_frames(n, self.pad) for n in row["samples"]] if self.hear else [0] * len(row["replies"])
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
        return item | {"ids": ids, "labels": labels, "turns": turns}


def collate(items):
    """Items of `Dialogues` -> a batch, everything laid end to end. With L, F, S the sums over dialogues, clips, replies:

    names [B], lengths [B]; ids and labels (L,), a label being what its position is to predict: the next id or IGNORE;
    mel (n_mels, F) and frames [C], or frozen (n, D); speech_lengths [replies], speech_ids, speech_rows and speech_labels
    (S,), where speech_rows is the position among L whose state is read, or -1.
    """
    lengths = [len(item["ids"]) for item in items]
    starts = [0, *itertools.accumulate(lengths)]
    turns = [(speech, [r + start if r >= 0 else -1 for r in rows], targets)
             for item, start in zip(items, starts) for speech, rows, targets in item["turns"]]
    end_to_end = lambda lists: torch.tensor([x for row in lists for x in row])
    mels = [m for item in items for m in item["mels"]]
    batch = {"names": [item["id"] for item in items], "lengths": lengths, "ids": end_to_end(item["ids"] for item in items),
             "labels": end_to_end([*item["labels"][1:], IGNORE] for item in items), "speech_lengths": [len(s) for s, _, _ in turns]}
    batch |= {key: end_to_end(x) for key, x in zip(("speech_ids", "speech_rows", "speech_labels"), zip(*turns))}
    if "frozen" in items[0]:
        return batch | {"frozen": torch.cat([item["frozen"] for item in items])}
    return batch | ({"mel": torch.cat(mels, 1), "frames": [m.shape[1] for m in mels]} if mels else {})


def deal(rows, positions, limit, processes=1):
    """Deal out the dialogues of a step to processes and micro-batches.

    rows       their numbers;  positions[row]: how many positions a dialogue takes
    limit      positions in a micro-batch, unless one dialogue has more
    Returns    for each process the same number of micro-batches, lists of rows: the longest first, each to the emptiest list.
    """
    n = 1
    while True:
        heap = [(0, i, []) for i in range(n * processes)]
        for row in sorted(rows, key=positions.__getitem__, reverse=True):
            total, i, own = heapq.heappop(heap)
            heapq.heappush(heap, (total + positions[row], i, [*own, row]))
        if max(heap)[0] <= limit or (n + 1) * processes > len(rows):
            lists = [own for _, _, own in sorted(heap, key=lambda x: x[1])]
            return [lists[rank::processes] for rank in range(processes)]
        n += 1


if __name__ == "__main__":
    main()
