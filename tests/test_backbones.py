"""The backbones in tiny/ are what tiny/backbones.log says: a sample of each figure of merit, computed anew
from the shipped files on the test split. It protects against files that fit neither the code nor the world
they were made for."""
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import whisper
from conftest import run
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from eval import by_transformers, typed_replies
from omni.audio import SAMPLE_RATE
from omni.augment import CONDITIONS
from omni.checkpoint import load_whisper
from omni.espeak import ACCENTS, ASSISTANT, UNSEEN_ACCENT, plain, speak
from omni.judges import language_model, transcribe
from omni.score import word_error_rate
from tiny import backbones, voices
from tiny.codec import NanoCodec
from tiny.unclear import LANGUAGE_OF
from tiny.world import dialogue

TINY = Path(__file__).parent.parent / "tiny"
LOG = (TINY / "backbones.log").read_text()


def logged(pattern):
    """The last number that the log states for this figure."""
    return float(re.findall(pattern + r"\D*?(-?[\d.]+)", LOG)[-1])


def test_sizes():
    """Each file is at most 8 MB, all together at most 20 MB."""
    suffixes = (".pt", ".json", ".safetensors", ".jinja", ".log")
    sizes = [f.stat().st_size for f in TINY.rglob("*") if f.is_file() and f.suffix in suffixes]
    assert max(sizes) <= 8e6 and sum(sizes) <= 20e6


def whisper_error_rate(jobs, condition=None):
    """WER in percent of the shipped Whisper on [(text, voice)]."""
    model = whisper.load_model(str(TINY / "whisper.pt"), device="cpu")
    model.encoder = load_whisper(str(TINY / "whisper.pt"))        # hears clips at their own length
    tokenizer = Qwen2Tokenizer.from_pretrained(TINY / "qwen2")
    heard = backbones.whisper_transcribe(model, tokenizer, backbones.clean_job((jobs, condition)))
    return 100 * word_error_rate([text for text, _ in jobs], heard)


@pytest.mark.parametrize("accents,figure", [(ACCENTS, "unseen sentences and voices:"),
                                            ([UNSEEN_ACCENT], "in an unseen accent:")])
def test_whisper(accents, figure):
    """Word error rate on unseen sentences in unseen voices, and in an accent that it never heard."""
    jobs = backbones.questions(random.Random(7), "test", 80, accents)
    assert whisper_error_rate(jobs) < logged(f"whisper: WER on .*{figure}") + 4


@pytest.mark.parametrize("condition", CONDITIONS)
def test_whisper_in_noise(condition):
    """The same with other voices, a fan, a room or a telephone between the speaker and the model. In babble
    single questions are lost as a whole, so figures of few questions scatter (16 % of 60 were seen)."""
    jobs = backbones.questions(random.Random(8), "test", 120)
    assert whisper_error_rate(jobs, condition) < logged(f"whisper: WER on .* with {condition}:") + 8


AWB = voices.missing(["flite/awb"])


@pytest.mark.skipif(bool(AWB), reason="; ".join(AWB))
def test_whisper_hears_a_person():
    """A voice of the validation split, made from recordings of a man whom training never heard."""
    jobs = [(text, "flite/awb:1.00:1.00:1.00")
            for text, _ in backbones.questions(random.Random(9), "test", 60)]
    assert whisper_error_rate(jobs) < logged("whisper: WER on .* of flite/awb:") + 6


def test_a_question_as_it_is_heard():
    """Every word in its order, at most two in a row of 100 ms, some in two rows in a row, gaps between them:
    somewhat more rows than espeak-ng's speech of it has."""
    rng, tokenizer = random.Random(0), Qwen2Tokenizer.from_pretrained(TINY / "qwen2")
    shares = []
    for text, voice in backbones.questions(rng, "train", 60):
        ids = tokenizer(text)["input_ids"]
        rows = backbones.heard(rng, ids, [len(tokenizer.decode([token])) for token in ids])
        assert all(first >= 0 or second < 0 for first, second in rows)
        said = [token for row in rows for token in row if token >= 0]
        left = iter(said)
        assert all(token in left for token in ids) and set(said) == set(ids)
        shares.append(len(rows) / (10 * len(speak(text, voice)) / SAMPLE_RATE))
    assert 1 < sum(shares) / len(shares) < 2          # and pauses, which espeak-ng does not make


def test_a_dialogue_as_rows():
    """Typed, the rows are the chat template's own tokens, and the labels what the assistant says; heard, only
    the questions differ."""
    tokenizer, rng = Qwen2Tokenizer.from_pretrained(TINY / "qwen2"), random.Random(3)
    turns = [turn for _ in range(3) for turn in dialogue(rng, "train")]
    chat = [{"role": who, "content": turn[key]} for turn in turns
            for who, key in (("user", "user"), ("assistant", "assistant"))]
    whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    typed = backbones.labelled_dialogue(random.Random(0), tokenizer, turns, spoken=False)
    assert typed[:, 0].tolist() == whole and (typed[:, 1] == -1).all() and not typed[:, 3].any()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [[*tokenizer(turn["assistant"])["input_ids"], end] for turn in turns]
    assert [x for x in typed[:, 2].tolist() if x != backbones.IGNORE] == [x for ids in said for x in ids]
    spoken = backbones.labelled_dialogue(random.Random(0), tokenizer, turns, spoken=True)
    heard = spoken[:, 3] == 1
    assert heard.any() and (spoken[heard, 2] == backbones.IGNORE).all()
    outside = [row for row in typed[:, 0].tolist()]
    for turn in turns:
        for token in tokenizer(turn["user"])["input_ids"]:
            outside.remove(token)
    assert sorted(spoken[~heard, 0].tolist()) == sorted(outside)


def test_qwen2():
    """Exact answers to typed questions that it never read."""
    rng = random.Random(7)
    rows = []
    for _ in range(40):
        asked = dialogue(rng, "test")
        rows.append({"users": [turn["user"] for turn in asked],
                     "replies": [turn["assistant"] for turn in asked]})
    model = Qwen2ForCausalLM.from_pretrained(TINY / "qwen2")
    tokenizer = Qwen2Tokenizer.from_pretrained(TINY / "qwen2")
    typed = typed_replies(rows, tokenizer, by_transformers(model, tokenizer, 60))
    right = [a == b for a, b in zip(typed, (reply for row in rows for reply in row["replies"]))]
    assert 100 * sum(right) / len(right) > logged("qwen2: exact answers to unseen typed questions:") - 5


def test_codec():
    """What an independent recognizer hears after units and back, compared with what it hears in the
    original."""
    codec = NanoCodec.load(TINY / "codec.pt")
    taught = [plain(text) for text in backbones.replies(random.Random(1), "train", 1000)]
    arpa = language_model(taught, True)
    spoken = backbones.replies(random.Random(7), "test", 60)[:60]
    texts = [plain(text) for text in spoken]
    original = [speak(text, ASSISTANT) for text in spoken]
    decoded = [codec.decode(codec.encode(torch.from_numpy(wav))).numpy() for wav in original]
    before = word_error_rate(texts, [transcribe((wav, arpa)) for wav in original])
    after = word_error_rate(texts, [transcribe((wav, arpa)) for wav in decoded])
    assert 100 * (after - before) < logged("codec: bigram judge.*excess") + 3


def test_whisper_hears_only_what_it_can_spell():
    """Sounds have an empty text, other languages are not among the clips, and no voice is of another
    split."""
    jobs = backbones.clips_to_hear(random.Random(0), 3000, people=0.6)
    sounds = [text for text, voice in jobs if voice.startswith("sound/")]
    people = [voice for _, voice in jobs if voice.split("/")[0] in voices.ENGINES]
    assert 0.01 < len(sounds) / len(jobs) < 0.06 and not any(sounds)
    assert 0.5 < len(people) / (len(jobs) - len(sounds)) < 0.7
    assert {voice.split(":")[0] for voice in people} <= set(voices.VOICES["train"])
    for text, voice in jobs:
        assert voice.startswith("sound/") or (text and not text.startswith("(") and "<" not in text)
        assert text not in LANGUAGE_OF
    assert not [voice for _, voice in backbones.clips_to_hear(random.Random(0), 300, people=0)
                if voice.split("/")[0] in voices.ENGINES]


def test_missing_synthesizers_are_named(monkeypatch, capsys, tmp_path):
    """Before anything is trained: what to install, or which option does without it."""
    lines = ["flite: apt install flite", "pico: pip install ttspico"]
    monkeypatch.setattr(voices, "missing", lambda names: lines)
    monkeypatch.setattr(backbones, "configure", lambda config: config(out_dir=str(tmp_path)))
    monkeypatch.setattr(backbones, "train_qwen2", None)
    with pytest.raises(SystemExit) as refusal:
        backbones.main()
    printed = capsys.readouterr().err.strip()
    assert refusal.value.code == 2 and printed.startswith("error: ") and "\n" not in printed
    assert "; ".join(lines) in printed and "--whisper_people 0" in printed


def test_backbones_load_where_downloads_would(tmp_path):
    """What tiny/backbones.py makes opens with the libraries' own loaders, as the real ones do. It needs none
    of the synthesizers that have to be installed."""
    run(sys.executable, "tiny/backbones.py", "--out_dir", tmp_path, "--figures", 8,
        "--parts", "qwen2,codec,whisper", "--qwen2_dialogues", 400, "--qwen2_steps", 20,
        "--codec_sentences", 100, "--codec_steps", 10, "--whisper_clips", 100, "--whisper_steps", 4,
        "--whisper_people", 0)
    assert whisper.load_model(str(tmp_path / "whisper.pt"), device="cpu").dims.n_mels == 80
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2").config.vocab_size == len(tokenizer)
    assert NanoCodec.load(tmp_path / "codec.pt").sample_rate == 16000
    log = (tmp_path / "backbones.log").read_text()
    for figure in ("unseen sentences and voices:", "in an unseen accent:", "with babble:", "flite/awb"):
        assert figure in log                          # measured; a voice may be said to be missing
