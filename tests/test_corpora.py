"""Corpora through the real command line, on samples made up here: what is read, what is left out and why, and
that neither a kill nor the number of processes changes the result."""
import csv
import io
import json
import os
import random
import re
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
from conftest import CHECKPOINT, load, run
from datasets import DatasetDict
from transformers import AutoTokenizer

from data import DataConfig, Dialogues, clips, collate
from omni.audio import SAMPLE_RATE, log_mel
from omni.augment import telephone
from omni.configure import configure
from omni.corpus import SPLITS, LeftOut, build, json_array, load_corpus, parse, records, synthesize, to_units
from omni.espeak import ASSISTANT, plain, speak
from tiny.codec import NanoCodec
from tiny.unclear import LANGUAGE_OF

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
    config = f"config/data_{source}.py"
    words = (sys.executable, "data.py", config, "--out_dir", out_dir, "--processes", 1, *more)
    return [str(word) for word in words]


def build_here(monkeypatch, words):
    """What `command` does, without the seconds that a new process takes to start."""
    monkeypatch.chdir(ROOT)
    build(configure(DataConfig, words[2:]))


def refusal(monkeypatch, capsys, words):
    """The last line that a build prints when it is refused with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        build_here(monkeypatch, words)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def rows_of(folder):
    return {split: list(load_corpus(str(folder), split)) for split in SPLITS}


def entries(folder):
    """What left_out.jsonl lists."""
    return [json.loads(line) for line in (Path(folder) / "left_out.jsonl").read_text().splitlines()]


def left_out(folder):
    """{id: reason} of the rows that a corpus lacks."""
    return {entry["id"]: entry["reason"] for entry in entries(folder)}


def contents(folder):
    """The bytes of all files of a corpus."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def finished_shards(folder):
    return [path for path in (Path(folder) / "shards").glob("*") if path.suffix != ".tmp"]


def trainable(folder, stage):
    """A few dialogues of each split, laid out and made a batch, give a loss that is a number."""
    omni, *tokenizers = load()
    hear = stage != "stage1_tts"
    for split in SPLITS:
        rows = Dialogues(load_corpus(str(folder), split), *tokenizers, 128, omni.R, omni.W, hear=hear)
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
        if rng.random() < 0.5:
            units = str(units)
        path = f"wav/{name}-{t}-user.wav"
        conversation.append(turn("human", f"Question {t} of {name}?", speech=path, unit=[1, 2]))
        conversation.append(turn("gpt", f"Answer {t}.", speech="no need", unit=units))
    conversation[-1] |= change
    return {"id": name, "conversation": conversation}


def spoilt(name, turns=1, **change):
    """`change` goes into its first question."""
    row = talk(name, turns)
    row["conversation"][0] |= change
    return row


BAD = {  # reason -> the dialogues that are left out for it; the JSON is enough to see it
    "turns that do not alternate": [
        {"id": "one-role", "conversation": [turn("human", "?"), turn("human", "!")]},
        {"id": "no-reply", "conversation": talk("x", 2)["conversation"][:3]},
        {"id": "reply-first", "conversation": talk("x")["conversation"][::-1]},
        {"id": "no-turns", "conversation": []}],
    "a record without a conversation": [
        {"id": "no-conversation", "turns": []}, {"id": "text", "conversation": "Hello."}],
    "an empty text": [talk("blank", text=" "), talk("null", text=None), spoilt("unasked", text="")],
    "a text with a special token": [
        talk("end", text="Yes.<|im_end|>"), spoilt("speech", text="Say <speech>.")],
    "a text that is not Unicode": [
        talk("surrogate", text="Half: \ud83d."), talk("other-half", text="\udc00")],
    "units outside 0 .. 6560": [talk("6561", unit=[5, 6561]), talk("minus", unit="5, -1")],
    "no units, or not whole numbers": [
        talk("unit-less", unit=[]), talk("unit-null", unit=None), talk("unit-float", unit=[5.5]),
        talk("unit-words", unit="five six")],
}
BAD_AUDIO = {  # what only shows with --audio_root
    "unreadable audio": [
        spoilt("missing", speech="wav/none.wav"), spoilt("not-audio", speech="wav/text.wav"),
        spoilt("cut", 2, speech="wav/cut.flac")],
    "a path that leaves audio_root": [
        spoilt("up", speech="wav/../../outside.wav"), spoilt("absolute", speech="/etc/passwd"),
        spoilt("link", speech="wav/link.wav")],
    "a turn without a recording": [spoilt("pathless", speech=None)],
}
NAMES = [(f"en_{i}", 1 + i % 3) for i in range(60)]     # of the good dialogues, with their number of turns


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released form with 60 good dialogues and many bad ones, its audio, a corpus without audio."""
    at = tmp_path_factory.mktemp("released")
    rows = [talk(*name) for name in NAMES]
    bad = [row for kind in (BAD, BAD_AUDIO) for dialogues in kind.values() for row in dialogues]
    for i, row in enumerate(bad):
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
    options = ("--path", at / "data.json", "--shard", 7, "--held_out", 0.2)
    return command("instructs2s", at / out_dir, *options, *more)


def test_the_json_alone_trains_stage1_tts(released):
    """Text -> units needs no audio: texts and units arrive unchanged, be the units lists or texts. Training
    on sound is refused with one line."""
    rows = rows_of(released / "alone")
    found = {row["id"]: row for split in SPLITS for row in rows[split]}
    good = [talk(*name) for name in NAMES] + [row for dialogues in BAD_AUDIO.values() for row in dialogues]
    assert found.keys() == {row["id"] for row in good} and all(len(rows[split]) > 3 for split in SPLITS)
    for row in good:
        ours, replies = found[row["id"]], row["conversation"][1::2]
        assert ours["replies"] == [t["text"] for t in replies] and ours["speech"] == []
        assert ours["units"] == [json.loads(str(t["unit"])) for t in replies]
    trainable(released / "alone", "stage1_tts")
    with pytest.raises(SystemExit) as refusal:
        load_corpus(str(released / "alone"), "train", hear=True)
    assert refusal.value.code == 2
    with pytest.raises(ValueError, match="holds no speech"):
        clips(rows["train"][0])


def test_what_is_left_out_is_listed(released):
    """A bad row costs only itself: each is listed with its reason, and the report counts the reasons."""
    assert left_out(released / "alone") == {row["id"]: reason for reason, rows in BAD.items() for row in rows}
    printed = (released / "alone.out").read_text()
    assert "left out: 19" in printed and "4  turns that do not alternate, such as one-role: " in printed


def test_recordings_are_referred_to(released):
    """With --audio_root rows refer to the files (345 GB are not copied); unreadable ones are left out."""
    run(*in_shards(released, "heard", "--audio_root", released / "audio"))
    reasons = {row["id"]: reason for reason, rows in (BAD | BAD_AUDIO).items() for row in rows}
    assert left_out(released / "heard") == reasons
    rows = rows_of(released / "heard")
    assert sum(map(len, rows.values())) == len(NAMES)
    assert all(len(clips(row)[0]) == 8000 for row in rows["train"])
    assert sum(p.stat().st_size for p in (released / "heard").rglob("*.arrow")) < 200_000
    trainable(released / "heard", "stage1")
    (released / "audio").rename(released / "moved")                # seen at once, before a model is loaded
    with pytest.raises(SystemExit):
        load_corpus(str(released / "heard"), "train", hear=True)
    (released / "moved").rename(released / "audio")
    load_corpus(str(released / "heard"), "train", hear=True)
    for split in SPLITS:                               # a dialogue's split depends on its id alone
        ids = [row["id"] for row in load_corpus(str(released / "alone"), split)]
        assert [row["id"] for row in rows[split]] == [i for i in ids if i in dict(NAMES)]


def test_ranks_make_the_same_corpus(released):
    """Two ranks, as accelerate or torchrun start them on one machine or two, share the shards; the last one
    completes the corpus."""
    ranks = [subprocess.Popen(in_shards(released, "ranks"), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    printed = [process.communicate(timeout=300)[0] for process in ranks]
    first, second = [set(re.findall(r"^shard (\d+):", text, re.MULTILINE)) for text in printed]
    assert [process.returncode for process in ranks] == [0, 0] and first and second and not first & second
    assert any("left out: 19" in text for text in printed)
    assert contents(released / "ranks") == contents(released / "alone")


def test_too_few_dialogues_are_not_sent_to_training(released, tmp_path, monkeypatch, capsys):
    """A split without dialogues is named, with a share that fills it, instead of a command that would be
    refused. The share is enough: built with it, all splits have some."""
    def printed(folder, share):
        options = "--path", released / "data.json", "--held_out", share
        build_here(monkeypatch, command("instructs2s", tmp_path / folder, *options))
        return capsys.readouterr().out

    few = printed("few", 0.0001)
    assert "Next" not in few and f"{tmp_path}/few is not enough" in few
    assert re.search(r"of \d+ dialogues none is in validation and test", few)
    share = re.search(r"--held_out (\S+) instead of 0.0001", few).group(1)
    assert "Next: accelerate launch" in printed("more", share)


def test_what_can_be_loaded(released, tmp_path, capsys):
    """A datasets folder with the same columns is a corpus too; a missing shard is an error."""
    rows = {split: load_corpus(str(released / "alone"), split) for split in SPLITS}
    DatasetDict(rows).save_to_disk(tmp_path / "plain")
    assert rows_of(tmp_path / "plain") == {split: list(rows[split]) for split in SPLITS}
    shutil.copytree(released / "alone", tmp_path / "gap")
    shutil.rmtree(tmp_path / "gap/shards/00003")
    for folder, split, message in (("gap", "test", "shards/00003 is missing"),
                                   ("plain", "dev", "no dialogues in the split 'dev'"),
                                   ("nowhere", "test", "there is no corpus in")):
        with pytest.raises(SystemExit):
            load_corpus(str(tmp_path / folder), split)
        assert message in capsys.readouterr().err


def test_a_damaged_json_is_named(released, monkeypatch, capsys):
    """A cut-off download gives one clear line and loses no finished shard. Repaired, it is another corpus."""
    text = (released / "data.json").read_text()
    (released / "cut.json").write_text(text[:len(text) // 2])
    words = command("instructs2s", released / "cut", "--path", released / "cut.json", "--shard", 7)
    last = refusal(monkeypatch, capsys, words)
    assert last.startswith(f"error: {released / 'cut.json'}: it is damaged or cut off after ")
    assert "download it again" in last
    assert finished_shards(released / "cut") and not (released / "cut/complete.json").exists()
    shutil.copy(released / "data.json", released / "cut.json")
    assert "was built with another path_sha256; " in refusal(monkeypatch, capsys, words)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, 1 << 16])
def test_json_array_wherever_a_chunk_ends(chunk):
    """The JSON is read in pieces; it does not matter where one ends, not even inside an escape."""
    rows = [{"a": [1, 2, {"b": "]}[,{"}], "é": 'x"\\y\\\\ud800'}, {"id": 2}, {},
            {"c": "😀😀\n\t\"", "d": 2.5}, talk("x", 2)]
    for text in (json.dumps(rows), json.dumps(rows, indent=4), json.dumps(rows, ensure_ascii=False)):
        assert list(json_array(io.StringIO(text + "\n"), chunk)) == rows
    assert list(json_array(io.StringIO("[ ]\n"), chunk)) == []
    for text in ("", '{"id": 1}', json.dumps(rows)[:-1], "[{} {]", "[1] 2"):
        with pytest.raises(ValueError):
            list(json_array(io.StringIO(text), chunk))
    halves = ["\ud83d", "\ude00", "\ude00\ud83d", "a\ud83d\ud83d\ude00b"]           # of surrogate pairs
    read = list(json_array(io.StringIO(json.dumps(halves)), chunk))
    assert read == ["\uffff", "\uffff", "\uffff\uffff", "a\uffff😀b"]


CUT_OFF = "it is damaged or cut off after 2 dialogues (parse error: premature EOF); download it again"


@pytest.mark.parametrize("content, error", [
    (b"[{}, {\xff}]", "it is not UTF-8 text"), ("[{}]".encode("utf-16"), "it is not UTF-8 text"),
    (b"", "it is not a JSON array"), (b'{"id": 1}', "it is not a JSON array"),
    (b'[{"id": 1}, {"id": 2}, {"i', CUT_OFF)])
def test_a_json_that_cannot_be_read(tmp_path, content, error):
    """One ValueError that names the file, whatever is wrong with it."""
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        list(records(DataConfig(source="instructs2s", path=str(tmp_path / "data.json"))))
    assert str(refusal.value).startswith(f"{tmp_path}/data.json: {error}")
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf [{}, 1]")         # with a byte order mark
    assert list(records(DataConfig(source="instructs2s", path=str(tmp_path / "data.json")))) == [{}, 1]


def test_a_record_that_is_nested_too_deeply(tmp_path, monkeypatch):
    """It costs only itself."""
    good = [json.dumps(talk(*name)) for name in NAMES[:8]]
    deep = "[" * 3000 + "]" * 3000
    (tmp_path / "data.json").write_text(f"[{', '.join([*good, deep])}]")
    build_here(monkeypatch, command("instructs2s", tmp_path / "corpus", "--path", tmp_path / "data.json"))
    assert [x["reason"] for x in entries(tmp_path / "corpus")] == ["a record that is nested too deeply"]
    assert len(load_corpus(str(tmp_path / "corpus"), "train")) > 4


# -------------------------------------------------------------------------------------------------- odd texts

def tokenizer_of_newlines(folder):
    """The golden checkpoint's tokenizer, with tokens for several runs of whitespace as Qwen2.5's has them."""
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINT / "checkpoint" / name, folder)
    vocab = json.loads((CHECKPOINT / "checkpoint/vocab.json").read_text())
    merges = (CHECKPOINT / "checkpoint/merges.txt").read_text().splitlines()
    n, r, space = "ĊčĠ"                                 # \n, \r and a space, as byte-level BPE writes them
    for i, (left, right) in enumerate([(n, n), (r, n), (space, n), (n + n, n), (space, space)]):
        vocab[left + right] = 360 + i
        merges.append(f"{left} {right}")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(merges))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("\n\n")["input_ids"] == [360] and tokenizer("a\r\n b")["input_ids"][1] == 361
    return tokenizer


def laid_out_as_a_whole(tokenizer, replies):
    """The ids of a dialogue if the chat template is tokenized at once, as officially; without `<speech>`."""
    messages = []
    for reply in replies:
        messages += [{"role": "user", "content": "<speech>"}, {"role": "assistant", "content": reply}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    speech = tokenizer.convert_tokens_to_ids("<speech>")
    ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i != speech]
    return ids[:-1]                                     # without the newline at the end of the template


SPACES = [chr(i) for i in range(0x110000) if chr(i).isspace()]
INVISIBLE = list("\u00ad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u200f\u202e\u2060\u2066\u3164\ufeff")
BEFORE = ["", " ", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\r\n", "\r\n\r\n", "\t\n", "\n\u00a0\n"]
AFTER = [" ", "\n", "\n\n", "\r\n", " \n "]
ODD = [before + "Hello." for before in BEFORE] + ["Hello." + after for after in AFTER]
ODD += [c + "\nHi" + c for c in SPACES + INVISIBLE] + [c + "Hi" for c in SPACES + INVISIBLE] + INVISIBLE
ODD += ["\u0301combining", "\n\u0301combining", "\n😀", "😀\n", "😀", "\u200f\u05e9\u05dc", "\n\u200f\u05e9",
        "\n's", "'s", "...\n\n", "\n...", "1\n", "\n\n1", "a\n\nb\r\nc", "\x00Hi", "\n\x00", "\x1b[0m", "<0>",
        "<sep>", "assistant\n", "\n\nuser\n"]
BLANK = ["", " ", "\n", "\n\n", " \t\r\n", "\u00a0\u2003\n", *SPACES]


def test_odd_beginnings_and_endings(tmp_path, monkeypatch):
    """However a text begins or ends, every turn is laid out as the official code does it, or left out."""
    rows = [talk(f"odd-{i}", 3) for i in range(len(ODD))] + [talk(f"blank-{i}", 2) for i in range(len(BLANK))]
    for row, text in zip(rows, ODD + BLANK):
        for said in row["conversation"][1::2]:
            said["text"] = text
    rows += [spoilt(f"unasked-{i}", text=text) for i, text in enumerate(BLANK)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    build_here(monkeypatch, command("instructs2s", tmp_path / "corpus", "--path", tmp_path / "data.json",
                                    "--held_out", 0.2))
    names = {f"{kind}-{i}" for kind in ("blank", "unasked") for i in range(len(BLANK))}
    assert left_out(tmp_path / "corpus") == dict.fromkeys(names, "an empty text")

    tokenizer, (_, _, tts_tokenizer) = tokenizer_of_newlines(tmp_path), load()

    def laid_out(rows):
        dialogues = Dialogues(rows, tokenizer, tts_tokenizer, 128, 3, 10, hear=False)
        return [dialogues[i]["ids"] for i in range(len(dialogues))]

    n = 0
    for rows in rows_of(tmp_path / "corpus").values():
        for row, ids in zip(rows, laid_out(rows)):
            assert ids == laid_out_as_a_whole(tokenizer, row["replies"]), row["replies"]
            n += 1
    assert n == len(ODD)
    raw = rows[0] | {"replies": ["\nHello."] * 3}        # as in the file: it would differ
    assert laid_out([raw])[0] != laid_out_as_a_whole(tokenizer, raw["replies"])


# -------------------------------------------------------------------------------------------- folder and text

@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A codec, a synthesizer, and a folder of recordings."""
    at = tmp_path_factory.mktemp("recordings")
    torch.manual_seed(0)
    NanoCodec(dim=16, phonemes="a").save(at / "codec.pt")
    (at / "tts.py").write_text(TTS)
    for name, seconds, rate in (("q", 0.5, 16000), ("a", 1.0, 44100), ("long", 70, 8000)):
        soundfile.write(at / f"{name}.flac", np.sin(np.arange(int(seconds * rate)) / 9) / 2, rate)
    return at


def tts_command(at):
    return f"{sys.executable} -IS {at / 'tts.py'} {{wav}} {{voice}}"


def test_own_recordings(recordings):
    """Rows refer to recorded questions, even of 70 s; a recorded reply gives the codec's units, 25 a second;
    a reply that was not recorded is said by the synthesizer in the assistant's voice."""
    at = recordings
    one = {"speech": ["q.flac"], "replies": ["Yes."], "reply_speech": ["a.flac"]}
    two = {"speech": ["q.flac", "long.flac"], "replies": ["Yes.", "No."], "reply_speech": ["a.flac", None]}
    good = [{"id": "d0"} | two] + [{"id": f"d{i}"} | one for i in range(1, 12)]
    bad = {"turns that do not alternate": {"id": "b1", "speech": ["q.flac"], "replies": ["Yes.", "No."]},
           "an unknown key": {"id": "b2", "speech": ["q.flac"], "reply": ["Yes."]},
           "a path that leaves audio_root": {"id": "b3", "speech": ["../q.flac"], "replies": "Yes."},
           "an empty text": {"id": "b4", "speech": ["q.flac"], "replies": [""]},
           "the synthesizer failed": {"id": "b5", "speech": ["q.flac"], "replies": ["An unspeakable word."]}}
    lines = [json.dumps(row) for row in [*good, *bad.values()]] + ['{"id": "b6",', "\n", "[1]"]
    (at / "dialogues.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    options = ["--path", at / "dialogues.jsonl", "--audio_root", at, "--codec", at / "codec.pt",
               "--held_out", 0.3, "--tts", tts_command(at), "--assistant", "900"]
    run(*command("folder", at / "corpus", *options))
    expected = {reason: row["id"] for reason, row in bad.items()}
    expected |= {"a line that is not JSON": None, "a record that is not a JSON object": None}
    assert {entry["reason"]: entry["id"] for entry in entries(at / "corpus")} == expected
    details = {entry["id"]: entry["detail"] for entry in entries(at / "corpus")}
    assert "exit code 1: I cannot say that" in details["b5"] and "did you mean 'replies'?" in details["b2"]
    rows = {row["id"]: row for split in rows_of(at / "corpus").values() for row in split}
    assert rows.keys() == {row["id"] for row in good}
    first = rows["d0"]
    assert [len(c) for c in clips(first)] == [8000, 70 * 16000] and first["users"] == ["q.flac", "long.flac"]
    assert len(first["units"][0]) == 25 and rows["d1"]["units"] == first["units"][:1]
    assert len(first["units"][1]) == 10               # 0.1 s a letter: "No." and the end of its line
    trainable(at / "corpus", "stage2")


def test_csv_is_the_same_as_jsonl(tmp_path):
    """A table says the same as JSON lines, with turns divided by "|"."""
    rows = [{"id": "a", "users": ["One, two?", "And?"], "replies": ["Yes.", "No."]},
            {"id": "b", "users": ["Q"], "replies": ["A"]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8-sig") as f:
        table = csv.writer(f)
        table.writerow(["id", "users", "replies"])
        for row in rows:
            table.writerow([row["id"], " | ".join(row["users"]), "|".join(row["replies"])])
    parsed = []
    for name in ("d.jsonl", "d.csv"):
        cfg = DataConfig(source="text", path=str(tmp_path / name))
        parsed.append([parse(cfg, json.loads(r) if isinstance(r, str) else r) for r in records(cfg)])
    assert parsed[0] == parsed[1] and [p["users"] for p in parsed[0]] == [r["users"] for r in rows]
    (tmp_path / "d.csv").write_text("id,users,replies\nb,Q,A,more\n")
    with pytest.raises(LeftOut):
        parse(cfg, next(records(cfg)))


def test_a_killed_run_resumes_to_the_same_corpus(recordings, capsys):
    """SIGKILL in the middle of synthesis leaves no process behind and nothing half-written. The same command
    then makes what a run makes that was not killed. A synthesizer's failure costs only its row."""
    at = recordings
    rows = []
    for i in range(16):
        turns = 1 + i % 2
        rows.append({"id": f"t{i}", "users": ["Hello there."] * turns, "replies": ["Yes."] * turns})
    rows[8]["users"] = ["Say it slowly."]
    rows[3] |= {"users": ["The unspeakable."], "replies": ["No."]}
    rows[5] |= {"users": ["Say nothing."] * 2}
    (at / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--path", at / "texts.jsonl", "--codec", at / "codec.pt", "--shard", 2, "--held_out", 0.3,
             "--tts", tts_command(at), "--voices", "700,800", "--assistant", "900"]
    run(*command("text", at / "straight", *words))
    reasons = left_out(at / "straight")
    assert reasons == {"t3": "the synthesizer failed", "t5": "the synthesizer failed"}

    one = command("text", at / "killed", *words)
    two = [*one]
    two[two.index("--processes") + 1] = "2"
    stuck = at / "tts.py.stuck"
    stuck.touch()
    process = subprocess.Popen(two, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 300
    while len(finished_shards(at / "killed")) < 6:    # of 8: shard 4 has the slow row, shard 6 waits for it
        assert time.time() < end and process.poll() is None
        time.sleep(0.05)
    children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    stuck.unlink()

    def alive(pid):
        return Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()

    while any(alive(pid) for pid in children):
        assert time.time() < end
        time.sleep(0.05)
    assert len(children) >= 2 and not (at / "killed/complete.json").exists()
    with pytest.raises(SystemExit):
        load_corpus(str(at / "killed"), "train")
    assert "is unfinished; run the same `python data.py` command again" in capsys.readouterr().err
    debris = at / "killed/shards/00004.4711.tmp/train"         # as a kill while a shard is written leaves it
    debris.mkdir(parents=True)
    (debris / "data-00000-of-00001.arrow").write_text("half")
    printed = run(*one)
    assert sum(line.startswith("shard 0") for line in printed.splitlines()) == 2
    assert contents(at / "killed") == contents(at / "straight")
    assert {row["voice"] for row in rows_of(at / "killed")["train"]} == {"700", "800"}
    trainable(at / "killed", "stage2")


def test_tools_that_do_not_work_are_refused_at_once(recordings, monkeypatch, capsys):
    """A synthesizer that cannot say one word would cost every row, after hours; a codec that does not load
    would stop every process."""
    words = command("text", recordings / "none", "--path", recordings / "texts.jsonl",
                    "--codec", recordings / "codec.pt")
    (recordings / "texts.jsonl").touch()
    (recordings / "text.pt").write_text("Dear sir or madam")
    for codec, message in (("text.pt", "is not a file of tensors"), ("none.pt", "there is no codec")):
        assert message in refusal(monkeypatch, capsys, [*words[:-1], str(recordings / codec)])
    no_script = f"{sys.executable} {recordings / 'none.py'} {{wav}}"
    last = refusal(monkeypatch, capsys, [*words, "--tts", no_script])
    assert last.startswith(f"error: voice '{ASSISTANT}' does not speak: exit code 2")
    assert "No such file" in last
    assert not (recordings / "none").exists()          # nothing for which the right command would be refused
    for tts in ("no-such-synthesizer {wav}", "cat", "cat {wav} 'open", "cat {wav} {voice}"):
        with pytest.raises(ValueError):
            DataConfig(source="text", path="x", tts=tts)


# ----------------------------------------------------------------------------------------- the embedded world

def test_a_synthesizer_is_not_asked_to_hum():
    """With --tts the user's command says the texts of the embedded world, but not its sounds: those are
    computed, 0.8 s of hum here, also where the command cannot say a word."""
    cfg = DataConfig(tts="false {wav}")
    assert len(synthesize(cfg, "(hum)", "sound/hum:0.8:17")) == pytest.approx(0.8 * SAMPLE_RATE, abs=1)
    with pytest.raises(LeftOut):
        synthesize(cfg, "Hello.", "en-us+f3:150:40")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The same few dialogues as a corpus with and without augmentation, and in one condition."""
    at = tmp_path_factory.mktemp("worlds")
    torch.manual_seed(0)
    NanoCodec(dim=16, phonemes="a").save(at / "codec.pt")
    corpora = {}
    for name, options in (("rooms", []), ("plain", ["--augment", False]),
                          ("telephone", ["--condition", "telephone"])):
        with pytest.MonkeyPatch.context() as patch:
            build_here(patch, tiny_command(at, name, *options))
        corpora[name] = rows_of(at / name)
    return at, corpora


def tiny_command(at, out_dir, *more):
    sizes = "--train", 24, "--validation", 6, "--test", 24
    words = (sys.executable, "data.py", "--out_dir", at / out_dir, "--codec", at / "codec.pt",
             "--processes", 1, "--seed", 2, "--people", False, *sizes, *more)
    return [str(word) for word in words]


def clips_of(rows):
    """[(text, clip (samples,))] of all questions."""
    return [(text, clip.numpy()) for row in rows for text, clip in zip(row["users"], clips(row), strict=True)]


def alike(one, other):
    """Are these renderings of the same text? espeak-ng keeps a state: samples differ, and one may end 60 ms
    later. We compare the mean log-mels, in which 0.1 is 4 dB; renderings differ by up to 0.04, and a
    telephone makes a difference of 0.7 or more."""
    means = [log_mel(torch.from_numpy(wav), 80, pad=False).mean(1) for wav in (one, other)]
    difference = (means[0] - means[1]).abs().max().item()
    return difference < 0.1 and abs(len(one) - len(other)) < 0.07 * SAMPLE_RATE


def test_replies_are_spoken_with_their_marks(worlds):
    """The texts are learned without marks; the units are of the speech with them, so they take longer."""
    at, corpora = worlds
    stressed = 0
    for row in corpora["plain"]["train"] + corpora["plain"]["test"]:
        assert row["replies"] == [plain(text) for text in row["spoken"]]
        for spoken, units in zip(row["spoken"], row["units"]):
            assert abs(len(units) - 25 * len(speak(spoken, ASSISTANT)) / SAMPLE_RATE) < 2.6
            stressed += "<stress>" in spoken
    assert stressed > 15
    for name in ("rooms", "telephone"):               # the sound of the questions changes nothing else
        for split in SPLITS:
            for a, b in zip(corpora[name][split], corpora["plain"][split], strict=True):
                assert all(a[key] == b[key] for key in ("id", "users", "replies", "spoken", "answers"))


def test_only_training_questions_are_augmented(worlds):
    """--augment changes most questions of the training and the validation split, the test's stay clean."""
    _, corpora = worlds
    for split, least, most in (("train", 0.6, 0.95), ("validation", 0.5, 1), ("test", 0, 0)):
        pairs = list(zip(clips_of(corpora["rooms"][split]), clips_of(corpora["plain"][split]), strict=True))
        changed = [not alike(heard, said) for (_, heard), (_, said) in pairs]
        assert least <= np.mean(changed) <= most, (split, changed)


def test_plain_questions_are_what_their_voices_say(worlds):
    """English and other languages by espeak-ng, and sounds of their seconds; in the training split, too."""
    _, corpora = worlds
    kinds = set()
    for split in SPLITS:
        for row in corpora["plain"][split]:
            for (text, clip), samples in zip(clips_of([row]), row["samples"]):
                assert len(clip) == samples
                if text.startswith("("):
                    assert 0.8 * SAMPLE_RATE <= samples <= 4 * SAMPLE_RATE and samples % 1600 == 0
                    kinds.add("sound")
                elif text not in LANGUAGE_OF:
                    assert alike(clip, speak(text, row["voice"])), (text, row["voice"])
                    kinds.add("english")
                else:
                    kinds.add("foreign")
    assert kinds == {"english", "foreign", "sound"}


def test_a_condition_is_that_of_the_test(worlds):
    """--condition telephone: every test question, and nothing but the line between it and the plain one."""
    _, corpora = worlds
    plain_clips, heard = clips_of(corpora["plain"]["test"]), clips_of(corpora["telephone"]["test"])
    for (text, said), (_, wav) in zip(plain_clips, heard, strict=True):
        if not text.startswith("("):                  # 16 bits hide what the line leaves of some sounds
            assert alike(telephone(said), wav) and not alike(said, wav), text


def test_an_unknown_condition_is_refused(tmp_path, monkeypatch, capsys):
    last = refusal(monkeypatch, capsys, tiny_command(tmp_path, "c", "--condition", "underwater"))
    assert "condition is 'underwater'; it must be one of babble, fan, room, telephone" in last
    assert not (tmp_path / "c").exists()


def test_voices_of_the_users(worlds, monkeypatch):
    """--voices: all English questions come from these; sounds and other languages stay what they are."""
    at, corpora = worlds
    voice = "en-us+f3:150:40"
    build_here(monkeypatch, tiny_command(at, "one voice", "--voices", voice))
    rows = load_corpus(str(at / "one voice"), "test")
    assert set(rows["voice"]) == {voice}
    for text, clip in clips_of(rows):
        if not text.startswith("(") and text not in LANGUAGE_OF:
            assert alike(clip, speak(text, voice)), text


def test_units_in_any_form():
    """We do not know whether the release writes a list or a text: both are read, and nothing else."""
    for units in ([12, 7], "12 7", "12,7", "[12, 7]", "[12 7]\n"):
        assert to_units(units) == [12, 7]
    for units in ("", "12.5", "0x1f", "<12>", [True], ["12"], [1.0], {"a": 1}, 12):
        with pytest.raises(LeftOut):
            to_units(units)
