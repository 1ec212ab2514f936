"""
Train one stage of a spoken chatbot.

Why three stages: speech has to become something that the LLM understands (stage 1), text has to become speech units
(stage 1 TTS), and then the speech LM has to speak while the LLM thinks, from its states as well as from its words
(stage 2). Each stage trains its own parts and freezes the rest (STAGES in model.py), and starts from the checkpoint
of the one before.

How: accelerate launch train.py config/tiny_stage1.py       then tiny_stage1_tts.py, then tiny_stage2.py
     ... --resume                continues a run that was stopped
     ... --batch_size 16         any key of the table below, over the config file
A run writes out_dir/step-N/, a checkpoint in the released layout with meta.json beside it, and out_dir/tensorboard.
"""
import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import accelerate
import torch
import transformers
from tqdm import tqdm

from configure import configure, fail
from data import Dialogues, chat_ids, collate, load_corpus
from model import IGNORE, STAGES, UNUSED, Omni, newest_checkpoint, replace_folder


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
    pad_audio: bool = False            # pad every clip to a multiple of 30 s; the official front end pads to 30 s
    batch_size: int = 32               # dialogues per optimizer step, over all processes
    micro_batch: int = 32              # dialogues that one process handles at once; the rest is accumulated
    epochs: float = 3.0                # passes over the corpus
    lr: float = 5e-5                   # peak learning rate
    warmup: float = 0.03               # share of the steps with rising rate; a cosine to zero follows
    weight_decay: float = 0.01         # of AdamW, on matrices
    beta2: float = 0.98                # of AdamW
    muon: bool = False                 # Muon instead of AdamW for the matrices inside the networks
    clip: float = 1.0                  # largest norm of the gradient
    precision: str = "bf16"            # bf16 (autocast) or no (fp32)
    log_every: int = 10                # steps between log lines
    eval_every: int = 200              # steps between validations
    eval_dialogues: int = 64           # validation dialogues of one validation
    save_every: int = 200              # steps between checkpoints; the newest two are kept
    workers: int = 1                   # processes that prepare batches
    seed: int = 1337                   # of the order of the data and of new weights
    resume: bool = False               # continue the run in out_dir

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}; it must be one of {', '.join(STAGES)}")
        if self.fusion not in UNUSED:
            raise ValueError(f"fusion is {self.fusion!r}; it must be one of {', '.join(UNUSED)}")
        for key in ("read", "write", "batch_size", "micro_batch", "epochs", "lr", "log_every", "eval_every", "save_every"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above zero")


cfg = configure(TrainConfig)
no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())    # said aloud, or Accelerate ignores torchrun
accelerator = accelerate.Accelerator(cpu=no_gpu, mixed_precision=cfg.precision, log_with="tensorboard", project_dir=cfg.out_dir)
main, world = accelerator.is_main_process, accelerator.num_processes


def say(text):
    if main:
        tqdm.write(text)
        sys.stdout.flush()                            # a log file shows it at once

if cfg.batch_size % world:
    fail(f"batch_size {cfg.batch_size} does not divide over {world} processes; choose a multiple of {world}")
share = cfg.batch_size // world                       # dialogues of one step that this process handles
torch.manual_seed(cfg.seed)
if accelerator.device.type == "cpu":                  # `accelerate launch` leaves each process one thread
    torch.set_num_threads(max(1, os.cpu_count() // world))

# ------------------------------------------------------------------------------------------ resume, model, data

last = newest_checkpoint(cfg.out_dir)
if last and not cfg.resume:
    fail(f"{cfg.out_dir} holds a run already ({os.path.basename(last)}); add --resume to continue it, or choose another --out_dir")
saved = None
if last:
    with open(os.path.join(last, "meta.json")) as f:
        saved = json.load(f)
    free = {"resume", "log_every", "eval_every", "save_every", "workers", "micro_batch", "eval_dialogues"}
    changed = [f"{k} {saved['config'].get(k)} -> {v}" for k, v in dataclasses.asdict(cfg).items()
               if k not in free and saved["config"].get(k) != v]
    if changed:
        fail(f"--resume: these keys differ from the run in {cfg.out_dir}: {'; '.join(changed)}; put them back")
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
model.freeze_for(cfg.stage)

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

train_set, validation_set = dialogues("train"), dialogues("validation")
steps_per_epoch = len(train_set) // cfg.batch_size
max_steps = int(steps_per_epoch * cfg.epochs)
if not max_steps:
    fail(f"{len(train_set)} dialogues make no step of {cfg.batch_size}; choose a smaller --batch_size")
lengths = [sum(map(len, units)) for units in train_set.rows["units"]]


def order(epoch):
    """The order of an epoch, a function of (seed, epoch) alone. Dialogues of similar length share a step, so that
    little of a batch is padding: shuffle, sort within 16 steps, shuffle the steps."""
    rng, n = random.Random(f"{cfg.seed} {epoch}"), cfg.batch_size
    rows = rng.sample(range(len(train_set)), len(train_set))
    rows = [i for at in range(0, len(rows), 16 * n) for i in sorted(rows[at:at + 16 * n], key=lengths.__getitem__)]
    steps = [rows[at:at + n] for at in range(0, steps_per_epoch * n, n)]
    return rng.sample(steps, len(steps))


def micro_batches(start):
    """The rows of each micro-batch of this process, from step `start` to the end."""
    for epoch in range(start // steps_per_epoch, math.ceil(cfg.epochs)):
        for at, rows in enumerate(order(epoch), epoch * steps_per_epoch):
            if start <= at < max_steps:
                mine = rows[accelerator.process_index::world]
                yield from (mine[i:i + cfg.micro_batch] for i in range(0, share, cfg.micro_batch))


def to_device(batch):
    return {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}


# ------------------------------------------------------------------------------------ optimizer, checkpoint, eval

def get_lr(step):
    rise = max(1, round(cfg.warmup * max_steps))
    if step < rise:
        return cfg.lr * (step + 1) / rise
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, max_steps - rise)))

trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
matrices = {n: p for n, p in trained.items() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n}
by_muon = set(matrices) if cfg.muon else set()
optimizers = [torch.optim.AdamW([{"params": [p for n, p in trained.items() if p.ndim > 1 and n not in by_muon], "weight_decay": cfg.weight_decay},
                                 {"params": [p for n, p in trained.items() if p.ndim < 2], "weight_decay": 0.0}],
                                lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)]
if cfg.muon:                                          # its steps are scaled to the size of AdamW's: one lr serves both
    optimizers.append(torch.optim.Muon(list(matrices.values()), lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
step = 0
if last:
    for optimizer, state in zip(optimizers, torch.load(os.path.join(last, "optimizer.pt"), weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    step = saved["step"]
    say(f"\nresuming {last}")
model, *optimizers = accelerator.prepare(model, *optimizers)
omni = accelerator.unwrap_model(model)
if main:
    os.makedirs(cfg.out_dir, exist_ok=True)
    accelerator.init_trackers("tensorboard")


def save():
    """out_dir/step-N/, whole or not at all; then only the newest two stay."""
    if not main:
        return
    folder = os.path.join(cfg.out_dir, f"step-{step:06d}")
    tmp = folder + ".part"
    omni.save_pretrained(tmp, tokenizer, tts_tokenizer)
    torch.save([optimizer.state_dict() for optimizer in optimizers], os.path.join(tmp, "optimizer.pt"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    meta = {"step": step, "max_steps": max_steps, "epoch": step / steps_per_epoch, "config": dataclasses.asdict(cfg),
            "log": history, "git": commit, "processes": world, "device": str(accelerator.device),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}}
    with open(os.path.join(tmp, "meta.json"), "w") as f:
        json.dump(meta, f, indent=1)
    replace_folder(tmp, folder)
    for name in sorted(n for n in os.listdir(cfg.out_dir) if n.startswith("step-") and n[5:].isdigit())[:-2]:
        shutil.rmtree(os.path.join(cfg.out_dir, name))
    say(f"saved {folder}")


@torch.no_grad()
def evaluate():
    """Validation loss and share of targets guessed right; in stage 1 also the share of replies that are right to the
    letter, heard from speech alone (greedy). All processes take their part."""
    model.eval()
    rows = range(min(cfg.eval_dialogues, len(validation_set)))[accelerator.process_index::world]
    totals = torch.zeros(5, device=accelerator.device)         # loss, targets, right, replies right, replies
    for i in range(0, len(rows), cfg.micro_batch):
        items = [validation_set[r] for r in rows[i:i + cfg.micro_batch]]
        totals[:3] += torch.stack(omni(to_device(collate(items)), cfg.stage))     # not DDP: ranks may differ in count
        if cfg.stage == "stage1":
            for r, item in zip(rows[i:i + cfg.micro_batch], items):
                replies = validation_set.rows[r]["replies"]
                prompt = chat_ids(tokenizer, replies[:-1])
                text = [t for what, t in omni.generate(prompt, item["mels"], speak=False, max_tokens=40) if what == "text"]
                totals[3:] += torch.tensor([tokenizer.decode(text) == replies[-1], 1], device=accelerator.device)
    model.train()
    loss, n, right, exact, replies = accelerator.reduce(totals).tolist()
    result = {"val_loss": loss / n, "val_accuracy": right / n}
    return result | ({"val_exact": exact / replies} if replies else {})


# ----------------------------------------------------------------------------------------------------- the loop

stop = False
def ask_to_stop(number, frame):
    global stop
    stop = True
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, ask_to_stop)                # finish the step, save, say how to go on

history = saved["log"] if saved else []
loader = torch.utils.data.DataLoader(train_set, batch_sampler=list(micro_batches(step)), collate_fn=collate,
                                     num_workers=cfg.workers, prefetch_factor=4 if cfg.workers else None,
                                     worker_init_fn=lambda _: (signal.signal(signal.SIGINT, signal.SIG_IGN), torch.set_num_threads(1)))
if step >= max_steps:
    say(f"{cfg.out_dir} is complete: {step} steps")
bar = tqdm(total=max_steps, initial=step, desc=cfg.stage, unit="step", disable=not main, mininterval=1, dynamic_ncols=True)
batches, clock, done = iter(loader), time.time(), 0
window = torch.zeros(3, device=accelerator.device)    # loss, targets, right since the last log line
model.train()
while step < max_steps:
    micro = [to_device(next(batches)) for _ in range(math.ceil(share / cfg.micro_batch))]
    key = "labels" if cfg.stage == "stage1" else "speech_labels"
    targets = accelerator.reduce(sum((b[key] != IGNORE).sum() for b in micro))     # of the whole global batch
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["lr"] = get_lr(step)
    bad = torch.zeros(1, device=accelerator.device)
    for i, batch in enumerate(micro):
        with accelerator.no_sync(model) if i < len(micro) - 1 else contextlib.nullcontext():   # reduce gradients once
            loss, n, right = model(batch, cfg.stage)
            accelerator.backward(loss * world / targets)       # DDP takes the mean over processes: times world
        window += torch.stack([loss.detach(), n, right])
        bad += ~torch.isfinite(loss.detach())
    norm = accelerator.clip_grad_norm_(trained.values(), cfg.clip)
    if accelerator.reduce(bad + ~torch.isfinite(norm)).item():
        names = [name for batch in micro for name in batch["names"]]
        print(f"step {step}, process {accelerator.process_index}: the loss or its gradient is not finite. Rows: {', '.join(names)}", flush=True)
        fail(f"stopped before step {step} was taken; the last checkpoint is untouched. Look at the rows above, or lower --lr {cfg.lr}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step, done = step + 1, done + 1
    bar.update()

    if step % cfg.log_every == 0 or step == max_steps:
        loss, n, right = accelerator.reduce(window).tolist()
        seconds, clock = time.time() - clock, time.time()
        line = {"step": step, "loss": loss / n, "accuracy": right / n, "grad_norm": norm.item(), "lr": get_lr(step - 1)}
        window.zero_()
        eta = (max_steps - step) * seconds / done
        say(f"step {step}/{max_steps} | loss {loss / n:.4f} | acc {right / n:.3f} | norm {norm:.2f} | lr {line['lr']:.2e} | "
            f"{1000 * seconds / done:.0f} ms/step | {n / seconds:.0f} targets/s | eta {eta / 60:.1f} min")
        history.append(line)
        accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        done = 0
    if step % cfg.eval_every == 0 or step == max_steps:
        result = evaluate()
        say(f"step {step}/{max_steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in result.items()))
        history.append({"step": step} | result)
        accelerator.log(result, step=step)
    stopping = accelerator.reduce(torch.tensor(float(stop), device=accelerator.device)).item() > 0
    if step % cfg.save_every == 0 or step == max_steps or stopping:
        save()
    if stopping:
        say(f"stopped at step {step}; go on with the same command and --resume")
        break
bar.close()
accelerator.end_training()
