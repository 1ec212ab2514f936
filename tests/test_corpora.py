"""Real corpora through the real command line, on samples made up here: what is read, what is left out and why, and that
neither a kill nor the number of processes changes what comes out."""
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import load

import data
from codec import NanoCodec
from data import SPLITS, DataConfig, Dialogues, LeftOut, clips, collate, json_array, load_corpus, parse, records, to_units
from tiny.world import ASSISTANT

ROOT = Path(__file__).parent.parent
TTS = """
import math, os, struct, sys, time, wave
wav, voice = sys.argv[1:]
text = sys.stdin.read()
if "unspeakable" in text:
    sys.exit("a word is missing\\nI cannot say that")
while "slowly" in text and os.path.exists(sys.argv[0] + ".stuck"):
    time.sleep(0.05)
if "nothing" not in text:
    with wave.open(wav, "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(22050)
        tone = [math.sin(i * int(voice) / 3500) for i in range(2205 * len(text))]
        f.writeframes(struct.pack(f"<{len(tone)}h", *[int(9000 * x) for x in tone]))
"""


def command(source, out_dir, *more):
    words = (sys.executable, "data.py", f"config/data_{source}.py", "--out_dir", out_dir, "--processes", 1, *more)
    return [str(word) for word in words]


def run(*words, code=0, **env):
    """Run a command in the repository; return what it printed."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | env)
    assert done.returncode == code, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def refusal(monkeypatch, capsys, words):
    """The last line of a run that is refused with exit code 2, here without the seconds that a new process takes."""
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def rows_of(folder):
    return {split: list(load_corpus(str(folder), split)) for split in SPLITS}


def left_out(folder):
    """{id: reason} of the rows that a corpus lacks."""
    return {x["id"]: x["reason"] for x in map(json.loads, (Path(folder) / "left_out.jsonl").read_text().splitlines())}


def contents(folder):
    """The bytes of all that a corpus consists of."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def trainable(folder, stage):
    """A few dialogues of each split, laid out and made a batch, go through the model: the sum of the loss is a number."""
    omni, *tokenizers = load()
    for split in SPLITS:
        rows = Dialogues(load_corpus(str(folder), split), *tokenizers, 128, omni.R, omni.W, hear=stage != "stage1_tts")
        with torch.no_grad():
            loss, n, _ = omni(collate([rows[i] for i in range(min(4, len(rows)))]), stage)
        assert loss.isfinite() and n > 0


# ------------------------------------------------------------------------------------------------ instructs2s

def turn(role, text, **more):
    return {"from": role, "text": text} | more


def talk(name, turns=1, **change):
    """A dialogue of the released form; `change` goes into its last reply."""
    rng, conversation = random.Random(name), []
    for t in range(1, turns + 1):
        units = [rng.randrange(6561) for _ in range(rng.randrange(20, 60))]
        conversation += [turn("human", f"Question {t} of {name}?", speech=f"wav/{name}-{t}-user.wav", unit=[1, 2]),
                         turn("gpt", f"Answer {t}.", speech="no need", unit=units if rng.random() < 0.5 else str(units))]
    conversation[-1] |= change
    return {"id": name, "conversation": conversation}


def spoilt(name, turns=1, **change):
    """`change` goes into its first question."""
    row = talk(name, turns)
    row["conversation"][0] |= change
    return row


BAD = {  # reason -> the dialogues that are left out for it; the JSON alone suffices to see it
    "turns that do not alternate": [{"id": "one-role", "conversation": [turn("human", "?"), turn("human", "!")]},
                                    {"id": "no-reply", "conversation": talk("x", 2)["conversation"][:3]},
                                    {"id": "reply-first", "conversation": talk("x")["conversation"][::-1]},
                                    {"id": "no-turns", "conversation": []}],
    "a record without a conversation": [{"id": "no-conversation", "turns": []}, {"id": "text", "conversation": "Hello."}],
    "an empty text": [talk("blank", text=" "), talk("null", text=None), spoilt("unasked", text="")],
    "a text with a special token": [talk("end", text="Yes.<|im_end|>"), spoilt("speech", text="Say <speech>.")],
    "a text that is not Unicode": [talk("surrogate", text="\ud800")],
    "units outside 0 .. 6560": [talk("6561", unit=[5, 6561]), talk("minus", unit="5, -1")],
    "no units, or no whole numbers": [talk("unit-less", unit=[]), talk("unit-null", unit=None), talk("unit-float", unit=[5.5]),
                                      talk("unit-words", unit="five six")],
}
BAD_AUDIO = {  # those that only --audio_root can show
    "unreadable audio": [spoilt("missing", speech="wav/none.wav"), spoilt("not-audio", speech="wav/text.wav"),
                         spoilt("cut", 2, speech="wav/cut.flac")],
    "a path that leaves audio_root": [spoilt("up", speech="wav/../../outside.wav"), spoilt("absolute", speech="/etc/passwd"),
                                      spoilt("link", speech="wav/link.wav")],
    "a turn without a recording": [spoilt("pathless", speech=None)],
}
NAMES = [(f"en_{i}", 1 + i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released form with 60 good dialogues and many bad ones, its audio, and the corpus of the JSON alone."""
    at = tmp_path_factory.mktemp("released")
    rows = [talk(*name) for name in NAMES]
    for i, row in enumerate(row for kind in (BAD, BAD_AUDIO) for rows_ in kind.values() for row in rows_):
        rows.insert(3 * i, row)
    (at / "data.json").write_text(json.dumps(rows, indent=4))
    wav = np.sin(np.arange(8000) / 10) / 2
    (at / "audio/wav").mkdir(parents=True)
    for row in rows:
        for t in range(1, 4):
            soundfile.write(at / f"audio/wav/{row['id']}-{t}-user.wav", wav, 16000)
    soundfile.write(at / "outside.wav", wav, 16000)
    (at / "audio/wav/link.wav").symlink_to(at / "outside.wav")
    (at / "audio/wav/text.wav").write_text("Dear sir or madam,\n" * 100)
    soundfile.write(at / "audio/wav/cut.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    (at / "audio/wav/cut.flac").write_bytes((at / "audio/wav/cut.flac").read_bytes()[:9000])
    (at / "alone.out").write_text(run(*in_shards(at, "alone")))
    return at


def in_shards(at, out_dir, *more):
    return command("instructs2s", at / out_dir, "--path", at / "data.json", "--shard", 7, "--held_out", 0.2, *more)


def test_the_json_alone_trains_stage1_tts(released):
    """No audio is needed for text -> units: texts and units arrive as they were, be the units lists or texts; whoever wants
    to hear the rows is told what to do, in one line."""
    rows = rows_of(released / "alone")
    found = {row["id"]: row for split in SPLITS for row in rows[split]}
    good = [talk(*name) for name in NAMES] + [row for rows_ in BAD_AUDIO.values() for row in rows_]
    assert found.keys() == {row["id"] for row in good} and all(len(rows[split]) > 3 for split in SPLITS)
    for row in good:
        replies = row["conversation"][1::2]
        assert found[row["id"]]["replies"] == [t["text"] for t in replies] and found[row["id"]]["speech"] == []
        assert found[row["id"]]["units"] == [json.loads(str(t["unit"])) for t in replies]
    trainable(released / "alone", "stage1_tts")
    omni, *tokenizers = load()
    with pytest.raises(SystemExit) as refusal:
        Dialogues(load_corpus(str(released / "alone"), "train"), *tokenizers, 128, 3, 10)
    assert refusal.value.code == 2


def test_what_is_left_out_is_listed(released):
    """A bad row costs itself alone: each is listed under its reason, and the reasons are counted where the user looks."""
    assert left_out(released / "alone") == {row["id"]: reason for reason, rows in BAD.items() for row in rows}
    printed = (released / "alone.out").read_text()
    assert "left out: 18" in printed and "4  turns that do not alternate, such as one-role: " in printed


def test_recordings_are_referred_to(released):
    """With --audio_root rows refer to the files (345 GB are not copied) and train; what cannot be heard is left out."""
    run(*in_shards(released, "heard", "--audio_root", released / "audio"))
    reasons = {row["id"]: reason for kind in (BAD, BAD_AUDIO) for reason, rows in kind.items() for row in rows}
    assert left_out(released / "heard") == reasons
    rows = rows_of(released / "heard")
    assert sum(map(len, rows.values())) == len(NAMES) and all(len(clips(row)[0]) == 8000 for row in rows["train"])
    assert sum(p.stat().st_size for p in (released / "heard").rglob("*.arrow")) < 200_000
    trainable(released / "heard", "stage1")
    for split in SPLITS:                               # a dialogue's split depends on its id alone
        ids = [row["id"] for row in load_corpus(str(released / "alone"), split)]
        assert [row["id"] for row in rows[split]] == [i for i in ids if i in dict(NAMES)]


def test_ranks_make_the_same_corpus(released):
    """Two ranks, as accelerate or torchrun start them on one machine or two, share the shards; the last one joins them."""
    ranks = [subprocess.Popen(in_shards(released, "ranks"), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    printed = [p.communicate(timeout=300)[0] for p in ranks]
    shards = [{line.split()[1] for line in text.splitlines() if line.startswith("shard ") and ":" in line} for text in printed]
    assert [p.returncode for p in ranks] == [0, 0] and shards[0] and shards[1] and not shards[0] & shards[1]
    assert any("left out: 18" in text for text in printed)
    assert contents(released / "ranks") == contents(released / "alone")


def test_a_damaged_json_is_named(released, monkeypatch, capsys):
    """A download that was cut off is one clear line, and loses no shard that is complete; a mended one is another corpus."""
    text = (released / "data.json").read_text()
    (released / "cut.json").write_text(text[:len(text) // 2])
    words = command("instructs2s", released / "cut", "--path", released / "cut.json", "--shard", 7)
    last = refusal(monkeypatch, capsys, words)
    assert last.startswith(f"error: {released / 'cut.json'}: it is damaged or cut off after ") and "download it again" in last
    assert list((released / "cut/shards").glob("*.json")) and not (released / "cut/dataset_dict.json").exists()
    shutil.copy(released / "data.json", released / "cut.json")
    assert "was built with another path_sha256; " in refusal(monkeypatch, capsys, words)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, 1 << 16])
def test_json_array_wherever_a_chunk_ends(chunk):
    """The JSON is read in pieces; it does not matter where one ends, even between an element and its comma."""
    rows = [{"a": [1, 2, {"b": "]}[,{"}], "é": 'x"\\y'}, {"id": 2}, {}, talk("x", 2)]
    for indent in (None, 4):
        assert list(json_array(io.StringIO(json.dumps(rows, indent=indent) + "\n"), chunk)) == rows
    assert list(json_array(io.StringIO("[ ]\n"), chunk)) == []
    for text in ("", '{"id": 1}', json.dumps(rows)[:-1], "[{} {]"):
        with pytest.raises(ValueError):
            list(json_array(io.StringIO(text), chunk))


# --------------------------------------------------------------------------------------------- folder and text

@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A codec, a synthesiser, and a folder of recordings."""
    at = tmp_path_factory.mktemp("recordings")
    torch.manual_seed(0)
    NanoCodec(dim=16, phonemes="a").save(at / "codec.pt")
    (at / "tts.py").write_text(TTS)
    for name, seconds, rate in (("q", 0.5, 16000), ("a", 1.0, 44100), ("long", 70, 8000)):
        soundfile.write(at / f"{name}.flac", np.sin(np.arange(int(seconds * rate)) / 9) / 2, rate)
    return at


def test_own_recordings(recordings):
    """Recorded questions are referred to, of 70 s too; a recorded reply gives the codec's units, 25 a second; a reply that
    was not recorded is said by the synthesiser in the assistant's voice."""
    at = recordings
    good = [{"id": f"d{i}", "speech": ["q.flac", "long.flac"][:1 + (i == 0)], "replies": ["Yes.", "No."][:1 + (i == 0)],
             "reply_speech": ["a.flac", None][:1 + (i == 0)]} for i in range(12)]
    bad = {"turns that do not alternate": {"id": "b1", "speech": ["q.flac"], "replies": ["Yes.", "No."]},
           "an unknown key": {"id": "b2", "speech": ["q.flac"], "reply": ["Yes."]},
           "a path that leaves audio_root": {"id": "b3", "speech": ["../q.flac"], "replies": "Yes."},
           "an empty text": {"id": "b4", "speech": ["q.flac"], "replies": [""]},
           "the synthesiser failed": {"id": "b5", "speech": ["q.flac"], "replies": ["An unspeakable word."]}}
    lines = [json.dumps(row) for row in [*good, *bad.values()]] + ['{"id": "b6",', "\n", "[1]"]
    (at / "dialogues.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    run(*command("folder", at / "corpus", "--path", at / "dialogues.jsonl", "--audio_root", at, "--codec", at / "codec.pt",
                 "--held_out", 0.3, "--tts", f"{sys.executable} -IS {at / 'tts.py'} {{wav}} {{voice}}", "--assistant", "900"))
    listed = [json.loads(line) for line in (at / "corpus/left_out.jsonl").read_text().splitlines()]
    assert {x["reason"]: x["id"] for x in listed} == {reason: row["id"] for reason, row in bad.items()} | {
        "a line that is not JSON": None, "a record that is no JSON object": None}
    assert "exit code 1: I cannot say that" in next(x["detail"] for x in listed if x["id"] == "b5")
    assert "did you mean 'replies'?" in next(x["detail"] for x in listed if x["id"] == "b2")
    rows = {row["id"]: row for split in rows_of(at / "corpus").values() for row in split}
    assert rows.keys() == {row["id"] for row in good}
    first = rows["d0"]
    assert [len(c) for c in clips(first)] == [8000, 70 * 16000] and first["users"] == ["q.flac", "long.flac"]
    assert len(first["units"][0]) == 25 and rows["d1"]["units"] == first["units"][:1]
    assert len(first["units"][1]) == 10               # a tenth of a second a letter, "No." and the end of its line
    trainable(at / "corpus", "stage2")


def test_csv_is_the_same_as_jsonl(tmp_path):
    """A table says the same as JSON lines, turns divided by "|"."""
    rows = [{"id": "a", "users": ["One, two?", "And?"], "replies": ["Yes.", "No."]},
            {"id": "b", "users": ["Q"], "replies": ["A"]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8-sig") as f:
        table = csv.writer(f)
        table.writerows([["id", "users", "replies"], *[[r["id"], " | ".join(r["users"]), "|".join(r["replies"])] for r in rows]])
    parsed = []
    for name in ("d.jsonl", "d.csv"):
        cfg = DataConfig(source="text", path=str(tmp_path / name))
        parsed.append([parse(cfg, json.loads(r) if isinstance(r, str) else r) for r in records(cfg)])
    assert parsed[0] == parsed[1] and [p["users"] for p in parsed[0]] == [r["users"] for r in rows]
    (tmp_path / "d.csv").write_text("id,users,replies\nb,Q,A,more\n")
    with pytest.raises(LeftOut):
        parse(cfg, next(records(cfg)))


def test_a_killed_run_continues_to_the_same_corpus(recordings):
    """SIGKILL in the middle of synthesis leaves no process behind and nothing half-written; the same command makes what a
    run makes that was not killed. A synthesiser's failure costs its row alone."""
    at = recordings
    rows = [{"id": f"t{i}", "users": ["Hello there."] * (1 + i % 2), "replies": ["Yes."] * (1 + i % 2)} for i in range(16)]
    rows[8]["users"] = ["Say it slowly."]
    rows[3] |= {"users": ["The unspeakable."], "replies": ["No."]}
    rows[5] |= {"users": ["Say nothing."] * 2}
    (at / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--path", at / "texts.jsonl", "--codec", at / "codec.pt", "--shard", 2, "--held_out", 0.3,
             "--tts", f"{sys.executable} -IS {at / 'tts.py'} {{wav}} {{voice}}", "--voices", "700,800", "--assistant", "900"]
    run(*command("text", at / "straight", *words))
    reasons = left_out(at / "straight")
    assert reasons == {"t3": "the synthesiser failed", "t5": "the synthesiser failed"}

    one = command("text", at / "killed", *words)
    two = [*one]
    two[two.index("--processes") + 1] = "2"
    stuck = at / "tts.py.stuck"
    stuck.touch()
    process = subprocess.Popen(two, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    markers, end = at / "killed/shards", time.time() + 300
    while len(list(markers.glob("*.json"))) < 6:      # of 8: shard 4 has the slow row, and shard 6 waits for it
        assert time.time() < end and process.poll() is None
        time.sleep(0.05)
    children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    stuck.unlink()
    alive = lambda pid: Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
    while any(alive(pid) for pid in children):
        assert time.time() < end
        time.sleep(0.05)
    assert len(children) >= 2 and not (at / "killed/dataset_dict.json").exists() and list((at / "killed").rglob("*.tmp"))
    with pytest.raises(SystemExit):
        load_corpus(str(at / "killed"), "train")
    printed = run(*one)
    assert sum(line.startswith("shard 0") for line in printed.splitlines()) == 2
    assert contents(at / "killed") == contents(at / "straight")
    assert {row["voice"] for row in rows_of(at / "killed")["train"]} == {"700", "800"}
    trainable(at / "killed", "stage2")


def test_tools_that_do_not_work_are_refused_at_once(recordings, monkeypatch, capsys):
    """A synthesiser that cannot say one word would cost every row, after hours, and a codec that does not load all processes."""
    words = command("text", recordings / "none", "--path", recordings / "texts.jsonl", "--codec", recordings / "codec.pt")
    (recordings / "texts.jsonl").touch()
    (recordings / "text.pt").write_text("Dear sir or madam")
    for codec, message in (("text.pt", "is no file of tensors"), ("none.pt", "there is no codec")):
        assert message in refusal(monkeypatch, capsys, [*words[:-1], str(recordings / codec)])
    last = refusal(monkeypatch, capsys, [*words, "--tts", f"{sys.executable} {recordings / 'none.py'} {{wav}}"])
    assert last.startswith(f"error: voice '{ASSISTANT}' does not speak: exit code 2") and "No such file" in last
    assert not (recordings / "none").exists()          # the right command is not refused for what a wrong one left
    for tts in ("no-such-synthesiser {wav}", "cat", "cat {wav} 'open", "cat {wav} {voice}"):
        with pytest.raises(ValueError):
            DataConfig(source="text", path="x", tts=tts)


def test_units_in_any_form():
    """Whether the release writes a list or a text is not known: both are read, and nothing else is guessed at."""
    for units in ([12, 7], "12 7", "12,7", "[12, 7]", "[12 7]\n"):
        assert to_units(units) == [12, 7]
    for units in ("", "12.5", "0x1f", "<12>", [True], ["12"], [1.0], {"a": 1}, 12):
        with pytest.raises(LeftOut):
            to_units(units)
