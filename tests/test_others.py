"""Corpora that others built, in their own forms, small and made up. It protects what comes out of each, that
a pickle from a stranger runs nothing, and that a row of another form is left out with its reason."""
import io
import json
import os
import pickle

import datasets
import numpy as np
import pytest
import soundfile

from data import DataConfig, clips
from omni.configure import configure
from omni.corpus import LeftOut, build, load_corpus, make_row
from omni.others import hub, named, read_units


def tone(seconds, rate=16000):
    return 0.1 * np.sin(np.arange(int(seconds * rate)) / 9)


def built(at, *words):
    """Build a corpus in this process -> (rows of the training split, {id: why a record was left out})."""
    words = ["--out_dir", at / "corpus", "--processes", 1, "--held_out", 0, *words]
    build(configure(DataConfig, [str(word) for word in words]))
    lines = (at / "corpus" / "left_out.jsonl").read_text().splitlines()
    return list(load_corpus(str(at / "corpus"), "train")), {x["id"]: x for x in map(json.loads, lines)}


# --------------------------------------------------------------------------------------------------- VocalNet

class Evil:
    """A pickle that would make a folder when it is read."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def npy(path, value):
    """A .npy file with a pickled object, as np.save writes it."""
    np.save(path, np.array(value, dtype=object), allow_pickle=True)


def test_units_of_vocalnet(tmp_path):
    """A pickled dict, with a length that may be shorter; a plain array; nothing else."""
    npy(tmp_path / "dict.npy", {"speech_token": np.array([[5, 6, 6560, 0]]), "speech_token_len": [3]})
    assert read_units(tmp_path / "dict.npy") == [5, 6, 6560]
    npy(tmp_path / "whole.npy", {"speech_token": np.array([[5, 6]], np.int32)})
    assert read_units(tmp_path / "whole.npy") == [5, 6]
    np.save(tmp_path / "plain.npy", np.array([[1, 2, 3]]))
    assert read_units(tmp_path / "plain.npy") == [1, 2, 3]
    npy(tmp_path / "other.npy", {"tokens": np.array([1])})
    np.save(tmp_path / "float.npy", np.array([0.5]))
    (tmp_path / "text.npy").write_text("no array")
    for name, why in (("other", "no speech_token"), ("float", "float64"), ("text", "no units"),
                      ("no", "No such")):
        with pytest.raises(ValueError, match=why):
            read_units(tmp_path / f"{name}.npy")


def test_a_malicious_pickle_runs_nothing(tmp_path):
    """Neither alone, nor inside of the dict, nor by a function of numpy that loads more."""
    npy(tmp_path / "inside.npy", {"speech_token": Evil(str(tmp_path / "made"))})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    (tmp_path / "alone.npy").write_bytes(header.getvalue() + pickle.dumps(Evil(str(tmp_path / "made"))))
    (tmp_path / "load.npy").write_bytes(header.getvalue() + b"cnumpy\nload\n(S'x'\ntR.")
    for name, why in (("inside", "mkdir"), ("alone", "mkdir"), ("load", "numpy.load")):
        with pytest.raises(ValueError, match=f"wants to run .*{why.split('.')[-1]}"):
            read_units(tmp_path / f"{name}.npy")
    assert not (tmp_path / "made").exists()


def test_vocalnet(tmp_path):
    """Rows become rows of ours; what is damaged, leaves the folder or is malicious is left out and named."""
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", tone(0.5), 16000)
        npy(tmp_path / f"{name}.npy", {"speech_token": np.array([[7, 8, 9]]), "speech_token_len": 3})
    npy(tmp_path / "evil.npy", {"speech_token": Evil(str(tmp_path / "made"))})

    def row(name, sound="a.wav", units="a.npy", **more):
        says = [{"from": "human", "value": "<speech>"}, {"from": "gpt", "value": f"I am {name}."}]
        return {"id": name, "speech": sound, "conversations": says, "units": units} | more
    two = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "One."},
           {"from": "human", "value": "<speech>"}, {"from": "gpt", "value": "Two."}]
    rows = [row("one"), row("two", ["a.wav", "b.wav"], ["a.npy", "b.npy"], conversations=two),
            row("evil", units="evil.npy"), row("out", units="../a.npy"), row("lost", sound="no.wav"),
            row("odd", conversations=two[:1]), {"id": "bare"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    kept, lost = built(tmp_path, "--source", "vocalnet", "--path", tmp_path / "rows.json",
                       "--audio_root", tmp_path)
    assert [row["id"] for row in kept] == ["one", "two"] and kept[0]["units"] == [[7, 8, 9]]
    assert kept[0]["replies"] == ["I am one."] and kept[1]["users"] == ["Who?", "b.wav"]
    assert kept[1]["units"] == [[7, 8, 9]] * 2 and [len(x) for x in clips(kept[1])] == [8000, 8000]
    assert {name: line["reason"].split()[-1] for name, line in lost.items()} == {
        "evil": "units", "out": "audio_root", "lost": "audio", "odd": "units", "bare": "units"}
    assert "mkdir" in lost["evil"]["detail"] and "conversations" in lost["bare"]["detail"]
    assert not (tmp_path / "made").exists()


# ----------------------------------------------------------------------------------------- SLAM-Omni, the hub

def test_slam(tmp_path):
    """Its units are another codec's: the reply is spoken again, so its own tokens may be anything."""
    soundfile.write(tmp_path / "q.wav", tone(0.5), 16000)
    rows = [{"key": "a", "source_wav": "q.wav", "source_text": "Who?", "target_token": [9999],
             "target_text": "Me."}, {"key": "b", "source_wav": "q.wav"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,), lost = built(tmp_path, "--source", "slam", "--path", tmp_path / "rows.jsonl",
                         "--audio_root", tmp_path)
    assert row["users"] == ["Who?"] and row["replies"] == ["Me."]
    assert row["speech"][0]["path"].endswith("q.wav")
    assert 5 < len(row["units"][0]) < 50 and max(row["units"][0]) < 6561
    (line,) = lost.values()
    assert line["record"] == 1 and "target_text" in line["detail"]


def hub_set(folder, columns, sounds=()):
    """A data set in a folder of parquet; sounds: which columns are of the type Audio."""
    made = datasets.Dataset.from_dict(columns)
    for column in sounds:
        made = made.cast_column(column, datasets.Audio(sampling_rate=22050))
    folder.mkdir()
    made.to_parquet(folder / "train-00000-of-00001.parquet")


def sound(seconds):
    file = io.BytesIO()
    soundfile.write(file, tone(seconds, 22050), 22050, format="FLAC")
    return {"bytes": file.getvalue(), "path": "x.flac"}


def test_a_set_of_the_hub_with_sounds(tmp_path, monkeypatch):
    """UltraVoice's form: both sides recorded, inside of the rows. A damaged sound is left out."""
    hub_set(tmp_path / "set", {"number": ["a", "b", "c"], "q": [sound(0.5), {"bytes": b"x", "path": "y.wav"},
            sound(1)], "a": [sound(0.8)] * 3, "text": ["Yes.", "Yes.", "No."]}, sounds=("q", "a"))
    columns = "id=number,speech=q,reply_speech=a,replies=text"
    kept, lost = built(tmp_path, "--source", "hub", "--path", tmp_path / "set", "--columns", columns)
    assert [row["id"] for row in kept] == ["a", "c"]
    assert list(lost) == ["b"] and "y.wav" in lost["b"]["detail"]
    assert [len(clips(row)[0]) for row in kept] == [8000, 16000] and kept[1]["replies"] == ["No."]
    assert len(kept[0]["units"][0]) == 20             # 0.8 s


def test_paths_of_a_hub_set_need_a_root(tmp_path):
    """A set whose sounds are paths: without --audio_root its rows are left out with the reason."""
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    hub_set(tmp_path / "set", {"q": ["a.wav"], "a": ["Yes."], "u": [[1, 2]]})
    words = ["--source", "hub", "--path", tmp_path / "set", "--columns", "speech=q,replies=a,units=u"]
    with pytest.raises(LeftOut, match="no --audio_root"):
        make_row(DataConfig(source="hub", path="x"), None, 0, {"speech": "a.wav", "replies": "Yes."})
    (row,), _ = built(tmp_path, *words, "--audio_root", tmp_path)
    assert len(clips(row)[0]) == 8000 and row["units"] == [[1, 2]]


def test_a_set_of_the_hub_with_texts_and_units(tmp_path):
    """What is not spoken is spoken here; units that are there are taken."""
    hub_set(tmp_path / "set", {"question": ["Who are you?", "And now?"], "answer": ["Me.", "You."],
                               "tokens": [[1, 2, 3], [4]]})
    kept, _ = built(tmp_path, "--source", "hub", "--path", tmp_path / "set", "--limit", 1,
                    "--columns", "users=question,replies=answer,units=tokens")
    (row,) = kept
    assert row["units"] == [[1, 2, 3]] and len(clips(row)[0]) > 5000 and row["voice"]


@pytest.mark.parametrize("columns, why", [
    ((), "must name replies"), (("users=q",), "must name replies"),
    (("user=q", "replies=a"), "user=q must be"), (("users=", "replies=a"), "users= must be")])
def test_columns_that_do_not_do(columns, why):
    with pytest.raises(ValueError, match=why):
        named(columns)


def test_turns_of_a_hub_row():
    one = {"users": "Q", "replies": "A", "units": [1, 2]}
    assert hub(one) == {"id": None, "users": ["Q"], "replies": ["A"], "speech": [], "said": None,
                        "units": [[1, 2]]}
    two = {"users": ["Q", "R"], "replies": ["A", "B"], "units": [[1], [2]], "id": 5}
    assert hub(two)["units"] == [[1], [2]] and hub(two)["id"] == 5
    with pytest.raises(ValueError, match="2 users, 1 replies"):
        hub(two | {"replies": ["A"]})


def test_what_cannot_be_streamed_is_one_line(tmp_path, capsys):
    hub_set(tmp_path / "set", {"q": ["a"], "a": ["b"]})
    for path, columns, why in ((tmp_path / "set", "users=x,replies=a", "there is no column x; it has q, a"),
                               (tmp_path / "no", "users=q,replies=a", "no")):
        with pytest.raises(SystemExit) as stop:
            built(tmp_path, "--source", "hub", "--path", path, "--columns", columns)
        assert stop.value.code == 2 and why in capsys.readouterr().err
