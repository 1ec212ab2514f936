"""
How long, how much memory: the README's figures of speed and size come from here, so that anybody can make them again.

How: python bench.py                      all of it
     python bench.py --what sizes         parameters of each part and memory of each stage, by arithmetic
     python bench.py --what stream        what the 50th chunk of a spoken reply costs, against the 2nd
     python bench.py --what data          seconds and memory that data.py takes for dialogues of the released form
The last line is JSON with all figures.
"""
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from codec import LOOKAHEAD, UNIT_VOCAB, CosyVoice2
from configure import configure, fail
from model import STAGES, Omni, SpeechEncoder

# Qwen2.5: width, layers, heads, key-value heads, MLP, vocabulary, are head and table one tensor?
QWEN2 = {"0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
         "3B": (2048, 36, 16, 2, 11008, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
         "14B": (5120, 48, 40, 8, 13824, 152064, False)}
PARTS = {"LLM": ("model.embed", "model.layers", "model.norm", "lm_head"), "adapter": "model.speech_projector",
         "gate fusion": ("speech_generator.input_proj", "speech_generator.gate"), "speech LM": "speech_generator.model",
         "encoder": "model.speech_encoder"}


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = ("sizes", "stream", "data")       # which benches to run
    codec: str = "tests/data/cosyvoice2_decoder"              # stream: a folder with flow.pt and hift.pt (this one is tiny)
    head_dim: int = 8                                         # stream: head size of that flow; 64 in the release
    chunk: int = 10                                           # stream: units in a chunk
    dialogues: tuple[int, ...] = (1000, 4000, 16000)          # data: sizes of the made-up corpora

    def __post_init__(self):
        if min(self.chunk, self.head_dim, *self.dialogues) < 1:
            raise ValueError("chunk, head_dim and dialogues must be at least 1")
        unknown = set(self.what) - {"sizes", "stream", "data"}
        if unknown:
            raise ValueError(f"what: {', '.join(unknown)} is none of sizes, stream, data")


def real_model(size, device="meta"):
    """LLaMA-Omni 2 of a released size, "0.5B" to "14B". On the meta device it has shapes and no memory."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
             "tie_word_embeddings")
    common = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
    speech = common | dict(zip(names, QWEN2["0.5B"])) | {"vocab_size": 151666 + UNIT_VOCAB, "eos_token_id": 151643}
    config = common | dict(zip(names, QWEN2[size])) | {
        "eos_token_id": 151645, "speech_encoder_hidden_size": 1280, "speech_generator": speech, "stream_params": "(3,10)"}
    with torch.device(device):
        return Omni(config, SpeechEncoder(128, 1500, 1280, 20, 32))


def parameters(omni, trained=None):
    """Millions of parameters by part; with `trained`, only those that do (True) or do not (False) get gradients."""
    return {part: sum(p.numel() for n, p in omni.named_parameters()
                      if n.startswith(prefix) and trained in (None, p.requires_grad)) / 1e6 for part, prefix in PARTS.items()}


def sizes(cfg):
    """AdamW in fp32 holds 16 bytes for a trained parameter (weight, gradient, two moments), a frozen one 4. Activations
    come on top."""
    result = {}
    print(f"{'million parameters':20}" + "".join(f"{part:>13}" for part in PARTS) + "".join(f"{s + ', GB':>16}" for s in STAGES))
    for size in QWEN2:
        omni = real_model(size)
        result[size] = {"parameters": parameters(omni)}
        for stage in STAGES:
            omni.freeze_for(stage)
            result[size][stage] = sum(16 * n for n in parameters(omni, True).values()) / 1e3 + sum(
                4 * n for n in parameters(omni, False).values()) / 1e3
        print(f"{size:20}" + "".join(f"{n:13,.1f}" for n in result[size]["parameters"].values())
              + "".join(f"{result[size][s]:16.1f}" for s in STAGES))
    return result


def stream(cfg, chunks=50, repeats=5):
    """Seconds for each chunk of one long reply, the median of several; with caches each costs the same."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".pt") as voice:
            torch.save(torch.zeros(1, 192), voice.name)
            codec = CosyVoice2.load(cfg.codec, voice.name, head_dim=cfg.head_dim, chunk=cfg.chunk)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    codec.to("cuda" if torch.cuda.is_available() else "cpu")
    units = torch.randint(0, UNIT_VOCAB, (cfg.chunk * chunks + LOOKAHEAD,), generator=torch.Generator().manual_seed(0)).tolist()
    bursts = [units[:cfg.chunk + LOOKAHEAD]] + [units[i:i + cfg.chunk] for i in range(cfg.chunk + LOOKAHEAD, len(units), cfg.chunk)]
    times = []
    for _ in range(repeats):
        pieces, clock = codec.stream(iter(bursts)), time.perf_counter()
        row = []
        for _ in range(chunks):
            next(pieces).cpu()
            row.append(time.perf_counter() - clock)
            clock = time.perf_counter()
        times.append(row)
    median = [statistics.median(row[i] for row in times) for i in range(chunks)]
    result = {"chunk_2_ms": 1000 * statistics.median(median[1:4]), "chunk_50_ms": 1000 * statistics.median(median[-3:])}
    result["ratio"] = result["chunk_50_ms"] / result["chunk_2_ms"]
    print(f"stream: {cfg.codec}, {cfg.chunk} units a chunk: chunk 2 {result['chunk_2_ms']:.1f} ms, chunk 50 {result['chunk_50_ms']:.1f} ms, "
          f"ratio {result['ratio']:.2f}")
    return result


def data(cfg):
    """The released JSON, made up, without its audio."""
    result, rng = {}, random.Random(0)
    for n in cfg.dialogues:
        with tempfile.TemporaryDirectory() as folder:
            turn = lambda i, t: [{"from": "human", "text": f"Question {t} of {i}?", "speech": f"{i}-{t}-user.wav"},
                                 {"from": "gpt", "text": "An answer of a few words.", "unit": [rng.randrange(UNIT_VOCAB) for _ in range(475)]}]
            with open(f"{folder}/made_up.json", "w") as f:
                json.dump([{"id": f"d{i}", "conversation": turn(i, 0) + turn(i, 1)} for i in range(n)], f, indent=1)
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "data.py", "config/data_instructs2s.py", "--path", f"{folder}/made_up.json", "--out_dir",
                            f"{folder}/corpus", "--processes", "1"], check=True, stdout=subprocess.DEVNULL,
                           cwd=os.path.dirname(os.path.abspath(__file__)))
            seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu, memory = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, used.ru_maxrss / 1e6
        result[n] = {"seconds": seconds, "cpu_seconds": cpu, "peak_GB": memory}
        print(f"data: {n} dialogues without audio, one process: {seconds:.1f} s, {cpu:.1f} s of CPU time; at most {memory:.2f} GB")
    return result


if __name__ == "__main__":
    cfg = configure(BenchConfig)
    print(json.dumps({what: {"sizes": sizes, "stream": stream, "data": data}[what](cfg) for what in cfg.what}))
