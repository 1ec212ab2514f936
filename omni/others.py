"""
Corpora that others built: their rows in the form that omni/corpus.py takes.

Why: forms look alike and differ in their details, and a detail that is guessed wrong costs a day of training.

    vocalnet   VocalNet's JSON or JSONL: one turn a row, {"id", "speech": path, "conversations": [{"from":
               "human", ...}, {"from": "gpt", "value": text}], "units": path}. The units are CosyVoice 2's, in
               pickled .npy files; an unpickler that knows numpy's arrays and nothing else reads them
    slam       SLAM-Omni's JSONL: {"key", "source_wav", "source_text", "target_text", "target_token"}. Its
               tokens are CosyVoice 1's, whose numbers mean other sounds: replies are spoken again
    hub        any data set on the hub, or a folder of one, streamed: --path owner/name, or
               owner/name:configuration, and --columns users=question,speech=audio,replies=answer;
               reply_speech, units and id may be named, too. A text of users that has no speech is spoken.
               Each of data.py's --processes streams the whole set and keeps its share
Paths are below audio_root.
"""
import os
import pickle

import datasets
import numpy as np

COLUMNS = ("id", "users", "speech", "replies", "reply_speech", "units")
NUMPY = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
         ("numpy._core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
         ("numpy._core.multiarray", "scalar"), ("numpy._core.numeric", "_frombuffer"),
         ("numpy.core.numeric", "_frombuffer")}


class Arrays(pickle.Unpickler):
    """Unpickles numpy's arrays and plain values. Whatever else a file names is not even imported."""

    def find_class(self, module, name):
        if (module, name) not in NUMPY:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return super().find_class(module, name)


def read_array(path):
    """What a .npy file holds, also if it is a pickled dict. Raises ValueError that names the file."""
    try:
        with open(path, "rb") as file:
            major, _ = np.lib.format.read_magic(file)
            if major == 1:
                _, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                _, _, dtype = np.lib.format.read_array_header_2_0(file)
            if dtype.hasobject:
                return Arrays(file).load().item()
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError, MemoryError,
            pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: it holds no units ({e})") from e


def read_units(path):
    """VocalNet's units of a reply: a dict with "speech_token" (1, N), or the array itself -> list of
    integers. Raises ValueError."""
    units = read_array(path)
    if isinstance(units, dict):
        if "speech_token" not in units:
            raise ValueError(f"{path}: it holds {', '.join(map(str, units))}, and no speech_token")
        length = units.get("speech_token_len")
        units = np.asarray(units["speech_token"]).reshape(-1)
        if length is not None:
            units = units[:int(np.asarray(length).reshape(-1)[0])]
    units = np.asarray(units).reshape(-1)
    if units.dtype.kind not in "iu":
        raise ValueError(f"{path}: its units are of the type {units.dtype}")
    return units.tolist()


def vocalnet(record, below):
    """A row of VocalNet -> what `parse` in omni/corpus.py returns. below(path): where it is, if it does not
    leave audio_root. Raises ValueError, TypeError, KeyError or AttributeError if the row has another form."""
    turns = record["conversations"]
    roles = [turn["from"] for turn in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"expected human, gpt, human ..., not {roles}"[:200])
    speech, units = (x if isinstance(x, list) else [x] for x in (record["speech"], record["units"]))
    users = [turn["value"].replace("<speech>", "").strip() or os.path.basename(str(path))
             for turn, path in zip(turns[::2], speech, strict=True)]
    return {"id": record.get("id"), "users": users, "replies": [turn["value"] for turn in turns[1::2]],
            "speech": speech, "units": [read_units(below(path)) for path in units]}


def slam(record):
    """A row of SLAM-Omni -> the same."""
    user = record.get("source_text") or os.path.basename(record["source_wav"])
    return {"id": record.get("key"), "users": [user], "replies": [record["target_text"]],
            "speech": [record["source_wav"]] if record.get("source_wav") else [],
            "said": [record.get("target_wav")]}


def named(columns):
    """("users=question", ...) -> {"users": "question", ...}. Raises ValueError."""
    names = dict(pair.partition("=")[::2] for pair in columns)
    for key, column in names.items():
        if key not in COLUMNS or not column:
            raise ValueError(f"columns: {key}={column} must be one of {', '.join(COLUMNS)}, and a column")
    if "replies" not in names or not {"users", "speech"} & names.keys():
        raise ValueError("columns must name replies, and users or speech: --columns users=question,"
                         "replies=answer")
    return names


def hub_rows(path, columns):
    """Yield the rows of a data set on the hub, or in a folder, as {"users": ..., ...}; sounds stay encoded.
    Only one row is in memory. Raises ValueError."""
    names, (name, _, configuration) = named(columns), path.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for column, kind in (rows.features or {}).items():
            if isinstance(kind, datasets.Audio):
                rows = rows.cast_column(column, datasets.Audio(decode=False))
        missing = [column for column in names.values() if rows.features and column not in rows.features]
        if missing:
            raise ValueError(f"there is no column {', '.join(missing)}; it has {', '.join(rows.features)}")
        for row in rows:
            yield {key: row.get(column) for key, column in names.items()}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise ValueError(f"{path}: {str(e).splitlines()[0]}") from e


def hub(record):
    """A row that `hub_rows` gives -> what `parse` returns. A text or a sound is one turn, a list several."""
    def turns(key):
        value = record.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    speech, replies, units = turns("speech"), turns("replies"), turns("units")
    if units and not isinstance(units[0], (list, str)):
        units = [units]                               # of one turn
    users = turns("users") or [f"turn {t + 1}" for t in range(len(speech))]
    counts = {len(users), len(replies), *(len(x) for x in (speech, units, turns("reply_speech")) if x)}
    if len(counts) > 1 or not replies:
        raise ValueError(f"{len(users)} users, {len(replies)} replies, {len(speech)} speech")
    found = {"id": record.get("id"), "users": users, "replies": replies, "speech": speech,
             "said": turns("reply_speech") or None}
    return found | ({"units": units} if units else {})
