"""
Build a corpus, and load it: dialogues of four sources -> speech -> units -> shards on the disk.

Why: dialogues come as texts, as recordings or as a released JSON, and training wants all of them in one
form. A corpus of 200,000 dialogues takes hours to make; neither a kill nor a damaged file may cost the rest.

How: dialogues are read one at a time, and each becomes a row (data.py lists the columns): a synthesizer says
what was not recorded, a codec turns the replies' speech into units. What cannot be trained on is left out,
counted and listed. Ranks and processes share the work in shards, so neither memory nor the time per dialogue
depends on how many there are. The folder:

    meta.json        the settings, and hashes of the input; no other corpus may be built in this folder
    shards/00012/    an ordinary datasets folder, with a folder for each split that has rows in this shard;
                     report.json counts the rows and lists what was left out
    left_out.jsonl   what all shards left out, one line for each dialogue
    complete.json    written last: the number of shards

A shard is written under a temporary name and then renamed, so a shard that exists is complete. The same
command, run again, builds the shards that are missing.
"""
import csv
import ctypes
import functools
import hashlib
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
from dataclasses import asdict, replace
from functools import partial

import datasets
import ijson
import pyarrow
import torch
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_from_disk

from omni import others
from omni.audio import SAMPLE_RATE, UNIT_RATE, UNIT_VOCAB, read_audio, read_audio_bytes, wav_bytes
from omni.augment import CONDITIONS, augment
from omni.codec import load_encoder
from omni.configure import did_you_mean, fail
from omni.espeak import ACCENTS, draw_voice, plain, speak
from omni.files import read_json, replace_file, replace_folder, sha256

SOURCES = ("tiny", "instructs2s", "folder", "text", "vocalnet", "slam", "hub")
WITH_UNITS = ("instructs2s", "vocalnet")              # sources whose replies are units already
SPLITS = ("train", "validation", "test")
FEATURES = Features({
    "id": Value("string"),
    "voice": Value("string"),
    "topics": List(Value("string")),
    "users": List(Value("string")),
    "speech": List({"bytes": Value("binary"), "path": Value("string")}),  # Audio would copy the files
    "samples": List(Value("int32")),
    "replies": List(Value("string")),
    "spoken": List(Value("string")),
    "answers": List(Value("string")),
    "units": List(List(Value("int16"))),
})


class LeftOut(Exception):
    """Why a dialogue cannot be trained on: LeftOut(reason, detail). Reasons are counted, so there are few."""


# --------------------------------------------------------------------------------- the four sources

def records(cfg):
    """Yield the dialogues as the source holds them, one at a time and always in the same order.

    A JSONL file yields its lines, the other sources yield dicts. Raises ValueError that names the file if it
    cannot be read.
    """
    if cfg.source == "tiny":
        from tiny import world  # here, because no other source needs it

        counts = {split: getattr(cfg, split) for split in SPLITS}
        yield from world.dialogues(cfg.seed, counts, cfg.voices, cfg.people)
        return
    if cfg.source == "hub":
        yield from itertools.islice(others.hub_rows(cfg.path, cfg.columns), cfg.limit or None)
        return
    try:
        with open(cfg.path, encoding="utf-8-sig", newline="") as file:
            kind = os.path.splitext(cfg.path)[1]
            if kind == ".json":
                rows = json_array(file)
            elif kind == ".csv":
                rows = csv.DictReader(file)
            else:
                rows = filter(str.strip, file)        # the lines that are not blank
            yield from itertools.islice(rows, cfg.limit or None)
    except UnicodeDecodeError as e:
        raise ValueError(f"{cfg.path}: it is not UTF-8 text ({e.reason} at byte {e.start} of a piece); "
                         "save it as UTF-8") from e
    except (OSError, ValueError, csv.Error) as e:
        raise ValueError(f"{cfg.path}: {e}") from e


def json_array(file, chunk=1 << 16):
    """Yield the elements of a JSON array; the whole file is never in memory. Raises ValueError."""
    if file.read(1000).lstrip()[:1] != "[":
        raise ValueError("it is not a JSON array, which begins with [")
    file.seek(0)
    n = 0
    try:
        for element in ijson.items(ijson.from_iter(json_pieces(file, chunk)), "item", use_float=True):
            yield element
            n += 1
    except ijson.JSONError as e:
        why = str(e).splitlines()[0]
        raise ValueError(f"it is damaged or cut off after {n} dialogues ({why}); download it again") from e


# An escape in a JSON string: a pair of surrogates (one character in two halves), half a pair, or any other.
ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
                    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)
NO_CHARACTER = "\uffff"                               # Unicode promises that this is none


def json_pieces(file, chunk):
    """Yield the text of a JSON file in pieces of UTF-8, with half a surrogate pair written as NO_CHARACTER.

    ijson reads half a pair as a question mark, and nobody would notice. `clean_text` leaves out NO_CHARACTER.
    """
    def mark_half(escape):
        return r"\uffff" if escape["half"] else escape[0]

    while text := file.read(chunk):
        while "\\" in text[-12:]:                     # an escape, of up to 12 characters, may not be complete
            more = file.read(1)
            if not more:
                break
            text += more
        yield ESCAPE.sub(mark_half, text).encode()


def from_json(line):
    """The object in a line of JSON. Raises LeftOut."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise LeftOut("a line that is not JSON", str(e)) from e


def parse(cfg, record):
    """A record of any source -> {"id", "users", "replies", ...}, where lists have one item for each turn.

    Keys that some sources lack: "speech" and "said" (paths of the user's and the assistant's recordings),
    "units", "split", "voice", "voices" (of the user's turns), "topics", "answers", "spoken" (the replies,
    with marks that say how they are spoken). Raises LeftOut if the record does not have the form of its
    source.
    """
    if not isinstance(record, dict):
        raise LeftOut("a record that is not a JSON object", repr(record)[:80])
    if cfg.source == "tiny":
        return record
    if cfg.source == "instructs2s":
        return parse_instructs2s(record)
    if cfg.source in ("vocalnet", "slam", "hub"):
        try:
            if cfg.source == "vocalnet":
                return others.vocalnet(record, partial(whole_path, cfg))
            return others.slam(record) if cfg.source == "slam" else others.hub(record)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            why = f"there is no {e}" if isinstance(e, KeyError) else str(e)
            raise LeftOut("a record of another form, or without its units", why[:200]) from e
    return parse_turns(record, hear=cfg.source == "folder", table=cfg.path.endswith(".csv"))


def parse_instructs2s(record):
    """A record of the released JSON, see config/data_instructs2s.py."""
    turns = record.get("conversation")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LeftOut("a record without a conversation", f"it has {', '.join(map(str, record))}"[:80])
    roles = [turn.get("from") for turn in turns]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise LeftOut("turns that do not alternate", f"expected human, gpt, human ..., not {roles}"[:200])
    users, replies = turns[::2], turns[1::2]
    return {
        "id": record.get("id"),
        "users": [turn.get("text") for turn in users],
        "replies": [turn.get("text") for turn in replies],
        "speech": [turn.get("speech") for turn in users],
        "units": [turn.get("unit") for turn in replies],
    }


def parse_turns(record, hear, table):
    """A line of a JSONL or CSV file, see config/data_folder.py and config/data_text.py.

    hear     the user's turns are recordings, otherwise texts
    table    the line is from a CSV file, where "|" divides turns
    """
    known = {"id", "users", "replies"}
    if hear:
        known |= {"speech", "reply_speech"}
    for key in record:
        if key not in known:
            advice = did_you_mean(str(key), known, f"known are {', '.join(sorted(known))}")
            raise LeftOut("an unknown key", f"{key!r}; {advice}")

    def turns(key):
        value = record.get(key) or []
        if isinstance(value, str) and table:
            return [turn.strip() for turn in value.split("|")]
        if isinstance(value, list):
            return value
        return [value]

    speech, replies = turns("speech"), turns("replies")
    users = turns("users") or [os.path.basename(str(path)) for path in speech]
    said = turns("reply_speech") or [None] * len(replies)
    counts = {"users": len(users), "replies": len(replies), "reply_speech": len(said)}
    if hear:
        counts["speech"] = len(speech)
    if len(set(counts.values())) > 1 or not replies:
        raise LeftOut("turns that do not alternate", ", ".join(f"{n} {key}" for key, n in counts.items()))
    return {"id": record.get("id"), "users": users, "replies": replies, "speech": speech, "said": said}


# --------------------------------------------------------------------------- texts, sound and units

def clean_text(text):
    """A text without the whitespace around it. Raises LeftOut if what remains cannot be said.

    Whitespace cannot be heard, and a newline at the beginning would merge with the newline that the chat
    template has there: Qwen2.5 has a token for two.
    """
    if not isinstance(text, str) or not text.strip():
        raise LeftOut("an empty text", repr(text)[:80])
    text = text.strip()
    if "<|" in text or "<speech>" in text:
        raise LeftOut("a text with a special token", text[:80])
    if NO_CHARACTER in text or text.encode(errors="ignore").decode() != text:
        raise LeftOut("a text that is not Unicode", repr(text)[:80])
    return text


def below_root(cfg, path):
    """The path of a recording as the corpus keeps it, relative to audio_root.

    Raises LeftOut if the path leads out of audio_root: by "..", from "/", or through a link.
    """
    if not path or not isinstance(path, str) or "\0" in path:
        raise LeftOut("a turn without a recording", repr(path))
    if not cfg.audio_root:
        raise LeftOut("a path, and no --audio_root that it is below", path)
    root = os.path.realpath(cfg.audio_root)
    whole = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, whole]) != root:
        raise LeftOut("a path that leaves audio_root", path)
    return os.path.relpath(whole, root)


def whole_path(cfg, path):
    return os.path.join(cfg.audio_root, below_root(cfg, path))


def recording(cfg, path):
    """Read a recording, a path below audio_root or a hub's {"bytes", "path"} -> float32 tensor (samples,) at
    16 kHz. Raises LeftOut."""
    try:
        if isinstance(path, dict) and path.get("bytes"):
            return read_audio_bytes(path["bytes"], path.get("path") or "a sound")
        if isinstance(path, dict):
            path = path.get("path")
        return read_audio(whole_path(cfg, path))
    except ValueError as e:
        raise LeftOut("unreadable audio", str(e)) from e


def synthesize(cfg, text, voice):
    """Say `text` with the command cfg.tts, or with espeak-ng -> float32 tensor (samples,) at 16 kHz. Only
    espeak-ng knows marks. The sounds of the embedded world are computed either way.

    Raises LeftOut, with the last line that the command wrote to stderr.
    """
    try:
        if cfg.source == "tiny" and (cfg.tts is None or voice.startswith("sound/")):   # a cough is no text
            from tiny.voices import say_all  # here, because no other source needs it

            return torch.from_numpy(say_all([(text, voice)])[0])
        if cfg.tts is None:
            return torch.from_numpy(speak(text, voice))
        with tempfile.TemporaryDirectory() as folder:
            return run_synthesizer(cfg.tts, plain(text), voice, os.path.join(folder, "speech.wav"))
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        raise LeftOut("the synthesizer failed", str(e)) from e


def run_synthesizer(template, text, voice, wav):
    """Run a synthesizer's command, without a shell, and read the file `wav` that it writes.

    Raises OSError, ValueError or TimeoutExpired.
    """
    text = " ".join(text.split())                     # one line: some synthesizers say line by line
    argument = text.lstrip("-")                       # a text must not look like an option
    values = {"{wav}": wav, "{voice}": voice, "{text}": argument}

    def fill(word):
        return re.sub(r"\{(wav|voice|text)\}", lambda name: values[name[0]], word)

    command = [fill(word) for word in shlex.split(template)]
    stdin = None if "{text}" in template else text + "\n"
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace",
                              timeout=600)            # seconds
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it wrote nothing to stderr"]
            raise ValueError(f"exit code {done.returncode}: {lines[-1]}")
        return read_audio(wav)
    except ValueError as e:
        raise ValueError(str(e).replace(wav, "{wav}")) from e


def degrade(cfg, wav, split, seed):
    """What a microphone makes of a question of the embedded world, wav (samples,) at 16 kHz.

    In the training and the validation split another room, noise and microphone for each question, unless
    cfg.augment is off; with cfg.condition the same condition for all questions of all splits.
    """
    rng = random.Random(seed)
    if cfg.condition:
        return torch.from_numpy(CONDITIONS[cfg.condition](wav.numpy(), rng))
    if cfg.augment and split != "test":
        return torch.from_numpy(augment(wav.numpy(), rng))
    return wav


@functools.lru_cache(maxsize=10000)
def synthesized_units(cfg, encode, text):
    """The units of a reply that the synthesizer says. Replies of the embedded world occur fifteen times each
    on average."""
    return encode(synthesize(cfg, text, cfg.assistant)).tolist()


def to_units(units):
    """Units as a list of integers, or as a text such as "12 7" or "[12, 7]" -> list of integers.

    Raises LeftOut unless there is at least one and each is in 0 .. 6560.
    """
    if isinstance(units, str) and re.fullmatch(r"[-\d\s,\[\]]*", units):
        units = [int(u) for u in re.findall(r"-?\d{1,9}", units)]      # int() refuses thousands of digits
    if not isinstance(units, list) or not units or not all(type(u) is int for u in units):
        raise LeftOut("no units, or not whole numbers", repr(units)[:80])
    if min(units) < 0 or max(units) >= UNIT_VOCAB:
        raise LeftOut(f"units outside 0 .. {UNIT_VOCAB - 1}", f"from {min(units)} to {max(units)}")
    return units


# ------------------------------------------------------------------------------------------- shards

def split_by_name(name, held_out):
    """The split of a dialogue: a hash of its id, so it does not depend on what else is in the file."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2 ** 64        # from 0 to 1
    if share < held_out:
        return "test"
    if share < 2 * held_out:
        return "validation"
    return "train"


def draw_user(cfg, rng, split):
    """The voice of a dialogue's user, one of --voices. A name without numbers, such as "de", is a language or
    accent of espeak-ng, and stands for all voices of the split; so do its English accents if none is given.
    """
    voice = rng.choice(cfg.voices) if cfg.voices else None
    if voice and (cfg.tts or ":" in voice):
        return voice
    return draw_voice(rng, split, [voice] if voice else ACCENTS)


def make_row(cfg, encode, number, record):
    """Record `number` of the source -> (split, row of the corpus). Raises LeftOut.

    encode   speech, float32 tensor (samples,) at 16 kHz -> tensor of units at 25 Hz
    """
    turns = parse(cfg, record)
    name = str(turns["id"] or number)
    clean_text(name)
    users = [clean_text(text) for text in turns["users"]]
    replies = [clean_text(text) for text in turns["replies"]]
    spoken = turns.get("spoken", replies)
    n = len(replies)
    split = turns.get("split") or split_by_name(name, cfg.held_out)
    voice = turns.get("voice", "")
    read_aloud = cfg.source in ("tiny", "text") or cfg.source in ("slam", "hub") and not turns["speech"]
    if read_aloud and cfg.source != "tiny":
        voice = draw_user(cfg, random.Random(f"{cfg.seed} {name}"), split)

    speech, samples = [], []                          # they stay empty for a released JSON without recordings
    if read_aloud:
        for t, (text, of_turn) in enumerate(zip(users, turns.get("voices") or [voice] * n)):
            wav = synthesize(cfg, text, of_turn)
            if cfg.source == "tiny":
                wav = degrade(cfg, wav, split, f"{cfg.seed} {name} {t}")
            speech.append({"bytes": wav_bytes(wav.numpy()), "path": None})
            samples.append(len(wav))
    elif cfg.audio_root or cfg.source == "hub":
        for path in turns["speech"]:
            wav, kept = recording(cfg, path), {"bytes": None, "path": path}
            if isinstance(path, dict):                # it came inside of its row, and stays in ours
                kept["bytes"], kept["path"] = wav_bytes(wav.numpy()), None
            else:
                kept["path"] = below_root(cfg, path)
            speech.append(kept)
            samples.append(len(wav))

    if "units" in turns:
        units = [to_units(u) for u in turns["units"]]
    else:
        units = []
        for text, path in zip(spoken, turns.get("said") or [None] * n):
            if path:
                units.append(encode(recording(cfg, path)).tolist())
            else:
                units.append(synthesized_units(cfg, encode, text))
    return split, {"id": name, "voice": voice, "topics": turns.get("topics", [""] * n), "users": users,
                   "speech": speech, "samples": samples, "replies": replies,
                   "spoken": spoken, "answers": turns.get("answers", [""] * n), "units": units}


def shard_folder(folder, number):
    """Where shard `number` of a corpus is; it exists when it is complete."""
    return os.path.join(folder, "shards", f"{number:05d}")


def build_shard(cfg, encode, number, numbered):
    """Build a shard. numbered: iterable of (record number, record).

    The rows of a shard are in memory until it is written, with the sound that was synthesized for them: 500
    dialogues of the embedded world are 60 MB of sound, and 0.4 GB at the peak, while they are saved.
    """
    start = time.time()
    rows = {split: [] for split in SPLITS}
    left_out = []
    for i, record in numbered:
        try:
            if isinstance(record, str):
                record = from_json(record)
            split, row = make_row(cfg, encode, i, record)
            rows[split].append(row)
        except LeftOut as e:
            reason, detail = e.args
            left_out.append({"record": i, "id": name_of(record), "reason": reason, "detail": detail})
        except RecursionError as e:
            reason = "a record that is nested too deeply"
            left_out.append({"record": i, "id": None, "reason": reason, "detail": str(e)})

    folder = shard_folder(cfg.out_dir, number)
    tmp = f"{folder}.{os.getpid()}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tables = DatasetDict()
    for split in SPLITS:
        if rows[split]:                               # a folder without rows could not be loaded
            columns = {name: [row[name] for row in rows[split]] for name in FEATURES}
            tables[split] = Dataset.from_dict(columns, features=FEATURES)
    tables.save_to_disk(tmp)
    figures = {split: count(rows[split]) for split in SPLITS}
    replace_file(os.path.join(tmp, "report.json"), json.dumps({"figures": figures, "left_out": left_out}))
    replace_folder(tmp, folder)
    kept, seconds = sum(map(len, rows.values())), time.time() - start
    print(f"shard {number:05d}: {kept} dialogues, {len(left_out)} left out, {seconds:.0f} s", flush=True)


def name_of(record):
    """The id of a record of any form, None if it has none."""
    name = record.get("id") if isinstance(record, dict) else None
    return name if isinstance(name, (str, int, float)) else None


def count(rows):
    """How much a list of rows holds."""
    return {
        "dialogues": len(rows),
        "turns": sum(len(row["replies"]) for row in rows),
        "seconds": sum(sum(row["samples"]) for row in rows) / SAMPLE_RATE,
        "units": sum(len(units) for row in rows for units in row["units"]),
    }


def build_shards(cfg, processes, process):
    """One process of this rank: read the whole source, and build those of its shards that are missing.

    Every process reads the source by itself: parsing costs less than a queue between processes. Returns the
    number of shards in the whole corpus.
    """
    datasets.disable_progress_bars()
    torch.set_num_threads(1)                          # the processes share the cores
    rank = int(os.environ.get("RANK", 0))             # as accelerate and torchrun set them
    world = int(os.environ.get("WORLD_SIZE", 1))
    encode = None
    if cfg.source not in WITH_UNITS:
        encode = load_encoder(cfg.codec)
    number = -1
    shards = itertools.groupby(enumerate(records(cfg)), lambda numbered: numbered[0] // cfg.shard)
    for number, numbered in shards:
        mine = number % world == rank and number // world % processes == process
        if mine and not os.path.exists(shard_folder(cfg.out_dir, number)):
            build_shard(cfg, encode, number, numbered)
    return number + 1


def start_process():
    """Make a process of the pool end at once on Ctrl-C, and whenever the process that started it ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)    # PR_SET_PDEATHSIG


# --------------------------------------------------------------------------------------- the corpus

def build(cfg):
    """Build the corpus that `cfg` (data.DataConfig) describes, or what is missing of it; print what it holds.

    fail() with one line if the input, the tools or the disk do not allow it.
    """
    shards = read_json(cfg.out_dir, "complete.json").get("shards")
    if shards is None:
        try_tools(cfg)
    claim(cfg)
    if shards is not None:
        print(f"{cfg.out_dir} is complete already")
        next_command(cfg, report(cfg, shards))
        return
    shards = run_processes(cfg)
    missing = sum(not os.path.exists(shard_folder(cfg.out_dir, number)) for number in range(shards))
    if missing:
        print(f"{missing} of {shards} shards are missing. If other ranks are working on them, the last rank "
              "completes the corpus; otherwise run the same command again")
        return
    if not shards:
        fail(f"{cfg.path} holds no dialogues; give another --path, and delete {cfg.out_dir}")
    finish(cfg, shards)
    next_command(cfg, report(cfg, shards))


def next_command(cfg, dialogues):
    """Print how to train on the corpus, or what it lacks. dialogues: {split: how many}."""
    empty, total = [split for split, n in dialogues.items() if not n], sum(dialogues.values())
    if empty:
        enough = min(0.4, max(0.005, 20 / max(1, total)))
        print(f"\nThe corpus {cfg.out_dir} is not enough to train on and to judge: of {total} dialogues none "
              f"is in {' and '.join(empty)}. Delete the folder and build it again, with more dialogues or "
              f"with a larger share for both: --held_out {enough:.2g} instead of {cfg.held_out:g}")
        return
    if cfg.source == "tiny":
        arguments = "config/tiny_stage1.py"
    elif cfg.source != "instructs2s" or cfg.audio_root:
        arguments = f"config/stage1.py --corpus {cfg.out_dir}"
    else:
        arguments = f"config/stage1_tts.py --init_from none --corpus {cfg.out_dir}"
    print(f"\nThe corpus is {cfg.out_dir}. Next: accelerate launch train.py {arguments}")


def try_tools(cfg):
    """Try the codec and the synthesizer before anything is written. fail() if one does not work.

    A codec that does not load would stop every process, and a synthesizer that cannot say one word would cost
    all the rows.
    """
    if cfg.source not in WITH_UNITS:
        try:
            load_encoder(cfg.codec)
        except (OSError, ValueError, RuntimeError) as e:
            fail(e)
    if cfg.source not in WITH_UNITS:
        for voice in (*cfg.voices, cfg.assistant):
            if cfg.source != "tiny":                  # a language stands for many voices: try one
                voice = draw_user(replace(cfg, voices=(voice,)), random.Random(0), "train")
            try:
                synthesize(cfg, "Hello.", voice)
            except LeftOut as e:
                fail(f"voice {voice!r} does not speak: {e.args[1]}; "
                     "try --tts, --voices and --assistant by hand first")


def claim(cfg):
    """Make out_dir the folder of this corpus: meta.json holds its settings.

    fail() if another corpus is there, or if the input is missing.
    """
    settings = asdict(cfg)
    for key in ("processes", "out_dir", "show", "llm"):                # these do not change the corpus
        settings.pop(key, None)
    if cfg.source not in ("tiny", "hub"):             # hashes: what counts is the content of a file
        settings["path_sha256"] = hash_of("path", cfg.path, "the file of the dialogues")
    if cfg.source not in WITH_UNITS:
        file = cfg.codec
        if os.path.isdir(file):                       # CosyVoice 2; only its tokenizer makes units
            file = os.path.join(file, "speech_tokenizer_v2.onnx")
        settings["codec_sha256"] = hash_of("codec", file, "the nano codec's file, or CosyVoice 2's folder")
    if cfg.audio_root:
        settings["audio_root"] = os.path.abspath(cfg.audio_root)
        if not os.path.isdir(cfg.audio_root):
            fail(f"there is no folder --audio_root {cfg.audio_root}; give the one that the recordings are in")
    settings = json.loads(json.dumps(settings))       # as they are read again: tuples become lists

    if os.path.exists(os.path.join(cfg.out_dir, "meta.json")):
        before = read_json(cfg.out_dir, "meta.json")
        changed = [key for key in settings if settings[key] != before.get(key)]
        if changed:
            fail(f"{cfg.out_dir} was built with another {', '.join(changed)}; "
                 "delete it or choose another --out_dir")
        return
    try:
        os.makedirs(os.path.join(cfg.out_dir, "shards"), exist_ok=True)
        replace_file(os.path.join(cfg.out_dir, "meta.json"), json.dumps(settings, indent=2))
    except OSError as e:
        fail(f"--out_dir {cfg.out_dir} cannot be written ({e.strerror}); choose another")


def hash_of(key, file, what):
    """The hash of an input file. fail() if it cannot be read."""
    try:
        return sha256(file)
    except OSError as e:
        fail(f"there is no {key} {file} ({e.strerror}); give {what}")


def run_processes(cfg):
    """Build this rank's shards with several processes. Returns the number of shards of the whole corpus."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    processes = max(1, cfg.processes // ranks_here)   # the ranks of a machine share it
    try:
        if processes == 1:
            return build_shards(cfg, 1, 0)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, start_process) as pool:
            return max(pool.map(partial(build_shards, cfg, processes), range(processes)))
    except ValueError as e:                           # the source is damaged; repaired, it is another corpus
        fail(f"{e}; then delete {cfg.out_dir} and start again")
    except OSError as e:                              # the disk is full
        fail(f"{e}; finished shards are kept, run the same command again to resume")
    except BrokenProcessPool:
        fail("a process was killed, perhaps out of memory; run the same command again with fewer --processes")
    except KeyboardInterrupt:
        fail("stopped; finished shards are kept, run the same command again to resume")


def finish(cfg, shards):
    """Make the shards a corpus. Several ranks may do so at once; they write the same."""
    expected = {os.path.basename(shard_folder(cfg.out_dir, number)) for number in range(shards)}
    at = os.path.join(cfg.out_dir, "shards")
    for name in os.listdir(at):
        if name not in expected:                      # left behind by a killed process
            shutil.rmtree(os.path.join(at, name), ignore_errors=True)
    lines = []
    for number in range(shards):
        for entry in read_json(shard_folder(cfg.out_dir, number), "report.json")["left_out"]:
            lines.append(json.dumps(entry) + "\n")
    replace_file(os.path.join(cfg.out_dir, "left_out.jsonl"), "".join(lines))
    replace_file(os.path.join(cfg.out_dir, "complete.json"), json.dumps({"shards": shards}))


def report(cfg, shards):
    """Print what the corpus holds, one line per split, and what was left out, one line per reason -> the
    number of dialogues in each split."""
    totals = {split: Counter() for split in SPLITS}
    reasons, examples = Counter(), {}
    for number in range(shards):
        shard = read_json(shard_folder(cfg.out_dir, number), "report.json")
        for split in SPLITS:
            totals[split].update(shard["figures"][split])
        for entry in shard["left_out"]:
            reasons[entry["reason"]] += 1
            name = entry["id"] or f"record {entry['record']}"
            example = f"{name}: {entry['detail']}"[:200]
            example = example.encode(errors="replace").decode()        # it may not be Unicode
            examples.setdefault(entry["reason"], example)

    print(f"\n{'split':12}{'dialogues':>10}{'turns':>8}{'hours in':>10}{'hours out':>10}{'units':>14}")
    for split, n in totals.items():
        hours_in, hours_out = n["seconds"] / 3600, n["units"] / UNIT_RATE / 3600
        line = f"{split:12}{n['dialogues']:10,}{n['turns']:8,}"
        line += f"{hours_in:10.2f}{hours_out:10.2f}{n['units']:14,}"
        print(line)
    where = f", listed in {cfg.out_dir}/left_out.jsonl" if reasons else ""
    print(f"\nleft out: {sum(reasons.values())}{where}")
    for reason, n in reasons.most_common():
        print(f"{n:8,}  {reason}, such as {examples[reason]}")
    return {split: n["dialogues"] for split, n in totals.items()}


# ------------------------------------------------------------------------------------------ reading

def load_corpus(folder, split, hear=False):
    """Load a split of a corpus that `build` made, or of any datasets folder with the same columns.

    hear     will the user's speech be needed?
    Returns a datasets.Dataset of rows; recordings get whole paths, from the audio_root in meta.json. fail()
    if there is no such split, if it is empty or lacks speech that is needed, or if the corpus is unfinished.
    """
    shards = read_json(folder, "complete.json").get("shards")
    meta = read_json(folder, "meta.json")
    if shards is not None:
        rows = load_shards(folder, split, shards)
    elif os.path.exists(os.path.join(folder, "dataset_dict.json")):
        rows = load_from_disk(folder).get(split)
    elif meta:
        fail(f"the corpus {folder} is unfinished; run the same `python data.py` command again to complete it")
    else:
        fail(f"there is no corpus in {folder}; run `python data.py` first, or set --corpus")
    if not rows:
        fail(f"the corpus {folder} has no dialogues in the split {split!r}; "
             "build it again with a larger --held_out")
    if meta.get("audio_root"):
        rows = rows.with_transform(partial(add_root, meta["audio_root"]))
    if hear:
        if not rows[0]["speech"]:
            fail(f"the corpus {folder} holds no speech: it was built without recordings, which is enough "
                 "only for config/stage1_tts.py; build another with --audio_root and name it with --corpus")
        path = rows[0]["speech"][0]["path"]
        if path and not os.path.exists(path):
            fail(f"the corpus {folder} refers to {path}, which is missing; bring the recordings back to "
                 "where they were when it was built")
    return rows


def load_shards(folder, split, shards):
    """The rows of a split of all shards, in order; None if there are none. Files are mapped, not read."""
    parts = []
    for number in range(shards):
        shard = shard_folder(folder, number)
        if not os.path.exists(os.path.join(shard, "report.json")):
            fail(f"{shard} is missing; delete {folder}/complete.json and build the corpus again")
        part = os.path.join(shard, split)
        if os.path.exists(part):
            parts.append(load_from_disk(part))
    if parts:
        return concatenate_datasets(parts)


def fingerprint(*splits):
    """Hash of the training columns, without the audio (too slow to read). splits: datasets of rows."""
    digest = hashlib.sha256()
    for rows in splits:
        columns = rows.select_columns(["id", "users", "replies", "units", "samples"]).with_format("arrow")
        for part in columns.iter(1000):
            for column in part.columns:
                x = column.combine_chunks()
                while isinstance(x, pyarrow.ListArray):
                    digest.update(x.value_lengths().to_numpy().tobytes())
                    x = x.flatten()
                if pyarrow.types.is_integer(x.type):  # units: 200 million in the released corpus
                    digest.update(x.to_numpy().tobytes())
                else:
                    digest.update(repr(x.to_pylist()).encode())
    return digest.hexdigest()


def add_root(root, batch):
    """Give the recordings in a batch of rows their whole paths."""
    for clips in batch.get("speech", []):
        for clip in clips:
            if clip["path"]:
                clip["path"] = os.path.join(root, clip["path"])
    return batch
