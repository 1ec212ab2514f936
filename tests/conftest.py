"""What several tests share: a tiny checkpoint with random weights, made-up dialogues, and a micro corpus for
the tests that run the real commands."""
import os
import random
import subprocess
import sys
from pathlib import Path

# Threads that wait sleep instead of spinning: on two cores, beside other jobs, tests take a fifth of the
# time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")   # before torch is imported; commands inherit it

import numpy as np
import pytest
import torch

from data import Dialogues
from omni import checkpoint
from omni.audio import SAMPLE_RATE, UNIT_VOCAB, wav_bytes
from omni.engine import Engine

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "data" / "llama_omni2"


def load(folder=CHECKPOINT / "checkpoint"):
    """A fresh (omni, tokenizer, tts_tokenizer)."""
    return checkpoint.load(str(folder), str(CHECKPOINT / "whisper-tiny-random.pt"))


def dialogue(seconds, replies, units, seed=0):
    """A row of the corpus.

    seconds  how long each clip lasts; it is noise
    replies  the texts;  units: how many each reply has
    """
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    samples = [int(SAMPLE_RATE * s) for s in seconds]
    return {"id": f"row-{seed}", "users": ["?"] * len(replies), "replies": replies,
            "speech": [{"bytes": wav_bytes(0.1 * rng.standard_normal(n))} for n in samples],
            "samples": samples,
            "units": [[draw.randrange(UNIT_VOCAB) for _ in range(n)] for n in units]}


ROWS = [                              # one, two and three turns; each reply ends in another kind of block
    dialogue([1.0], ["Paris is nice."], [45], 1),
    dialogue([0.79, 1.33], ["Hi there.", "It is five, I think."], [9, 60], 2),
    dialogue([0.4, 0.2, 0.95], ["Yes.", "No.", "Two and two is four."], [30, 12, 71], 3)]


@pytest.fixture(scope="session")
def tiny():
    """(omni, tokenizer, tts_tokenizer) for tests that leave the weights as they are."""
    torch.set_num_threads(1)
    omni, *tokenizers = load()
    return omni.eval(), *tokenizers


@pytest.fixture(scope="session")
def items(tiny):
    """ROWS, laid out for training: three dialogues of one, two and three turns."""
    omni, *tokenizers = tiny
    return list(Dialogues(ROWS, *tokenizers, omni.model.speech_encoder.n_mels, omni.R, omni.W))


def generate(omni, ids, clips=(), reply=None, speak=True, temperature=1.0, **options):
    """One reply of an engine made for it: yields (kind, x). options: of Engine."""
    return Engine(omni, **options).generate(ids, clips, reply=reply, speak=speak, temperature=temperature)


def run(*command, code=0, **more):
    """Run a command in the repository, expecting exit code `code` -> what it printed."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          **more)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a micro corpus and the backbones in tiny/."""
    at = tmp_path_factory.mktemp("world")
    (at / "tiny").symlink_to(ROOT / "tiny")
    run(sys.executable, "data.py", "--out_dir", at / "corpus", "--train", 48, "--validation", 8, "--test", 8)
    return at


def train_arguments(at, stage, out_dir, **more):
    """What follows `train.py` on the command line, in a micro world; more: {"--key": value}."""
    options = {"--corpus": at / "corpus", "--out_dir": at / out_dir, "--llm": at / "tiny/qwen2",
               "--speech_lm": at / "tiny/qwen2", "--whisper": at / "tiny/whisper.pt",
               "--batch_size": 8} | more
    return [f"config/tiny_{stage}.py", *(str(x) for pair in options.items() for x in pair)]
