"""
Watching a run: what the model says so far, and whether its loss is what it was when we ran this.

Why: a loss of 0.3 means little by itself. A reply that you can read and hear, and the curve of a run that
went well, tell you after minutes what you would otherwise learn after days.
"""
import os

import soundfile
import torch

from omni.engine import Engine
from omni.files import read_json

CURVES = "runs/reference_curves"      # STAGE.json: the losses of our own runs, with their settings
ROWS = 16                             # replies that are made at once
TOLERANCE = 1.5                       # a loss beyond this many times the reference's, and 0.02, is not normal


def answers(omni, dialogues, numbers, stage, max_tokens):
    """The model's last turns in some dialogues of a data.Dialogues, from speech, or in stage 1 TTS from the
    true texts.

    Returns [(text, units)]. Greedy text, units at temperature 0.3; no random numbers of the training are
    used.
    """
    engine, replies = Engine(omni, rows=min(ROWS, max(1, len(numbers))), max_tokens=max_tokens), []
    for i in numbers:
        prompt, mels = dialogues.prompt(i)
        given = None
        if not dialogues.hear:
            given = dialogues.tokenizer(dialogues.rows[i]["replies"][-1])["input_ids"]
        replies.append(engine.submit(prompt, mels, given, speak=stage != "stage1", temperature=0.3, seed=i))
    for _ in engine.stream():
        pass
    return [(dialogues.tokenizer.decode(reply.text), reply.units) for reply in replies]


def write_samples(omni, dialogues, cfg, codec, step):
    """Answers to the first cfg.samples dialogues, into cfg.out_dir/samples/: text, units, and sound if there
    is a codec. Yields a line for each."""
    folder = os.path.join(cfg.out_dir, "samples")
    os.makedirs(folder, exist_ok=True)
    numbers = range(min(cfg.samples, len(dialogues)))
    for i, (text, units) in zip(numbers, answers(omni, dialogues, numbers, cfg.stage, max_tokens=128)):
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
