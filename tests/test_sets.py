"""Benchmarks of others in their own forms, small and made up: hub sets as parquet, VoiceBench, URO-Bench, and
lists of questions. It protects that a row is read whatever its fields are called, that one which cannot be
read is named, and what goes out to a benchmark's own scripts."""
import io
import json

import datasets
import numpy as np
import pytest
import soundfile

from omni.audio import read_wav, wav_bytes
from omni.sets import SETS, published, read_set, texts_of, write_forms


def sound(seconds, rate=16000, kind="WAV"):
    """The bytes of a sound file."""
    file = io.BytesIO()
    wav = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * rate))
    soundfile.write(file, wav, rate, format=kind)
    return file.getvalue()


def with_audio(columns):
    """A Dataset whose column "audio" has the type Audio, without a codec that could encode it."""
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(sampling_rate=16000))


def hub_set(folder, columns, **audio):
    """A set as it lies on the hub: parquet."""
    made = with_audio(columns | {"audio": [{"bytes": sound(0.5, **audio), "path": "a.wav"}]})
    (folder / "data").mkdir()
    made.to_parquet(folder / "data" / "test-00000-of-00001.parquet")


@pytest.mark.parametrize("name, columns, references", [
    ("llama-questions", {"Questions": ["x"], "Answer": ["Paris"]}, ["Paris"]),
    ("web-questions", {"question": ["Who?"], "answers": [["Jazmyn", "Bieber"]]}, ["Jazmyn", "Bieber"]),
    ("web-questions", {"question": ["Who?"], "answers": ['["Jazmyn", "Bieber"]']}, ["Jazmyn", "Bieber"]),
    ("triviaqa", {"question": ["Who?"], "answer": ['{"value": "Rome", "aliases": ["Roma", "Rome"]}']},
     ["Rome", "Roma"]),
    ("voicebench/openbookqa", {"prompt": ["A or B?"], "reference": ["B"]}, ["B"]),
    ("voicebench/bbh", {"prompt": ["Is it so?"], "reference": ["yes"], "id": ["navigate_12"]}, ["yes"]),
    ("voicebench/advbench", {"prompt": ["How do I rob a bank?"]}, [])])
def test_sets_of_the_hub(tmp_path, name, columns, references):
    """Compressed or at another rate, the sound is what the model hears: 16 kHz."""
    hub_set(tmp_path, columns, rate=24000, kind="FLAC")
    (row,), rule = read_set(name, str(tmp_path))
    assert rule == SETS[name][2] and row["references"] == references and row["error"] is None
    assert len(read_wav(row["speech"][0])) == 8000
    assert row["topics"] == ["navigate" if name.endswith("bbh") else "test"]


def test_a_saved_set_and_several_splits(tmp_path):
    """sd-qa asks the same in several accents: each is a row, and the split its category."""
    rows = datasets.Dataset.from_dict({"id": ["1", "2"], "prompt": ["a", "b"], "reference": ["x", "y"]})
    datasets.DatasetDict({"usa": rows, "aus": rows}).save_to_disk(tmp_path)
    found, _ = read_set("voicebench/sd-qa", str(tmp_path))
    assert [row["topics"] for row in found] == [["usa"]] * 2 + [["aus"]] * 2
    assert len({row["id"] for row in found}) == 4
    assert all(len(read_wav(row["speech"][0])) > 2000 for row in found)       # read aloud
    assert len(read_set("voicebench/sd-qa", str(tmp_path), limit=3)[0]) == 3


def test_lists_and_uro_bench(tmp_path):
    """Paths are relative to the file; a folder with test.jsonl is URO-Bench's layout."""
    soundfile.write(tmp_path / "a.wav", 0.1 * np.ones(4000), 8000)
    rows = [{"source_wav": "a.wav", "source_text": "What?", "target_text": "Yes."},
            {"source_wav": "b.wav", "source_text": "What?", "target_text": "Yes."},
            {"source_text": "Say it.", "target_text": ""}, {"target_text": "Yes."}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    for name, path in (("uro", tmp_path), ("jsonl", tmp_path / "test.jsonl")):
        found, _ = read_set(name, str(path))
        assert len(read_wav(found[0]["speech"][0])) == 8000 and found[0]["references"] == ["Yes."]
        errors = [row["error"] for row in found]
        assert errors[0] is None and "b.wav: there is no such file" in errors[1]
        assert "no reference" in errors[2] and "neither sound" in errors[3]
    (tmp_path / "rows.csv").write_text("id,question,answer\n7,What?,Yes.\n")
    (row,), _ = read_set("jsonl", str(tmp_path / "rows.csv"))
    assert row["id"] == "7" and row["users"] == ["What?"] and row["references"] == ["Yes."]


@pytest.mark.parametrize("content, line", [
    ('{"a": 1}\n[1]\n', "line 2 is not an object"), ("{", "line 1 is not JSON"), ("", "it has no rows")])
def test_damaged_lists(tmp_path, content, line):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=line):
        read_set("jsonl", str(tmp_path / "rows.jsonl"))


def test_what_cannot_be_a_set(tmp_path):
    (tmp_path / "rows.txt").write_text("hello")
    for name, path, line in (("jsonl", None, "with --path"),
                             ("jsonl", tmp_path / "rows.txt", "ends with .jsonl"),
                             ("voicebench", None, "known are"), ("uro", tmp_path / "no", "there is nothing")):
        with pytest.raises(ValueError, match=line):
            read_set(name, path and str(path))


def test_bad_sounds_are_named(tmp_path):
    """Bytes that are no sound, silence, a fraction of a second: the row says which, the others are there."""
    columns = {"question": ["a", "b", "c", "d"], "answer": ["x"] * 4,
               "audio": [{"bytes": b"nothing", "path": "one.wav"}, {"bytes": sound(0.01), "path": "two.wav"},
                         {"bytes": wav_bytes(np.zeros(8000)), "path": "three.wav"},
                         {"bytes": sound(0.5), "path": None}]}
    with_audio(columns).save_to_disk(tmp_path)
    errors = [row["error"] for row in read_set("web-questions", str(tmp_path))[0]]
    for error, name, why in zip(errors, ("one", "two", "three"), ("cannot be read", "lasts", "silent")):
        assert f"{name}.wav" in error and why in error
    assert errors[3] is None


def test_references_in_any_form():
    assert texts_of(None) == [] and texts_of(" ") == [] and texts_of(5) == ["5"]
    assert texts_of("[not json") == ["[not json"] and texts_of(["a", "", None, "a"]) == ["a"]


def test_forms_for_the_scripts_of_others(tmp_path):
    (tmp_path / "sound").mkdir()
    soundfile.write(tmp_path / "sound" / "0-1.flac", np.full(1600, 0.1), 16000)
    turns = [{"question": "Q?", "text": "B.", "references": ["B"], "sound": "sound/0-1.flac"},
             {"question": "R?", "text": "", "references": ["A"], "sound": None}]
    rows = [{"about": {"prompt": "Q?", "reference": "B"}, "split": "usa"},
            {"about": {"prompt": "R?", "reference": "A"}, "split": "aus"}]
    paths = write_forms("voicebench/sd-qa", tmp_path, "ours", turns, rows)
    assert [path.rpartition("/")[2] for path in paths] == ["ours-sd-qa-usa-audio.jsonl",
                                                           "ours-sd-qa-aus-audio.jsonl"]
    assert [[json.loads(line) for line in open(path)] for path in paths] == [
        [{"prompt": "Q?", "reference": "B", "response": "B."}],
        [{"prompt": "R?", "reference": "A", "response": ""}]]
    write_forms("uro", tmp_path, "ours", turns, rows)
    for name, texts in (("pred_text", ["B.", ""]), ("question_text", ["Q?", "R?"]), ("gt_text", ["B", "A"])):
        lines = [json.loads(line) for line in open(tmp_path / f"{name}.jsonl")]
        assert lines == [{"0000": texts[0]}, {"0001": texts[1]}]
    assert [path.name for path in (tmp_path / "audio").iterdir()] == ["0000.wav"]
    assert write_forms("jsonl", tmp_path, "ours", turns, rows) == []


def test_published_figures():
    """The paper's table 1, as reference/paper.md has it, and where each figure is from."""
    found = {model: values for model, values, source in published("llama-questions") if source}
    assert found["LLaMA-Omni2-7B"] == {"s2t": 70.3, "s2s": 60.7} and len(found) == 11
    assert dict((m, v) for m, v, _ in published("instructs2s-eval"))["LLaMA-Omni2-0.5B"]["wer"] == 2.64
    assert published("tiny") == []
