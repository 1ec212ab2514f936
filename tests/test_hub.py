"""Sharing a checkpoint. It protects that a card says what the runs recorded and nothing else, that what is
uploaded opens elsewhere, that no path or command of the maker gets out, and that the ONNX half hears what the
model hears."""
import dataclasses
import inspect
import json
import os
import shutil
import sys

import accelerate
import huggingface_hub
import onnxruntime
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from transformers import Qwen2Config, Qwen2ForCausalLM
from whisper.model import ModelDimensions, Whisper

from model import SPEECH, forward_packed
from omni import checkpoint, hub
from omni.files import read_json, sha256
from omni.run import Run

CORPUS = {"dialogues": 12345, "sha256": "feed" * 16,
          "settings": {"source": "tiny", "train": 12345, "path": None, "audio_root": "/home/me/sounds",
                       "tts": "say --key secret {wav}", "codec": "/home/me/tiny/codec.pt"}}
STAGES = {"stage1": (700, 0.125), "stage1_tts": (800, 0.25), "stage2": (900, 0.375)}      # steps, validation
FIGURES = {"turns": [321], "s2t": [87.5, 80.0, 95.0]}


def make_backbones(at):
    """Random ones under the names of the embedded world's, smaller."""
    shutil.copytree(ROOT / "tiny/qwen2", at / "qwen2")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = Qwen2Config.from_pretrained(at / "qwen2", **sizes, layer_types=["full_attention"])
    Qwen2ForCausalLM(config).save_pretrained(at / "qwen2")
    dims = ModelDimensions(80, 1500, 64, 1, 2, n_vocab=9, n_text_ctx=9, n_text_state=64, n_text_head=1,
                           n_text_layer=1)
    weights = Whisper(dims).state_dict()
    weights["encoder.positional_embedding"] = torch.randn(1500, 64)
    torch.save({"dims": dims.__dict__, "model_state_dict": weights}, at / "whisper.pt")


def make_run(at, stage, before):
    """A run's folder, written as train.py writes it, with weights that differ from those before."""
    settings = {"stage": stage, "corpus": "/home/me/corpus", "out_dir": str(at / stage), "init_from": before,
                "llm": str(at / "tiny/qwen2"), "whisper": str(at / "tiny/whisper.pt"), "fusion": "gate",
                "speech_lm": str(at / "tiny/qwen2"), "lora_rank": 0, "freeze_llm": False, "batch_size": 24,
                "lr": 0.0075, "resume": True, "keep": 2}
    Config = dataclasses.make_dataclass("Config", settings)
    run = Run(Config(**settings), accelerate.Accelerator(cpu=True))
    if before:
        omni, *tokenizers = checkpoint.load(before)
    else:
        names = [settings[key] for key in ("llm", "whisper", "speech_lm")]
        omni, *tokenizers = checkpoint.from_backbones(*names)
    run.set_base(omni, tokenizers)
    run.set_corpus(CORPUS)
    omni.freeze_for(stage)
    trained = [p for p in omni.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += 0.02 * torch.randn_like(p)
    steps, loss = STAGES[stage]
    run.history = [{"step": 1, "loss": 9.0}, {"step": steps, "val_loss": loss}]
    run.save(steps, omni, [torch.optim.SGD(trained, lr=0.1)], tokenizers, torch.zeros(3),
             {"max_steps": steps, "epoch": 1.5})
    run.export(steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of three stages, each from the one before."""
    at, before = tmp_path_factory.mktemp("runs"), None
    torch.manual_seed(0)
    make_backbones(at / "tiny")
    for stage in STAGES:
        make_run(at, stage, before)
        before = str(at / stage)
    return at


def share(monkeypatch, *arguments, code=0):
    """Run the command."""
    monkeypatch.setattr(sys, "argv", ["hub.py", *map(str, arguments)])
    if not code:
        return hub.main()
    with pytest.raises(SystemExit) as exit:
        hub.main()
    assert exit.value.code == code


def rows_of(text, heading):
    """The cells of the table under a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if line.startswith("|")][2:]


def test_the_card_says_what_the_runs_recorded(monkeypatch, runs, tmp_path):
    """Also when the runs have moved. Each stage has its own row, read back from Markdown and YAML."""
    moved = tmp_path / "moved"
    shutil.copytree(runs, moved)
    share(monkeypatch, moved / "stage2", "me/bot", "--folder", tmp_path / "look", "--eval", evaluation(moved))
    text = (tmp_path / "look/README.md").read_text()
    front = ModelCard(text).data
    assert front.license == "other"                   # nothing is known of the command that spoke
    assert (front.base_model, front.language, front.pipeline_tag) == (None, "en", "any-to-any")
    git = read_json(moved / "stage2/final", "meta.json")["git"][:7]
    common = ["12,345", "feedfeed"]
    assert rows_of(text, "Training") == [
        ["stage 1", "speech adapter, LLM", *common, "700", "1.50", "24", "0.0075", "0.125", git],
        ["stage 1 TTS", "speech LM", *common, "800", "1.50", "24", "0.0075", "0.250", git],
        ["stage 2", "gate fusion, speech LM", *common, "900", "1.50", "24", "0.0075", "0.375", git]]
    assert ["s2t", "87.5 (80.0 to 95.0)"] in rows_of(text, "Figures")
    assert "`python eval.py --ckpt bot --runs=a,b`" in text and "Commit: c0ffee." in text
    assert "python sample.py --ckpt hf:me/bot --wav question.wav\n" in text and "280" in text
    # the same from final/; and when another run lies where stage 1 TTS was, nothing is said about it
    share(monkeypatch, moved / "stage2/final", "me/bot", "--folder", tmp_path / "again")
    assert rows_of((tmp_path / "again/README.md").read_text(), "Training") == rows_of(text, "Training")
    shutil.rmtree(moved / "stage1_tts")
    shutil.copytree(moved / "stage1", moved / "stage1_tts")
    share(monkeypatch, moved / "stage2", "me/bot", "--folder", tmp_path / "broken")
    text = (tmp_path / "broken/README.md").read_text()
    assert [row[0] for row in rows_of(text, "Training")] == ["stage 2"]
    assert "started from `stage1_tts`; what came before is not recorded" in text
    assert ModelCard(text).data.language is None and ModelCard(text).data.license == "other"


def evaluation(runs, weights=None):
    """The folder of an evaluation of stage 2, or of other weights."""
    folder = runs / "eval"
    folder.mkdir(exist_ok=True)
    weights = weights or sha256(runs / "stage2/final/model.safetensors")
    (folder / "settings.json").write_text(json.dumps({"set": "tiny", "weights": weights}))
    results = {"figures": FIGURES, "categories": {}, "git": "c0ffee",
               "command": "eval.py --ckpt /home/me/bot --runs=/home/me/a,/home/me/b"}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_figures_of_other_weights_are_left_out(monkeypatch, runs, tmp_path, capsys):
    at = evaluation(runs, "0" * 64)
    share(monkeypatch, runs / "stage2", "--folder", tmp_path / "look", "--eval", at)
    text = (tmp_path / "look/README.md").read_text()
    assert "87.5" not in text and "No evaluation of these weights is recorded." in text
    assert f"{at} is left out" in capsys.readouterr().out


def test_a_model_that_cannot_speak_says_so(monkeypatch, runs, tmp_path):
    share(monkeypatch, runs / "stage1", "--folder", tmp_path / "look")
    text = (tmp_path / "look/README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "audio-text-to-text" and "--wav question.wav --text\n" in text
    assert "no stage 1 TTS" in text and "serve.py" not in text


def test_nothing_private_gets_out(monkeypatch, runs, tmp_path):
    """Neither the command of the synthesizer nor a folder of the maker, in any file that is text."""
    share(monkeypatch, runs / "stage2", "me/bot", "--folder", tmp_path / "look", "--eval", evaluation(runs))
    for path in (tmp_path / "look").rglob("*"):
        if path.suffix in (".md", ".json"):
            text = path.read_text()
            assert "secret" not in text and "/home" not in text and str(ROOT) not in text, path
            assert str(runs) not in text, path
    meta = read_json(tmp_path / "look", "meta.json")
    assert meta["config"]["corpus"] == "corpus" and meta["corpus"]["settings"]["tts"] == "a command"


@torch.no_grad()
def test_the_folder_opens_elsewhere_with_the_same_logits(monkeypatch, runs, tmp_path):
    """The runs are gone, so it leans on nothing but its own files: no links, Whisper's encoder inside."""
    shutil.copytree(runs, tmp_path / "runs")

    def logits():
        omni, tokenizer, _ = checkpoint.load(folder)
        mel = torch.randn(80, 240, generator=torch.Generator().manual_seed(1))
        ids = torch.tensor([*tokenizer("What is")["input_ids"], *[SPEECH] * 24])
        x = omni.embed_prompt(ids, omni.encode_speech(mel, [240]))
        states = forward_packed(omni.model, x, [len(ids)])
        return omni.lm_head(states), forward_packed(omni.speech_generator.model.model, states, [len(ids)])

    folder = str(tmp_path / "runs/stage2")
    expected = logits()
    share(monkeypatch, folder, "--folder", tmp_path / "look")
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "look")
    assert not any(path.is_symlink() for path in (tmp_path / "look").rglob("*"))
    assert checkpoint.damage(folder) is None
    for ours, theirs in zip(logits(), expected):
        assert ours.equal(theirs)


# ------------------------------------------------------------------------------------------------- licences

@pytest.mark.parametrize("settings, source, licence, base", [
    ({}, "instructs2s", "cc-by-nc-4.0", ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"]),
    ({"llm": "hf:Qwen/Qwen2.5-3B-Instruct"}, "instructs2s", "other", ["Qwen/Qwen2.5-3B-Instruct",
                                                                      "Qwen/Qwen2.5-0.5B"]),
    ({"init_from": "hf:ICTNLP/LLaMA-Omni2-0.5B"}, "instructs2s", "other", ["ICTNLP/LLaMA-Omni2-0.5B"]),
    ({"llm": "tiny/qwen2", "speech_lm": "tiny/qwen2", "whisper": "tiny/whisper.pt"}, "tiny", "mit", []),
    ({}, "tiny", "apache-2.0", ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"]),
    ({}, "folder", "other", ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"]),
    ({"whisper": "mine.pt"}, "tiny", "other", ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"]),
], ids=str)
def test_the_strictest_licence_counts(settings, source, licence, base):
    """As reference/real_sizes.md lists them."""
    config = {"stage": "stage2", "llm": "hf:Qwen/Qwen2.5-0.5B-Instruct", "speech_lm": "hf:Qwen/Qwen2.5-0.5B",
              "whisper": "large-v3", "init_from": None} | settings
    meta = {"config": config, "corpus": {"settings": {"source": source, "codec": "tiny/codec.pt"}}}
    rows = hub.origins([meta], config["init_from"])
    assert max((row[2] for row in rows), key=hub.STRICTER.index) == licence
    assert [name.removeprefix("hf:") for _, name, _, _ in rows if name.startswith("hf:")] == base
    codec = "CosyVoice 2" if source == "instructs2s" else "tiny/codec.pt"
    assert [name for part, name, _, _ in rows if part == "units"] == [codec]


# --------------------------------------------------------------------------------------------------- upload

class Hub:
    """Takes the place of HfApi; refuses what the real methods would not take."""

    calls, fault = [], None

    def __getattr__(self, name):
        def call(*args, **more):
            if self.fault:
                raise self.fault
            real = inspect.signature(getattr(huggingface_hub.HfApi, name))
            bound = real.bind(self, *args, **more).arguments
            bound.pop("self")
            if "folder_path" in bound:                # read now: it is gone afterwards
                at = bound.pop("folder_path")
                bound["omni"] = checkpoint.load(at)[0]
                bound["files"] = {name for name in os.listdir(at)}
            self.calls.append((name, bound))
        return call


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_upload(monkeypatch, runs, fake, capsys):
    """One commit with all files of final/ and the card; old weights go, or a reader would load both."""
    share(monkeypatch, runs / "stage2", "me/bot")
    (first, created), (second, uploaded) = fake.calls
    assert (first, created) == ("create_repo", {"repo_id": "me/bot", "exist_ok": True})
    assert second == "upload_folder" and uploaded["repo_id"] == "me/bot"
    assert uploaded["files"] == {*os.listdir(runs / "stage2/final"), "README.md"}
    assert uploaded["delete_patterns"] == ["*.safetensors", "onnx/*"]
    ours, theirs = uploaded["omni"].state_dict(), checkpoint.load(str(runs / "stage2"))[0].state_dict()
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert "https://huggingface.co/me/bot" in capsys.readouterr().out
    assert not (runs / "stage2/final/README.md").exists()                # the run itself is left as it was
    assert checkpoint.damage(runs / "stage2/final") is None


def test_refusals(monkeypatch, runs, fake, tmp_path, capsys):
    """One line each, and nothing is uploaded."""
    def refused(*arguments):
        share(monkeypatch, *arguments, code=2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "owner/name" in refused(runs / "stage2", "bot")
    assert "owner/name" in refused(runs / "stage2")
    assert "a b" in refused(runs / "stage2", "me/a b")
    (tmp_path / "full").mkdir()
    assert "already" in refused(runs / "stage2", "--folder", tmp_path / "full")
    assert "nowhere" in refused("nowhere", "me/bot")
    assert "results.json" in refused(runs / "stage2", "me/bot", "--eval", tmp_path)
    shutil.copytree(runs / "stage1/step-000700", tmp_path / "run/step-000700")
    assert "let train.py finish" in refused(tmp_path / "run", "me/bot")
    shutil.copytree(runs / "stage1/final", tmp_path / "plain")
    (tmp_path / "plain/meta.json").unlink()
    assert "no meta.json" in refused(tmp_path / "plain", "me/bot")
    assert not fake.calls
    monkeypatch.setattr(fake, "fault", Exception("[Errno -2] Name or service not known"))
    assert "check the network" in refused(runs / "stage2", "me/bot")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "hf auth login" in refused(runs / "stage2", "me/bot")


# ----------------------------------------------------------------------------------------------------- ONNX

@torch.no_grad()
def test_onnx_hears_what_torch_hears(monkeypatch, runs, tmp_path):
    """Clips of several lengths, each against the packed encoder, alone and beside others; and a clip of more
    than 30 s in pieces. To 1e-4 of the largest value."""
    share(monkeypatch, runs / "stage2", "--folder", tmp_path / "look", "--onnx")
    assert "speech.onnx" in (tmp_path / "look/README.md").read_text()
    session = onnxruntime.InferenceSession(tmp_path / "look/onnx/speech.onnx",
                                           providers=["CPUExecutionProvider"])
    omni = checkpoint.load(str(tmp_path / "look"))[0]

    def hear(mel):
        return torch.from_numpy(session.run(["positions"], {"mel": mel.numpy()})[0])

    def same(ours, theirs):
        assert ours.shape == theirs.shape and len(ours)
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()

    generator, frames = torch.Generator().manual_seed(2), [10, 11, 99, 100, 371, 2999, 3000]
    mels = [torch.randn(80, n, generator=generator) for n in frames]
    beside = omni.model.speech_projector(omni.encode_speech(torch.cat(mels, 1), frames))
    same(torch.cat([hear(mel) for mel in mels]), beside)
    for mel in mels:
        same(hear(mel), omni.model.speech_projector(omni.encode_speech(mel, [mel.shape[1]])))
    long = torch.randn(80, 3333, generator=generator)
    same(torch.cat([hear(piece) for piece in long.split(3000, 1)]),
         omni.model.speech_projector(omni.encode_speech(long, [3333])))


def test_an_export_that_differs_is_refused(monkeypatch, runs, tmp_path, capsys):
    """The check can fail: an encoder with another order of frames."""
    forward = hub.Ears.forward
    monkeypatch.setattr(hub.Ears, "forward", lambda self, mel: forward(self, mel.flip(1)))
    share(monkeypatch, runs / "stage2", "--folder", tmp_path / "look", "--onnx", code=2)
    assert "differs from torch" in capsys.readouterr().err and not os.listdir(tmp_path)
