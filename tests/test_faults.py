"""Training that can be trusted: whatever ends a run - a signal, kill -9, a full disk, a damaged checkpoint or row - the same
command goes on, and the weights are those of a run that nothing ended, to the bit. All with real processes, on CPU.

FAULTS=20 pytest tests/test_faults.py    kills 20 times instead of 3
"""
import atexit
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pyarrow
import pytest
import soundfile
import torch
from datasets import load_from_disk
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM
from whisper.model import ModelDimensions, Whisper

import model
from conftest import ROOT, train_arguments
from data import FEATURES
from model import newest_checkpoint

FAULTS = int(os.environ.get("FAULTS", 3))
STEPS = 9                             # one and a half epochs of 48 dialogues, 8 a step
# stage 1 in fp32 with AdamW, where another number of processes is a matter of rounding; the others as their configs say, bf16
# and Muon. In each a step is 2 micro-batches or more, for each of two processes too.
OWN = {"stage1": {"--precision": "no", "--muon": False, "--micro_tokens": 200}, "stage1_tts": {"--micro_tokens": 400},
       "stage2": {"--micro_tokens": 600}}
SHARE = {None: {}, "FSDP": {"ACCELERATE_USE_FSDP": "true"},    # what `accelerate launch` makes of its file
         "DEEPSPEED": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                       "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "LOGITS": "5000"}}    # some pieces, not as many in each process
# New processes are forked from one that has imported what train.py imports, which takes 0.1 s instead of 5
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["data", "accelerate", "torch.distributed.checkpoint.state_dict", "tensorboard", "pytest", "peft"])


def become_train(arguments, env, log, limit):
    """What a new process does: python train.py ..."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)         # inherited from how this process was made
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ |= env
    model.LOGITS = int(env.get("LOGITS", model.LOGITS))
    sys.argv = ["train.py", *arguments]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()                                # as python does at its end, but multiprocessing does not


class Run:
    """train.py at work, in one process or two, which write into one log beside out_dir."""

    def __init__(self, world, stage, out_dir, *more, processes=1, share=None, limit=None):
        """share: what shares out weights and optimizer, FSDP or DEEPSPEED; limit: no file may become larger, in bytes."""
        self.log = Path(f"{out_dir}.log")
        self.log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = {"--init_from": "none", "--epochs": 1.5, "--log_every": 2, "--eval_every": 4, "--eval_dialogues": 4,
                     "--samples": 0, "--save_every": 1, "--keep": 99, "--workers": 0, "--llm": world / "small", "--speech_lm": world / "small",
                     "--whisper": world / "small/whisper.pt"}
        arguments |= OWN[stage] | dict(zip(more[::2], more[1::2]))
        arguments = train_arguments(world, stage, out_dir, **arguments)
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | SHARE[share] for r in range(processes)]
        self.ranks = [fork.Process(target=become_train, args=(arguments, env if processes > 1 else {}, self.log, limit))
                      for env in ranks]
        for process in self.ranks:
            process.start()

    def wait_for(self, what):
        """Until the log holds a text, or `what()` is true."""
        seen, end = what if callable(what) else lambda: what in self.log.read_text(), time.time() + 120
        while not seen() and any(p.is_alive() for p in self.ranks):
            assert time.time() < end, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def send(self, number, rank=0):
        """A signal to one process and those that it started."""
        with contextlib.suppress(ProcessLookupError):          # it was quicker
            os.killpg(self.ranks[rank].pid, number)

    def end(self, *codes):
        """What it printed. All its processes must end, within two minutes and with these exit codes (0)."""
        for process in self.ranks:
            process.join(120)
        hung = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for rank in hung:
            self.send(signal.SIGKILL, rank)
        text = self.log.read_text()
        assert not hung, f"processes {hung} hang\n{text[-3000:]}"
        assert [p.exitcode for p in self.ranks] == list(codes or [0] * len(self.ranks)), text[-3000:]
        return text


@pytest.fixture(scope="module")
def world(world):
    """The micro world with backbones of random weights, a tenth of the size: a checkpoint is 4 MB, and these tests write hundreds."""
    config = Qwen2Config.from_pretrained(ROOT / "tiny/qwen2", hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                                         layer_types=["full_attention"] * 2)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(world / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "tiny/qwen2" / name, world / "small")
    dims = ModelDimensions(n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=1, n_audio_layer=8,
                           n_vocab=64, n_text_ctx=8, n_text_state=64, n_text_head=1, n_text_layer=1)
    torch.save({"dims": vars(dims), "model_state_dict": Whisper(dims).state_dict()}, world / "small/whisper.pt")
    return world


@pytest.fixture(scope="module")
def straight(world):
    """A function (stage, processes, share) -> (out_dir of a run that nothing disturbed, the seconds that it took)."""
    @functools.cache
    def run(stage, processes=1, share=None):
        out_dir, start = world / f"straight-{stage}-{processes}-{share}", time.time()
        Run(world, stage, out_dir, processes=processes, share=share).end()
        return out_dir, time.time() - start
    return run


def until(straight, step, out_dir):
    """A copy of a run as it was after so many steps."""
    gone = {"final", *(f"step-{n:06d}" for n in range(step + 1, STEPS + 1))}
    return shutil.copytree(straight, out_dir, ignore=lambda at, names: gone if Path(at) == straight else ())


def log_of(out_dir, step=STEPS):
    """The log lines of a run that ended at this step."""
    meta = json.loads((Path(newest_checkpoint(out_dir)) / "meta.json").read_text())
    assert meta["step"] == step
    return meta["log"]


def assert_same(a, b):
    """Two finished runs: every log line as text, every weight, the optimizer's and the generators' states to the bit."""
    assert json.dumps(log_of(a)) == json.dumps(log_of(b))
    for file in ("final/model.safetensors", f"step-{STEPS:06d}/model.safetensors", f"step-{STEPS:06d}/config.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    for file in ("optimizer.pt", "rng.pt"):
        for x, y in zip(*(tree_leaves(torch.load(run / f"step-{STEPS:06d}" / file)) for run in (a, b)), strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, file


def rows_of(step):
    """The rows of a step, counted from 0: data order is a function of (seed, epoch)."""
    epoch, i = divmod(step, 6)
    return random.Random(f"1337 {epoch}").sample(range(48), 48)[8 * i:8 * i + 8]


def other_corpus(world, folder, change, split="train", **settings):
    """A corpus with other rows in a split, change(rows), and other settings in its meta.json; returns its folder."""
    shutil.copytree(world / "corpus", folder)
    schema = FEATURES.arrow_schema
    rows = pyarrow.RecordBatch.from_pylist(change(load_from_disk(world / "corpus")[split].to_list()), schema=schema)
    with pyarrow.ipc.new_stream(folder / split / "data-00000.arrow", schema) as writer:
        writer.write_batch(rows)
    (folder / "meta.json").write_text(json.dumps(json.loads((folder / "meta.json").read_text()) | settings))
    return folder


def clip(row, change):
    """A change of the corpus: the WAV bytes of a row's first clip are others."""
    def apply(rows):
        speech = rows[row]["speech"][0]
        speech["bytes"] = change(speech["bytes"])
        return rows
    return apply


def name_of(world, row):
    return load_from_disk(world / "corpus")["train"][row]["id"]


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------------------ stopped

def test_killed_at_random_moments(world, straight, tmp_path):
    """kill -9, FAULTS times: every other time at a random moment, every other time in the middle of a save."""
    goal, seconds = straight("stage1")
    draw, killed = random.Random(2026), []
    while True:
        run = Run(world, "stage1", tmp_path / "run")
        if len(killed) < FAULTS:
            in_a_save, delay = len(killed) % 2, draw.random()
            if in_a_save:
                run.wait_for(lambda: list((tmp_path / "run").glob("*.part")))
            time.sleep(delay * (0.1 if in_a_save else seconds))
            alive = run.ranks[0].is_alive()
            run.send(signal.SIGKILL)
            run.ranks[0].join()
            if alive:
                killed.append(f"{delay:.3f} in {sorted(p.name for p in (tmp_path / 'run').glob('*'))}")
                continue
        print("killed:", *killed, sep="\n")           # shown if one of these fails
        run.end()
        assert_same(goal, tmp_path / "run")
        if len(killed) == FAULTS:
            break
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("stage, processes, when, whom", [
    ("stage1_tts", 1, "step 4/9 | val_loss", 0), ("stage2", 1, "step 2/9", 0), ("stage1", 2, "step 4/9 | loss", 1),
    ("stage1_tts", 2, "step 2/9", 0)])
def test_asked_to_stop(world, straight, tmp_path, stage, processes, when, whom):
    """SIGTERM to one process of one or two, and to its workers: all save at the same step, say how to go on, exit with 0."""
    goal, _ = straight(stage, processes)
    run = Run(world, stage, tmp_path / "run", "--save_every", 100, "--workers", 1, processes=processes)
    run.wait_for(when)
    run.send(signal.SIGTERM, whom)
    text = run.end()
    step = int(newest_checkpoint(tmp_path / "run")[-6:])
    assert f"stopped at step {step}; the same command goes on" in text and step < STEPS
    if when == "step 4/9 | loss":                     # the evaluation of step 4 comes next: it was asked in the middle of it
        assert step == 4 and "step 4/9 | val_loss" in text
    assert f"continuing {tmp_path}/run/step-{step:06d}" in Run(world, stage, tmp_path / "run", processes=processes).end()
    assert_same(goal, tmp_path / "run")


def test_one_of_two_killed(world, straight, tmp_path):
    """The other one does not wait for ever."""
    goal, _ = straight("stage2", 2)
    run = Run(world, "stage2", tmp_path / "run", processes=2)
    run.wait_for("step 4/9")
    run.send(signal.SIGKILL, 1)
    run.end(1, -signal.SIGKILL)
    assert "continuing" in Run(world, "stage2", tmp_path / "run", processes=2).end()
    assert_same(goal, tmp_path / "run")


# ------------------------------------------------------------------------------------------------- disk and files

def test_full_disk(world, straight, tmp_path):
    """Whichever file does not fit: one line, exit code 2, no debris, the checkpoints before it stand, and the run goes on."""
    goal, _ = straight("stage1")
    run = until(goal, 5, tmp_path / "run")
    names = "step-000006/model.safetensors", "step-000006/optimizer.pt", "final/model.safetensors"
    sizes = {name: (goal / name).stat().st_size for name in names}
    assert list(sizes.values()) == sorted(sizes.values())
    for step, (name, size) in zip((5, 5, STEPS), sizes.items()):
        text = Run(world, "stage1", run, limit=size - 1000).end(2)
        assert len(errors(text)) == 1 and "make room, then run the same command again" in text and "Traceback" not in text, text
        assert newest_checkpoint(run) == f"{run}/step-{step:06d}" and not list(run.glob("*.part")), name
    Run(world, "stage1", run).end()
    assert_same(goal, run)
    text = Run(world, "stage1", tmp_path / "new", limit=100_000).end(2)
    assert len(errors(text)) == 1 and "make room" in text and "Traceback" not in text, text
    assert not list((tmp_path / "new").glob("*"))


def test_damaged_checkpoints(world, straight, tmp_path):
    """Each is passed over with a line that names it, and the one before is taken."""
    goal, _ = straight("stage1")
    run = until(goal, 9, tmp_path / "run")
    model, optimizer, rng, meta = (run / name for name in ("step-000009/model.safetensors", "step-000008/optimizer.pt",
                                                           "step-000007/rng.pt", "step-000006/meta.json"))
    weights = bytearray(model.read_bytes())
    weights[len(weights) // 2] ^= 1
    model.write_bytes(weights)
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    rng.unlink()
    meta.write_text('{"step": 6, "files"')
    text = Run(world, "stage1", run).end()
    for fragment in ("step-000009: model.safetensors is not what was written",
                     f"step-000008: optimizer.pt has {(goal / 'step-000008/optimizer.pt').stat().st_size - 1} bytes",
                     "step-000007: rng.pt is missing", "step-000006: its meta.json is missing or damaged",
                     f"continuing {run}/step-000005"):
        assert fragment in text
    assert_same(goal, run)


def test_the_frozen_base_must_stand(world, straight, tmp_path):
    """What was not trained lies in one place alone: changed or gone, nothing goes on."""
    run = until(straight("stage1")[0], 5, tmp_path / "run")
    file = run / "base/model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    for damage in (lambda: file.write_bytes(weights), lambda: shutil.rmtree(run / "base")):
        damage()
        error, = errors(Run(world, "stage1", run).end(2))
        assert f"{run}/base, which has changed or is gone; bring it back" in error
    assert newest_checkpoint(run) == f"{run}/step-000005"


# ------------------------------------------------------------------------------------------- another run than before

def test_changed_keys(world, straight, tmp_path):
    """What decides the result must stay, and all that differs is named; what does not may change: workers, for one."""
    goal, _ = straight("stage1")
    run = until(goal, 5, tmp_path / "run")
    error, = errors(Run(world, "stage1", run, "--lr", 0.5, "--seed", 7, "--workers", 2).end(2))
    assert "seed 1337 -> 7" in error and "lr 0.004 -> 0.5" in error and "workers" not in error
    assert "; workers 0 -> 2" in Run(world, "stage1", run, "--workers", 2).end()
    assert_same(goal, run)


def test_changed_corpus(world, straight, tmp_path):
    """Another corpus in the place of the one that the run began with is refused with the difference."""
    run = until(straight("stage1")[0], 5, tmp_path / "run")
    def reword(rows):
        rows[30]["replies"][-1] = rows[30]["replies"][-1].swapcase()
        return rows
    def revoice(rows):
        rows[40]["units"][-1][5] ^= 1
        return rows
    fewer = other_corpus(world, tmp_path / "fewer", lambda rows: rows[:40], train=40)
    reworded, revoiced = (other_corpus(world, tmp_path / change.__name__, change) for change in (reword, revoice))
    for corpus, difference in ((fewer, ("dialogues 48 -> 40", "train 48 -> 40")), (reworded, ("the dialogues themselves",)),
                               (revoiced, ("the dialogues themselves",))):
        error, = errors(Run(world, "stage1", run, "--corpus", corpus).end(2))
        assert "is not the corpus that the run" in error and all(part in error for part in difference), error


def test_other_number_of_processes(world, straight, tmp_path):
    """The same dialogues make the same steps: the losses are those of one process, up to rounding. Other micro-batches too."""
    goal, _ = straight("stage1")
    run = until(goal, 5, tmp_path / "run")
    text = Run(world, "stage1", run, "--micro_tokens", 150, processes=2).end()
    assert "2 processes instead of 1" in text and "micro_tokens 200 -> 150" in text
    for ours, theirs in zip(log_of(run), log_of(goal), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- rotten data

@pytest.mark.parametrize("share", SHARE)
def test_nan_in_one_clip(world, straight, tmp_path, share):
    """All processes stop before the step, one names the row, the checkpoint before stands, and once the corpus is mended
    the run ends where it should. DeepSpeed takes the step itself, so that it must be the one that does not; three processes,
    by which not every parameter divides."""
    if share == "DEEPSPEED" and not shutil.which("c++"):
        pytest.skip("DeepSpeed on CPU needs a C++ compiler: NOT RUN")
    processes = 3 if share == "DEEPSPEED" else 2
    goal, _ = straight("stage1", processes, share)
    run, row = until(goal, 5, tmp_path / "run"), rows_of(7)[2]
    def rot(wav):
        file, (sound, rate) = io.BytesIO(), soundfile.read(io.BytesIO(wav))
        sound[1000] = float("nan")
        soundfile.write(file, sound, rate, format="WAV", subtype="FLOAT")
        return file.getvalue()
    rotten = other_corpus(world, tmp_path / "rotten", clip(row, rot))
    text = Run(world, "stage1", run, "--corpus", rotten, processes=processes, share=share).end(*[2] * processes)
    named = [line for line in text.splitlines() if "not finite" in line and name_of(world, row) in line]
    assert len(named) == 1 and named[0].startswith("step 7, process ") and named[0].count("train-") < 8, text[-3000:]
    assert newest_checkpoint(run) == f"{run}/step-000007"
    Run(world, "stage1", run, processes=processes, share=share).end()
    assert_same(goal, run)


@pytest.mark.parametrize("workers, length, processes", [(0, 30, 1), (1, 3000, 2)])
def test_row_that_cannot_be_read(world, straight, tmp_path, workers, length, processes):
    """A clip cut in its header, or in its sound: one line with the row's name, nothing lost; of two processes both stop."""
    run, row = until(straight("stage1", processes)[0], 6, tmp_path / "run"), rows_of(7)[2]
    rotten = other_corpus(world, tmp_path / "rotten", clip(row, lambda wav: wav[:length]))
    text = Run(world, "stage1", run, "--corpus", rotten, "--workers", workers, processes=processes).end(*[2] * processes)
    error, *others = errors(text) if name_of(world, row) in errors(text)[0] else errors(text)[::-1]
    assert "step 7 cannot be made" in error and name_of(world, row) in error, error
    assert len(others) == processes - 1 and all("another process says why" in line for line in others) and "Traceback" not in text
    assert newest_checkpoint(run) == f"{run}/step-000007"


def test_validation_row_that_cannot_be_read(world, straight, tmp_path):
    """The same, when validation comes to it after step 4."""
    run = until(straight("stage1")[0], 2, tmp_path / "run")
    rotten = other_corpus(world, tmp_path / "rotten", clip(1, lambda wav: wav[:3000]), split="validation")
    text = Run(world, "stage1", run, "--corpus", rotten).end(2)
    error, = errors(text)
    assert load_from_disk(world / "corpus")["validation"][1]["id"] in error and "Traceback" not in text, text
    assert newest_checkpoint(run) == f"{run}/step-000003"


# ------------------------------------------------------------------------------------------------ cache and patience

@pytest.mark.parametrize("stage, precision, tolerance", [("stage1", "bf16", 0), ("stage2", "no", 1e-3)])
def test_cache(world, tmp_path, stage, precision, tolerance):
    """Killed while the frozen networks listen and think for the cache, the run begins again. The losses are those of a run
    without a cache: in bf16, in which it is kept, to the bit; in fp32 up to bf16's rounding, which a small --lr leaves small."""
    arguments = ["--precision", precision, "--lr", 1e-4, "--muon", False]
    Run(world, stage, tmp_path / "without", *arguments).end()
    arguments += ["--cache", tmp_path / "cache"]
    run = Run(world, stage, tmp_path / "with", *arguments)
    run.wait_for(lambda: list((tmp_path / "cache").glob("*.part")))
    run.send(signal.SIGKILL)
    run.end(-signal.SIGKILL)
    Run(world, stage, tmp_path / "with", *arguments).end()
    assert len(list((tmp_path / "cache").glob("*.bf16"))) == 2
    for ours, theirs in zip(log_of(tmp_path / "with"), log_of(tmp_path / "without"), strict=True):
        for key in {"loss", "val_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=0)


def test_patience(world, tmp_path):
    """Stops after three validations without a better one; the best stays beside the newest two, and is what is exported."""
    arguments = [world, "stage1", tmp_path / "run", "--lr", 1.0, "--patience", 3, "--eval_every", 1, "--keep", 2]
    text = Run(*arguments).end()
    steps = sorted(int(path.name[-6:]) for path in (tmp_path / "run").glob("step-*"))
    losses = {line["step"]: line["val_loss"] for line in log_of(tmp_path / "run", steps[-1]) if "val_loss" in line}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 3 < STEPS and steps == [best, best + 2, best + 3]
    assert f"step {best} is the one that counts" in text and f"exported {tmp_path}/run/step-{best:06d}" in text
    assert "is complete" in Run(*arguments).end()


def test_compare(world, tmp_path):
    """A loss near the reference's is called normal, one that learning at a hundred times its rate has ruined is not."""
    backbones = "--llm", "tiny/qwen2", "--speech_lm", "tiny/qwen2", "--whisper", "tiny/whisper.pt"
    for lr, verdict in ((0.001, ": normal"), (0.4, ": NOT normal, too high")):
        text = Run(world, "stage1", tmp_path / f"{lr}", "--epochs", 1.7, "--log_every", 10, "--lr", lr, "--compare", True, "--eval_every", 99, *backbones).end()
        assert "expect another curve: " in text and "batch_size 32 there, 8 here" in text
        line, = (line for line in text.splitlines() if "step 10/10 | reference 3.7884" in line)
        assert line.endswith(verdict), line
