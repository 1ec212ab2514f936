"""The whole pipeline through the real command lines, on a corpus of a few dozen dialogues and a few steps. It protects
what a newcomer does first: every command of the README works after the one before it, losses fall, the reply is heard."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import soundfile

from conftest import CHECKPOINT, ROOT, run, train_arguments
from test_released import layout

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--quiet"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DIRECTLY = [sys.executable]           # 4 s quicker


def train_command(at, stage, out_dir, *more, launch=LAUNCH):
    options = {"--log_every": 2, "--eval_every": 100, "--eval_dialogues": 4, "--samples": 0, "--save_every": 3}
    return [*launch, "train.py", *train_arguments(at, stage, out_dir, **options | dict(zip(more[::2], more[1::2])))]


def train(at, stage, out_dir, *more, launch=LAUNCH, code=0):
    return run(*train_command(at, stage, out_dir, *more, launch=launch), code=code)


def log_of(folder):
    last = max(folder.glob("step-*"))
    return json.loads((last / "meta.json").read_text())["log"]


def test_three_stages_and_a_reply(world):
    for stage, start in (("stage1", None), ("stage1_tts", "stage1"), ("stage2", "stage1_tts")):
        out = train(world, stage, stage, "--epochs", 3, *(["--init_from", world / start] if start else []))
        losses = [line["loss"] for line in log_of(world / stage) if "loss" in line]
        assert len(losses) == 9 and sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
        assert "speech adapter" in out and "val_loss" in out
    names, *fields = layout(world / "stage2/final")            # exactly the official checkpoint's, whose LLM is not tied
    golden, *golden_fields = layout(CHECKPOINT / "checkpoint")
    assert names == golden - {"lm_head.weight"} and fields == golden_fields
    out = run(sys.executable, "sample.py", "--ckpt", world / "stage2", "--corpus", world / "corpus", "--codec",
              world / "tiny/codec.pt", "--out", world / "reply.wav", "--max_units", 60)
    assert "first text" in out and "real-time factor" in out
    replies = sorted(world.glob("reply*.wav"))
    assert replies
    for reply in replies:
        wav, rate = soundfile.read(reply)
        assert rate == 16000 and 0.04 <= len(wav) / rate <= 60 * 0.04 and len(wav) % 640 == 0
    # one's own question, in another format, and the text alone
    wav, rate = soundfile.read(replies[0])
    soundfile.write(world / "question.flac", [*wav, *wav, *([0.01] * 4000)], 22050)
    out = run(sys.executable, "sample.py", "--ckpt", world / "stage2", "--wav", world / "question.flac", "--text")
    assert "first text" in out and "saved" not in out
    out = run(sys.executable, "eval.py", "--ckpt", world / "stage2", "--corpus", world / "corpus", "--codec",
              world / "tiny/codec.pt", "--llm", world / "tiny/qwen2", "--dialogues", 2, "--out", world / "eval", "--runs",
              ",".join(str(world / s) for s in ("stage1", "stage1_tts", "stage2")))
    assert (world / "eval/demo.png").stat().st_size > 10000 and json.loads((world / "eval/eval.json").read_text())["turns"] > 0
    for name in re.findall(r"\]\((\S+)\)", (world / "eval/gallery.md").read_text()):
        assert len(soundfile.read(world / "eval" / name)[0]) > 1600


def test_a_stopped_run_continues_as_if_it_had_not_stopped(world):
    """Ctrl-C saves at the end of the step, says how to go on, and the same command ends in the very same weights."""
    straight, stopped = world / "straight", world / "stopped"
    train(world, "stage1", straight, "--epochs", 2)
    process = subprocess.Popen(train_command(world, "stage1", stopped, "--epochs", 2), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    seen = ""
    for line in process.stdout:
        seen += line
        if "step 4/" in line:
            os.killpg(process.pid, signal.SIGINT)     # what a terminal does on Ctrl-C
            break
    seen += process.stdout.read()
    process.wait()
    assert "the same command goes on" in seen and not (stopped / "final").exists(), seen[-3000:]
    train(world, "stage1", stopped, "--epochs", 2)
    assert (stopped / "final/model.safetensors").read_bytes() == (straight / "final/model.safetensors").read_bytes()
    assert log_of(stopped) == log_of(straight)


def test_refusals(world):
    """One line, exit code 2, nothing lost: another run's folder, a changed key, a NaN, a missing codec."""
    def refused(out_dir, *more):
        return train(world, "stage1", out_dir, "--epochs", 0.5, *more, launch=DIRECTLY, code=2)
    run_folder = world / "refused"
    train(world, "stage1", run_folder, "--epochs", 0.5, launch=DIRECTLY)
    before = sorted(p.name for p in run_folder.iterdir())
    assert "holds a run already (step-000003)" in refused(run_folder, "--resume", False)
    assert "lr 0.004 -> 0.5" in refused(run_folder, "--lr", 0.5)
    assert sorted(p.name for p in run_folder.iterdir()) == before
    out = refused(world / "nan", "--lr", 1e38, "--clip", 1e38, "--muon", False)
    assert "not finite" in out and "train-0000" in out and not list((world / "nan").glob("step-*"))
    out = run(sys.executable, "data.py", "--codec", world / "none.pt", "--out_dir", world / "c", code=2)
    assert out.strip().splitlines()[-1].startswith("error: there is no codec")
    sample = [sys.executable, "sample.py", "--corpus", world / "corpus", "--codec", world / "tiny/codec.pt", "--ckpt"]
    for arguments, fragment in (([run_folder, "--wav", "none.wav"], "none.wav: there is no such file"),
                                ([run_folder, "--index", "99"], "--index 99"), ([world / "nowhere"], "nowhere")):
        assert fragment in run(*sample, *arguments, code=2).strip().splitlines()[-1]


def test_the_global_batch_alone_decides(world):
    """The same losses to 1e-5 from one process, from several micro-batches, from two processes (DDP), from two that share out weights and
    optimizer (FSDP2), from two that go on from what these saved, by DeepSpeed (ZeRO-3), and from one that goes on from theirs."""
    from safetensors.torch import load_file
    fsdp, zero3 = ([sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"config/accelerate/8gpu_{name}.yaml", "--num_processes", "2"]
                   for name in ("fsdp", "zero3"))
    runs = {"one": (DIRECTLY, 9999, 1), "accumulated": (DIRECTLY, 200, 1), "two": (TWO, 200, 2), "fsdp": (fsdp, 200, 2), "zero3": (zero3, 200, 2),
            "one again": (DIRECTLY, 200, 1)}
    if not shutil.which("c++"):                       # DeepSpeed on CPU compiles a file
        del runs["zero3"]
        warnings.warn("no C++ compiler: DeepSpeed NOT RUN")
    for name, (launch, micro, _) in runs.items():
        if name in ("zero3", "one again"):
            gone = {"final", *(f"step-{step:06d}" for step in range(2 if name == "zero3" else 6, 7))}
            shutil.copytree(world / before, world / name, ignore=lambda at, names: gone)
        before = name
        train(world, "stage1", name, "--epochs", 1, "--precision", "no", "--muon", False, "--lr", 1e-5, "--micro_tokens", micro,
              "--save_every", 1, "--keep", 9, launch=launch)         # Muon rounds to bf16, which hides what is compared here
    one, goal = load_file(world / "one/final/model.safetensors"), log_of(world / "one")
    assert any("val_exact" in line for line in goal)
    for name, (_, _, processes) in runs.items():
        assert json.loads((max((world / name).glob("step-*")) / "meta.json").read_text())["processes"] == processes
        for a, b in zip(log_of(world / name), goal, strict=True):
            for key in ("loss", "val_loss"):
                assert a.get(key) == (b.get(key) and pytest.approx(b[key], rel=1e-5)), (name, a, b)
        ours = load_file(world / name / "final/model.safetensors")
        assert ours.keys() == one.keys() and all((ours[k] - v).abs().max() < 1e-4 for k, v in one.items())
