"""A second language: its texts, its voices, the backbones that it needs, and the script that trains it. It
protects a way that the other tests do not go, since the embedded world is English."""
import json
import os
import random
import shlex
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, run
from test_readme import keys_of
from transformers import Qwen2Tokenizer

from data import DataConfig
from omni.audio import SAMPLE_RATE
from omni.configure import read_file
from omni.corpus import build, clean_text, draw_user, from_json, load_corpus, parse, split_by_name
from omni.espeak import ACCENTS, ASSISTANT, VARIANTS, speak
from tiny import backbones
from tiny.backbones import letters_of
from tiny.codec import NanoCodec
from tiny.german import NUMBERS, dialogues
from tiny.judge import by_nano

TINY = ROOT / "tiny"
ROWS = dialogues(0)
SOURCE = DataConfig(source="text", path="german.jsonl")


def test_every_row_is_read():
    """The corpus builder takes each, and no question occurs twice, so a held-out one is new."""
    turns = [parse(SOURCE, from_json(json.dumps(row))) for row in ROWS]
    assert all(clean_text(text) == text for turn in turns for text in turn["users"] + turn["replies"])
    assert len({turn["users"][0] for turn in turns}) == len({turn["id"] for turn in turns}) == len(ROWS)
    assert len(ROWS) == 5240


def test_a_repeated_sentence_is_in_one_split():
    """What a test question asks to repeat was never a reply in training."""
    said = {"train": set(), "validation": set(), "test": set()}
    for row in ROWS:
        if row["id"].startswith("repeating"):
            said[split_by_name(row["id"], 0.04)].add(row["replies"][0])
    assert len(said["test"]) > 40 and not said["train"] & (said["test"] | said["validation"])


def test_sums_are_right():
    """By the words' numbers, in place of the table that made them."""
    value = {word: n for n, word in enumerate(NUMBERS)}
    rows = [row for row in ROWS if row["id"].startswith("sums")]
    for row in rows:
        task, _, result = row["replies"][0].lower().rstrip(".").partition(" ist ")
        first, sign, second = task.split()
        assert value[first] + {"plus": 1, "minus": -1}[sign] * value[second] == value[result]
        assert task in row["users"][0]
    assert len(rows) == 1100


@pytest.mark.parametrize("split", VARIANTS)
def test_a_language_stands_for_its_voices(split):
    """--voices de: voices of the split, that speak; without --voices English ones, and others as given."""
    rng = random.Random(0)
    for _ in range(20):
        language, _, rest = draw_user(DataConfig(voices=("de",)), rng, split).partition("+")
        assert language == "de" and rest.split(":")[0] in VARIANTS[split]
        assert draw_user(DataConfig(), rng, split).partition("+")[0] in ACCENTS
    assert draw_user(DataConfig(voices=("de+f2:155:50",)), rng, split) == "de+f2:155:50"
    assert draw_user(DataConfig(voices=("amy",), tts="cat {wav}"), rng, split) == "amy"


def test_letters():
    """What CTC spells: umlauts as vowels, ß as two letters, nothing out of range."""
    assert letters_of("Müde heißt") == letters_of("mude heisst") and max(letters_of("Größe, Œuvre?")) <= 27


@pytest.fixture(scope="module")
def german(tmp_path_factory):
    """A folder with 158 German dialogues, and backbones that were trained on them for a moment."""
    at = tmp_path_factory.mktemp("german")
    run(sys.executable, "-m", "tiny.german", "--path", at / "german.jsonl", "--share", 0.03)
    run(sys.executable, "tiny/backbones.py", "--out_dir", at, "--texts", at / "german.jsonl",
        "--held_out", 0.1, "--accents", "de", "--assistant", "de+f2:155:50", "--init_from", "tiny",
        "--figures", 4, "--parts", "qwen2,codec,whisper", "--qwen2_dialogues", 300, "--qwen2_steps", 3,
        "--codec_sentences", 1000, "--codec_steps", 2, "--whisper_clips", 64, "--whisper_steps", 3,
        "--whisper_people", 0)
    return at


def test_backbones_of_a_language(german):
    """They start from the English ones, have the language's words and phonemes, and are measured on it."""
    german_words, english_words = (Qwen2Tokenizer.from_pretrained(at / "qwen2") for at in (german, TINY))
    pieces = [len(words(" Gegenteil")["input_ids"]) for words in (german_words, english_words)]
    assert pieces[0] < pieces[1]
    codec, english = NanoCodec.load(german / "codec.pt"), NanoCodec.load(TINY / "codec.pt")
    assert "y:" in codec.phonemes and "y:" not in english.phonemes
    assert torch.allclose(codec.embed.weight, english.embed.weight, atol=0.1)
    log = (german / "backbones.log").read_text()
    for figure in ("unseen questions and voices", "unseen replies", "after the codec", "exact answers"):
        assert figure in log


def test_a_corpus_in_the_language(german):
    """data.py builds it with this codec; each row is asked in a voice of its split."""
    build(DataConfig(source="text", path=str(german / "german.jsonl"), voices=("de",), held_out=0.1, limit=60,
                     assistant="de+f2:155:50", codec=str(german / "codec.pt"), out_dir=str(german / "corpus"),
                     processes=1))
    for split in ("train", "test"):
        for row in load_corpus(str(german / "corpus"), split):
            assert row["voice"].split(":")[0].removeprefix("de+") in VARIANTS[split] and row["units"][0]


def test_the_judge_of_a_language(german):
    """It hears texts of its own words, and nothing in a clip that is too short."""
    heard = list(by_nano([speak("Drei plus vier.", "de+f2:155:50"), np.zeros(5, np.float32)], german))
    assert len(heard) == 2 and isinstance(heard[0], str) and heard[1] == ""


def test_another_voice(tmp_path):
    """--parts voice trains the decoder: units of a sound stay, its sound changes."""
    os.makedirs(tmp_path / "recordings")
    wav = speak("The sky is blue, and the grass is green.", "en-us+f2:150:60")
    soundfile.write(tmp_path / "recordings/a.wav", wav, SAMPLE_RATE)
    line = {"speech": "a.wav", "text": "The sky is blue, and the grass is green."}
    (tmp_path / "recordings/all.jsonl").write_text(json.dumps(line) + "\n")
    run(sys.executable, "tiny/backbones.py", "--out_dir", tmp_path, "--parts", "voice", "--codec_steps", 3,
        "--recordings", tmp_path / "recordings/all.jsonl")
    before, after = NanoCodec.load(TINY / "codec.pt"), NanoCodec.load(tmp_path / "codec.pt")
    units = before.encode(torch.from_numpy(wav))
    assert torch.equal(after.encode(torch.from_numpy(wav)), units)
    assert not torch.allclose(before.decode(units), after.decode(units), atol=1e-3)


def test_units_in_the_time_of_a_recording():
    """The assistant's own recording, with a second of silence before it, has the assistant's units, a second
    later."""
    codec = NanoCodec.load(TINY / "codec.pt")
    wav = torch.from_numpy(speak("Rome is the capital of Italy.", ASSISTANT))
    wav = torch.nn.functional.pad(wav, (0, -len(wav) % 640))
    later = torch.cat([0.0001 * torch.randn(SAMPLE_RATE), wav])
    units = backbones.in_time(codec, wav, later)
    assert len(units) == len(later) // 640
    assert (units[27:] == codec.encode(wav)[2:]).float().mean() > 0.9


@pytest.mark.parametrize("arguments,message", [
    (["--parts", "codec", "--texts", "nowhere.jsonl"], "--texts nowhere.jsonl cannot be read"),
    (["--parts", "voice"], "--parts voice and --recordings"),
    (["--parts", "ears"], "--parts ears: known are"),
    (["--parts", "voice", "--recordings", "nowhere"], "--recordings nowhere")])
def test_refusals(arguments, message, monkeypatch, capsys, tmp_path):
    """One line that names the thing."""
    monkeypatch.setattr(sys, "argv", ["backbones.py", "--out_dir", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as refusal:
        backbones.main()
    printed = capsys.readouterr().err.strip()
    assert refusal.value.code == 2 and message in printed and printed.count("\n") == 0


def test_the_commands_of_the_script(tmp_path):
    """runs/second_language.sh, with stand-ins for python and torchrun that print what they are asked: every
    script knows its keys, and what a step reads an earlier one has written."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "> $0 $*"\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    printed = run("bash", "runs/second_language.sh", PATH=path)
    commands = [shlex.split(line)[2:] for line in printed.splitlines() if line.startswith("> ")]
    assert len(commands) == 9
    for command in commands:
        if command[0] == "-m":
            script, words = "tiny/german.py", command[2:]
        else:
            at = next(i for i, word in enumerate(command) if word.endswith(".py"))
            script, words = command[at], command[at + 1:]
        known = keys_of(script)
        assert {word[2:] for word in words if word.startswith("--")} <= known
        for word in words:
            if word.startswith("config/"):
                assert {key for key, _, _ in read_file(str(ROOT / word))} <= known
