"""
Train one stage of a spoken chatbot.

Why three stages: speech has to become something that the LLM understands (stage 1), text has to become speech units
(stage 1 TTS), and then the speech LM has to speak while the LLM thinks, from its states as well as from its words
(stage 2). Each stage trains its own parts and freezes the rest (STAGES in model.py), and starts from the checkpoint
of the one before.

How: accelerate launch train.py config/tiny_stage1.py       then tiny_stage1_tts.py, then tiny_stage2.py
     the same command again      continues a run that was stopped, by whatever
     ... --batch_size 16         any key of the table below, over the config file
     ... --compare               says at each log line whether the loss is what it was when we ran this
A run writes into out_dir: step-N/, what was trained so far with all that it takes to go on; base/, once, the frozen rest if
no other checkpoint holds it; samples/, what the model says at each validation; tensorboard/; and at the end final/, the
whole model in the released layout.
"""
import atexit
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import accelerate
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from codec import load_codec
from configure import configure, fail
from data import Dialogues, chat_ids, collate, deal, load_corpus
from model import IGNORE, STAGES, UNUSED, Omni, hashes, newest_checkpoint, read_json, seal


@dataclass(frozen=True)
class TrainConfig:
    stage: str = "stage1"              # stage1 (speech -> text), stage1_tts (text -> units) or stage2 (speech -> units)
    corpus: str = "corpus/tiny"        # a corpus that data.py built
    out_dir: str = "out/stage1"        # where checkpoints and logs go
    init_from: str | None = None       # a run or checkpoint to start from; none: the three backbones below
    llm: str = "tiny/qwen2"            # Qwen2 that thinks: a folder or a hub name
    whisper: str = "tiny/whisper.pt"   # Whisper that hears: a file or a model name such as large-v3
    speech_lm: str = "tiny/qwen2"      # Qwen2 that the speech LM starts from
    read: int = 3                      # R: rows of text that the speech LM reads ...
    write: int = 10                    # W: ... before it writes so many units
    fusion: str = "gate"               # of stage 2; for the ablation: text (without the LLM's states) or hidden (they alone)
    lora_rank: int = 0                 # stage 1: train two small matrices beside each of the LLM's; 0: the LLM itself
    freeze_llm: bool = False           # stage 1: train the adapter alone
    pad_audio: bool = False            # pad every clip to a multiple of 30 s; the official front end pads to 30 s
    batch_size: int = 32               # dialogues per optimizer step, over all processes
    micro_tokens: int = 8192           # positions that one process handles at once; the rest of a step is accumulated
    epochs: float = 3.0                # passes over the corpus
    patience: int = 0                  # stop after so many validations without a better one, and keep the best; 0: never
    lr: float = 5e-5                   # peak learning rate
    warmup: float = 0.03               # share of the steps with rising rate; a cosine to zero follows
    weight_decay: float = 0.01         # of AdamW, on matrices
    beta2: float = 0.98                # of AdamW
    muon: bool = False                 # Muon instead of AdamW for the matrices inside the networks
    clip: float = 1.0                  # largest norm of the gradient
    precision: str = "bf16"            # bf16 (autocast) or no (fp32)
    recompute: bool = False            # activation checkpointing: a third more time, a fraction of the memory
    compile: bool = False              # torch.compile the layers
    cache: str | None = None           # a folder that keeps what the frozen networks make of the corpus; none: no
    log_every: int = 10                # steps between log lines
    eval_every: int = 200              # steps between validations
    eval_dialogues: int = 64           # validation dialogues of one validation
    samples: int = 2                   # validation dialogues that are answered, for you to read and hear
    codec: str | None = None           # makes sound of the samples; none: their units are enough
    save_every: int = 200              # steps between checkpoints
    keep: int = 2                      # how many of the newest checkpoints stay, beside the best
    tracker: str = "tensorboard"       # or wandb, or none
    compare: bool = False              # compare the loss with runs/reference_curves/
    profile: int = 0                   # write a trace of so many steps, to be opened in ui.perfetto.dev
    workers: int = 1                   # processes that prepare batches
    seed: int = 1337                   # of the order of the data and of new weights
    resume: bool = True                # continue the run in out_dir; false: refuse if there is one

    def __post_init__(self):
        for key, known in (("stage", STAGES), ("fusion", UNUSED), ("tracker", ("tensorboard", "wandb", "none")), ("precision", ("bf16", "no"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(known)}")
        for key in ("read", "write", "batch_size", "micro_tokens", "epochs", "lr", "log_every", "eval_every", "save_every", "eval_dialogues"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above zero")
        if self.keep < 2:
            raise ValueError("keep must be at least 2: should the newest checkpoint be damaged, the one before is what is left")
        for key in ("lora_rank", "freeze_llm"):
            if getattr(self, key) and self.stage != "stage1":
                raise ValueError(f"{key} is for stage1, where the LLM is trained")
        if self.cache and self.stage == "stage1_tts":
            raise ValueError("cache keeps what frozen networks make of the corpus, and none of them runs in stage1_tts; leave it out")


TOLERANCE = 1.5                       # a loss so many times the reference's is not normal

# keys that a continued run may change: they decide how, not what, is computed; of the corpus it is the content that counts
FREE = {"resume", "out_dir", "corpus", "log_every", "eval_every", "eval_dialogues", "samples", "codec", "save_every", "keep", "tracker", "compare", "profile",
        "workers", "micro_tokens", "recompute", "compile", "cache", "patience"}

cfg = configure(TrainConfig)
if cfg.tracker == "wandb" and not importlib.util.find_spec("wandb"):        # Accelerate would go on without a word
    fail("--tracker wandb needs W&B, which is not installed: `pip install wandb`, or leave it out for TensorBoard")
# `accelerate launch` with an FSDP or a DeepSpeed file sets these. Accelerate's own FSDP would make the loss bf16 and ignore CPUs,
# its own DeepSpeed steps before a NaN is seen: shard below
fsdp, zero3 = (os.environ.pop(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
sharded = fsdp or zero3
if zero3 and cfg.muon:
    fail("muon needs whole matrices, and DeepSpeed lays them flat; take --muon false, or FSDP")
no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())    # said aloud, or Accelerate ignores torchrun
accelerator = accelerate.Accelerator(cpu=no_gpu, mixed_precision=cfg.precision, project_dir=cfg.out_dir,
                                     log_with=None if cfg.tracker == "none" else cfg.tracker,
                                     kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))])    # for one that writes 200 GB
main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
if accelerator.device.type == "cpu" or zero3:         # where CPUs compute. `accelerate launch` leaves each process one thread
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", world))))


def say(text):
    if main:
        tqdm.write(text)
        sys.stdout.flush()                            # a log file shows it at once


stop = False
def ask_to_stop(number, frame):
    global stop
    stop = True


def asked_to_stop():
    """Was any of the processes asked to stop? All learn it at the same step."""
    return accelerator.reduce(torch.tensor(float(stop), device=accelerator.device)).item() > 0

# ------------------------------------------------------------------------------------------ resume, model, data

final = os.path.join(cfg.out_dir, "final")
last = newest_checkpoint(cfg.out_dir)
if len(seen := set(gather_object([last and os.path.basename(last)]))) > 1:
    fail(f"the processes see different checkpoints in {cfg.out_dir}: {', '.join(map(str, seen))}; on two machines it must be a folder that both see")
if last and not cfg.resume:
    fail(f"{cfg.out_dir} holds a run already ({os.path.basename(last)}); leave --resume false out, or choose another --out_dir")
saved = read_json(last, "meta.json") if last else None
if main and os.path.isdir(cfg.out_dir):
    for name in os.listdir(cfg.out_dir):
        if name.endswith(".part"):                    # a killed process was writing it
            shutil.rmtree(os.path.join(cfg.out_dir, name))
if saved:
    changed = {k: f"{k} {saved['config'].get(k)} -> {v}" for k, v in json.loads(json.dumps(dataclasses.asdict(cfg))).items()
               if saved["config"].get(k) != v}
    if fixed := [text for k, text in changed.items() if k not in FREE]:
        fail(f"these keys differ from the run in {cfg.out_dir}: {'; '.join(fixed)}; put them back, or choose another --out_dir")
    say(f"\ncontinuing {last}" + "".join(f"; {text}" for text in changed.values()))
    if saved["processes"] != world:
        say(f"{world} processes instead of {saved['processes']}: the same dialogues make the same steps, but sums are rounded in another order")
for seed in (torch.manual_seed, random.seed, np.random.seed):
    seed(cfg.seed)
try:
    if last or cfg.init_from:
        model, tokenizer, tts_tokenizer = Omni.from_pretrained(last or cfg.init_from)
    else:
        model, tokenizer, tts_tokenizer = Omni.from_backbones(cfg.llm, cfg.whisper, cfg.speech_lm, cfg.read, cfg.write)
except (OSError, ValueError, RuntimeError) as e:      # a folder that lacks a file, a tensor, a name that is no model
    fail(f"the model cannot be loaded: {e}")
if (model.R, model.W) != (cfg.read, cfg.write):
    fail(f"read, write is {cfg.read}, {cfg.write}, but {last or cfg.init_from} was trained with {model.R}, {model.W}")
if cfg.fusion != "gate":                              # a field of ours: the released checkpoints have none
    model.config["fusion"] = model.speech_generator.fusion = cfg.fusion

# What this run does not train is not copied into each of its checkpoints: they name the folder that holds it.
base = model.folder
if not last and base is None:                         # new, from backbones, or spread over several folders
    base = os.path.join(cfg.out_dir, "base")
    if main:
        try:
            model.save_pretrained(base + ".part", tokenizer, tts_tokenizer)
            seal(base + ".part", base, {})
        except (OSError, RuntimeError) as e:
            shutil.rmtree(base + ".part", ignore_errors=True)
            fail(f"{base} cannot be written ({e}); make room or choose another --out_dir")
accelerator.wait_for_everyone()
if not last and not os.path.isdir(base):
    fail(f"the first process wrote {base}, which is not there for this one; on two machines --out_dir must be a folder that both see")
base = saved["base"] if last else {"folder": os.path.relpath(base, final), "sha256": hashes(base)}
if cfg.lora_rank and not last:
    model.add_lora(cfg.lora_rank)
model.freeze_for(cfg.stage, llm=not cfg.freeze_llm)
if cfg.recompute:
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable")        # renamed; both names are in use
    for network in (model.model, model.speech_generator.model):
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
if cfg.compile:
    for layer in (*model.model.layers, *model.speech_generator.model.model.layers):
        layer.compile(dynamic=True)

say(f"\n{'part':24}{'trained':>14}{'frozen':>14}")
parts = {"speech encoder": "model.speech_encoder", "speech adapter": "model.speech_projector",
         "LLM": ("model.embed", "model.layers", "model.norm", "lm_head"), "speech LM": "speech_generator.model",
         "gate fusion": ("speech_generator.input_proj", "speech_generator.gate")}
for part, prefix in parts.items():
    own = [p for n, p in model.named_parameters() if n.startswith(prefix)]
    say(f"{part:24}{sum(p.numel() for p in own if p.requires_grad):14,}{sum(p.numel() for p in own if not p.requires_grad):14,}")


def dialogues(split):
    return Dialogues(load_corpus(cfg.corpus, split), tokenizer, tts_tokenizer, model.model.speech_encoder.n_mels,
                     cfg.read, cfg.write, cfg.pad_audio, hear=cfg.stage != "stage1_tts")


def fingerprint(rows):
    """Of all that is learned from and of how long the clips are, but not of their sound, which would take long to read."""
    digest = hashlib.sha256()
    for part in rows.select_columns(["id", "users", "replies", "units", "samples"]).with_format(None).iter(1000):
        digest.update(repr(part).encode())
    return digest.hexdigest()


train_set, validation_set = dialogues("train"), dialogues("validation")
lengths = {split: list(rows.lengths()) for split, rows in (("train", train_set), ("validation", validation_set))}
corpus = {"dialogues": len(train_set), "settings": read_json(cfg.corpus, "meta.json"),
          "sha256": hashlib.sha256("".join(fingerprint(rows.rows) for rows in (train_set, validation_set)).encode()).hexdigest()}
if saved and corpus != saved["corpus"]:
    was, now = ({"dialogues": c["dialogues"]} | c["settings"] for c in (saved["corpus"], corpus))
    difference = [f"{k} {was.get(k)} -> {now.get(k)}" for k in now | was if was.get(k) != now.get(k)] or ["the dialogues themselves"]
    fail(f"{cfg.corpus} is not the corpus that the run in {cfg.out_dir} began with: {'; '.join(difference)}; bring it back, or choose another --out_dir")
if len(validation_set) < world:
    fail(f"{len(validation_set)} validation dialogues for {world} processes; build the corpus with more")
steps_per_epoch = len(train_set) // cfg.batch_size
max_steps = int(steps_per_epoch * cfg.epochs)
if not max_steps or cfg.batch_size < world:
    fail(f"{len(train_set)} dialogues in steps of {cfg.batch_size} are no step for {world} processes; choose another --batch_size")


@functools.lru_cache(maxsize=2)
def order(epoch):
    """The order of an epoch's dialogues, a function of (seed, epoch) alone."""
    return random.Random(f"{cfg.seed} {epoch}").sample(range(len(train_set)), len(train_set))


def cost(split):
    """The positions that each dialogue of a split takes in this stage."""
    think, talk = cfg.stage == "stage1" or cfg.stage == "stage2" and not cfg.cache, cfg.stage != "stage1"
    return [think * llm + talk * speech for _, _, llm, speech in lengths[split]]

positions = {split: cost(split) for split in lengths}


def plan(step):
    """The micro-batches of this process in a step."""
    epoch, i = divmod(step, steps_per_epoch)
    return deal(order(epoch)[i * cfg.batch_size:(i + 1) * cfg.batch_size], positions["train"], cfg.micro_tokens, world)[rank]


def to_device(batch):
    return {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}


def in_worker(_):
    """Who stops a run may signal its whole process group: workers go on until the step is done. Nor do they take the main
    process's cores."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def batches_of(rows, groups):
    """A loader of the batches that `groups`, lists of row numbers, ask for. It draws from no generator but its own."""
    return torch.utils.data.DataLoader(rows, batch_sampler=groups, collate_fn=collate, num_workers=cfg.workers, worker_init_fn=in_worker,
                                       prefetch_factor=4 if cfg.workers else None, generator=torch.Generator(),
                                       multiprocessing_context="fork" if cfg.workers else None)    # this file has no main() to import


UNREADABLE = OSError, ValueError, RuntimeError        # what a loader raises at such a row


def reason(e):
    """A worker's error comes with its traceback: the last line says which row."""
    return str(e).strip().splitlines()[-1]


def readable(loader):
    """Its batches, or one line that says which row cannot be read."""
    try:
        yield from loader
    except UNREADABLE as e:
        fail(f"{reason(e)}; the last checkpoint stands")


# ------------------------------------------------------------------------------------ optimizer, checkpoint, eval

def get_lr(step):
    rise = max(1, round(cfg.warmup * max_steps))
    if step < rise:
        return cfg.lr * (step + 1) / rise
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, max_steps - rise)))

if fsdp:                                              # weights, gradients and optimizer state are shared out over the processes
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cfg.precision == "bf16" else MixedPrecisionPolicy()
    for module in [m for m in model.modules() if isinstance(m, Qwen2DecoderLayer)] + [model]:
        fully_shard(module, mp_policy=half)
elif not zero3:
    model.to(accelerator.device)
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
matrices = {n: p for n, p in trained.items() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n}
by_muon = set(matrices) if cfg.muon else set()
optimizers = [torch.optim.AdamW([{"params": [p for n, p in trained.items() if p.ndim > 1 and n not in by_muon], "weight_decay": cfg.weight_decay},
                                 {"params": [p for n, p in trained.items() if p.ndim < 2], "weight_decay": 0.0}],
                                lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)]
if cfg.muon:                                          # its steps are scaled to the size of AdamW's: one lr serves both
    optimizers.append(torch.optim.Muon(list(matrices.values()), lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
omni, step = model, saved["step"] if last else 0
if zero3:
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use")     # of torch 2.13, in each step
    import deepspeed
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
    settings = accelerate.DeepSpeedPlugin().deepspeed_config                  # what the yaml says of stage and offload
    if settings["zero_optimization"]["stage"] != 3:
        fail("of DeepSpeed only zero_stage 3 is for this loop; for what fits each GPU whole take config/accelerate/8gpu.yaml")
    names = {p: n for n, p in trained.items()}
    groups = [[names[p] for p in group["params"]] for group in optimizers[0].param_groups]
    masters = {n: p.detach() for n, p in trained.items()}                     # in fp32; DeepSpeed's would come from bf16
    model, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], config=settings | {
        "train_batch_size": world, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.clip, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": cfg.precision == "bf16"}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"})
    share = lambda x: F.pad(x.flatten(), (0, -x.numel() % world)).chunk(world)[rank]      # of this process, as DeepSpeed lays it out
    for name, p in trained.items():
        deepspeed.utils.safe_set_local_fp32_param(p, share(masters.pop(name)))
elif not fsdp:
    model = accelerator.prepare(model)
whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)    # on rank 0, also when sharded
MOMENTS = "exp_avg", "exp_avg_sq"                     # what AdamW keeps of each parameter, beside the step


def get_states():
    """(weights, state of the optimizers) of what is trained, whole, by the parameter's name, on rank 0. All take part."""
    if not zero3:
        return get_model_state_dict(omni, options=whole), get_optimizer_state_dict(omni, optimizers, options=whole)
    weights, states = {}, {}
    for name, p in trained.items():
        full = [deepspeed.utils.safe_get_full_fp32_param(p), *(deepspeed.utils.safe_get_full_optimizer_state(p, k) for k in MOMENTS)]
        if main:
            weights[name], *moments = (x.cpu() for x in full)
            states[name] = dict(zip(MOMENTS, moments), step=torch.tensor(float(step)))
    return weights, {"state": states, "param_groups": [group | {"params": names} for group, names in zip(optimizers[0].param_groups, groups)]}


if last:
    states = torch.load(os.path.join(last, "optimizer.pt"), weights_only=True, mmap=True) if main or zero3 else {}
    if zero3:
        for flat in model.optimizer.fp32_partitioned_groups_flat:
            optimizers[0].state[flat] = {k: torch.zeros_like(flat) for k in MOMENTS} | {"step": torch.tensor(float(step), device=flat.device)}
        for (name, p), k in itertools.product(trained.items(), MOMENTS):
            deepspeed.utils.safe_set_local_optimizer_state(p, share(states["state"][name][k]), k)
    else:
        set_optimizer_state_dict(omni, optimizers, states, options=dataclasses.replace(whole, broadcast_from_rank0=world > 1))
if main:
    os.makedirs(cfg.out_dir, exist_ok=True)
    accelerator.init_trackers("nanoOmni" if cfg.tracker == "wandb" else "tensorboard",
                              init_kwargs={"wandb": {"dir": cfg.out_dir, "name": cfg.out_dir, "config": dataclasses.asdict(cfg)}})
history = saved["log"] if saved else []


def rng_state():
    """Of this process: python, numpy, torch, and its GPU."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_rng_state(state):
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save():
    """out_dir/step-N/, whole or not at all; then the newest `keep` and the best one stay. All processes take part, one writes."""
    weights, states = get_states()
    rng = gather_object([rng_state() | {"window": window.tolist()}])
    folder, problem = os.path.join(cfg.out_dir, f"step-{step:06d}"), 0
    if main:
        tmp = folder + ".part"
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        meta = {"step": step, "max_steps": max_steps, "epoch": step / steps_per_epoch, "config": dataclasses.asdict(cfg),
                "corpus": corpus, "base": base, "git": commit, "processes": world, "device": str(accelerator.device),
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}, "log": history}
        try:
            omni.save_pretrained(tmp, tokenizer, tts_tokenizer, {k: w for k, w in weights.items() if k in trained})
            torch.save(states, os.path.join(tmp, "optimizer.pt"))
            torch.save(rng, os.path.join(tmp, "rng.pt"))
            seal(tmp, folder, meta)
        except Exception as e:                        # a full disk: OSError, RuntimeError or safetensors' own class
            shutil.rmtree(tmp, ignore_errors=True)
            size = sum(t.nbytes for x in (weights, states["state"]) for t in torch.utils._pytree.tree_leaves(x) if torch.is_tensor(t))
            print(f"step {step} cannot be saved: {e}", file=sys.stderr)
            problem = size
    problem = int(accelerator.reduce(torch.tensor(float(problem), device=accelerator.device)).item())
    if problem:
        fail(f"a checkpoint of {problem / 1e6:.0f} MB does not fit into {cfg.out_dir}, where {shutil.disk_usage(cfg.out_dir).free / 1e6:.0f} MB are "
             f"free; the checkpoints before it stand: make room, then run the same command again")
    if main:
        steps = sorted(n for n in os.listdir(cfg.out_dir) if re.fullmatch(r"step-\d+", n))
        best = f"step-{best_validation()[1]:06d}"
        for name in steps[:-cfg.keep]:
            if name != best:
                shutil.rmtree(os.path.join(cfg.out_dir, name))
    say(f"saved {folder}")


def best_validation():
    """(loss, step) of the lowest validation loss so far."""
    return min(((line["val_loss"], line["step"]) for line in history if "val_loss" in line), default=(math.inf, -1))


def patience_is_over():
    return bool(cfg.patience) and sum("val_loss" in x and x["step"] > best_validation()[1] for x in history) >= cfg.patience


def export(folder):
    """out_dir/final/: the whole model of a checkpoint in the released layout, LoRA merged."""
    if main:
        try:
            model, *tokenizers = Omni.from_pretrained(folder)
            model.merge_lora()
            model.save_pretrained(final + ".part", *tokenizers)
            seal(final + ".part", final, {k: v for k, v in read_json(folder, "meta.json").items() if k not in ("files", "base")})
        except (OSError, ValueError, RuntimeError) as e:
            shutil.rmtree(final + ".part", ignore_errors=True)
            fail(f"{final} cannot be written ({e}); make room, then run the same command again")
    say(f"exported {folder} to {final}")


@contextlib.contextmanager
def unsharded():
    """Every process has the whole model, so that each can evaluate and talk at its own pace."""
    if zero3:
        with unwrap_model_for_generation(model):
            yield
        return
    for on in (True, False):
        for module in omni.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not on, recurse=False)
                module.unshard() if on else module.reshard()
        if on:
            yield


@torch.no_grad()
def evaluate():
    """Validation loss and share of targets guessed right; in stage 1 also the share of replies that are right to the
    letter, heard from speech alone (greedy). All processes take their part."""
    model.eval()
    totals = torch.zeros(5, device=accelerator.device)         # loss, targets, right, replies right, replies
    mine = deal(range(min(max(cfg.eval_dialogues, world), len(validation_set))), positions["validation"], cfg.micro_tokens, world)[rank]
    for batch, rows in zip(readable(batches_of(validation_set, mine)), mine):
        totals[:3] += torch.stack(omni(to_device(batch), cfg.stage))         # not DDP: ranks may differ in count
        if cfg.stage == "stage1":
            for r in rows:
                text, _ = answer(r)
                totals[3:] += torch.tensor([text == validation_set.rows[r]["replies"][-1], 1], device=accelerator.device)
    model.train()
    loss, n, right, exact, replies = accelerator.reduce(totals).tolist()
    result = {"val_loss": loss / n, "val_accuracy": right / n}
    return result | ({"val_exact": exact / replies} if replies else {})


def answer(r):
    """What the model says in the last turn of a validation dialogue, heard, or in stage 1 TTS read: (text, units)."""
    replies, hear, text, units = validation_set.rows[r]["replies"], cfg.stage != "stage1_tts", [], []
    gpu = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(gpu), torch.compiler.set_stance("force_eager"):     # training goes on as if nothing had been drawn
        for what, x in omni.generate(chat_ids(tokenizer, replies[:-1]), validation_set.mels(validation_set.rows[r]) if hear else (), max_tokens=40, temperature=0.3,
                                     speak=cfg.stage != "stage1", reply=None if hear else tokenizer(replies[-1])["input_ids"]):
            text += [x] if what == "text" else []
            units += x if what == "units" else []
    return tokenizer.decode(text), units


def write_samples():
    """Answers to the first validation dialogues: text, units and sound, in the log, in samples/ and in TensorBoard."""
    model.eval()
    board = accelerator.get_tracker("tensorboard").writer if cfg.tracker == "tensorboard" else None
    os.makedirs(os.path.join(cfg.out_dir, "samples"), exist_ok=True)
    for r in range(min(cfg.samples, len(validation_set))):
        (text, units), asked, stem = answer(r), validation_set.rows[r]["users"][-1], os.path.join(cfg.out_dir, "samples", f"step-{step:06d}-{r}")
        line = f"{asked} -> {text}" + f" | {len(units)} units: {' '.join(map(str, units))}" * bool(units)
        with open(stem + ".txt", "w") as f:
            f.write(line + "\n")
        accelerator.log({f"sample {r}": line}, step=step)
        if units and voice:
            wav = voice.decode(torch.tensor(units)).cpu().numpy()
            soundfile.write(stem + ".wav", wav, voice.sample_rate)
            if board:
                board.add_audio(f"sample {r}", wav, step, voice.sample_rate)
        say(f"sample {r}: {line[:160]}")
    model.train()


def remember(split, rows):
    """Let the frozen networks hear (stage 1) or hear and think (stage 2) each dialogue once, and keep what they make of it."""
    width = model.config["speech_encoder_hidden_size" if cfg.stage == "stage1" else "hidden_size"]
    sizes = [5 * speech if cfg.stage == "stage1" else text for speech, text, _, _ in lengths[split]]
    starts = [0, *itertools.accumulate(sizes)]
    name = hashlib.sha256(repr((cfg.stage, corpus, base["sha256"], cfg.pad_audio)).encode()).hexdigest()[:16]
    path = os.path.join(cfg.cache, f"{split}-{name}.bf16")
    if not os.path.exists(path):
        if sharded:
            fail(f"the cache {path} is not there yet; start the same command without FSDP or DeepSpeed once, then stop it when training begins")
        os.makedirs(cfg.cache, exist_ok=True)
        total, free = 2 * width * starts[-1], shutil.disk_usage(cfg.cache).free
        say(f"cache: {path} will hold {len(sizes):,} dialogues in {total / 1e9:.2f} GB; {free / 1e9:.0f} GB are free")
        if total > free:
            fail(f"{cfg.cache} has not that much room; choose another --cache, or leave it out")
        if main:
            with open(path + ".part", "wb") as file:
                file.truncate(total)
        accelerator.wait_for_everyone()
        mine = [list(range(i, min(i + 16, len(sizes)))) for i in range(16 * rank, len(sizes), 16 * world)]
        with open(path + ".part", "r+b") as file:
            for group, batch in zip(tqdm(mine, desc=f"cache, {split}", disable=None if main else True), readable(batches_of(rows, mine))):
                with accelerator.autocast(), torch.no_grad():
                    kept = omni.frozen(to_device(batch), cfg.stage).bfloat16().cpu()
                file.seek(2 * width * starts[group[0]])
                file.write(kept.view(torch.int16).numpy().tobytes())
                if stop:
                    break
        if asked_to_stop():
            say("stopped before training; the same command begins again")
            raise SystemExit(0)
        if main:
            os.replace(path + ".part", path)
        accelerator.wait_for_everyone()
    rows.keep(path, sizes, width)


def compare():
    """Is the loss what it was when we ran this? Means of five log lines, since one of them is noise."""
    recent = [line for line in history if "loss" in line][-5:]
    mean = lambda losses: sum(losses) / len(losses)
    theirs = [reference["loss"][str(line["step"])] for line in recent if str(line["step"]) in reference["loss"]]
    if len(theirs) < len(recent):
        return f"the reference has no step {recent[-1]['step']}"
    ours, theirs = mean([line["loss"] for line in recent]), mean(theirs)
    high, low = ours > TOLERANCE * theirs + 0.02, ours < theirs / TOLERANCE - 0.02
    return f"reference {theirs:.4f}, here {ours / theirs:.2f} times that: " + ("NOT normal, too high" if high else "NOT normal, too low" if low else "normal")


# ----------------------------------------------------------------------------------------------------- the loop

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, ask_to_stop)                # finish the step, save, say how to go on

@atexit.register
def end_workers():
    """They are deaf to a kinder end (in_worker), and torch would take theirs for a failure."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


if os.path.isdir(final):
    say(f"{cfg.out_dir} is complete: {final}")
    raise SystemExit(0)
if cfg.cache:
    for split, rows in (("train", train_set), ("validation", validation_set)):
        remember(split, rows)
try:
    voice = load_codec(cfg.codec).to(accelerator.device) if cfg.codec and cfg.stage != "stage1" and main else None
except (OSError, ValueError, RuntimeError) as e:
    fail(f"--codec {cfg.codec}: {e}; leave it out to do without sound")
if cfg.compare:
    reference = read_json("runs/reference_curves", f"{cfg.stage}.json")
    others = [f"{k} {v} there, {getattr(cfg, k)} here" for k, v in reference["config"].items() if v != getattr(cfg, k)]
    say(f"compare: the reference was made with other settings, so expect another curve: {'; '.join(others)}" if others else
        f"compare: normal is a loss within {TOLERANCE} times the reference's and 0.02, over five log lines")
loader = batches_of(train_set, (rows for at in range(step, max_steps) for rows in plan(at)))
bar = tqdm(total=max_steps, initial=step, desc=cfg.stage, unit="step", disable=None if main else True, mininterval=1, dynamic_ncols=True)
batches, clock, done, waited = iter(loader), time.time(), 0, 0.0
window = torch.zeros(3, device=accelerator.device)    # loss, targets, right since the last log line
if last:
    states = torch.load(os.path.join(last, "rng.pt"), weights_only=True)
    for state in states[rank::world]:                 # with fewer processes than before also those of the others
        window += torch.tensor(state["window"], device=accelerator.device)
    if rank < len(states):
        set_rng_state(states[rank])                   # last, so that nothing draws before the loop
profiler, first = torch.profiler.profile() if cfg.profile and main else None, step
backward = model.backward if zero3 else torch.Tensor.backward
model.train()
while step < max_steps and not patience_is_over():
    if profiler and step == first + 3:                # the first steps are not like the others
        profiler.start()
    clock_data, problem, key = time.time(), None, "labels" if cfg.stage == "stage1" else "speech_labels"
    try:
        micro = [next(batches) for _ in plan(step)]
    except UNREADABLE as e:
        micro, problem = [], reason(e)
    waited += time.time() - clock_data
    targets = sum((b[key] != IGNORE).sum().item() for b in micro)
    targets, problems = accelerator.reduce(torch.tensor([targets, problem is not None], device=accelerator.device)).tolist()    # of all processes
    if problems:
        fail(f"step {step} cannot be made: {problem or 'another process says why'}; the last checkpoint stands")
    micro = [to_device(batch) for batch in micro]
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["lr"] = get_lr(step)
    losses = []
    for i, batch in enumerate(micro):
        # DDP reduces gradients once; sharded, each micro-batch's go where they belong at once, or the whole of them would lie here
        with accelerator.no_sync(model) if i < len(micro) - 1 and not sharded else contextlib.nullcontext():
            loss, n, right = model(batch, cfg.stage)
            backward(loss * world / targets)                   # the mean over processes is taken: times world
        window += torch.stack([loss.detach(), n, right])
        losses.append(loss.detach())
    if zero3:                                         # it takes the step here, unless a gradient is not finite
        model.step()
        norm = torch.tensor(math.nan if model.optimizer.overflow else float(model.get_global_grad_norm()), device=accelerator.device)
    else:
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.clip)
        norm = norm.full_tensor() if fsdp else norm
    bad = ~torch.isfinite(torch.stack([*losses, norm]))
    bad_losses, bad_ones = accelerator.reduce(torch.stack([bad[:-1].any(), bad.any()]).float()).tolist()
    if bad_ones:                                      # say which rows: those of the losses, or if it is the gradient alone, all
        names = [name for batch, b in zip(micro, bad) if b or not bad_losses for name in batch["names"]]
        if names:
            print(f"step {step}, process {rank}: the loss or its gradient is not finite. Rows: {', '.join(names)}", flush=True)
        fail(f"stopped before step {step} was taken; the last checkpoint is untouched. Look at the rows above, or lower --lr {cfg.lr}")
    for optimizer in () if zero3 else optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step, done = step + 1, done + 1
    bar.update()
    if profiler and step == min(first + 3 + cfg.profile, max_steps):
        profiler.stop()
        profiler.export_chrome_trace(os.path.join(cfg.out_dir, "trace.json"))
        say(profiler.key_averages().table(sort_by="self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total", row_limit=15))

    if step % cfg.log_every == 0 or step == max_steps:
        loss, n, right = accelerator.reduce(window).tolist()
        seconds, clock = time.time() - clock, time.time()
        line = {"step": step, "loss": loss / n, "accuracy": right / n, "grad_norm": norm.item(), "lr": get_lr(step - 1)}
        window.zero_()
        real, computed = sum(map(sum, (b["lengths"] + b["speech_lengths"] for b in micro))), sum(len(b["ids"]) + len(b["speech_ids"]) for b in micro)
        say(f"step {step}/{max_steps} | loss {loss / n:.4f} | acc {right / n:.3f} | norm {norm:.2f} | lr {line['lr']:.2e} | {1000 * seconds / done:.0f} ms/step, "
            f"{100 * waited / seconds:.0f} % for data | {n / seconds:.0f} targets/s | {100 * real / computed:.0f} % of positions real | "
            f"eta {(max_steps - step) * seconds / done / 60:.1f} min")
        history.append(line)
        if cfg.compare:
            say(f"step {step}/{max_steps} | {compare()}")
        accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        done, waited = 0, 0.0
    better = False
    if step % cfg.eval_every == 0 or step == max_steps:
        before, began = best_validation(), time.time()
        with unsharded():
            result = evaluate()
            if main:
                write_samples()
        history.append({"step": step} | result)
        better = result["val_loss"] < before[0]
        say(f"step {step}/{max_steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in result.items()) + " | the best so far" * better)
        accelerator.log(result, step=step)
        clock += time.time() - began
    stopping = asked_to_stop()
    if step % cfg.save_every == 0 or step == max_steps or stopping or better or patience_is_over():
        began = time.time()
        save()
        clock += time.time() - began
    if stopping:
        say(f"stopped at step {step}; the same command goes on")
        break
bar.close()
if patience_is_over():
    say(f"no better validation for {cfg.patience} times: step {best_validation()[1]} is the one that counts")
if step >= max_steps or patience_is_over():
    export(os.path.join(cfg.out_dir, f"step-{best_validation()[1] if cfg.patience else step:06d}"))
accelerator.end_training()
if no_gpu and world > 1:                              # gloo's threads sometimes abort a process that ends as others do
    del batches
    sys.stdout.flush()
    os._exit(0)
