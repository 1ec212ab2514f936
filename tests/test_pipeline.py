"""The whole pipeline through the real command lines, on a corpus of a few dozen dialogues and a few steps. It protects
what a newcomer does first: every command of the README works after the one before it, losses fall, the reply is heard."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--quiet"]


def run(*command, code=0, **more):
    """Run a command in the repository; return what it printed."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Backbones and corpus, micro."""
    at = tmp_path_factory.mktemp("world")
    run(sys.executable, "tiny/backbones.py", "--out_dir", at / "tiny", "--qwen2_dialogues", 400, "--qwen2_steps", 60,
        "--codec_sentences", 100, "--codec_steps", 40, "--whisper_clips", 128, "--whisper_steps", 12, "--figures", 8)
    run(sys.executable, "data.py", "--out_dir", at / "corpus", "--train", 48, "--validation", 8, "--test", 8,
        "--codec", at / "tiny/codec.pt")
    return at


def train_command(at, stage, out_dir, *more):
    return [str(c) for c in (*LAUNCH, "train.py", f"config/tiny_{stage}.py", "--corpus", at / "corpus", "--out_dir", at / out_dir,
            "--llm", at / "tiny/qwen2", "--speech_lm", at / "tiny/qwen2", "--whisper", at / "tiny/whisper.pt", "--batch_size", 8,
            "--log_every", 2, "--eval_every", 100, "--eval_dialogues", 4, "--workers", 0, *more)]


def train(at, stage, out_dir, *more, code=0):
    return run(*train_command(at, stage, out_dir, *more), code=code)


def log_of(folder):
    last = max(folder.glob("step-*"))
    return json.loads((last / "meta.json").read_text())["log"]


def test_backbones_load_where_downloads_would(world):
    """The three files open with the libraries' own loaders, as the real ones do."""
    import whisper
    from transformers import AutoTokenizer, Qwen2ForCausalLM
    from codec import NanoCodec
    assert whisper.load_model(str(world / "tiny/whisper.pt"), device="cpu").dims.n_mels == 80
    assert Qwen2ForCausalLM.from_pretrained(world / "tiny/qwen2").config.vocab_size == len(AutoTokenizer.from_pretrained(world / "tiny/qwen2"))
    assert NanoCodec.load(world / "tiny/codec.pt").sample_rate == 16000


def test_three_stages_and_a_reply(world):
    for stage, start in (("stage1", None), ("stage1_tts", "stage1"), ("stage2", "stage1_tts")):
        out = train(world, stage, stage, "--epochs", 3, *(["--init_from", world / start] if start else []))
        losses = [line["loss"] for line in log_of(world / stage) if "loss" in line]
        assert len(losses) == 9 and sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
        assert "speech adapter" in out and "val_loss" in out
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
    """Ctrl-C saves at the end of the step, says how to go on, and the resumed run ends in the very same weights."""
    from safetensors.torch import load_file
    straight, stopped = world / "straight", world / "stopped"
    train(world, "stage1", straight, "--epochs", 3)
    process = subprocess.Popen(train_command(world, "stage1", stopped, "--epochs", 3), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    seen = ""
    for line in process.stdout:
        seen += line
        if "step 4/" in line:
            os.killpg(process.pid, signal.SIGINT)     # what a terminal does on Ctrl-C
            break
    seen += process.stdout.read()
    process.wait()
    assert "--resume" in seen and list(stopped.glob("step-*")), seen[-3000:]
    train(world, "stage1", stopped, "--epochs", 3, "--resume")
    ours, theirs = (load_file(max(d.glob("step-*")) / "model.safetensors") for d in (stopped, straight))
    assert all((ours[k] == theirs[k]).all() for k in theirs)
    steps = [x["step"] for x in log_of(stopped) if "loss" in x]
    assert steps == sorted(set(steps)) and steps[-1] == 18


def test_refusals(world):
    """One line, exit code 2, nothing lost: another run's folder, a changed key, a missing codec, a NaN."""
    run_folder = world / "refused"
    train(world, "stage1", run_folder, "--epochs", 1)
    before = sorted(p.name for p in run_folder.glob("step-*"))
    assert "--resume" in train(world, "stage1", run_folder, "--epochs", 1, code=1)
    assert "lr 0.004 -> 0.5" in train(world, "stage1", run_folder, "--epochs", 1, "--lr", "0.5", "--resume", code=1)
    assert sorted(p.name for p in run_folder.glob("step-*")) == before
    out = train(world, "stage1", world / "nan", "--epochs", 1, "--lr", 1e38, "--clip", 1e38, "--muon", "false", code=1)
    assert "not finite" in out and "train-0000" in out and not list((world / "nan").glob("step-*"))
    out = run(sys.executable, "data.py", "--codec", world / "none.pt", "--out_dir", world / "c", code=2)
    assert out.strip().splitlines()[-1].startswith("error: there is no codec")
    sample = [sys.executable, "sample.py", "--corpus", world / "corpus", "--codec", world / "tiny/codec.pt", "--ckpt"]
    for arguments, fragment in (([world / "straight", "--wav", "none.wav"], "none.wav: there is no such file"),
                                ([world / "straight", "--index", "99"], "--index 99"), ([world / "nowhere"], "nowhere")):
        assert fragment in run(*sample, *arguments, code=2).strip().splitlines()[-1]


def test_the_global_batch_alone_decides(world):
    """The same losses and weights, up to rounding, from one process, from two micro-batches, and from two processes."""
    from safetensors.torch import load_file
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    for name, launch, micro in (("one", LAUNCH, 8), ("accumulated", LAUNCH, 4), ("two", two, 4)):
        command = train_command(world, "stage1", name, "--epochs", 1, "--precision", "no", "--muon", "false",
                                "--micro_batch", micro)        # Muon rounds to bf16, which hides what is compared here
        run(*launch, *command[len(LAUNCH):])
    ours = {name: load_file(max((world / name).glob("step-*")) / "model.safetensors") for name in ("one", "accumulated", "two")}
    for name, processes in (("accumulated", 1), ("two", 2)):
        meta = json.loads((max((world / name).glob("step-*")) / "meta.json").read_text())
        assert meta["processes"] == processes
        for a, b in zip(meta["log"], log_of(world / "one"), strict=True):
            assert a == pytest.approx(b, rel=1e-3)
        assert all((ours[name][k] - v).abs().max() < 1e-3 for k, v in ours["one"].items())
