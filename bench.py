"""
How long, how much memory: the README's figures of speed and size come from here, so that anybody can make them again.

How: python bench.py                      all of it
     python bench.py --what sizes         parameters of each part and memory of each stage, by arithmetic
     python bench.py --what stream        what the 50th chunk of a spoken reply costs, against the 2nd
     python bench.py --what data          seconds and memory that data.py takes for dialogues of the released form
     python bench.py --what train         tokens a second in training, share that is useful, memory, MFU, against a trainer that pads
     python bench.py --what loss          memory of the loss over Qwen2.5's vocabulary, logits whole and in pieces
The last line is JSON with all figures.
"""
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from codec import LOOKAHEAD, UNIT_VOCAB, CosyVoice2
from configure import configure, fail
from data import Dialogues, collate, deal, load_corpus, wav_bytes
from model import IGNORE, SPEECH, STAGES, Head, Omni, SpeechEncoder, speech_positions

# Qwen2.5: width, layers, heads, key-value heads, MLP, vocabulary, are head and table one tensor?
QWEN2 = {"0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
         "3B": (2048, 36, 16, 2, 11008, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
         "14B": (5120, 48, 40, 8, 13824, 152064, False)}
PARTS = {"LLM": ("model.embed", "model.layers", "model.norm", "lm_head"), "adapter": "model.speech_projector",
         "gate fusion": ("speech_generator.input_proj", "speech_generator.gate"), "speech LM": "speech_generator.model",
         "encoder": "model.speech_encoder"}


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = ("sizes", "stream", "data", "train", "loss")   # which benches to run
    sizes: tuple[str, ...] = ()                               # train: tiny, 0.5B ...; none: tiny on CPU, 0.5B and 3B on a GPU
    codec: str = "tests/data/cosyvoice2_decoder"              # stream: a folder with flow.pt and hift.pt (this one is tiny)
    head_dim: int = 8                                         # stream: head size of that flow; 64 in the release
    chunk: int = 10                                           # stream: units in a chunk
    dialogues: tuple[int, ...] = (1000, 4000, 16000)          # data: sizes of the made-up corpora

    def __post_init__(self):
        if min(self.chunk, self.head_dim, *self.dialogues) < 1:
            raise ValueError("chunk, head_dim and dialogues must be at least 1")
        unknown = set(self.what) - {"sizes", "stream", "data", "train", "loss"}
        if unknown:
            raise ValueError(f"what: {', '.join(unknown)} is none of sizes, stream, data, train, loss")


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
    """The released JSON, made up, without its audio, in one process of data.py."""
    result, rng = {}, random.Random(0)
    for n in cfg.dialogues:
        with tempfile.TemporaryDirectory() as folder:
            turn = lambda i, t: [{"from": "human", "text": f"Question {t} of {i}?", "speech": f"{i}-{t}-user.wav"},
                                 {"from": "gpt", "text": "An answer of a few words.",
                                  "unit": [rng.randrange(UNIT_VOCAB) for _ in range(475)]}]
            with open(f"{folder}/made_up.json", "w") as f:
                for i in range(n):
                    f.write("[,"[i > 0] + json.dumps({"id": f"d{i}", "conversation": turn(i, 0) + turn(i, 1)}, indent=1) + "\n")
                f.write("]")
            start, before, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
            process = subprocess.Popen([sys.executable, "data.py", "config/data_instructs2s.py", "--path", f"{folder}/made_up.json",
                                        "--out_dir", f"{folder}/corpus", "--processes", "1"], stdout=subprocess.DEVNULL,
                                       cwd=os.path.dirname(os.path.abspath(__file__)))
            while process.poll() is None:                     # getrusage's peak counts what this process held when it forked
                with open(f"/proc/{process.pid}/status") as f:
                    peak = max([peak, *(int(line.split()[1]) for line in f if line.startswith("VmHWM"))])      # kB
                time.sleep(0.02)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            fail(f"data.py ended with exit code {process.returncode}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result[n] = {"seconds": seconds, "cpu_seconds": cpu, "peak_GB": peak / 1e6}
        print(f"data: {n} dialogues without audio, one process: {seconds:.1f} s, {cpu:.1f} s of CPU time, {peak / 1e6:.2f} GB at most")
    return result


# ------------------------------------------------------------------------------------------------------- training

def mixed(n):
    """The embedded corpus, mixed with long rows: every eighth one is eight dialogues in one."""
    rows = load_corpus("corpus/tiny", "train")
    lists, result, at = [k for k, v in rows[0].items() if isinstance(v, list)], [], 0
    while len(result) < n:
        parts = [rows[at + i] for i in range(8 if len(result) % 8 == 7 else 1)]
        result.append(parts[0] | {k: [x for part in parts for x in part[k]] for k in lists})
        at += len(parts)
    return result


def made_up(n):
    """Rows of the lengths of InstructS2S-200K: two turns, 7.5 s a question, 19 s a reply (reference/), all of them ragged."""
    rng, rows = random.Random(0), []
    for i in range(n):
        samples = [int(16000 * rng.lognormvariate(math.log(7), 0.4)) for _ in range(2)]
        rows.append({"id": str(i), "replies": ["word " * int(rng.lognormvariate(math.log(45), 0.5)) for _ in samples], "samples": samples,
                     "speech": [{"bytes": wav_bytes(np.random.default_rng(i).normal(0, 0.1, s)), "path": None} for s in samples],
                     "units": [[rng.randrange(UNIT_VOCAB) for _ in range(int(rng.lognormvariate(math.log(450), 0.5)))] for _ in samples]})
    return rows


class Plain(list):
    """Rows in memory with the two ways of reading that Dialogues wants."""
    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def padded(items):
    """The baseline's batch: every sequence as long as the longest."""
    pad = lambda lists, value: pad_sequence([torch.as_tensor(x) for x in lists], batch_first=True, padding_value=value)
    turns = [t for item in items for t in item["turns"]]
    starts = torch.arange(len(items)) * max(len(item["ids"]) for item in items)
    rows = [torch.tensor(rows) + (torch.tensor(rows) >= 0) * starts[i] for i, item in enumerate(items) for _, rows, _ in item["turns"]]
    return {"ids": pad([i["ids"] for i in items], 0), "labels": pad([i["labels"][1:] + [IGNORE] for i in items], IGNORE),
            "real": pad([[1] * len(i["ids"]) for i in items], 0), "frames": torch.tensor([m.shape[1] for i in items for m in i["mels"]]),
            "mel": pad([m.T for i in items for m in i["mels"]], 0.0).transpose(1, 2), "speech_ids": pad([t[0] for t in turns], 0),
            "speech_rows": pad(rows, -1), "speech_labels": pad([t[2] for t in turns], IGNORE), "speech_real": pad([[1] * len(t[0]) for t in turns], 0)}


def padded_loss(omni, batch, stage):
    """What a trainer does that pads: a rectangle of positions with a mask, and a logit for each of them."""
    generator = omni.speech_generator
    if stage != "stage1_tts":
        with torch.set_grad_enabled(stage == "stage1"):
            encoder = omni.model.speech_encoder
            with torch.no_grad():
                x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(batch["mel"])))).transpose(1, 2)
                x = x + encoder.positional_embedding[:x.shape[1]].to(x.dtype)
                for block in encoder.blocks:
                    x = block(x)
                x = encoder.ln_post(x)
            x = omni.model.speech_projector(x[:, :x.shape[1] // 5 * 5].flatten(0, 1)).view(len(x), x.shape[1] // 5, -1)
            heard = torch.cat([row[:speech_positions(n)] for row, n in zip(x, batch["frames"].tolist())])
            speech = batch["ids"] == SPEECH
            x = omni.model.embed_tokens(batch["ids"].masked_fill(speech, 0)).masked_scatter(speech[..., None], heard.float())
            states = omni.model(inputs_embeds=x, attention_mask=batch["real"], use_cache=False).last_hidden_state
    if stage == "stage1":
        logits, labels = omni.lm_head(states).float(), batch["labels"]
    else:
        x, at = generator.embed(batch["speech_ids"]), batch["speech_rows"] >= 0
        if stage == "stage2":
            x = x.masked_scatter(at[..., None], generator.fuse(states.flatten(0, 1)[batch["speech_rows"][at]], batch["speech_ids"][at]).float())
        states = generator.model.model(inputs_embeds=x, attention_mask=batch["speech_real"], use_cache=False).last_hidden_state
        logits, labels = generator.model.lm_head(states).float(), batch["speech_labels"]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def flops(omni, stage, batch):
    """Floating-point operations of a step by arithmetic: 2 for each weight and position, as much again for each of the two
    gradients where there are any, and attention's two products over the half that is seen."""
    weights = lambda module: sum(p.numel() for n, p in module.named_parameters() if p.ndim > 1 and "embed" not in n)
    square = lambda network, lengths: 2 * network.config.hidden_size * network.config.num_hidden_layers * sum(n * n for n in lengths)
    generator, total = omni.speech_generator, 0
    if stage != "stage1_tts":
        encoder, frames = omni.model.speech_encoder, [(n + 1) // 2 for n in batch["frames"]]
        total += 2 * weights(encoder) * sum(frames) + 4 * encoder.ln_post.weight.numel() * len(encoder.blocks) * sum(n * n for n in frames)
        llm = 2 * weights(omni.model.layers) * sum(batch["lengths"]) + square(omni.model, batch["lengths"])
        llm += 2 * weights(omni.model.speech_projector) * sum(frames) / 5
        total += llm * (3 if stage == "stage1" else 1)
    if stage == "stage1":
        return total + 6 * omni.lm_head.weight.numel() * int((batch["labels"] != IGNORE).sum())
    fusion = 2 * (weights(generator.input_proj) + weights(generator.gate)) * int((batch["speech_rows"] >= 0).sum()) if stage == "stage2" else 0
    network = generator.model.model
    talk = 2 * weights(network.layers) * sum(batch["speech_lengths"]) + square(network, batch["speech_lengths"])
    return total + 3 * (talk + fusion) + 6 * generator.model.lm_head.weight.numel() * int((batch["speech_labels"] != IGNORE).sum())


def train_case(size, stage, how, steps=8, warm=2):
    """One way of training in a process of its own -> figures. how: "padded", "ours", "ours, compiled" or "ours, recomputed"."""
    cuda, ours = torch.cuda.is_available(), how != "padded"
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    omni, *tokenizers = Omni.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    if size != "tiny":
        omni = real_model(size).to_empty(device=device)
        omni.tie(), omni.speech_generator.model.tie_weights()          # to_empty has parted them
        for p in (*omni.parameters(), *omni.buffers()):
            torch.nn.init.normal_(p, std=0.02)
        for network in (omni.model, omni.speech_generator.model.model):
            network.rotary_emb = type(network.rotary_emb)(network.config).to(device)
    omni.to(device).freeze_for(stage)
    rows = Plain(mixed(32 * (steps + warm)) if size == "tiny" else made_up(16 * (steps + warm)))
    batch_size = len(rows) // (steps + warm)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    data = Dialogues(rows, *tokenizers, omni.model.speech_encoder.n_mels, 3, 10, hear=stage != "stage1_tts" or not ours)
    lengths = list(data.lengths())
    positions = [llm * (stage != "stage1_tts") + talk * (stage != "stage1") for _, _, llm, talk in lengths]
    micro = [deal(order[i:i + batch_size], positions, 16384)[0] if ours else [order[j:j + 8] for j in range(i, i + batch_size, 8)]
             for i in range(0, len(order), batch_size)]
    if how == "ours, recomputed":
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable")
        omni.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        omni.speech_generator.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "ours, compiled":
        for layer in (*omni.model.layers, *omni.speech_generator.model.model.layers):
            layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW([p for p in omni.parameters() if p.requires_grad], lr=1e-4, fused=True)
    loader = iter(torch.utils.data.DataLoader(data, batch_sampler=[m for step in micro for m in step], num_workers=1 + 7 * cuda, prefetch_factor=4,
                                              multiprocessing_context="fork",
                                              collate_fn=collate if ours else padded, worker_init_fn=lambda _: torch.set_num_threads(1)))
    waited, work, computed = 0.0, 0, 0
    for step, groups in enumerate(micro):
        if step == warm:
            start, waited, work, computed = time.perf_counter(), 0.0, 0, 0
        for _ in groups:
            clock = time.perf_counter()
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in next(loader).items()}
            waited += time.perf_counter() - clock
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = omni(batch, stage)[0] if ours else padded_loss(omni, batch, stage)
            loss.backward()
            work += flops(omni, stage, batch) if ours else 0
            computed += (stage != "stage1_tts") * batch["ids"].numel() + (stage != "stage1") * batch["speech_ids"].numel()
        optimizer.step(), optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    seconds, real = time.perf_counter() - start, sum(positions[row] for groups in micro[warm:] for group in groups for row in group)
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens_per_s": real / seconds, "useful_share": real / computed, "peak_GB": memory / 1e9, "flops_per_s": work / seconds,
            "data_share": waited / seconds}


def matmul_flops(device, n):
    """What a plain bf16 matrix product reaches here, floating-point operations per second."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        clock = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        times.append(time.perf_counter() - clock)
    return 2 * n ** 3 / statistics.median(times)


def alone(function, *arguments):
    """In a process of its own, whose peak of memory is then the function's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def train(cfg):
    """Tokens a second against a trainer that pads, step for step on the same rows and with the same optimizer."""
    cuda = torch.cuda.is_available()
    if not cuda and not os.path.isdir("corpus/tiny"):
        fail("--what train mixes the embedded corpus, which is not there; run `python data.py` first")
    result = {"matmul_flops_per_s": alone(matmul_flops, "cuda" if cuda else "cpu", 8192 if cuda else 2048)}
    print(f"train: a plain bf16 matrix product makes {result['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s")
    print(f"{'':32}{'tokens/s':>10}{'useful':>9}{'peak GB':>9}{'MFU':>8}{'data':>7}{'gain':>7}")
    for size in cfg.sizes or (("0.5B", "3B") if cuda else ("tiny",)):
        for stage in STAGES if size != "3B" else ("stage1",):
            for how in ("padded", "ours", "ours, compiled", "ours, recomputed") if stage == "stage1" else ("padded", "ours"):
                try:
                    r = alone(train_case, size, stage, how)
                except RuntimeError as e:                      # the padded one may not fit at all
                    print(f"{f'{size} {stage}, {how}':32}{str(e).splitlines()[0][:80]}")
                    continue
                result[f"{size} {stage}, {how}"] = r
                r["mfu"] = r.pop("flops_per_s") / result["matmul_flops_per_s"] if how != "padded" else None
                r["gain"] = r["tokens_per_s"] / result.get(f"{size} {stage}, padded", r)["tokens_per_s"]
                print(f"{f'{size} {stage}, {how}':32}{r['tokens_per_s']:10,.0f}{100 * r['useful_share']:8.1f}%{r['peak_GB']:9.2f}"
                      + (f"{100 * r['mfu']:7.1f}%" if r["mfu"] else f"{'':8}") + f"{100 * r['data_share']:6.0f}%{r['gain']:7.2f}")
    return result


def loss_case(pieces, targets=2048, width=896, vocabulary=151936):
    """Peak memory of the loss, forward and backward, over the 0.5B's vocabulary, in bytes above what its inputs take."""
    torch.manual_seed(0)
    head, hidden = Head(width, vocabulary, bias=False), torch.randn(targets, width, requires_grad=True)
    head.weight.grad, device = torch.zeros_like(head.weight), "cuda" if torch.cuda.is_available() else "cpu"
    head, hidden = head.to(device), hidden.detach().to(device).requires_grad_()
    labels = torch.randint(vocabulary, (targets,), device=device)
    peak = lambda: torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, clock = peak(), time.perf_counter()
    (head(hidden, labels)[0] if pieces else F.cross_entropy(head(hidden).float(), labels, reduction="sum")).backward()
    return peak() - before, time.perf_counter() - clock


def loss(cfg):
    """The 152k-word logits, whole and in pieces."""
    (whole, t0), (pieces, t1) = alone(loss_case, False), alone(loss_case, True)
    print(f"loss: 2,048 targets of 151,936 words: whole {whole / 1e9:.2f} GB, {t0:.1f} s; in pieces {pieces / 1e9:.2f} GB, {t1:.1f} s")
    return {"whole_GB": whole / 1e9, "pieces_GB": pieces / 1e9, "whole_s": t0, "pieces_s": t1}


if __name__ == "__main__":
    cfg = configure(BenchConfig)
    print(json.dumps({what: {"sizes": sizes, "stream": stream, "data": data, "train": train, "loss": loss}[what](cfg) for what in cfg.what}))
