"""Checkpoints as they are released: tied or not, whole or in shards, with the encoder inside or beside, at every size.
It protects the promise that a download loads, completely or with one clear line."""
import json
import re
import shutil

import pytest
import torch
from conftest import CHECKPOINT
from safetensors.torch import load_file, save_file

from bench import QWEN2, parameters, real_model
from model import Omni

WHISPER = str(CHECKPOINT / "whisper-tiny-random.pt")


def variant(folder, tied=False, shards=1, encoder=True, **fields):
    """A copy of the golden checkpoint, stored in another of the released ways."""
    shutil.copytree(CHECKPOINT / "checkpoint", folder)
    weights = load_file(folder / "model.safetensors")
    if tied:                                          # the 0.5B to 3B releases
        weights.pop("lm_head.weight")
    if not encoder:
        weights = {k: w for k, w in weights.items() if not k.startswith("model.speech_encoder.")}
    if shards > 1:                                    # the 7B and larger: several files and an index that says which holds what
        (folder / "model.safetensors").unlink()
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        for i, name in enumerate(names):
            save_file({k: weights[k] for k in sorted(weights)[i::shards]}, folder / name)
        index = {k: names[i % shards] for i, k in enumerate(sorted(weights))}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("how", [dict(tied=True), dict(shards=3), dict(encoder=False), dict(tied=True, shards=2, encoder=False)], ids=str)
def test_every_way_of_storing_loads(tmp_path, how):
    """The same tensors, wherever they lie; and what is saved again loads again, key for key."""
    expected = load_file(CHECKPOINT / "checkpoint" / "model.safetensors")
    if how.get("tied"):
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    if not how.get("encoder", True):                  # the Whisper file here holds other numbers than the checkpoint
        own = torch.load(WHISPER, weights_only=True)["model_state_dict"]
        expected |= {f"model.speech_{k}": w for k, w in own.items() if k.startswith("encoder.")}
    omni, *tokenizers = Omni.from_pretrained(variant(tmp_path / "a", **how), WHISPER)
    expected["speech_generator.model.lm_head.weight"] = expected["speech_generator.model.model.embed_tokens.weight"]
    ours = omni.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], w) for k, w in expected.items())
    omni.save_pretrained(str(tmp_path / "b"), *tokenizers)
    again = Omni.from_pretrained(str(tmp_path / "b"), WHISPER)[0]
    assert again.config == omni.config and all(torch.equal(w, again.state_dict()[k]) for k, w in ours.items())
    saved = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert saved == expected.keys() - {"speech_generator.model.lm_head.weight"} - ({"lm_head.weight"} if how.get("tied") else set())
    head, table = omni.lm_head.weight, omni.model.embed_tokens.weight
    assert (head is table) == bool(how.get("tied"))


def test_stream_params_is_parsed_not_evaluated(tmp_path):
    """The official code evaluates this field; a config from a stranger is data."""
    marker = tmp_path / "ran"
    bad = variant(tmp_path / "bad", stream_params=f"(3, open({str(marker)!r}, 'w') and 10)")
    with pytest.raises(ValueError, match="stream_params"):
        Omni.from_pretrained(bad, WHISPER)
    assert not marker.exists()
    omni = Omni.from_pretrained(variant(tmp_path / "good", stream_params="( 2, 7 )"), WHISPER)[0]
    assert (omni.R, omni.W) == (2, 7)


# millions of parameters, from the shapes that the paper and the releases state (reference/architecture.md)
TABLE = {"0.5B": (494.0, 14.9, 4.8), "1.5B": (1543.7, 16.3, 9.1), "3B": (3085.9, 17.3, 13.7), "7B": (7615.6, 20.5, 33.7),
         "14B": (14770.0, 23.6, 63.2)}


@pytest.mark.parametrize("size", QWEN2)
def test_parameter_counts(size):
    """Each released size, built on the meta device, has the parts' parameter counts."""
    n = parameters(real_model(size))
    assert (n["LLM"], n["adapter"], n["gate fusion"]) == pytest.approx(TABLE[size], abs=0.06)
    assert (n["speech LM"], n["encoder"]) == pytest.approx((499.7, 635.0), abs=0.06)


def layout(folder):
    """The names of a checkpoint's tensors, without the numbers of layers, and of its config's fields."""
    config = json.loads((folder / "config.json").read_text())
    return ({re.sub(r"\.\d+\.", ".N.", k) for k in load_file(folder / "model.safetensors")}, config.keys(), config["speech_generator"].keys())


def test_a_checkpoint_from_backbones_has_the_released_layout(tmp_path):
    """What train.py starts from and saves has exactly the tensors and fields of the official checkpoint. (Its LLM is tied.)"""
    omni, *tokenizers = Omni.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    omni.save_pretrained(str(tmp_path / "saved"), *tokenizers)
    names, *fields = layout(tmp_path / "saved")
    golden, *golden_fields = layout(CHECKPOINT / "checkpoint")
    assert names == golden - {"lm_head.weight"} and fields == golden_fields
