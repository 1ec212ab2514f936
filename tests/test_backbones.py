"""The backbones in tiny/ are what tiny/backbones.log says: a sample of each figure of merit, computed anew from the
shipped files on the test split. It protects against files that fit neither the code nor the world they were made for."""
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import whisper
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from codec import NanoCodec
from conftest import run
from eval import hear, language_model, typed, word_error_rate
from tiny import backbones, world

TINY = Path(__file__).parent.parent / "tiny"
LOG = (TINY / "backbones.log").read_text()


def logged(pattern):
    """The last number that the log states for this figure."""
    return float(re.findall(pattern + r"\D*?(-?[\d.]+)", LOG)[-1])


def turns(n, seed):
    rng = random.Random(seed)
    return [t for _ in range(n) for t in world.dialogue(rng, "test")][:n]


def test_sizes():
    files = [f for f in TINY.rglob("*") if f.is_file() and f.suffix in (".pt", ".json", ".safetensors", ".jinja", ".log")]
    assert max(f.stat().st_size for f in files) <= 5e6 and sum(f.stat().st_size for f in files) <= 10e6


@pytest.mark.parametrize("accents,figure", [(world.ACCENTS, "unseen sentences and voices:"), ([world.UNSEEN_ACCENT], "in an unseen accent:")])
def test_whisper(accents, figure):
    """Word error rate on unseen sentences in unseen voices, and in an accent that it never heard."""
    from model import SpeechEncoder
    from transformers import Qwen2Tokenizer
    model = whisper.load_model(str(TINY / "whisper.pt"), device="cpu")
    model.encoder = SpeechEncoder.from_whisper(str(TINY / "whisper.pt"))       # clips at their own length
    rng = random.Random(7)
    jobs = [(t["user"], world.draw_voice(rng, "test", accents)) for t in turns(80, 7)]
    mels = [whisper.log_mel_spectrogram(torch.from_numpy(world.speak(*job)), 80).numpy() for job in jobs]
    heard = backbones.transcribe(model, Qwen2Tokenizer.from_pretrained(TINY / "qwen2"), mels)
    assert 100 * word_error_rate([t for t, _ in jobs], heard) < logged(f"whisper: WER on .*{figure}") + 4


def test_qwen2():
    """Exact answers to typed questions that it never read."""
    rng = random.Random(7)
    dialogues = [world.dialogue(rng, "test") for _ in range(40)]
    rows = [{"users": [t["user"] for t in d], "replies": [t["assistant"] for t in d]} for d in dialogues]
    right = typed(Qwen2ForCausalLM.from_pretrained(TINY / "qwen2"), Qwen2Tokenizer.from_pretrained(TINY / "qwen2"), rows)
    assert 100 * sum(right) / len(right) > logged("qwen2: exact answers to unseen typed questions:") - 5


def test_codec():
    """What an independent recogniser hears after units and back, against what it hears in the original."""
    codec = NanoCodec.load(TINY / "codec.pt")
    rng = random.Random(1)
    arpa = language_model([t["assistant"] for _ in range(1000) for t in world.dialogue(rng, "train")], True)
    texts = [t["assistant"] for t in turns(60, 7)]
    original = [world.speak(t, world.ASSISTANT) for t in texts]
    back = [codec.decode(codec.encode(torch.from_numpy(w))).numpy() for w in original]
    there, ours = (100 * word_error_rate(texts, [hear((w, arpa)) for w in wavs]) for wavs in (original, back))
    assert ours - there < logged("codec: bigram judge.*excess") + 3


def test_backbones_load_where_downloads_would(tmp_path):
    """What tiny/backbones.py makes opens with the libraries' own loaders, as the real ones do."""
    run(sys.executable, "tiny/backbones.py", "--out_dir", tmp_path, "--qwen2_dialogues", 400, "--qwen2_steps", 20,
        "--codec_sentences", 100, "--codec_steps", 10, "--whisper_clips", 128, "--whisper_steps", 4, "--figures", 8)
    assert whisper.load_model(str(tmp_path / "whisper.pt"), device="cpu").dims.n_mels == 80
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2").config.vocab_size == len(tokenizer)
    assert NanoCodec.load(tmp_path / "codec.pt").sample_rate == 16000
