"""The model against numbers that the official code computed on small random weights: tests/data/llama_omni2, or the
folder in GOLDEN_DIR. It protects compatibility with the released checkpoints: names, shapes, order of operations."""
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import SPEECH, Omni, expand_speech, log_mel, run

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "data" / "llama_omni2"))


@pytest.fixture(scope="module")
def golden():
    whisper = next(GOLDEN.glob("*.pt"))
    omni, tokenizer, tts_tokenizer = Omni.from_pretrained(str(GOLDEN / "checkpoint"), str(whisper))
    return omni.eval(), load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "expected.safetensors")


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["one_turn", "two_turns"])
def test_agrees_with_official_code(golden, name):
    omni, inputs, expected = golden
    want = {k.removeprefix(f"{name}."): v for k, v in expected.items() if k.startswith(name)}
    ids = inputs[f"{name}.input_ids"][0].tolist()
    n_mels = omni.model.speech_encoder.n_mels
    clips = [log_mel(inputs[f"audio{i}"], n_mels, pad=True) for i in range(ids.count(SPEECH))]
    frames = [c.shape[-1] for c in clips]
    with torch.no_grad():
        heard = omni.hear(torch.cat(clips, 1), frames)
        close(omni.model.speech_projector(heard), want["speech_features"].flatten(0, 1))
        x = omni.embed_prompt(torch.tensor(expand_speech(ids, frames)), heard)[None]
        close(x, want["inputs_embeds"])
        packed = run(omni.model, torch.cat([x[0, :5], x[0]]), [5, x.shape[1]])      # behind another row, as in training
        close(packed[None, -16:], want["hidden_last16"])
        hidden = omni.model(inputs_embeds=x, use_cache=False).last_hidden_state
        close(hidden[:, -16:], want["hidden_last16"])
        close(omni.lm_head(hidden[:, -16:]), want["logits_last16"])
        # greedy text through the cached path, and the states that predicted it
        steps = want["greedy_tokens"].shape[1]
        text = list(omni.write_text(x, steps, 0.0, 1.0, eos=-1))
        assert [t for t, _, _ in text] == want["greedy_tokens"][0].tolist()
        close(torch.stack([s for _, s, _ in text]), want["greedy_hidden"][0])
        close(omni.speech_generator.fuse(want["greedy_hidden"][0], want["greedy_tokens"][0]), want["fused"])
    # the streaming speech LM, greedy over its whole vocabulary as the golden run was, with a cache across bursts
    trace, limit = [], len(want["tts_tokens"])
    list(omni.generate(ids, clips, eos=-1, max_tokens=steps, max_units=limit, temperature=0.0, constrain=False, trace=trace))
    assert limit == len(trace)
    logits = torch.stack([l for _, l in trace])
    assert logits.argmax(-1).tolist() == want["tts_tokens"].tolist()
    close(logits[:len(want["tts_logits_first"])], want["tts_logits_first"])
    last = omni.speech_generator.embed(want["tts_tokens"][-1:])
    close(torch.cat([*(i for i, _ in trace), last]), want["tts_inputs_final"])


def test_save_is_the_released_layout(golden, tmp_path):
    """load -> save -> load: every tensor and every config field survives, key for key."""
    omni, _, _ = golden
    _, tokenizer, tts_tokenizer = Omni.from_pretrained(str(GOLDEN / "checkpoint"), str(next(GOLDEN.glob("*.pt"))))
    omni.save_pretrained(str(tmp_path / "saved"), tokenizer, tts_tokenizer)
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "saved", GOLDEN / "checkpoint"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    import json
    assert json.load(open(tmp_path / "saved/config.json")) == json.load(open(GOLDEN / "checkpoint/config.json"))
