"""
Train one stage of a spoken chatbot.

Why three stages: speech has to become something that the LLM understands (stage 1), text has to become speech
units (stage 1 TTS), and then the speech LM has to speak while the LLM thinks, from its states as well as its
words (stage 2). Each stage trains its own parts and freezes the rest (STAGES in model.py), and starts from
the checkpoint before.

How: accelerate launch train.py config/tiny_stage1.py    then tiny_stage1_tts.py, then tiny_stage2.py
     the same command again       resumes a run that was interrupted
     ... --batch_size 16          any key of the table below; the command line wins over the config file
     ... --compare                says at each log line whether the loss is what it was when we ran this
A run writes into out_dir: step-N/ (checkpoints), samples/ (what the model says at each validation), the
tracker's curves, and at the end final/, the whole model in the released layout.
"""
import itertools
import math
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from tqdm import tqdm

from data import Dialogues, batches, deal, epoch_order, positions_of
from model import FUSIONS, IGNORE, PARTS, STAGES
from omni import checkpoint, parallel, watch
from omni.codec import load_codec
from omni.configure import configure, fail
from omni.corpus import fingerprint, load_corpus
from omni.files import read_json
from omni.run import Run


@dataclass(frozen=True)
class TrainConfig:
    stage: str = "stage1"              # stage1 (speech -> text), stage1_tts (text -> units) or stage2 (both)
    corpus: str = "corpus/tiny"        # a corpus that data.py built
    out_dir: str = "out/stage1"        # where checkpoints and logs go
    init_from: str | None = None       # a run or checkpoint to start from; none: the three backbones below
    llm: str = "tiny/qwen2"            # Qwen2 that thinks: a folder, or hf:owner/name on the Hugging Face hub
    whisper: str = "tiny/whisper.pt"   # Whisper that hears: a file, or a model name such as large-v3
    speech_lm: str = "tiny/qwen2"      # Qwen2 that the speech LM starts from
    read: int = 3                      # R: rows of text that the speech LM reads ...
    write: int = 10                    # W: ... before it writes this many units
    fusion: str = "gate"               # stage 2; for the ablation: text (no LLM states) or hidden (only they)
    lora_rank: int = 0                 # stage 1: train two small matrices beside each of the LLM's; 0: no
    freeze_llm: bool = False           # stage 1: train only the adapter
    pad_audio: bool = False            # pad every clip to a multiple of 30 s, as the official front end does
    batch_size: int = 32               # dialogues per optimizer step, over all processes
    micro_tokens: int = 8192           # positions that one process handles at once; the rest is accumulated
    epochs: float = 3.0                # passes over the corpus
    patience: int = 0                  # stop after this many validations without a better one; 0: never
    lr: float = 5e-5                   # peak learning rate
    warmup: float = 0.03               # share of the steps with a rising rate; a cosine to zero follows
    weight_decay: float = 0.01         # of AdamW, on matrices
    beta2: float = 0.98                # of AdamW
    muon: bool = False                 # Muon instead of AdamW for the matrices inside the networks
    clip: float = 1.0                  # largest norm of the gradient; 0: no clipping
    precision: str = "bf16"            # bf16 (autocast) or no (fp32)
    recompute: bool = False            # activation checkpointing: a third more time, a fraction of the memory
    compile: bool = False              # torch.compile the layers
    log_every: int = 10                # steps between log lines
    eval_every: int = 200              # steps between validations
    eval_dialogues: int = 64           # validation dialogues of one validation
    samples: int = 2                   # validation dialogues that are answered, for you to read and hear
    codec: str | None = None           # makes sound of the samples; none: units only
    save_every: int = 200              # steps between checkpoints
    keep: int = 2                      # how many of the newest checkpoints stay, beside the best
    tracker: str = "tensorboard"       # or another one of Accelerate's, such as wandb; none
    compare: bool = False              # compare the loss with runs/reference_curves/
    workers: int = 1                   # processes that prepare batches
    seed: int = 1337                   # of the order of the data and of new weights
    resume: bool = True                # resume the run in out_dir; false: refuse if there is one

    def __post_init__(self):
        trackers = [str(name) for name in get_available_trackers()]          # those that are installed
        for key, known in (("stage", STAGES), ("fusion", FUSIONS), ("precision", ("bf16", "no")),
                           ("tracker", (*trackers, "none"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(known)}")
        for key in ("read", "write", "batch_size", "micro_tokens", "epochs", "lr", "log_every", "eval_every",
                    "save_every", "eval_dialogues"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above zero")
        if self.clip < 0:
            raise ValueError(f"clip is {self.clip}; it must be above zero, or 0 for no clipping")
        if self.keep < 2:
            raise ValueError("keep must be at least 2: if the newest checkpoint is damaged, another is taken")
        if self.stage != "stage1" and (self.lora_rank or self.freeze_llm):
            raise ValueError("lora_rank and freeze_llm are for stage1, where the LLM is trained")


cfg = configure(TrainConfig)
accelerator, sharding = parallel.start(cfg.precision, cfg.tracker, cfg.out_dir)
device, main, rank, world = (accelerator.device, accelerator.is_main_process, accelerator.process_index,
                             accelerator.num_processes)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable")     # renamed; both names work


def log(text):
    """Print a line in the first process; a log file shows it at once."""
    if main:
        tqdm.write(text)
        sys.stdout.flush()


run = Run(cfg, accelerator)
if run.complete:
    log(f"{cfg.out_dir} is complete: {run.final}")
    raise SystemExit(0)
if run.last:
    log(f"\nresuming {run.last}" + "".join(f"; {run.change(key)}" for key in run.changed))
    if run.saved["processes"] != world:
        log(f"{world} processes instead of {run.saved['processes']}: the same dialogues make the same steps, "
            "but sums are rounded in another order")
hear = cfg.stage != "stage1_tts"                      # text -> units: nobody listens
splits = {name: load_corpus(cfg.corpus, name, hear) for name in ("train", "validation")}
steps_per_epoch = len(splits["train"]) // cfg.batch_size
max_steps = int(steps_per_epoch * cfg.epochs)
if not max_steps or cfg.batch_size < world:           # said before gigabytes are loaded and written
    fail(f"{len(splits['train'])} dialogues in steps of {cfg.batch_size} are not one step for {world} "
         "processes; choose another --batch_size or --epochs")
if len(splits["validation"]) < world:
    fail(f"{len(splits['validation'])} validation dialogues for {world} processes; build a corpus with more")
run.set_corpus({"dialogues": len(splits["train"]), "settings": read_json(cfg.corpus, "meta.json"),
                "sha256": parallel.once(lambda: fingerprint(*splits.values()))})
for seed in (torch.manual_seed, random.seed, np.random.seed):
    seed(cfg.seed)


# ---------------------------------------------------------------------------------------- the model

def load_model():
    """(omni, tokenizer, tts_tokenizer): of the last checkpoint, of --init_from, or of the backbones."""
    if run.last:
        return checkpoint.load(run.last)
    if cfg.init_from:
        omni, *tokenizers = checkpoint.load(cfg.init_from)
        omni.merge_lora()
    else:
        omni, *tokenizers = checkpoint.from_backbones(cfg.llm, cfg.whisper, cfg.speech_lm, cfg.read,
                                                      cfg.write, cfg.pad_audio)
    trained_with = {"read": omni.R, "write": omni.W, "pad_audio": omni.pad_audio}
    if "fusion" in omni.config:                       # absent before stage 2, and after it if it is gate
        trained_with["fusion"] = omni.config["fusion"]
    for key, value in trained_with.items():
        if getattr(cfg, key) != value:
            raise ValueError(f"{cfg.init_from} was trained with {key} {value}, not {getattr(cfg, key)}; set "
                             f"--{key} {value}, or start from another checkpoint")
    if cfg.fusion != "gate":                          # a field of ours: the released checkpoints have none
        omni.config["fusion"] = omni.speech_generator.fusion = cfg.fusion
    run.set_base(omni, tokenizers)
    if cfg.lora_rank:
        omni.add_lora(cfg.lora_rank)
    return omni, *tokenizers


omni, *tokenizers = parallel.build(load_model)
omni.freeze_for(cfg.stage, llm=not cfg.freeze_llm)
for network in (omni.model, omni.speech_generator.model.model):
    if cfg.recompute:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cfg.compile:
        for layer in network.layers:
            layer.compile(dynamic=True)

log(f"\n{'part':24}{'trained':>14}{'frozen':>14}")
for part, prefixes in PARTS.items():
    sizes = {True: 0, False: 0}
    for name, p in omni.named_parameters():
        if name.startswith(prefixes):
            sizes[p.requires_grad] += p.numel()
    log(f"{part:24}{sizes[True]:14,}{sizes[False]:14,}")

# ----------------------------------------------------------------------------------------- the data

n_mels = omni.model.speech_encoder.n_mels
train_set, validation_set = (Dialogues(rows, *tokenizers, n_mels, cfg.read, cfg.write, cfg.pad_audio, hear)
                             for rows in splits.values())
positions = positions_of(parallel.once(lambda: list(train_set.lengths())), cfg.stage)
validation_positions = positions_of(list(validation_set.lengths()), cfg.stage)


def plan(step):
    """The micro-batches of this process in a step: lists of row numbers."""
    epoch, i = divmod(step, steps_per_epoch)
    rows = epoch_order(cfg.seed, epoch, len(train_set))[i * cfg.batch_size:(i + 1) * cfg.batch_size]
    return deal(rows, positions, cfg.micro_tokens, world)[rank]


def to_device(batch):
    return {key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items()}


# ------------------------------------------------------------------------------------ the optimizer

model = parallel.wrap(omni, accelerator, sharding)    # what is called in training; omni is what is inside
trained = {name: p for name, p in omni.named_parameters() if p.requires_grad}
tables = "embed_tokens", "lm_head"
matrices = [name for name, p in trained.items() if p.ndim == 2 and not any(table in name for table in tables)]
by_muon = matrices if cfg.muon else []
by_adamw = [p for name, p in trained.items() if p.ndim > 1 and name not in by_muon]
vectors = [p for p in trained.values() if p.ndim < 2]
optimizers = [torch.optim.AdamW([{"params": by_adamw, "weight_decay": cfg.weight_decay},
                                 {"params": vectors, "weight_decay": 0.0}],
                                lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)]
if cfg.muon:                                          # steps scaled to AdamW's size, so one lr serves both
    optimizers.append(torch.optim.Muon([trained[name] for name in by_muon], lr=cfg.lr,
                                       weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
if run.last:
    run.resume_optimizers(omni, optimizers)


def get_lr(step):
    """Linear warm-up, then a cosine to zero: a function of the step alone."""
    rise = max(1, round(cfg.warmup * max_steps))
    if step < rise:
        return cfg.lr * (step + 1) / rise
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, max_steps - rise)))


# ----------------------------------------------------------------------------------- the validation

@torch.no_grad()
def evaluate():
    """Validation loss and share of targets predicted right; in stage 1 also the share of replies that are
    exactly right (greedy, from speech). All processes take part."""
    totals = torch.zeros(5, device=device)            # loss, targets, right, replies exactly right, replies
    rows = range(min(max(cfg.eval_dialogues, world), len(validation_set)))
    mine = deal(rows, validation_positions, cfg.micro_tokens, world)[rank]
    for batch, numbers in zip(batches(validation_set, mine, cfg.workers), mine):
        totals[:3] += torch.stack(omni(to_device(batch), cfg.stage))     # not DDP: ranks may differ in count
        if cfg.stage == "stage1":
            replies = [validation_set.rows[i]["replies"][-1] for i in numbers]
            limit = max(map(len, tokenizers[0](replies)["input_ids"])) + 8   # a longer text is wrong anyway
            texts = [text for text, _ in watch.answers(omni, validation_set, numbers, cfg.stage, limit)]
            totals[3:] += torch.tensor([sum(map(str.__eq__, texts, replies)), len(numbers)], device=device)
    loss, n, right, exact, replies = accelerator.reduce(totals).tolist()
    result = {"val_loss": loss / n, "val_accuracy": right / n}
    if replies:
        result["val_exact"] = exact / replies
    return result


# ----------------------------------------------------------------------------------------- the loop

stop = False


def ask_to_stop(number, frame):
    """Ctrl-C or SIGTERM: finish the step, save, say how to resume."""
    global stop
    stop = True


for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, ask_to_stop)
try:
    voice = load_codec(cfg.codec).to(device) if cfg.codec and cfg.stage != "stage1" and main else None
except (OSError, ValueError, RuntimeError) as e:
    fail(f"--codec {cfg.codec}: {e}; leave it out to do without sound")
if cfg.compare:
    log(watch.compare_settings(asdict(cfg)))
if main:
    os.makedirs(cfg.out_dir, exist_ok=True)
    accelerator.init_trackers("nanoOmni", config={key: str(value) for key, value in asdict(cfg).items()})
bar = tqdm(total=max_steps, initial=run.step, desc=cfg.stage, unit="step", disable=None if main else True,
           mininterval=1, dynamic_ncols=True)
plans, plans_ahead = itertools.tee(plan(step) for step in range(run.step, max_steps))     # workers run ahead
micro_batches = batches(train_set, itertools.chain.from_iterable(plans_ahead), cfg.workers)
window = torch.zeros(3, device=device)                # loss, targets, right since the last log line
if run.last:
    before = run.resume_rng()                         # last: nothing may draw before the loop
    window += torch.tensor(before, device=device)
step, clock, waited, done = run.step, time.time(), 0.0, 0
omni.train()
while step < max_steps and not (cfg.patience and run.validations_since_best() >= cfg.patience):
    # the step's batches, and how many targets all processes have in them
    began, problem = time.time(), None
    try:
        micro = [to_device(next(micro_batches)) for _ in next(plans)]
    except ValueError as e:
        micro, problem = [], e
    waited += time.time() - began
    labels = "labels" if cfg.stage == "stage1" else "speech_labels"
    targets = sum((batch[labels] != IGNORE).sum().item() for batch in micro)
    sums = torch.tensor([targets, problem is not None], device=device)
    targets, problems = accelerator.reduce(sums).tolist()
    if problems:
        problem = problem or "another process says why"
        fail(f"step {step} cannot be made: {problem}; the last checkpoint stands")

    # forward, backward, clip
    losses = []
    for i, batch in enumerate(micro):
        with parallel.accumulate(model, last=i == len(micro) - 1):
            loss, n, right = model(batch, cfg.stage)  # sums over the targets
            (loss * world / targets).backward()       # gradients are averaged over processes: times world
        losses.append(loss.detach())
        window += torch.stack([losses[-1], n, right])
    norm = parallel.clip(model, cfg.clip).to(device)

    # a loss or gradient that is not finite stops the run before it does harm
    bad = ~torch.isfinite(torch.stack([*losses, norm]))
    bad_losses, bad_any = accelerator.reduce(torch.stack([bad[:-1].any(), bad.any()]).float()).tolist()
    if bad_any:                                       # name the rows of those losses; all if it is the norm
        names = [name for batch, b in zip(micro, bad) if b or not bad_losses for name in batch["names"]]
        if names:
            rows = ", ".join(names)                   # one write, or the lines of two processes mix
            print(f"step {step}, process {rank}: loss or gradient is not finite. Rows: {rows}", flush=True)
        fail(f"stopped before step {step}; the last checkpoint is untouched. Look at the rows above, or "
             f"lower --lr {cfg.lr}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step, done = step + 1, done + 1
    bar.update()

    if step % cfg.log_every == 0 or step == max_steps:
        loss, n, right = accelerator.reduce(window).tolist()
        window.zero_()
        seconds, clock = time.time() - clock, time.time()
        line = {"step": step, "loss": loss / n, "accuracy": right / n, "grad_norm": norm.item(),
                "lr": get_lr(step - 1)}
        run.history.append(line)
        log(f"step {step}/{max_steps} | loss {loss / n:.4f} | acc {right / n:.3f} | norm {norm:.2f} | "
            f"lr {line['lr']:.2e} | {1000 * seconds / done:.0f} ms/step, {100 * waited / seconds:.0f} % for "
            f"data | {n / seconds:.0f} targets/s | eta {(max_steps - step) * seconds / done / 60:.1f} min")
        if cfg.compare:
            log(f"step {step}/{max_steps} | {watch.compare(run.history, cfg.stage)}")
        accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)
        done, waited = 0, 0.0

    began, better = time.time(), False
    if step % cfg.eval_every == 0 or step == max_steps:
        best, _ = run.best()
        omni.eval()
        with parallel.unsharded(omni):
            try:
                result = evaluate()
            except ValueError as e:
                fail(f"{e}; the last checkpoint stands")
            if main:
                for line in watch.write_samples(omni, validation_set, cfg, voice, step):
                    accelerator.log({line.split(":")[0]: line}, step=step)
                    log(line[:160])
        omni.train()
        run.history.append({"step": step} | result)
        better = result["val_loss"] < best
        figures = " | ".join(f"{key} {value:.4f}" for key, value in result.items())
        log(f"step {step}/{max_steps} | {figures}" + (" | the best so far" if better else ""))
        accelerator.log(result, step=step)
    stopping = accelerator.reduce(torch.tensor(float(stop), device=device)).item() > 0     # all together
    over = step == max_steps or cfg.patience and run.validations_since_best() >= cfg.patience
    if step % cfg.save_every == 0 or better or stopping or over:
        about = {"max_steps": max_steps, "epoch": step / steps_per_epoch}
        log(f"saved {run.save(step, omni, optimizers, tokenizers, window, about)}")
    clock += time.time() - began                      # neither counts in ms/step
    if stopping and not over:
        log(f"stopped at step {step}; run the same command again to resume")
        break
else:
    counts = step
    if cfg.patience:
        counts = run.best()[1]
        log(f"step {counts} has the best validation loss")
    log(f"exported {run.export(counts)} to {run.final}")
bar.close()
parallel.end(accelerator)
