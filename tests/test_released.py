"""Checkpoints as they are released: tied or not, whole or in shards, with the encoder inside or beside, at
every size, in a folder or on the hub. It protects the promise that a download loads, completely or with one
clear line."""
import contextlib
import json
import os
import re
import shutil

import huggingface_hub
import pytest
import torch
from accelerate import init_empty_weights
from conftest import CHECKPOINT
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM, Qwen2Model, Qwen2Tokenizer

from model import Omni
from omni import checkpoint
from omni.costs import model_of, parameters

WHISPER = str(CHECKPOINT / "whisper-tiny-random.pt")
HEAD = "speech_generator.model.lm_head.weight"        # of the speech LM: tied to its table, in every release
TABLE = "speech_generator.model.model.embed_tokens.weight"


def variant(folder, tied=False, shards=1, encoder=True, **fields):
    """A copy of the golden checkpoint, stored in another of the released ways."""
    shutil.copytree(CHECKPOINT / "checkpoint", folder)
    weights = load_file(folder / "model.safetensors")
    if tied:                                          # the 0.5B to 3B releases
        weights.pop("lm_head.weight")
    if not encoder:
        weights = {name: w for name, w in weights.items() if not name.startswith("model.speech_encoder.")}
    if shards > 1:                                    # the 7B and larger: an index says which file holds what
        (folder / "model.safetensors").unlink()
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            save_file({name: weights[name] for name in sorted(weights)[i::shards]}, folder / file)
        index = {name: files[i % shards] for i, name in enumerate(sorted(weights))}
        index = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("how", [{"tied": True}, {"shards": 3}, {"encoder": False},
                                 {"tied": True, "shards": 2, "encoder": False}], ids=str)
def test_every_way_of_storing_loads(tmp_path, how):
    """The same tensors, wherever they lie; and what is saved again loads again, key for key."""
    tied = how.get("tied", False)
    expected = load_file(CHECKPOINT / "checkpoint" / "model.safetensors")
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    if not how.get("encoder", True):                  # the Whisper file here holds other numbers
        own = torch.load(WHISPER, weights_only=True)["model_state_dict"]
        expected |= {f"model.speech_{name}": w for name, w in own.items() if name.startswith("encoder.")}
    expected[HEAD] = expected[TABLE]
    omni, *tokenizers = checkpoint.load(variant(tmp_path / "a", **how), WHISPER)
    ours = omni.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], w) for name, w in expected.items())
    assert (omni.lm_head.weight is omni.model.embed_tokens.weight) == tied
    checkpoint.save(omni, str(tmp_path / "b"), *tokenizers)
    again = checkpoint.load(str(tmp_path / "b"), WHISPER)[0]
    assert again.config == omni.config
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in ours.items())
    saved = load_file(tmp_path / "b" / "model.safetensors").keys()
    if tied:
        assert saved == expected.keys() - {"lm_head.weight"}
    else:
        assert saved == expected.keys()


def test_stream_params_is_parsed_not_evaluated(tmp_path):
    """The official code evaluates this field; a config from a stranger is data."""
    marker = tmp_path / "ran"
    bad = variant(tmp_path / "bad", stream_params=f"(3, open({str(marker)!r}, 'w') and 10)")
    with pytest.raises(ValueError, match="stream_params"):
        checkpoint.load(bad, WHISPER)
    assert not marker.exists()
    omni = checkpoint.load(variant(tmp_path / "good", stream_params="( 2, 7 )"), WHISPER)[0]
    assert (omni.R, omni.W) == (2, 7)


# millions of parameters, from the shapes that the paper and the releases state (reference/architecture.md)
COUNTS = {"0.5B": (494.0, 14.9, 4.8), "1.5B": (1543.7, 16.3, 9.1), "3B": (3085.9, 17.3, 13.7),
          "7B": (7615.6, 20.5, 33.7), "14B": (14770.0, 23.6, 63.2)}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    """Each released size, built on the meta device, has the parts' parameter counts."""
    n = parameters(model_of(size))
    counts = n["LLM"], n["speech adapter"], n["gate fusion"]
    assert counts == pytest.approx(COUNTS[size], abs=0.06)
    assert (n["speech LM"], n["speech encoder"]) == pytest.approx((499.7, 635.0), abs=0.06)


def layout(folder):
    """The names of a checkpoint's tensors, without the numbers of layers, and of its config's fields."""
    config = json.loads((folder / "config.json").read_text())
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in load_file(folder / "model.safetensors")}
    return names, config.keys(), config["speech_generator"].keys()


def test_a_seed_means_the_same_weights_with_memory_or_without(tiny):
    """A model is built without memory, since nearly all of it is loaded. Its new parts still get the numbers
    that they got when the rest was drawn too, and so do LoRA's matrices after it: our reference curves begin
    with them."""
    omni, found = tiny[0], []
    new = "model.speech_projector", "speech_generator.input_proj", "speech_generator.gate"
    for empty in (False, True):
        torch.manual_seed(3)
        with contextlib.ExitStack() as stack:
            if empty:
                stack.enter_context(init_empty_weights())
                draws = stack.enter_context(checkpoint.Draws())
            made = Omni(omni.config, omni.model.speech_encoder)
        if empty:
            assert made.model.layers[0].mlp.up_proj.weight.is_meta
            for name in new:
                draws.fill(made.get_submodule(name))
        weights = {name: p.detach() for name, p in made.named_parameters() if name.startswith(new)}
        found.append((weights, torch.rand(3)))
    assert len(found[0][0]) == 10
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_backbones_arrive_in_their_places():
    """Every tensor of both Qwen2 and of Whisper's encoder is in the model, bit for bit; heads are tied, and
    nothing is without memory, also of what no state dict holds."""
    omni, *_ = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    ours = omni.state_dict()
    qwen2 = Qwen2ForCausalLM.from_pretrained("tiny/qwen2", dtype=torch.float32).state_dict()
    for name, w in qwen2.items():
        assert torch.equal(ours[name][:len(w)], w), name
        assert torch.equal(ours[f"speech_generator.model.{name}"][:len(w)], w), name
    encoder = torch.load("tiny/whisper.pt", weights_only=True)["model_state_dict"]
    for name, w in encoder.items():
        if name.startswith("encoder."):
            assert torch.equal(ours[f"model.speech_{name}"], w.float()), name
    speech_lm = omni.speech_generator.model
    assert omni.lm_head.weight is omni.model.embed_tokens.weight
    assert speech_lm.lm_head.weight is speech_lm.model.embed_tokens.weight
    for name, x in (*omni.named_parameters(), *omni.named_buffers()):
        assert not x.is_meta and x.dtype == torch.float32, name
    for network in (omni.model, speech_lm.model):
        rotary = Qwen2Model(network.config.__class__(**network.config.to_dict())).rotary_emb
        assert torch.equal(network.rotary_emb.inv_freq, rotary.inv_freq)


def test_whisper_is_mapped(monkeypatch):
    """Of the file's decoder nothing is copied: large-v3 would take 9.4 GB instead of its encoder's 2.5."""
    seen, read = [], torch.load

    def watched(*args, **more):
        seen.append(more.get("mmap"))
        return read(*args, **more)

    monkeypatch.setattr(torch, "load", watched)
    checkpoint.load_whisper("tiny/whisper.pt")
    assert seen == [True]


def test_a_checkpoint_read_or_mapped_is_the_same(tmp_path):
    """export maps the files instead of holding a second model. And what `seal` has listed need not be hashed
    again: the list is right."""
    omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    folder = str(tmp_path / "saved")
    checkpoint.save(omni, folder + ".part", *tokenizers)
    checkpoint.seal(folder + ".part", folder, {})
    read, mapped = checkpoint.load(folder)[0], checkpoint.load(folder, mapped=True)[0]
    torch.testing.assert_close(read.state_dict(), omni.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(mapped.state_dict(), omni.state_dict(), rtol=0, atol=0)
    of_file = [p.untyped_storage().nbytes() > p.nbytes or p.data_ptr() % 64 for p in mapped.parameters()]
    assert sum(map(bool, of_file)) > 10
    assert all(p.data_ptr() % 64 == 0 for p in read.parameters())
    assert checkpoint.recorded_hashes(folder) == checkpoint.hashes(folder)
    assert len(checkpoint.hashes(folder)) == 1


def test_a_checkpoint_from_backbones_has_the_released_layout(tmp_path):
    """What train.py starts from and saves has exactly the tensors and fields of the official checkpoint, and
    the field pad_audio. Its LLM is tied; the speech LM's head is a tensor of its own."""
    omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    checkpoint.save(omni, str(tmp_path / "saved"), *tokenizers)
    names, fields, speech_fields = layout(tmp_path / "saved")
    golden, golden_fields, golden_speech_fields = layout(CHECKPOINT / "checkpoint")
    assert names == golden - {"lm_head.weight"} | {HEAD}
    assert fields == golden_fields | {"pad_audio"}
    assert speech_fields == golden_speech_fields
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(weights[HEAD], weights[TABLE])


# ------------------------------------------------------------------------- how its clips were padded

def test_a_released_checkpoint_was_trained_on_padded_clips():
    """It has no field that says so."""
    assert "pad_audio" not in json.loads((CHECKPOINT / "checkpoint" / "config.json").read_text())
    assert checkpoint.load(str(CHECKPOINT / "checkpoint"), WHISPER)[0].pad_audio is True


@pytest.mark.parametrize("pad_audio", [False, True])
def test_a_checkpoint_says_how_its_clips_were_padded(tmp_path, pad_audio):
    """From the first step to the download: who loads it need not know."""
    omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2",
                                                  pad_audio=pad_audio)
    assert omni.pad_audio is pad_audio
    checkpoint.save(omni, str(tmp_path / "saved"), *tokenizers)
    assert checkpoint.load(str(tmp_path / "saved"))[0].pad_audio is pad_audio


# --------------------------------------------------------------------------- the hub, only when asked

SERVED = {"owner/qwen2": "tiny/qwen2", "owner/omni": str(CHECKPOINT / "checkpoint")}


@pytest.fixture
def hub(monkeypatch):
    """A hub that has what is in SERVED -> the names that it was asked for, a list."""
    asked = []

    def download(name, **more):
        asked.append(name)
        if name not in SERVED:
            raise OSError("no such repository")
        return SERVED[name]

    def local_or_download(from_pretrained):
        def load(name, *args, **more):
            folder = name if os.path.isdir(name) else download(name)
            return from_pretrained(folder, *args, **more)
        return load

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for kind in (Qwen2Tokenizer, Qwen2ForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", local_or_download(kind.from_pretrained))
    return asked


MISSING = {                           # what is loaded, its arguments: one of them is a folder that is missing
    "a run": (checkpoint.load, ["out/nowhere"]),
    "an LLM": (checkpoint.from_backbones, ["out/nowhere", "tiny/whisper.pt", "tiny/qwen2"]),
    "a speech LM": (checkpoint.from_backbones, ["tiny/qwen2", "tiny/whisper.pt", "out/nowhere"])}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_folder_is_not_looked_for_on_the_hub(hub, what):
    """There a stranger may own that name. The error names the folder, then how to ask the hub."""
    load, arguments = MISSING[what]
    with pytest.raises(FileNotFoundError, match="^there is no folder out/nowhere;.* hf:owner/name$"):
        load(*arguments)
    assert not hub


def test_hf_downloads_a_checkpoint(hub):
    """Its whole folder, by the name without the prefix."""
    omni, _, _ = checkpoint.load("hf:owner/omni", WHISPER)
    weights = load_file(CHECKPOINT / "checkpoint" / "model.safetensors")
    assert torch.equal(omni.state_dict()[TABLE], weights[TABLE])
    assert hub == ["owner/omni"]


@pytest.mark.parametrize("llm, speech_lm", [
    ("hf:owner/qwen2", "tiny/qwen2"), ("tiny/qwen2", "hf:owner/qwen2")])
def test_hf_downloads_a_backbone(hub, llm, speech_lm):
    """Its tokenizer and its weights."""
    omni, *_ = checkpoint.from_backbones(llm, "tiny/whisper.pt", speech_lm)
    weights = load_file("tiny/qwen2/model.safetensors")
    assert torch.equal(omni.state_dict()["model.norm.weight"], weights["model.norm.weight"])
    assert hub == ["owner/qwen2", "owner/qwen2"]


def test_a_failed_download_says_what_to_do(hub):
    """The command that downloads it, with the name that the hub knows."""
    advice = "^hf:owner/none cannot be downloaded .*`hf download owner/none`, or give a folder$"
    with pytest.raises(FileNotFoundError, match=advice):
        checkpoint.load("hf:owner/none")
    assert hub == ["owner/none"]
