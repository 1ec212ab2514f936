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

from eval import exact_typed, language_model, transcribe, word_error_rate
from omni.checkpoint import load_whisper
from omni.espeak import ACCENTS, ASSISTANT, UNSEEN_ACCENT, draw_voice, speak
from tiny import backbones
from tiny.codec import NanoCodec
from tiny.world import dialogue

TINY = Path(__file__).parent.parent / "tiny"
LOG = (TINY / "backbones.log").read_text()


def logged(pattern):
    """The last number that the log states for this figure."""
    return float(re.findall(pattern + r"\D*?(-?[\d.]+)", LOG)[-1])


def turns(n, seed):
    rng = random.Random(seed)
    return [turn for _ in range(n) for turn in dialogue(rng, "test")][:n]


def test_sizes():
    """Each file is at most 5 MB, all together at most 10 MB."""
    suffixes = (".pt", ".json", ".safetensors", ".jinja", ".log")
    sizes = [f.stat().st_size for f in TINY.rglob("*") if f.is_file() and f.suffix in suffixes]
    assert max(sizes) <= 5e6 and sum(sizes) <= 10e6


@pytest.mark.parametrize("accents,figure", [(ACCENTS, "unseen sentences and voices:"),
                                            ([UNSEEN_ACCENT], "in an unseen accent:")])
def test_whisper(accents, figure):
    """Word error rate on unseen sentences in unseen voices, and in an accent that it never heard."""
    model = whisper.load_model(str(TINY / "whisper.pt"), device="cpu")
    model.encoder = load_whisper(str(TINY / "whisper.pt"))        # hears clips at their own length
    rng = random.Random(7)
    jobs = [(turn["user"], draw_voice(rng, "test", accents)) for turn in turns(80, 7)]
    mels = [whisper.log_mel_spectrogram(torch.from_numpy(speak(*job)), 80).numpy() for job in jobs]
    tokenizer = Qwen2Tokenizer.from_pretrained(TINY / "qwen2")
    heard = backbones.whisper_transcribe(model, tokenizer, mels)
    error_rate = word_error_rate([text for text, _ in jobs], heard)
    assert 100 * error_rate < logged(f"whisper: WER on .*{figure}") + 4


def test_qwen2():
    """Exact answers to typed questions that it never read."""
    rng = random.Random(7)
    rows = []
    for _ in range(40):
        asked = dialogue(rng, "test")
        rows.append({"users": [turn["user"] for turn in asked],
                     "replies": [turn["assistant"] for turn in asked]})
    model = Qwen2ForCausalLM.from_pretrained(TINY / "qwen2")
    right = exact_typed(model, Qwen2Tokenizer.from_pretrained(TINY / "qwen2"), rows)
    assert 100 * sum(right) / len(right) > logged("qwen2: exact answers to unseen typed questions:") - 5


def test_codec():
    """What an independent recognizer hears after units and back, compared with what it hears in the
    original."""
    codec = NanoCodec.load(TINY / "codec.pt")
    arpa = language_model(backbones.replies(random.Random(1), "train", 1000), True)
    texts = [turn["assistant"] for turn in turns(60, 7)]
    original = [speak(text, ASSISTANT) for text in texts]
    decoded = [codec.decode(codec.encode(torch.from_numpy(wav))).numpy() for wav in original]
    before = word_error_rate(texts, [transcribe((wav, arpa)) for wav in original])
    after = word_error_rate(texts, [transcribe((wav, arpa)) for wav in decoded])
    assert 100 * (after - before) < logged("codec: bigram judge.*excess") + 3


def test_backbones_load_where_downloads_would(tmp_path):
    """What tiny/backbones.py makes opens with the libraries' own loaders, as the real ones do."""
    run(sys.executable, "tiny/backbones.py", "--out_dir", tmp_path, "--figures", 8,
        "--qwen2_dialogues", 400, "--qwen2_steps", 20, "--codec_sentences", 100, "--codec_steps", 10,
        "--whisper_clips", 128, "--whisper_steps", 4)
    assert whisper.load_model(str(tmp_path / "whisper.pt"), device="cpu").dims.n_mels == 80
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2").config.vocab_size == len(tokenizer)
    assert NanoCodec.load(tmp_path / "codec.pt").sample_rate == 16000
