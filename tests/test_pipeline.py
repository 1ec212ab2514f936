"""The whole pipeline through the real command lines, on a corpus of a few dozen dialogues and a few steps. It
protects what a newcomer does first: every command of the README works after the one before it, losses fall,
and the reply can be heard."""
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import soundfile
from conftest import CHECKPOINT, ROOT, run, train_arguments
from safetensors.torch import load_file
from test_released import layout

from omni.files import read_json

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCH = [*ACCELERATE, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--quiet"]
DIRECTLY = [sys.executable]           # 10 s quicker
DDP = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP = [*ACCELERATE, "--config_file", "config/accelerate/8gpu_fsdp.yaml", "--num_processes", "2"]


def train_command(at, stage, out_dir, *more, launch=LAUNCH):
    options = {"--log_every": 2, "--eval_every": 100, "--eval_dialogues": 4, "--samples": 0,
               "--save_every": 3}
    options |= dict(zip(more[::2], more[1::2]))
    return [*launch, "train.py", *train_arguments(at, stage, out_dir, **options)]


def train(at, stage, out_dir, *more, launch=LAUNCH, code=0):
    return run(*train_command(at, stage, out_dir, *more, launch=launch), code=code)


def meta_of(folder):
    """What the newest checkpoint of a run says about it."""
    return read_json(max(folder.glob("step-*")), "meta.json")


def test_three_stages_and_a_reply(world):
    for stage, start in (("stage1", None), ("stage1_tts", "stage1"), ("stage2", "stage1_tts")):
        more = ["--epochs", 3]
        if start:
            more += ["--init_from", world / start]
        out = train(world, stage, stage, *more, launch=DIRECTLY if start else LAUNCH)
        losses = [line["loss"] for line in meta_of(world / stage)["log"] if "loss" in line]
        assert len(losses) == 9 and sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
        assert "speech adapter" in out and "val_loss" in out
    # the official checkpoint's tensors and fields, and that of the padding; this LLM is tied, that one is not
    names, fields, speech_fields = layout(world / "stage2/final")
    golden, golden_fields, golden_speech_fields = layout(CHECKPOINT / "checkpoint")
    assert names == golden - {"lm_head.weight"} | {"speech_generator.model.lm_head.weight"}
    assert fields == golden_fields | {"pad_audio"} and speech_fields == golden_speech_fields

    sample = [sys.executable, "sample.py", "--ckpt", world / "stage2"]
    sound = "--corpus", world / "corpus", "--codec", world / "tiny/codec.pt"
    out = run(*sample, *sound, "--out", world / "reply.wav", "--max_units", 60)
    assert "first text" in out and "real-time factor" in out
    replies = sorted(world.glob("reply*.wav"))
    assert replies
    for reply in replies:
        wav, rate = soundfile.read(reply)
        assert rate == 16000 and 0.04 <= len(wav) / rate <= 60 * 0.04 and len(wav) % 640 == 0
    # one's own question, in another format, and the text alone
    wav, rate = soundfile.read(replies[0])
    soundfile.write(world / "question.flac", [*wav, *wav, *([0.01] * 4000)], 22050)
    out = run(*sample, "--wav", world / "question.flac", "--text")
    assert "first text" in out and "saved" not in out

    runs = ",".join(str(world / stage) for stage in ("stage1", "stage1_tts", "stage2"))
    run(sys.executable, "eval.py", "--ckpt", world / "stage2", *sound, "--llm", world / "tiny/qwen2",
        "--dialogues", 2, "--out", world / "eval", "--runs", runs)
    assert (world / "eval/demo.png").stat().st_size > 10000
    assert read_json(world / "eval", "results.json")["figures"]["turns"][0] > 0
    run(sys.executable, "-m", "omni.hub", world / "stage2", "--folder", world / "shared", "--eval",
        world / "eval")
    card = (world / "shared/README.md").read_text()
    for words in ("| stage 1 | ", "| stage 1 TTS | ", "| stage 2 | ", "| turns | ", "`python eval.py --ckpt"):
        assert words in card
    for name in re.findall(r"\]\((\S+)\)", (world / "eval/gallery.md").read_text()):
        assert len(soundfile.read(world / "eval" / name)[0]) > 1600


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(world):
    """Ctrl-C saves at the end of the step and says how to resume. The same command ends in the same bytes."""
    straight, stopped = world / "straight", world / "stopped"
    train(world, "stage1", straight, "--epochs", 2, launch=DIRECTLY)
    command = train_command(world, "stage1", stopped, "--epochs", 2)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    seen = ""
    for line in process.stdout:
        seen += line
        if "step 4/" in line:
            os.killpg(process.pid, signal.SIGINT)     # what a terminal does on Ctrl-C
            break
    seen += process.stdout.read()
    process.wait()
    assert "run the same command again to resume" in seen and not (stopped / "final").exists(), seen[-3000:]
    train(world, "stage1", stopped, "--epochs", 2, launch=DIRECTLY)
    ours, theirs = ((folder / "final/model.safetensors").read_bytes() for folder in (stopped, straight))
    assert ours == theirs and meta_of(stopped)["log"] == meta_of(straight)["log"]


def test_refusals(world):
    """One line, exit code 2, nothing lost: another run's folder, a changed key, a NaN, a missing codec."""
    def refused(out_dir, *more):
        return train(world, "stage1", out_dir, "--epochs", 0.5, *more, launch=DIRECTLY, code=2)

    run_folder = world / "refused"
    train(world, "stage1", run_folder, "--epochs", 0.5, launch=DIRECTLY)
    before = sorted(p.name for p in run_folder.iterdir())
    assert "holds a run already (final)" in refused(run_folder, "--resume", False)
    assert "lr 0.004 -> 0.5" in refused(run_folder, "--lr", 0.5)
    assert sorted(p.name for p in run_folder.iterdir()) == before
    shutil.rmtree(run_folder / "final")
    assert "holds a run already (step-000003)" in refused(run_folder, "--resume", False)
    out = refused(world / "nan", "--lr", 1e38, "--clip", 1e38, "--muon", False)
    assert "loss or gradient is not finite" in out and "train-0000" in out
    assert not list((world / "nan").glob("step-*"))
    out = run(sys.executable, "data.py", "--codec", world / "none.pt", "--out_dir", world / "c", code=2)
    assert out.strip().splitlines()[-1].startswith("error: there is no codec")
    sample = [sys.executable, "sample.py", "--corpus", world / "corpus", "--codec", world / "tiny/codec.pt",
              "--ckpt"]
    for arguments, fragment in (([run_folder, "--wav", "none.wav"], "none.wav: there is no such file"),
                                ([run_folder, "--index", "99"], "--index 99"),
                                ([world / "nowhere"], "nowhere")):
        assert fragment in run(*sample, *arguments, code=2).strip().splitlines()[-1]


def test_only_the_global_batch_decides(world):
    """The same losses to 2e-4 from one process, from several micro-batches, from two processes (DDP), from
    two that shard weights and optimizer (FSDP 2) and resume what DDP saved, and from one that resumes what
    FSDP 2 saved."""
    runs = {                          # launcher, --micro_tokens, (whose checkpoint it resumes, at which step)
        "one": (DIRECTLY, 9999, None),
        "accumulated": (DIRECTLY, 200, None),
        "ddp": (DDP, 200, None),
        "fsdp": (FSDP, 200, ("ddp", 1)),
        "one again": (DIRECTLY, 200, ("fsdp", 4)),
    }
    # Muon rounds to bf16, which hides what is compared here. Gradients agree to 1e-6, but where one is only
    # rounding, AdamW's first steps take its sign, so losses agree to 2e-4.
    more = ["--epochs", 1, "--precision", "no", "--muon", False, "--lr", 1e-5, "--save_every", 1, "--keep", 9]
    for name, (launch, micro, start) in runs.items():
        if start:
            before, step = start
            later = {"final", *(f"step-{n:06d}" for n in range(step + 1, 7))}
            shutil.copytree(world / before, world / name, ignore=lambda at, names: later)
        out = train(world, "stage1", name, *more, "--micro_tokens", micro, launch=launch)
        assert not start or f"resuming {world / name}/step-{step:06d}" in out
    one, goal = load_file(world / "one/final/model.safetensors"), meta_of(world / "one")["log"]
    assert any("val_exact" in line for line in goal)
    for name, (launch, _, _) in runs.items():
        meta = meta_of(world / name)
        assert meta["processes"] == (1 if launch is DIRECTLY else 2)
        for ours, theirs in zip(meta["log"], goal, strict=True):
            for key in {"loss", "val_loss"} & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (name, ours, theirs)
        weights = load_file(world / name / "final/model.safetensors")
        assert weights.keys() == one.keys()
        for key, weight in one.items():
            assert (weights[key] - weight).abs().max() < 1e-4, (name, key)
