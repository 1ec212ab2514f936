"""
Watching a run: what the model says so far, and whether its loss is what it was when we ran this.

Why: a loss of 0.3 means little by itself. A reply that you can read and hear, and the curve of a run that
went well, tell you after minutes what you would otherwise learn after days.
"""
import os

import soundfile
import torch

from omni.engine import generate
from omni.files import read_json

CURVES = "runs/reference_curves"      # STAGE.json: the losses of our own runs, with their settings
TOLERANCE = 1.5                       # a loss beyond this many times the reference's, and 0.02, is not normal


def answer(omni, dialogues, i, stage, max_tokens):
    """The model's last turn in dialogue i of a data.Dialogues, from speech, or in stage 1 TTS from the true
    text.

    Returns (text, units). Greedy text, units at temperature 0.3; the training's random state stays as it was.
    """
    text, units, device = [], [], omni.lm_head.weight.device
    prompt, mels = dialogues.prompt(i)
    reply = None if dialogues.hear else dialogues.tokenizer(dialogues.rows[i]["replies"][-1])["input_ids"]
    events = generate(omni, prompt, mels, max_tokens=max_tokens, temperature=0.3, speak=stage != "stage1",
                      reply=reply)
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpu), torch.compiler.set_stance("force_eager"):
        for kind, x in events:
            if kind == "text":
                text.append(x)
            elif kind == "units":
                units += x
    return dialogues.tokenizer.decode(text), units


def write_samples(omni, dialogues, cfg, codec, step):
    """Answers to the first cfg.samples dialogues, into cfg.out_dir/samples/: text, units, and sound if there
    is a codec. Yields a line for each."""
    folder = os.path.join(cfg.out_dir, "samples")
    os.makedirs(folder, exist_ok=True)
    for i in range(min(cfg.samples, len(dialogues))):
        text, units = answer(omni, dialogues, i, cfg.stage, max_tokens=128)
        line = f"sample {i}: {dialogues.rows[i]['users'][-1]} -> {text}"
        if units:
            line += f" | {len(units)} units: {' '.join(map(str, units))}"
        stem = os.path.join(folder, f"step-{step:06d}-{i}")
        with open(f"{stem}.txt", "w") as f:
            f.write(line + "\n")
        if units and codec:
            soundfile.write(f"{stem}.wav", codec.decode(torch.tensor(units)).cpu().numpy(), codec.sample_rate)
        yield line


def compare_settings(config):
    """A line that says how a run's config, a dict, differs from the reference's."""
    reference = read_json(CURVES, f"{config['stage']}.json")["config"]
    others = [key for key, value in reference.items() if config[key] != value]
    if others:
        others = "; ".join(f"{key} {reference[key]} there, {config[key]} here" for key in others)
        return f"compare: the reference was made with other settings, expect another curve: {others}"
    return f"compare: normal is a mean of five log lines within {TOLERANCE} times the reference's and 0.02"


def compare(history, stage):
    """Is the loss of the last five log lines what it was in our run? One line alone is noise. Returns a
    text."""
    losses = read_json(CURVES, f"{stage}.json")["loss"]
    ours = [line for line in history if "loss" in line][-5:]
    theirs = [losses.get(str(line["step"])) for line in ours]
    if None in theirs:
        return f"the reference has no step {ours[-1]['step']}"
    here, there = sum(line["loss"] for line in ours) / len(ours), sum(theirs) / len(theirs)
    verdict = "normal"
    if here > TOLERANCE * there + 0.02:
        verdict = "NOT normal, too high"
    elif here < there / TOLERANCE - 0.02:
        verdict = "NOT normal, too low"
    return f"reference {there:.4f}, here {here / there:.2f} times that: {verdict}"
