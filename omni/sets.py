"""
Questions to judge a model by: benchmarks of others, or any list, in one form.

Why: whoever measures spoken chatbots collects five repositories, each with its own files. Here a set is a
name, where its rows come from, and the rule that says which replies are right (omni/score.py).

How: `read_set` gives corpus rows, as data.py makes them, with a few columns more. A row of others may name
its fields as it likes: the first that is there is taken, of the names in FIELDS. Rows come from the hub by
the set's name, or from --path: a folder (of parquet files, or as datasets saves them), or a file (JSONL,
JSON, CSV) whose sounds are paths beside it.
"""
import glob
import json
import os
import subprocess
import tempfile

import datasets
import numpy as np
import soundfile

from omni.audio import read_audio, read_audio_bytes, wav_bytes
from omni.corpus import run_synthesizer
from omni.espeak import speak
from omni.files import replace_file

READER = "en-us+m3:160:50"             # espeak-ng's voice that reads questions which have no sound
# name -> (set on the hub, its configuration, rule)
SETS = {
    "llama-questions": ("TwinkStart/llama-questions", None, "occurs"),
    "web-questions": ("TwinkStart/speech-web-questions", None, "occurs"),
    "triviaqa": ("TwinkStart/speech-triavia-qa", None, "occurs"),
    "instructs2s-eval": (None, None, "judge"),        # 199 questions of alpaca-eval; not published as a set
    "uro": (None, None, "occurs"),                    # URO-Bench: a folder with test.jsonl
    "jsonl": (None, None, "occurs"),
}
RULES = {"alpacaeval": "judge", "alpacaeval_full": "judge", "commoneval": "judge", "wildvoice": "judge",
         "advbench": "refusal", "bbh": "task", "ifeval": "instructions", "mmsu": "choice",
         "openbookqa": "choice", "sd-qa": "occurs"}             # mtbench has several turns, and is not read
SETS |= {f"voicebench/{name}": ("hlt-lab/voicebench", name, rule) for name, rule in RULES.items()}
FIELDS = {
    "id": ("id", "ID", "question_id", "index", "key"),
    "user": ("question", "Question", "prompt", "source_text", "text", "instruction", "query"),
    "sound": ("audio", "source_wav", "speech", "wav", "audio_path"),
    "references": ("references", "answers", "answer", "Answer", "reference", "target_text",
                   "official_answer"),
    "category": ("category", "topic", "task", "domain", "subset", "dataset"),
}


def field(row, name):
    """The first field of a row that serves as `name`; None if there is none."""
    return next((row[key] for key in FIELDS[name] if row.get(key) is not None), None)


def texts_of(value):
    """References in any form -> a list of texts: a text, a list, JSON of a list, or a dict with aliases."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return texts_of(json.loads(value))
        except ValueError:
            pass
    if isinstance(value, dict):
        value = [value.get("value"), *(value.get("aliases") or [])]
    if not isinstance(value, (list, tuple, np.ndarray)):
        value = [value]
    return list(dict.fromkeys(str(text).strip() for text in value if text is not None and str(text).strip()))


def read_rows(name, path):
    """Yield (split, row, folder that its paths are relative to). Raises ValueError in one line."""
    hub, configuration, _ = SETS[name]
    if path is None and hub is None:
        raise ValueError(f"--set {name}: say where it is, with --path")
    try:
        if path is None:
            tables = datasets.load_dataset(hub, configuration)
        elif os.path.isdir(path):
            lines = sorted(glob.glob(f"{path}/*.jsonl"))
            if lines:                                 # URO-Bench's layout, and metadata.jsonl
                yield from read_file(lines[0])
                return
            saved = any(os.path.exists(f"{path}/{file}") for file in ("dataset_dict.json", "state.json"))
            tables = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
        elif os.path.isfile(path):
            yield from read_file(path)
            return
        else:
            raise ValueError(f"--path {path}: there is nothing")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        why = str(e).splitlines()[0]
        if not why.startswith("--path"):
            why = f"--set {name}: it cannot be read ({why})"
        raise ValueError(why) from e
    if isinstance(tables, datasets.Dataset):
        tables = {"test": tables}
    for split, rows in tables.items():
        for column, kind in rows.features.items():
            if isinstance(kind, datasets.Audio):      # its bytes: we decode them ourselves
                rows = rows.cast_column(column, datasets.Audio(decode=False))
        for row in rows:
            yield split, row, path if path and os.path.isdir(path) else ""


def read_file(path):
    """The rows of a JSONL, JSON or CSV file."""
    kind = {"jsonl": "json", "json": "json", "csv": "csv"}.get(path.rpartition(".")[2])
    if kind is None:
        raise ValueError(f"--path {path}: a file of questions ends with .jsonl, .json or .csv")
    if path.endswith(".jsonl"):                       # by hand: rows need not have the same fields
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as e:
                        raise ValueError(f"--path {path}: line {number} is not JSON ({e})") from e
                    if not isinstance(row, dict):
                        raise ValueError(f"--path {path}: line {number} is not an object")
                    yield "test", row, os.path.dirname(path)
        return
    for row in datasets.load_dataset(kind, data_files=path, split="train"):
        yield "test", row, os.path.dirname(path)


def read_sound(value, folder):
    """A sound of a row, bytes or a path -> the bytes of a WAV file at 16 kHz, or None if the row has none.
    Raises ValueError."""
    if isinstance(value, dict):
        data, value = value.get("bytes"), value.get("path")
        if data:
            return wav_bytes(read_audio_bytes(data, value or "its sound").numpy())
    if not value:
        return None
    return wav_bytes(read_audio(os.path.join(folder, str(value))).numpy())


def read_aloud(text, tts):
    """A question's sound (n,) at 16 kHz. Raises OSError, ValueError or RuntimeError."""
    if tts is None:
        return speak(text, READER)
    with tempfile.TemporaryDirectory() as folder:
        return run_synthesizer(tts, text, "", os.path.join(folder, "speech.wav")).numpy()


def read_set(name, path, limit=None, tts=None):
    """A set's rows in the form of a corpus, one turn each. A row that cannot be asked has its reason in
    "error", and counts as wrong.

    tts      the command that reads aloud what has no sound, as data.py takes it; none: espeak-ng
    Returns  (rows, rule). Raises ValueError in one line.
    """
    if name not in SETS:
        raise ValueError(f"--set {name}: known are tiny, {', '.join(SETS)}")
    rule, rows, names = SETS[name][2], [], set()
    for number, (split, row, folder) in enumerate(read_rows(name, path)):
        if limit and number >= limit:
            break
        id, user = str(field(row, "id") if field(row, "id") is not None else number), field(row, "user")
        if id in names:                               # sd-qa asks the same in several accents
            id = f"{id}/{split}/{number}"
        names.add(id)
        references, error, sound = texts_of(field(row, "references")), None, None
        try:
            sound = read_sound(field(row, "sound"), folder)
            if sound is None and not isinstance(user, str):
                raise ValueError(f"it has neither sound ({', '.join(FIELDS['sound'])}) nor text "
                                 f"({', '.join(FIELDS['user'])})")
            if sound is None:
                sound = wav_bytes(read_aloud(user, tts))
            if rule in ("occurs", "choice", "task") and not references:
                raise ValueError(f"it has no reference ({', '.join(FIELDS['references'])})")
        except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as e:
            error = str(e).splitlines()[0]
        about = {key: x for key, x in row.items() if isinstance(x, (str, int, float, bool, list, type(None)))}
        rows.append({"id": id, "users": [user or ""], "speech": [{"bytes": sound, "path": None}],
                     "topics": [str(field(row, "category") or (id.partition("/")[0].rstrip("0123456789_-")
                                                               if rule == "task" else split))],
                     "replies": [""], "spoken": [""], "answers": [""], "references": references,
                     "error": error, "about": about, "split": split})
    if not rows:
        raise ValueError(f"--set {name}: it has no rows")
    return rows, rule


# -------------------------------------------------------------------------- for the scripts of the benchmarks

def write_forms(name, folder, model, turns, rows):
    """Write the replies as the set's own scripts read them; returns the paths.

    VoiceBench: MODEL-SUBSET-SPLIT-audio.jsonl, the row without its sound and with `response`.
    URO-Bench: question_text, pred_text and gt_text.jsonl, a line {"0000": text} for each, and audio/0000.wav.
    """
    paths = []
    for split in dict.fromkeys(row["split"] for row in rows) if name.startswith("voicebench/") else ():
        paths.append(f"{folder}/{model}-{name.split('/')[1]}-{split}-audio.jsonl")
        lines = [json.dumps(row["about"] | {"response": turn["text"]}) for turn, row in zip(turns, rows)
                 if row["split"] == split]
        replace_file(paths[-1], "\n".join(lines) + "\n")
    if name == "uro":
        columns = {"question_text": [turn["question"] for turn in turns],
                   "pred_text": [turn["text"] for turn in turns],
                   "gt_text": [" | ".join(turn["references"]) for turn in turns]}
        for column, texts in columns.items():
            paths.append(f"{folder}/{column}.jsonl")
            lines = [json.dumps({f"{i:04d}": text}) for i, text in enumerate(texts)]
            replace_file(paths[-1], "\n".join(lines) + "\n")
        os.makedirs(f"{folder}/audio", exist_ok=True)
        for i, turn in enumerate(turns):
            if turn["sound"]:
                wav, rate = soundfile.read(f"{folder}/{turn['sound']}")
                soundfile.write(f"{folder}/audio/{i:04d}.wav", wav, rate)
        paths.append(f"{folder}/audio")
    return paths


# ------------------------------------------------------------------------------------------ published figures

def published(name):
    """[(model, {figure: value}, source)] for a set, from reference/published.json."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(f"{here}/reference/published.json") as file:
        return [(row["model"], row[name], row["source"]) for row in json.load(file) if name in row]
