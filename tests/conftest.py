"""What several tests share: a tiny checkpoint with random weights, made-up dialogues, and a micro corpus for
the tests that run the real commands."""
import atexit
import multiprocessing
import os
import random
import resource
import runpy
import subprocess
import sys
import tempfile
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


# New processes are forked from one that has imported what the commands import: 0.1 s instead of 5.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["data", "omni.run", "omni.parallel", "omni.watch", "omni.codec", "omni.corpus",
                             "omni.engine", "omni.hub", "tensorboard", "peft", "pytest", "conftest"])


def become(words, out, err, cwd=ROOT, env=(), limit=None):
    """What a new process does: `python WORDS`, as the leader of its own group.

    out, err  files that its output is appended to;  limit: the largest file allowed, in bytes
    """
    os.setsid()
    multiprocessing.set_start_method(None, force=True)         # inherited from how this process was made
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ |= env
    sys.path.insert(0, str(cwd))
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    module = words[0] == "-m"
    sys.argv = words[module:]
    sys.modules.pop(sys.argv[0], None)                         # it may have been imported
    try:
        (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()                                # as python does at its end, but not here


def run(*command, code=0, cwd=ROOT, **env):
    """Run a command in the repository, expecting exit code `code` -> what it printed. Of commands that start
    with sys.executable the process is forked, see above."""
    words, env = [str(c) for c in command], os.environ | env
    with tempfile.TemporaryDirectory() as at:
        out, err = Path(at, "out"), Path(at, "err")
        if words[0] == sys.executable:
            process = fork.Process(target=become, args=(words[1:], out, err, cwd, env))
            process.start()
            process.join(300)
            status = process.exitcode
            process.kill()
        else:
            with open(out, "w") as stdout, open(err, "w") as stderr:
                status = subprocess.run(words, cwd=cwd, stdout=stdout, stderr=stderr, timeout=300,
                                        env=env).returncode
        out, err = (path.read_text() if path.exists() else "" for path in (out, err))
    assert status == code, f"{words}: {status}\n{out[-3000:]}\n{err[-3000:]}"
    return out + err


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
