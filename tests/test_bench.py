"""bench.py compares our training with one that pads. It protects the comparison: both compute the same loss,
and positions are counted alike. The profile works for as little as one step."""
import json

import pytest
import torch

import bench
from data import collate, positions_of
from model import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_the_baseline_computes_the_same_loss(tiny, items, stage):
    """On one dialogue of one turn, where no clip is padded; on all in stage 1 TTS, which hears none."""
    omni = tiny[0]
    chosen = items if stage == "stage1_tts" else items[:1]
    with torch.no_grad():
        padded = bench.padded_loss(omni, bench.padded(chosen), stage)
        ours, targets, _ = omni(collate(chosen), stage)
    assert padded.item() == pytest.approx(ours.item(), rel=1e-5)
    assert targets > 3


def test_positions_are_those_of_the_batch(items):
    """What counts as real in the baseline is what we compute."""
    batch = collate(items)
    lengths = [(len(item["ids"]), sum(len(ids) for ids, _, _ in item["turns"])) for item in items]
    assert sum(positions_of(lengths, "stage1")) == len(batch["ids"])
    assert sum(positions_of(lengths, "stage1_tts")) == len(batch["speech_ids"])
    assert sum(positions_of(lengths, "stage2")) == len(batch["ids"]) + len(batch["speech_ids"])
    padded = bench.padded(items)
    assert padded["real"].sum() == len(batch["ids"])
    assert padded["speech_real"].sum() == len(batch["speech_ids"])


def test_profile_of_one_step(tmp_path, monkeypatch, capsys):
    class Training:
        def __init__(self, size, stage, how, steps):
            assert (size, stage, how, steps) == ("0.5B", "stage2", "ours", bench.WARM + 1)

        def start(self):
            pass

        def step(self):
            torch.ones(8, 8) @ torch.ones(8, 8)
    monkeypatch.setattr(bench, "Training", Training)
    out = tmp_path / "traces" / "trace.json"
    bench.bench_profile(bench.BenchConfig(sizes=("0.5B",), stage="stage2", steps=1, out=str(out)))
    events = json.loads(out.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::matmul" for event in events)
    assert "aten::" in capsys.readouterr().out


@pytest.mark.parametrize("options,message", [
    ({"what": ("sizes", "speed")}, "what: speed is none of sizes"), ({"stage": "stage3"}, "stage: stage3"),
    ({"sizes": ("1B",)}, "sizes: 1B is none of tiny"), ({"steps": 0}, "at least 1")], ids=str)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        bench.BenchConfig(**options)
