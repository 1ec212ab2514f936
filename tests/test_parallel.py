"""Two real processes on CPU, which talk through gloo: the first one loads the model, the other one gets it.
It protects two promises: a machine holds and downloads one model, and all processes train the same one."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CASES = {                             # name: how `wrap` shards, rank of LoRA
    "DDP": (None, 0),
    "DDP with LoRA": (None, 4),
    "FSDP 2": ("gpu", 0)}


# ----------------------------------------------------------------------- what each of the two processes does

def tensors(omni):
    """{name: tensor} of all parameters and buffers, whole; two names of one tensor are two entries."""
    parameters = omni.named_parameters(remove_duplicate=False)
    buffers = omni.named_buffers(remove_duplicate=False)
    found = {}
    for name, x in (*parameters, *buffers):
        whole = x.full_tensor() if hasattr(x, "full_tensor") else x
        found[name] = whole.detach().clone()
    return found


def ties(omni):
    """Is each head one tensor with its table: of the LLM, of the speech LM?"""
    speech_lm = omni.speech_generator.model
    return (omni.lm_head.weight is omni.model.embed_tokens.weight,
            speech_lm.lm_head.weight is speech_lm.model.embed_tokens.weight)


def work(folder):
    """Build and wrap a model for each of CASES, then fail to load one; the results go into rank-N.pt."""
    from omni import checkpoint, parallel

    accelerator, _ = parallel.start("no", "none", folder)
    rank, results = accelerator.process_index, {}
    assert accelerator.num_processes == 2
    for name, (sharding, lora) in CASES.items():
        torch.manual_seed(rank)                       # new weights drawn here would differ between processes
        result = results[name] = {"loaded": 0}

        def load():
            omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
            if lora:
                omni.add_lora(lora)
            result["loaded"] += 1
            result["before"] = tensors(omni)
            return omni, *tokenizers

        omni, *tokenizers = parallel.build(load)
        omni.freeze_for("stage1")
        result["trained"] = sorted(n for n, p in omni.named_parameters() if p.requires_grad)
        result["chat"] = tokenizers[0]("Hello, how are you?")["input_ids"]
        parallel.wrap(omni, accelerator, sharding)
        result["after"], result["ties"], result["config"] = tensors(omni), ties(omni), omni.config

    def load_nothing():
        raise ValueError("no such model")

    try:
        parallel.build(load_nothing)
    except SystemExit as stop:
        results["exit code"] = stop.code
    torch.save(results, os.path.join(folder, f"rank-{rank}.pt"))
    parallel.end(accelerator)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    work(sys.argv[1])


# ---------------------------------------------------------------------------------------------- the tests

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """([results of process 0, of process 1], [what each wrote on stderr])."""
    folder = tmp_path_factory.mktemp("ranks")
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in "01":
        environment = os.environ | both | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen([sys.executable, __file__, folder], cwd=ROOT, env=environment,
                                          stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"rank-{rank}.pt") for rank in "01"], errors


@pytest.mark.parametrize("name", CASES)
def test_only_the_first_process_loads(ranks, name):
    """So a machine with eight GPUs holds one model in its memory, not eight, and downloads it once."""
    assert [results[name]["loaded"] for results in ranks[0]] == [1, 0]


@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_model(ranks, name):
    """Every parameter and buffer, also those that no state dict holds, is bit for bit what the first process
    loaded."""
    loaded = ranks[0][0][name]["before"]
    assert len(loaded) > 100
    for results in ranks[0]:
        after = results[name]["after"]
        assert after.keys() == loaded.keys()
        assert [key for key, x in loaded.items() if not torch.equal(x, after[key])] == []


@pytest.mark.parametrize("name", CASES)
def test_heads_are_still_tied(ranks, name):
    """Otherwise table and head drift apart in the processes that did not load."""
    assert [results[name]["ties"] for results in ranks[0]] == [(True, True), (True, True)]


@pytest.mark.parametrize("name", CASES)
def test_all_processes_train_the_same_parts_of_the_same_text(ranks, name):
    """What has gradients, the config and the tokenizer are those of the first process."""
    first, second = (results[name] for results in ranks[0])
    for what in ("trained", "config", "chat"):
        assert first[what] == second[what]
    assert any("lora_" in key for key in first["trained"]) == ("LoRA" in name)


def test_a_model_that_cannot_be_loaded_stops_all_and_is_said_once(ranks):
    """No process waits for the others for hours."""
    assert [results["exit code"] for results in ranks[0]] == [2, 2]
    lines = [line for text in ranks[1] for line in text.splitlines() if line.startswith("error: ")]
    assert lines == ["error: the model cannot be loaded: no such model"]
