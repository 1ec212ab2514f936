"""
The folder of a run: opened, saved, resumed, pruned, exported.

Why: a run is stopped, killed, moved, or its disk is full. The same command continues it as if nothing had
happened, to the bit on CPU, or refuses with one line that says what has changed (tests/test_faults.py).

    out_dir/step-N/      what was trained, optimizer, random states; config, corpus, log in meta.json
            base/        once: the frozen rest, if no other checkpoint holds it
            samples/     what the model says at each validation
            final/       at the end: the whole model in the released layout
"""
import dataclasses
import json
import math
import os
import random
import shutil
import sys

import accelerate
import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from torch.utils._pytree import tree_leaves

from omni import checkpoint, parallel
from omni.configure import fail
from omni.files import commit, read_json

# keys that may change when a run is resumed: they decide how, not what, is computed
FREE = {"resume", "out_dir", "corpus", "log_every", "eval_every", "eval_dialogues", "samples", "codec",
        "save_every", "keep", "tracker", "compare", "workers", "micro_tokens", "recompute", "compile",
        "patience"}


def rng_state():
    """Of this process: python, numpy, torch, and its GPU."""
    name, keys, *rest = np.random.get_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest],
            "torch": torch.get_rng_state(), "cuda": gpu}


def set_rng_state(state):
    """The reverse."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Run:
    """A run's folder, opened by all of its processes."""

    def __init__(self, cfg, accelerator):
        """cfg: dataclass with out_dir, resume, keep. fail() if the folder holds a run that differs from it in
        other keys than FREE."""
        self.accelerator, self.main, self.keep = accelerator, accelerator.is_main_process, cfg.keep
        self.folder, self.final = cfg.out_dir, os.path.join(cfg.out_dir, "final")
        self.config = json.loads(json.dumps(dataclasses.asdict(cfg)))                # tuples become lists
        self.complete = os.path.isdir(self.final)
        self.last = None if self.complete else checkpoint.newest_checkpoint(self.folder)
        seen = set(gather_object([self.last and os.path.basename(self.last)]))
        if len(seen) > 1:
            fail(f"the processes see different checkpoints in {self.folder}: {', '.join(map(str, seen))}; on "
                 "two machines it must be a folder that both see")
        newest = self.final if self.complete else self.last
        if newest and not cfg.resume:
            fail(f"{self.folder} holds a run already ({os.path.basename(newest)}); leave out --resume false, "
                 "or choose another --out_dir")
        try:
            self.saved = read_json(newest, "meta.json") if newest else {}
        except ValueError:                            # only of final/: damaged steps were passed over
            fail(f"{newest}/meta.json is damaged; delete {newest}, and the same command makes it again")
        self.step, self.history = self.saved.get("step", 0), self.saved.get("log", [])
        self.base, self.corpus = self.saved.get("base"), None
        before = self.saved.get("config", self.config)
        self.changed = [key for key, value in self.config.items() if before.get(key) != value]
        fixed = [self.change(key) for key in self.changed if key not in FREE]
        if fixed:
            fail(f"these keys differ from the run in {self.folder}: {'; '.join(fixed)}; put them back, or "
                 "choose another --out_dir")
        if self.main and os.path.isdir(self.folder):
            for name in os.listdir(self.folder):
                if name.endswith(".part"):            # a killed process was writing it
                    shutil.rmtree(os.path.join(self.folder, name))

    def change(self, key):
        """How a key differs from what the run began with."""
        return f"{key} {self.saved['config'].get(key)} -> {self.config[key]}"

    def set_base(self, omni, tokenizers):
        """Remember which folder holds what this run does not train, so that its checkpoints need not: the one
        that the model came from if it holds all of it, else base/, written here. In the first process, before
        the first step.

        Raises OSError if base/ cannot be written.
        """
        folder = omni.source
        if folder is None:
            folder = os.path.join(self.folder, "base")
            try:
                checkpoint.save(omni, folder + ".part", *tokenizers)
                checkpoint.seal(folder + ".part", folder, {})
            except (OSError, RuntimeError) as e:
                shutil.rmtree(folder + ".part", ignore_errors=True)
                raise OSError(f"{folder} cannot be written ({e}); make room or change --out_dir") from e
        self.base = {"folder": os.path.relpath(folder, self.final),
                     "sha256": checkpoint.recorded_hashes(folder)}

    def set_corpus(self, corpus):
        """Remember what the run learns from: {"dialogues": n, "settings": {...}, "sha256": ...}. fail() if a
        resumed run began with another."""
        self.corpus = corpus
        began = self.saved.get("corpus", corpus)
        if corpus == began:
            return
        was = {"dialogues": began["dialogues"]} | began["settings"]
        now = {"dialogues": corpus["dialogues"]} | corpus["settings"]
        keys = [key for key in now | was if was.get(key) != now.get(key)]
        changes = "; ".join(f"{key} {was.get(key)} -> {now.get(key)}" for key in keys)
        fail(f"{self.config['corpus']} is not the corpus that the run in {self.folder} began with: "
             f"{changes or 'the dialogues themselves'}; bring it back, or choose another --out_dir")

    def save(self, step, omni, optimizers, tokenizers, window, about):
        """Write step-N/, whole or not at all, then delete all but the newest `keep` and the best. All
        processes take part, the first one writes. window: a tensor that each process gets back from
        `resume_rng`; about: a dict that goes into meta.json. Returns the folder. fail() if it does not fit on
        the disk."""
        weights, states = parallel.get_states(omni, optimizers)
        trained = {name for name, p in omni.named_parameters() if p.requires_grad}
        rng = gather_object([rng_state() | {"window": window.tolist()}])
        folder, failed_bytes = os.path.join(self.folder, f"step-{step:06d}"), 0
        if self.main:
            tmp = folder + ".part"
            versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
            meta = about | {"step": step, "config": self.config, "corpus": self.corpus, "base": self.base,
                            "git": commit(), "processes": self.accelerator.num_processes,
                            "device": str(self.accelerator.device), "versions": versions, "log": self.history}
            try:
                checkpoint.save(omni, tmp, *tokenizers, {k: w for k, w in weights.items() if k in trained})
                torch.save(states, os.path.join(tmp, "optimizer.pt"))
                torch.save(rng, os.path.join(tmp, "rng.pt"))
                checkpoint.seal(tmp, folder, meta)
            except (OSError, RuntimeError) as e:      # a full disk is either
                shutil.rmtree(tmp, ignore_errors=True)
                print(f"step {step} cannot be saved: {e}", file=sys.stderr)
                tensors = [t for t in tree_leaves((weights, states["state"])) if torch.is_tensor(t)]
                failed_bytes = sum(t.nbytes for t in tensors)
        failed = torch.tensor(float(failed_bytes), device=self.accelerator.device)
        failed_bytes = self.accelerator.reduce(failed).item()
        if failed_bytes:
            free = shutil.disk_usage(self.folder).free
            fail(f"a checkpoint of {failed_bytes / 1e6:.0f} MB does not fit into {self.folder}, where "
                 f"{free / 1e6:.0f} MB are free; the checkpoints before it stand: make room, then run the "
                 "same command again")
        if self.main:
            best = f"step-{self.best()[1]:06d}"
            for name in checkpoint.steps_in(self.folder)[:-self.keep]:
                if name != best:
                    shutil.rmtree(os.path.join(self.folder, name))
        return folder

    def resume_optimizers(self, omni, optimizers):
        """Give the optimizers the state of the last checkpoint."""
        path = os.path.join(self.last, "optimizer.pt")
        states = torch.load(path, weights_only=True, mmap=True) if self.main else {}
        parallel.set_optimizers(omni, optimizers, states)

    def resume_rng(self):
        """Set this process's random states to those of the last checkpoint -> its window, a list. With fewer
        processes than before, the windows of those that are gone are added to those that are left."""
        states = torch.load(os.path.join(self.last, "rng.pt"), weights_only=True)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if rank < len(states):
            set_rng_state(states[rank])
        mine = [state["window"] for state in states[rank::world]]
        return [sum(column) for column in zip(*mine)] or [0.0, 0.0, 0.0]

    def best(self):
        """(loss, step) of the lowest validation loss so far."""
        losses = [(line["val_loss"], line["step"]) for line in self.history if "val_loss" in line]
        return min(losses, default=(math.inf, -1))

    def validations_since_best(self):
        """How many validations have not been better than the best."""
        return sum("val_loss" in line and line["step"] > self.best()[1] for line in self.history)

    def export(self, step):
        """Make final/, the whole model of a checkpoint in the released layout, LoRA merged. fail() on a full
        disk."""
        folder = os.path.join(self.folder, f"step-{step:06d}")
        if self.main:
            meta = read_json(folder, "meta.json")
            meta = {key: value for key, value in meta.items() if key not in ("files", "base")}
            try:
                omni, *tokenizers = checkpoint.load(folder, mapped=True)     # beside the one in training
                omni.merge_lora()
                checkpoint.save(omni, self.final + ".part", *tokenizers)
                checkpoint.seal(self.final + ".part", self.final, meta)
            except (OSError, ValueError, RuntimeError) as e:
                shutil.rmtree(self.final + ".part", ignore_errors=True)
                fail(f"{self.final} cannot be written ({e}); make room, then run the same command again")
        return folder
