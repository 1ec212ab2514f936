"""The model against numbers that the official code computed on small random weights:
tests/data/llama_omni2, or the folder in GOLDEN_DIR. It protects compatibility with the released checkpoints:
names, shapes, order of operations."""
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import generate
from safetensors.torch import load_file

from model import SPEECH, expand_speech, forward_packed
from omni import checkpoint
from omni.audio import log_mel
from omni.engine import Engine

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "data" / "llama_omni2"))


def load():
    """A fresh (omni, tokenizer, tts_tokenizer)."""
    return checkpoint.load(str(GOLDEN / "checkpoint"), str(next(GOLDEN.glob("*.pt"))))


@pytest.fixture(scope="module")
def golden():
    omni = load()[0].eval()
    return omni, load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "expected.safetensors")


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-4, rtol=1e-4)


def case(golden, name):
    """(omni, prompt ids, list of mels, {what: the official code's numbers}) of one dialogue."""
    omni, inputs, expected = golden
    ids = inputs[f"{name}.input_ids"][0].tolist()
    n_mels = omni.model.speech_encoder.n_mels
    clips = [log_mel(inputs[f"audio{i}"], n_mels, pad=True) for i in range(ids.count(SPEECH))]
    prefix = f"{name}."
    theirs = {key.removeprefix(prefix): x for key, x in expected.items() if key.startswith(prefix)}
    return omni, ids, clips, theirs


@pytest.mark.parametrize("name", ["one_turn", "two_turns"])
@torch.no_grad()
def test_speech_to_text_agrees_with_official_code(golden, name):
    """From the clips to the fused rows: adapter, embeddings, states, logits, greedy text."""
    omni, ids, clips, theirs = case(golden, name)
    frames = [clip.shape[-1] for clip in clips]
    encoded = omni.encode_speech(torch.cat(clips, 1), frames)
    close(omni.model.speech_projector(encoded), theirs["speech_features"].flatten(0, 1))
    x = omni.embed_prompt(torch.tensor(expand_speech(ids, frames)), encoded)[None]
    close(x, theirs["inputs_embeds"])
    behind_another = torch.cat([x[0, :5], x[0]])      # a row behind another one, as in training
    packed = forward_packed(omni.model, behind_another, [5, x.shape[1]])
    close(packed[None, -16:], theirs["hidden_last16"])
    hidden = omni.model(inputs_embeds=x, use_cache=False).last_hidden_state
    close(hidden[:, -16:], theirs["hidden_last16"])
    close(omni.lm_head(hidden[:, -16:]), theirs["logits_last16"])
    # greedy text through the cached path, and the states that predicted it
    steps = theirs["greedy_tokens"].shape[1]
    writer = Engine(omni, max_tokens=steps, eos=-1)
    reply = writer.submit(ids, clips, speak=False)
    states = [reply.state for _, kind, _ in writer.stream() if kind == "text"]
    assert reply.text == theirs["greedy_tokens"][0].tolist()
    close(torch.stack(states), theirs["greedy_hidden"][0])
    fused = omni.speech_generator.fuse(theirs["greedy_hidden"][0], theirs["greedy_tokens"][0])
    close(fused, theirs["fused"])


@pytest.mark.parametrize("name", ["one_turn", "two_turns"])
def test_streaming_agrees_with_official_code(golden, name):
    """The streaming speech LM, greedy over its whole vocabulary as the golden run was, with a cache across
    bursts."""
    omni, ids, clips, theirs = case(golden, name)
    trace, steps, limit = [], theirs["greedy_tokens"].shape[1], len(theirs["tts_tokens"])
    list(generate(omni, ids, clips, eos=-1, max_tokens=steps, max_units=limit, temperature=0.0,
                         constrain=False, trace=trace))
    assert limit == len(trace)
    logits = torch.stack([row for _, row in trace])
    assert logits.argmax(-1).tolist() == theirs["tts_tokens"].tolist()
    close(logits[:len(theirs["tts_logits_first"])], theirs["tts_logits_first"])
    with torch.no_grad():
        last = omni.speech_generator.embed(theirs["tts_tokens"][-1:])
    close(torch.cat([*(inputs for inputs, _ in trace), last]), theirs["tts_inputs_final"])


def test_save_is_the_released_layout(tmp_path):
    """load -> save: every tensor and every config field survives, key for key. The speech LM's tied head is
    written too, since the official code does not tie it."""
    omni, *tokenizers = load()
    checkpoint.save(omni, str(tmp_path / "saved"), *tokenizers)
    ours = load_file(tmp_path / "saved" / "model.safetensors")
    theirs = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    speech_lm = "speech_generator.model."
    theirs[speech_lm + "lm_head.weight"] = theirs[speech_lm + "model.embed_tokens.weight"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(w, theirs[name]) for name, w in ours.items())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
