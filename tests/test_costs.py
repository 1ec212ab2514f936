"""The cost tables are arithmetic. This protects them where they can be checked: parameters against the
numbers that Qwen2.5 is known by, bytes of activations and FLOPs against what torch counts, and the docs
against what the command prints."""
import json
import re
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Model

import bench
from model import STAGES, forward_packed, qwen2_config
from omni import checkpoint, costs, packing
from omni.configure import read_file


def network(hidden, mlp, heads, kv_heads, layers):
    return Qwen2Model(qwen2_config({
        "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": 8, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 1024}))


def saved_bytes(model, positions):
    """Bytes of the tensors that the forward pass saves for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage       # held, or its address would be used again
        return x
    x = torch.randn(positions, model.config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        forward_packed(model, x, [positions])
        return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("shape", [(128, 512, 4, 2, 2), (256, 704, 8, 2, 3)], ids=str)
def test_activations_are_what_torch_saves(shape, lora_rank, monkeypatch):
    """Exactly, with the attention of a GPU: the bf16 copies of the weights, and the formula."""
    def fused(q, k, v, mask, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    monkeypatch.setattr(packing, "attention", fused)
    model, positions = network(*shape), 256
    if lora_rank:
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=lora_rank, target_modules=linear), model)
    expected = 2 * costs.matrix_weights(model.layers)
    expected += positions * costs.activations(model.config, lora_rank=lora_rank)
    assert saved_bytes(model, positions) == expected


def test_flops_are_what_torch_counts():
    """Forward and backward pass of two layers. On CPU attention computes the half that is not seen, too."""
    model, n = network(128, 512, 4, 2, 2), 256
    with FlopCounterMode(display=False) as counter:
        forward_packed(model, torch.randn(n, 128, requires_grad=True), [n]).sum().backward()
    half = costs.network_flops(model, [n]) - 2 * costs.matrix_weights(model.layers) * n
    assert counter.get_total_flops() == 3 * (costs.network_flops(model, [n]) + half)


@pytest.mark.parametrize("size,count", [
    ("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512),
    ("14B", 14_770_033_664)])
def test_qwen2_has_the_parameters_it_is_known_by(size, count):
    assert costs.parameters(costs.model_of(size))["LLM"] == pytest.approx(count / 1e6, abs=1e-7)


def test_the_embedded_world_is_what_its_files_hold():
    omni = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")[0]
    assert costs.parameters(costs.model_of("tiny", "tiny", "tiny/whisper.pt")) == costs.parameters(omni)
    heads = [block.attn.n_head for block in omni.model.speech_encoder.blocks]
    assert (80, 192, heads[0], len(heads)) == costs.WHISPER["tiny/whisper.pt"]


def test_the_files_of_a_world_fit_together():
    """A stage starts from the one before, in the same corpus, and samples speak with the corpus's codec."""
    for kind in ("", "tiny_", "small_"):
        files = [dict((key, value) for key, value, _ in read_file(f"config/{kind}{stage}.py"))
                 for stage in STAGES]
        assert [fields["stage"] for fields in files] == list(STAGES)
        for before, fields in zip(files, files[1:]):
            assert fields["init_from"] == before["out_dir"]
            corpora = {run.get("corpus", "").removesuffix("_heard") for run in (before, fields)}
            assert len(corpora) == 1                  # stage 1 TTS needs no recordings
            assert "lora_rank" not in fields
    data = dict((key, value) for key, value, _ in read_file("config/data_small.py"))
    assert data["out_dir"] == files[0]["corpus"]
    assert not {"codec"} & (files[1].keys() | files[2].keys()) - {data["codec"]}
    assert files[0]["llm"] == f"hf:Qwen/Qwen2.5-{costs.backbone(files[0]['llm'])}-Instruct"
    assert files[0]["whisper"] in costs.WHISPER


@pytest.fixture(scope="module")
def printed():
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.extend(" ".join(args).splitlines()))
        result = bench.bench_sizes(bench.BenchConfig())
    return lines, result


def test_the_least_is_less(printed):
    """Recomputing and LoRA never need more, and what the paper trained on, four L40, holds its 0.5B."""
    order = [f"{n} GB" for n in costs.CARDS] + [f"{n} x 80 GB" for n in (2, 4, 8, 16)]
    stages = {name: figures for name, figures in printed[1].items() if "least" in figures}
    assert len(stages) == 7 * 3
    for name, usual in stages.items():
        least = usual["least"]
        if usual["gpu"] != "two cores":
            assert order.index(least["gpu"]) <= order.index(usual["gpu"]), name
        assert least["state_GB"] <= usual["state_GB"] < usual["total_GB"]
        assert least["total_GB"] <= usual["total_GB"]
        assert "0.5B" not in name or usual["total_GB"] < 48


def test_docs_hold_the_tables(printed):
    lines, _ = printed
    document = (ROOT / "reference/real_sizes.md").read_text().splitlines()
    assert len(lines) > 30
    for line in lines:
        assert line in document or not line


def test_small_says_what_the_table_says(printed):
    """The card's memory and the disk for checkpoints of the middle rung."""
    header = (ROOT / "runs/small.sh").read_text().partition("set -euo")[0]
    stages = [printed[1][f"small, {stage}"] for stage in STAGES]
    assert f"{max(stage['total_GB'] for stage in stages):.1f} GB of GPU memory" in header.replace("\n# ", " ")
    assert f"{sum(stage['disk_GB'] for stage in stages):.0f} GB of disk" in header


def test_small_chooses_short_answers(tmp_path):
    """One row of each kind: kept, or left out and counted."""
    kept = {"instruction": "What is rain?", "context": "", "response": "Water\nthat falls."}
    out = [kept | {"context": "A text."}, kept | {"response": "so " * 31}, kept | {"instruction": "so " * 26}]
    path = tmp_path / "dolly.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*out, kept]))
    said = run("bash", "runs/small.sh", "--texts", path, tmp_path / "short.jsonl", PYTHON=sys.executable)
    rows = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    assert rows == [{"id": "dolly-3", "users": ["What is rain?"], "replies": ["Water that falls."]}]
    assert "1 questions chosen" in said and said.count("\n    1 ") == 3


def test_speedrun_says_what_the_table_says(printed):
    """FLOP of each stage at 0.5B, and hours and dollars of all three."""
    _, result = printed
    header = (ROOT / "runs/speedrun.sh").read_text().partition("set -euo")[0]
    stages = [result[f"0.5B, {stage}"] for stage in STAGES]
    said = [float(x) for x in re.findall(r"epochs?\s+([\d.e+]+) FLOP", header)]
    assert said == [float(f"{stage['flop']:.1e}") for stage in stages]
    hours, dollars = (sum(stage[key] for stage in stages) for key in ("hours", "dollars"))
    assert f"{hours:.1f} hours" in header
    assert f"{dollars:.0f} dollars" in header
