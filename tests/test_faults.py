"""Training that can be trusted. Whatever ends a run - a signal, kill -9, a full disk, a damaged checkpoint or
row - the same command resumes it, and the weights are those of a run that nothing ended, to the bit. A key
does what it says, whatever the model came from. All with real processes, on CPU.

FAULTS=20 pytest tests/test_faults.py    kills 20 times instead of 3
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, become, fork, train_arguments
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from whisper.model import ModelDimensions, Whisper

import model
from omni import checkpoint
from omni.checkpoint import newest_checkpoint
from omni.corpus import FEATURES, load_corpus
from omni.files import read_json

FAULTS = int(os.environ.get("FAULTS", 3))
STEPS = 9                             # one and a half epochs of 48 dialogues, 8 a step
# Stage 1 runs in fp32 with AdamW, where another number of processes only changes the rounding. The others run
# as their configs say, in bf16 with Muon. Each step is 2 micro-batches or more, with two processes too.
OWN = {
    "stage1": {"--precision": "no", "--muon": False, "--micro_tokens": 200},
    "stage1_tts": {"--micro_tokens": 400},
    "stage2": {"--micro_tokens": 600},
}
# What `accelerate launch` makes of its file; and several chunks of logits, not as many in each process.
FSDP = {"ACCELERATE_USE_FSDP": "true", "LOGITS": "5000"}
SHARDING = {
    None: {},
    "FSDP": FSDP,
    "FSDP, offloaded": FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
}
def become_train(arguments, env, log, limit):
    """What a new process does: python train.py ..."""
    model.LOGITS = int(env.get("LOGITS", model.LOGITS))
    become(["train.py", *arguments], log, log, env=env, limit=limit)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """train.py at work, in one process or several, which write into one log beside out_dir."""

    def __init__(self, world, stage, out_dir, *more, processes=1, sharding=None, limit=None):
        """more: "--key", value, ...;  sharding: a key of SHARDING;  limit: the largest file allowed, in
        bytes."""
        self.log = Path(f"{out_dir}.log")
        self.log.write_text("")
        options = {"--init_from": "none", "--epochs": 1.5, "--log_every": 2, "--eval_every": 4,
                   "--eval_dialogues": 4, "--samples": 0, "--save_every": 1, "--keep": 99, "--workers": 0,
                   "--llm": world / "small", "--speech_lm": world / "small",
                   "--whisper": world / "small/whisper.pt"}
        options |= OWN[stage] | dict(zip(more[::2], more[1::2]))
        arguments = train_arguments(world, stage, out_dir, **options)
        together = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = []
        for rank in range(processes):
            env = {}
            if processes > 1:
                env = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | SHARDING[sharding]
            process = fork.Process(target=become_train, args=(arguments, env, self.log, limit))
            process.start()
            self.ranks.append(process)

    def wait_for(self, what):
        """Until the log holds a text, or `what()` is true."""
        end = time.time() + 120
        while any(process.is_alive() for process in self.ranks):
            seen = what() if callable(what) else what in self.log.read_text()
            if seen:
                return
            assert time.time() < end, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def send(self, number, rank=0):
        """A signal to one process and those that it started."""
        with contextlib.suppress(ProcessLookupError):          # it was quicker
            os.killpg(self.ranks[rank].pid, number)

    def end(self, *codes):
        """What it printed. All processes must end, within two minutes and with these exit codes (0)."""
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
    """The micro world with backbones of random weights, a tenth of the size: a checkpoint is 4 MB, and these
    tests write hundreds."""
    config = Qwen2Config.from_pretrained(ROOT / "tiny/qwen2", hidden_size=48, intermediate_size=96,
                                         num_hidden_layers=2, layer_types=["full_attention"] * 2)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(world / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "tiny/qwen2" / name, world / "small")
    dims = ModelDimensions(n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=1, n_audio_layer=8,
                           n_vocab=64, n_text_ctx=8, n_text_state=64, n_text_head=1, n_text_layer=1)
    weights = Whisper(dims).state_dict()
    torch.save({"dims": vars(dims), "model_state_dict": weights}, world / "small/whisper.pt")
    return world


@pytest.fixture(scope="module")
def straight(world):
    """A function (stage, processes, sharding, "--key", value, ...) -> (out_dir of a run that nothing
    disturbed, the seconds that it took). Each run is made once."""
    @functools.cache
    def run(stage, processes=1, sharding=None, *more):
        name = "-".join(str(x) for x in ("straight", stage, processes, sharding, *more))
        out_dir, start = world / name, time.time()
        Run(world, stage, out_dir, *more, processes=processes, sharding=sharding).end()
        return out_dir, time.time() - start
    return run


def until(straight, step, out_dir):
    """A copy of a run as it was after so many steps."""
    gone = {"final", *(f"step-{n:06d}" for n in range(step + 1, STEPS + 1))}
    return shutil.copytree(straight, out_dir, ignore=lambda at, names: gone if Path(at) == straight else ())


def log_of(out_dir, step=STEPS):
    """The log lines of a run that ended at this step."""
    meta = read_json(newest_checkpoint(out_dir), "meta.json")
    assert meta["step"] == step
    return meta["log"]


def assert_same(a, b, steps=STEPS):
    """Two finished runs: every log line as text, every weight, the optimizer's and the generators' states to
    the bit."""
    last = f"step-{steps:06d}"
    assert json.dumps(log_of(a, steps)) == json.dumps(log_of(b, steps))
    for file in ("final/model.safetensors", f"{last}/model.safetensors", f"{last}/config.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    for file in ("optimizer.pt", "rng.pt"):
        ours, theirs = (tree_leaves(torch.load(run / last / file)) for run in (a, b))
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, file


def rows_of(step):
    """The rows of a step, counted from 0: data order is a function of (seed, epoch)."""
    epoch, i = divmod(step, 6)
    return random.Random(f"1337 {epoch}").sample(range(48), 48)[8 * i:8 * i + 8]


def corpus_rows(world, split):
    """The rows of the micro corpus, as dicts."""
    return load_corpus(world / "corpus", split).to_list()


def other_corpus(world, folder, change, split="train", **settings):
    """A copy of the micro corpus, which has one shard, with other rows in a split, change(rows), and other
    settings in its meta.json. Returns its folder."""
    shutil.copytree(world / "corpus", folder)
    rows = Dataset.from_list(change(corpus_rows(world, split)), features=FEATURES)
    shutil.rmtree(folder / "shards/00000" / split)
    rows.save_to_disk(folder / "shards/00000" / split)
    (folder / "meta.json").write_text(json.dumps(read_json(folder, "meta.json") | settings))
    return folder


def plain_corpus(world, folder, replies):
    """A datasets folder with the micro corpus's rows and these replies, in turn. Returns the folder."""
    splits = {}
    for split in ("train", "validation"):
        rows = corpus_rows(world, split)
        reply = itertools.cycle(replies)
        for row in rows:
            row["replies"] = [next(reply) for _ in row["replies"]]
        splits[split] = Dataset.from_list(rows, features=FEATURES)
    DatasetDict(splits).save_to_disk(folder)
    return folder


def clip(row, change):
    """A change of the corpus: the WAV bytes of a row's first clip are others."""
    def apply(rows):
        speech = rows[row]["speech"][0]
        speech["bytes"] = change(speech["bytes"])
        return rows
    return apply


def name_of(world, row, split="train"):
    return corpus_rows(world, split)[row]["id"]


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def only_error(text):
    """The one line that a refused run says."""
    error, = errors(text)
    assert "Traceback" not in text, text
    return error


# ------------------------------------------------------------------------------------------ stopped

def test_killed_at_random_moments(world, straight, tmp_path):
    """kill -9, FAULTS times: at a random moment and in the middle of a save, by turns."""
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
    ("stage1_tts", 1, "step 4/9 | val_loss", 0), ("stage2", 1, "step 2/9", 0),
    ("stage1", 2, "step 4/9 | loss", 1), ("stage1_tts", 2, "step 2/9", 0)])
def test_asked_to_stop(world, straight, tmp_path, stage, processes, when, whom):
    """SIGTERM to one process of one or two, and to its workers: all save at the same step, say how to resume,
    and exit with 0."""
    goal, _ = straight(stage, processes)
    run = Run(world, stage, tmp_path / "run", "--save_every", 100, "--workers", 1, processes=processes)
    run.wait_for(when)
    run.send(signal.SIGTERM, whom)
    text = run.end()
    step = int(newest_checkpoint(tmp_path / "run")[-6:])
    assert f"stopped at step {step}; run the same command again to resume" in text and step < STEPS
    if when == "step 4/9 | loss":                     # the evaluation of step 4 comes next: asked during it
        assert step == 4 and "step 4/9 | val_loss" in text
    text = Run(world, stage, tmp_path / "run", processes=processes).end()
    assert f"resuming {tmp_path}/run/step-{step:06d}" in text
    assert_same(goal, tmp_path / "run")


def test_one_of_two_killed(world, straight, tmp_path):
    """The other one does not wait for ever."""
    goal, _ = straight("stage2", 2)
    run = Run(world, "stage2", tmp_path / "run", processes=2)
    run.wait_for("step 4/9")
    run.send(signal.SIGKILL, 1)
    run.end(1, -signal.SIGKILL)
    assert "resuming" in Run(world, "stage2", tmp_path / "run", processes=2).end()
    assert_same(goal, tmp_path / "run")


# ----------------------------------------------------------------------------------- disk and files

def test_full_disk(world, straight, tmp_path):
    """Whichever file does not fit: one line, exit code 2, no debris, the checkpoints before it stand, and the
    run can be resumed."""
    goal, _ = straight("stage1")
    run = until(goal, 5, tmp_path / "run")
    names = "step-000006/model.safetensors", "step-000006/optimizer.pt", "final/model.safetensors"
    sizes = {name: (goal / name).stat().st_size for name in names}
    assert list(sizes.values()) == sorted(sizes.values())
    for step, (name, size) in zip((5, 5, STEPS), sizes.items()):
        error = only_error(Run(world, "stage1", run, limit=size - 1000).end(2))
        assert "make room, then run the same command again" in error
        assert newest_checkpoint(run) == f"{run}/step-{step:06d}" and not list(run.glob("*.part")), name
    Run(world, "stage1", run).end()
    assert_same(goal, run)
    assert "make room" in only_error(Run(world, "stage1", tmp_path / "new", limit=100_000).end(2))
    assert not list((tmp_path / "new").glob("*"))


def test_damaged_checkpoints(world, straight, tmp_path):
    """Each is passed over with a line that names it, and the one before is taken."""
    goal, _ = straight("stage1")
    run = until(goal, 9, tmp_path / "run")
    weights = bytearray((run / "step-000009/model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (run / "step-000009/model.safetensors").write_bytes(weights)
    optimizer = (run / "step-000008/optimizer.pt").read_bytes()
    (run / "step-000008/optimizer.pt").write_bytes(optimizer[:-1])
    (run / "step-000007/rng.pt").unlink()
    (run / "step-000006/meta.json").write_text('{"step": 6, "files"')
    text = Run(world, "stage1", run).end()
    for fragment in ("step-000009: model.safetensors is not what was written",
                     f"step-000008: optimizer.pt has {len(optimizer) - 1} bytes",
                     "step-000007: rng.pt is missing", "step-000006: its meta.json is missing or damaged",
                     f"resuming {run}/step-000005"):
        assert fragment in text
    assert_same(goal, run)


def test_the_frozen_base_must_stand(world, straight, tmp_path):
    """What was not trained lies in one place only: changed or gone, nothing is resumed."""
    run = until(straight("stage1")[0], 5, tmp_path / "run")
    file = run / "base/model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    for damage in (lambda: file.write_bytes(weights), lambda: shutil.rmtree(run / "base")):
        damage()
        error = only_error(Run(world, "stage1", run).end(2))
        assert f"{run}/base, which has changed or is gone; bring it back" in error
    assert newest_checkpoint(run) == f"{run}/step-000005"


# ----------------------------------------------------------------------------- another run than before

def test_changed_keys(world, straight, tmp_path):
    """What decides the result must stay, and all that differs is named; the rest may change, workers for
    one."""
    goal, _ = straight("stage1")
    run = until(goal, 5, tmp_path / "run")
    error = only_error(Run(world, "stage1", run, "--lr", 0.5, "--seed", 7, "--workers", 2).end(2))
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
    reworded = other_corpus(world, tmp_path / "reworded", reword)
    revoiced = other_corpus(world, tmp_path / "revoiced", revoice)
    same_number = "the dialogues themselves"
    for corpus, difference in ((fewer, "dialogues 48 -> 40; train 48 -> 40"), (reworded, same_number),
                               (revoiced, same_number)):
        error = only_error(Run(world, "stage1", run, "--corpus", corpus).end(2))
        assert "is not the corpus that the run" in error and difference in error, error


def test_cheap_checks_come_first(world, tmp_path):
    """What the corpus's files tell is said before a model is loaded (there is none here) or base/ written."""
    def mute(rows):
        return [row | {"speech": [], "samples": []} for row in rows]

    def one(rows):
        return rows[:1]

    deaf = other_corpus(world, tmp_path / "deaf", mute)
    small = other_corpus(world, tmp_path / "small", one, split="validation")
    nowhere = "--llm", tmp_path / "nowhere", "--whisper", tmp_path / "nowhere"
    for more, processes, message in (
            (("--corpus", deaf), 1, "holds no speech"), (("--batch_size", 50), 1, "are not one step"),
            (("--batch_size", 1), 2, "are not one step for 2 processes"),
            (("--corpus", small), 2, "1 validation dialogues for 2 processes")):
        again = Run(world, "stage1", tmp_path / "run", *nowhere, *more, processes=processes)
        text = again.end(*[2] * processes)
        assert len(errors(text)) == processes and message in errors(text)[0], text
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ several processes

def test_other_number_of_processes(world, straight, tmp_path):
    """The same dialogues make the same steps: the losses are those of one process, up to rounding. Other
    micro-batches too."""
    goal, _ = straight("stage1")
    run = until(goal, 5, tmp_path / "run")
    text = Run(world, "stage1", run, "--micro_tokens", 150, processes=2).end()
    assert "2 processes instead of 1" in text and "micro_tokens 200 -> 150" in text
    for ours, theirs in zip(log_of(run), log_of(goal), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_sharded(world, straight):
    """FSDP 2 in two processes, from the first step: the losses of one process, up to rounding. Weights and
    optimizer in host memory change nothing, to the bit; on CPU, where this runs, they are there anyway."""
    sharded, _ = straight("stage1", 2, "FSDP")
    for ours, theirs in zip(log_of(sharded), log_of(straight("stage1")[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same(sharded, straight("stage1", 2, "FSDP, offloaded")[0])


def test_muon_sharded(world, straight, tmp_path):
    """Muon orthogonalizes whole matrices, also when FSDP 2 shards them, here over three processes that do not
    divide all of them evenly. A run that was stopped ends in the same bytes.

    Muon rounds to bf16, so losses are not those of one process to the last digit. Measured here: two or three
    processes with FSDP 2, two with DDP, and one with other micro-batches differ by 2e-5 at most. If each half
    of a matrix is orthogonalized by itself, they differ by 4e-4 after two steps and 4e-3 after nine.
    """
    one, _ = straight("stage1", 1, None, "--muon", True)
    goal, _ = straight("stage1", 3, "FSDP", "--muon", True)
    for ours, theirs in zip(log_of(goal), log_of(one), strict=True):
        for key in {"loss", "val_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    run = Run(world, "stage1", tmp_path / "run", "--muon", True, processes=3, sharding="FSDP")
    run.wait_for("step 4/9")
    run.send(signal.SIGTERM, 1)
    assert "run the same command again to resume" in run.end()
    run = Run(world, "stage1", tmp_path / "run", "--muon", True, processes=3, sharding="FSDP")
    assert "resuming" in run.end()
    assert_same(goal, tmp_path / "run")


# -------------------------------------------------------------------- what it starts from, what a key says

THREE = "--epochs", 0.5               # steps


def config_of(folder):
    """The model's config in a checkpoint; it must be there."""
    return json.loads((folder / "config.json").read_text())


def test_clip(world, straight, tmp_path):
    """0 means no clipping: the bytes are those of a limit that no gradient reaches. A low limit changes
    them."""
    none, huge, small = (straight("stage1", 1, None, *THREE, "--clip", limit)[0] for limit in (0, 1e9, 1e-3))
    assert all(line["grad_norm"] > 1e-3 for line in log_of(none, 3) if "loss" in line)
    assert_same(none, huge, steps=3)
    before, first, clipped = (load_file(folder / "model.safetensors") for folder in
                              (none / "base", none / "step-000001", small / "step-000001"))
    for name, weight in first.items():
        assert not torch.equal(weight, before[name]), name
    assert any(not torch.equal(weight, clipped[name]) for name, weight in first.items())
    error = only_error(Run(world, "stage1", tmp_path / "run", "--clip", -1).end(2))
    assert "clip is -1.0; it must be above zero, or 0 for no clipping" in error


def test_start_from_an_ablation(world, tmp_path):
    """A model that was trained without the gate is trained on without it, and only if you say so. A complete
    run says that it is, even if what it started from is gone."""
    first, second = tmp_path / "first", tmp_path / "second"
    Run(world, "stage2", first, *THREE, "--fusion", "text").end()
    error = only_error(Run(world, "stage2", second, *THREE, "--init_from", first).end(2))
    assert f"{first} was trained with fusion text, not gate; set --fusion text" in error
    arguments = world, "stage2", second, *THREE, "--init_from", first, "--fusion", "text"
    text = Run(*arguments).end()
    table = [line.split() for line in text.splitlines()]
    assert ["gate", "fusion", "0"] in [line[:3] for line in table] and ["part", "trained", "frozen"] in table
    assert config_of(first / "final")["fusion"] == config_of(second / "final")["fusion"] == "text"
    assert checkpoint.load(str(second))[0].speech_generator.fusion == "text"
    shutil.rmtree(first)
    text = Run(*arguments).end()
    assert f"{second} is complete: {second}/final" in text and "trained " not in text


def test_start_from_lora(world, tmp_path):
    """A run with LoRA that was stopped has no final/. A start from its newest checkpoint is a start from the
    merged model, W + 2 B A. What the new run saves knows nothing of LoRA, and loads."""
    first = tmp_path / "first"
    Run(world, "stage1", first, *THREE, "--lora_rank", 4).end()
    weights = load_file(first / "base/model.safetensors")
    trained = load_file(first / "step-000003/model.safetensors")
    for name, weight in trained.items():
        if "lora_A" in name:
            B = trained[name.replace("lora_A", "lora_B")]
            assert B.any()
            weights[name.replace("lora_A.default.", "")] += 2 * B @ weight
        elif "lora_B" not in name:
            weights[name] = weight
    merged = load_file(first / "final/model.safetensors")
    torch.testing.assert_close(weights, merged, rtol=0, atol=1e-6)
    goal, second = tmp_path / "goal", tmp_path / "second"
    Run(world, "stage2", goal, *THREE, "--init_from", first).end()
    (first / "final").rename(tmp_path / "aside")
    Run(world, "stage2", second, *THREE, "--init_from", first).end()
    assert json.dumps(log_of(goal, 3)) == json.dumps(log_of(second, 3))
    for file in ("config.json", "model.safetensors"):
        assert (goal / "final" / file).read_bytes() == (second / "final" / file).read_bytes(), file
    for folder in ("base", "step-000001", "final"):
        assert "lora_rank" not in config_of(second / folder)
    torch.testing.assert_close(load_file(second / "base/model.safetensors"), merged, rtol=0, atol=0)
    again = until(second, 1, tmp_path / "again")
    assert "resuming" in Run(world, "stage2", again, *THREE, "--init_from", first).end()
    assert_same(second, again, steps=3)


def test_padding_is_remembered(world, straight, tmp_path):
    """A model that heard unpadded clips does not understand padded ones, so a change is refused."""
    goal, _ = straight("stage1")
    assert config_of(goal / "final")["pad_audio"] is False
    padded = Run(world, "stage2", tmp_path / "run", "--init_from", goal, "--pad_audio", True)
    error = only_error(padded.end(2))
    assert f"{goal} was trained with pad_audio False, not True" in error


def test_complete(world, straight):
    """Said before anything is loaded, by one process or two; a complete run is not begun again."""
    for processes in (1, 2):
        goal, _ = straight("stage1", processes)
        text = Run(world, "stage1", goal, "--corpus", "nowhere", processes=processes).end()
        assert text.count(f"{goal} is complete: {goal}/final") == 1 and "trained " not in text
    error = only_error(Run(world, "stage1", straight("stage1")[0], "--resume", False).end(2))
    assert "holds a run already (final)" in error


def test_damaged_final(world, straight, tmp_path):
    """One line says what to delete; then the same command makes it again, byte for byte."""
    goal, _ = straight("stage1")
    run = shutil.copytree(goal, tmp_path / "run")
    (run / "final/meta.json").write_text('{"step": 9, "log"')
    assert f"delete {run}/final" in only_error(Run(world, "stage1", run).end(2))
    shutil.rmtree(run / "final")
    Run(world, "stage1", run).end()
    assert_same(goal, run)


# ------------------------------------------------------------------------------------ unusual replies

def test_replies_with_odd_ends(world, tmp_path):
    """Newlines and spaces around replies, with a tokenizer that has a token for two newlines, as Qwen2.5's:
    the template's newline and a reply's must not merge. data.py strips replies, so this corpus is a plain
    datasets folder."""
    llm = shutil.copytree(world / "small", tmp_path / "llm")
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    newline = "\u010a"                                # how byte-level BPE writes it
    vocabulary[newline * 2] = vocabulary.pop("\u00c0")        # a byte that UTF-8 never uses
    merges.insert(0, [newline, newline])
    (llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(Qwen2Tokenizer.from_pretrained(llm)("\n\n")["input_ids"]) == 1
    replies = "\nHello.", "\n\nHello.", " \n Hello.", "Hello.\n", "\n"
    corpus = plain_corpus(world, tmp_path / "corpus", replies)
    more = *THREE, "--corpus", corpus, "--llm", llm, "--speech_lm", llm
    Run(world, "stage2", tmp_path / "run", *more).end()
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "run", 3) if "loss" in line)


def test_long_replies(world, tmp_path):
    """A reply of 45 words counts as exactly right if the model says it to its end. It learns one by heart, in
    which each word is one token and occurs once."""
    tokenizer = Qwen2Tokenizer.from_pretrained(world / "small")
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    reply = "".join([token for token in tokens if re.fullmatch(" [a-z]+", token)][-45:]).strip()
    assert len(tokenizer(reply)["input_ids"]) > 40
    corpus = plain_corpus(world, tmp_path / "corpus", [reply])
    more = "--corpus", corpus, "--epochs", 3, "--muon", True, "--lr", 0.03, "--save_every", 99
    Run(world, "stage1", tmp_path / "run", *more, "--eval_every", 99, "--micro_tokens", 9999).end()
    assert log_of(tmp_path / "run", 18)[-1]["val_exact"] == 1


# --------------------------------------------------------------------------------------- rotten data

@pytest.mark.parametrize("sharding", [None, "FSDP"])
def test_nan_in_one_clip(world, straight, tmp_path, sharding):
    """All processes stop before the step, one names the row, the checkpoint before it stands, and once the
    corpus is repaired the run ends where it should."""
    goal, _ = straight("stage1", 2, sharding)
    run, row = until(goal, 5, tmp_path / "run"), rows_of(7)[2]

    def rot(wav):
        file, (sound, rate) = io.BytesIO(), soundfile.read(io.BytesIO(wav))
        sound[1000] = float("nan")
        soundfile.write(file, sound, rate, format="WAV", subtype="FLOAT")
        return file.getvalue()

    rotten = other_corpus(world, tmp_path / "rotten", clip(row, rot))
    text = Run(world, "stage1", run, "--corpus", rotten, processes=2, sharding=sharding).end(2, 2)
    lines = [line for line in text.splitlines() if "loss or gradient is not finite" in line]
    named = [line for line in lines if name_of(world, row) in line]
    assert len(named) == 1, text[-3000:]
    named, = named
    assert named.startswith("step 7, process ") and named.count("train-") < 8, text[-3000:]
    assert newest_checkpoint(run) == f"{run}/step-000007"
    Run(world, "stage1", run, processes=2, sharding=sharding).end()
    assert_same(goal, run)


@pytest.mark.parametrize("workers, length, processes", [(0, 30, 1), (1, 3000, 2)])
def test_row_that_cannot_be_read(world, straight, tmp_path, workers, length, processes):
    """A clip cut in its header, or in its sound: one line with the row's name, nothing lost; of two processes
    both stop."""
    run, row = until(straight("stage1", processes)[0], 6, tmp_path / "run"), rows_of(7)[2]
    rotten = other_corpus(world, tmp_path / "rotten", clip(row, lambda wav: wav[:length]))
    run_again = Run(world, "stage1", run, "--corpus", rotten, "--workers", workers, processes=processes)
    text = run_again.end(*[2] * processes)
    named = [line for line in errors(text) if name_of(world, row) in line]
    others = [line for line in errors(text) if line not in named]
    assert len(named) == 1 and "step 7 cannot be made" in named[0], text
    assert len(others) == processes - 1 and all("another process says why" in line for line in others)
    assert "Traceback" not in text
    assert newest_checkpoint(run) == f"{run}/step-000007"


def test_validation_row_that_cannot_be_read(world, straight, tmp_path):
    """The same, when validation comes to it after step 4."""
    run = until(straight("stage1")[0], 2, tmp_path / "run")
    change = clip(1, lambda wav: wav[:3000])
    rotten = other_corpus(world, tmp_path / "rotten", change, split="validation")
    error = only_error(Run(world, "stage1", run, "--corpus", rotten).end(2))
    assert name_of(world, 1, "validation") in error
    assert newest_checkpoint(run) == f"{run}/step-000003"


# -------------------------------------------------------------------------- patience and comparison

def test_patience(world, tmp_path):
    """Stops after three validations without a better one. The best checkpoint stays, beside the newest two,
    and is exported."""
    more = "--lr", 1.0, "--patience", 3, "--eval_every", 1, "--keep", 2
    text = Run(world, "stage1", tmp_path / "run", *more).end()
    steps = sorted(int(path.name[-6:]) for path in (tmp_path / "run").glob("step-*"))
    log = log_of(tmp_path / "run", steps[-1])
    losses = {line["step"]: line["val_loss"] for line in log if "val_loss" in line}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 3 < STEPS and steps == [best, best + 2, best + 3]
    assert f"step {best} has the best validation loss" in text
    assert f"exported {tmp_path}/run/step-{best:06d}" in text
    assert "is complete" in Run(world, "stage1", tmp_path / "run", *more).end()


def test_compare(world, tmp_path):
    """A loss near the reference's is called normal; one that a far too high learning rate ruined is not."""
    reference = read_json("runs/reference_curves", "stage1.json")["loss"]["10"][0]
    more = ["--epochs", 1.7, "--log_every", 10, "--eval_every", 99, "--compare", True,
            "--llm", "tiny/qwen2", "--speech_lm", "tiny/qwen2", "--whisper", "tiny/whisper.pt"]
    for lr, verdict in ((0.0004, ": normal"), (0.4, ": NOT normal, too high")):
        text = Run(world, "stage1", tmp_path / f"{lr}", "--lr", lr, *more).end()
        assert "expect another curve: " in text and "batch_size 32 there, 8 here" in text
        line, = (line for line in text.splitlines() if f"step 10/10 | reference {reference:.4f}" in line)
        assert line.endswith(verdict), line
