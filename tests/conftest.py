"""What several tests share: a tiny checkpoint with random weights, and one made-up dialogue after another."""
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data import Dialogues, wav_bytes
from model import Omni

CHECKPOINT = Path(__file__).parent / "data" / "llama_omni2"


def load(folder=CHECKPOINT / "checkpoint"):
    """A fresh (omni, tokenizer, tts_tokenizer)."""
    return Omni.from_pretrained(str(folder), str(CHECKPOINT / "whisper-tiny-random.pt"))


def dialogue(seconds, replies, units, seed=0):
    """A row of the corpus. The clips are noise of so many seconds; `units` is how many each reply has."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    return {"id": f"row-{seed}", "users": ["?"] * len(replies), "replies": replies,
            "speech": [{"bytes": wav_bytes(0.1 * rng.standard_normal(int(16000 * s)))} for s in seconds],
            "samples": [int(16000 * s) for s in seconds],
            "units": [[draw.randrange(6561) for _ in range(n)] for n in units]}


ROWS = [dialogue([1.0], ["Paris is nice."], [45], 1),          # one turn; every reply's last block is another one
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
