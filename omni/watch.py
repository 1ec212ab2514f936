"""
Watching a run: what the model says so far, and whether its loss is what it was when we ran this.

Why: a loss of 0.3 means little by itself. A reply that you can read and hear, and the curve of a run that
went well, tell you after minutes what you would otherwise learn after days.

How: train.py calls this at each validation, and with --compare at each log line.
     python -m omni.watch                      our own runs as tables: what you should see
     python -m omni.watch out/tiny_stage1      yours
     python -m omni.watch out/tiny_stage1 --save "MACHINE"     yours becomes the one to compare with
"""
import argparse
import json
import os
import re
from glob import glob

import soundfile
import torch

from omni.audio import read_audio
from omni.configure import fail
from omni.corpus import load_corpus
from omni.engine import Engine
from omni.files import read_json
from omni.judges import language_model, transcribe
from omni.run import FREE

CURVES = "runs/reference_curves"      # STAGE.json: `curve` of our own runs
SHOWN = 10, 100, 200, 300, 400, 500, 600, 1000, 2000                  # steps of a table, and the last one
UNSAID = FREE - {"corpus"} | {"stage", "seed"}                        # keys that make no other curve
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
    steps = [str(line["step"]) for line in ours]
    if not losses.keys() >= set(steps):
        return f"the reference has no step {steps[-1]}"
    here = sum(line["loss"] for line in ours) / len(ours)
    there = sum(losses[step][0] for step in steps) / len(steps)
    verdict = "normal"
    if here > TOLERANCE * there + 0.02:
        verdict = "NOT normal, too high"
    elif here < there / TOLERANCE - 0.02:
        verdict = "NOT normal, too low"
    return f"reference {there:.4f}, here {here / there:.2f} times that: {verdict}"


def curve(folder, device):
    """What a complete run was like: commit, device, settings, loss and validation by step, and what its first
    sample said: its text, or of speech what a recognizer hears. Raises OSError, ValueError."""
    meta = read_json(os.path.join(folder, "final"), "meta.json")
    if "log" not in meta:
        raise ValueError(f"{folder} holds no complete run")
    losses = {line["step"]: [round(line["loss"], 4), round(line["accuracy"], 3)]
              for line in meta["log"] if "loss" in line}
    validations = {line["step"]: [round(line[key], 4) for key in ("val_loss", "val_accuracy", "val_exact")
                                  if key in line] for line in meta["log"] if "val_loss" in line}
    said, arpa = {}, None
    for path in sorted(glob(os.path.join(folder, "samples", "step-*-0.txt"))):
        with open(path) as f:
            asked, text = re.match(r"sample 0: (.*) -> ([^|\n]*)", f.read()).groups()
        wav = path.removesuffix(".txt") + ".wav"
        if os.path.exists(wav):
            if arpa is None:
                replies = load_corpus(meta["config"]["corpus"], "train")["replies"]
                arpa = language_model([reply for row in replies for reply in row], bigram=True)
            text = transcribe((read_audio(wav).numpy(), arpa))
        said[int(re.search(r"step-(\d+)", path)[1])] = text.strip()
    settings = {key: value for key, value in meta["config"].items() if key not in UNSAID}
    return {"stage": meta["config"]["stage"], "git": meta["git"], "device": device, "config": settings,
            "asked": asked, "loss": losses, "validation": validations, "said": said}


def table(run):
    """A `curve` -> its table in Markdown."""
    exact = any(len(figures) > 2 for figures in run["validation"].values())
    says = "says" if exact else "is heard to say"
    head = ["step", "loss", "right", "validation loss", "right", *["exact"] * exact, says]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for step, (loss, right) in run["loss"].items():
        if int(step) not in SHOWN and step != list(run["loss"])[-1]:
            continue
        cells = [f"{int(step):,}", f"{loss:.3f}", f"{100 * right:.0f} %"]
        figures = run["validation"].get(step)
        if figures:
            cells += [f"{figures[0]:.3f}", *(f"{100 * share:.0f} %" for share in figures[1:])]
        else:
            cells += ["-"] * (2 + exact)
        lines.append(" | ".join([*cells, run["said"].get(step, "-")]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m omni.watch", description="A run as a table.")
    parser.add_argument("runs", nargs="*", help="folders of complete runs; none: those in " + CURVES)
    parser.add_argument("--save", metavar="MACHINE", help="keep them as the ones to compare with")
    args = parser.parse_args()
    try:
        runs = [json.loads(json.dumps(curve(folder, args.save))) for folder in args.runs]
        for run in runs if args.save else []:
            path = os.path.join(CURVES, f"{run['stage']}.json")
            with open(f"{path}.tmp", "w") as f:
                lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in run.items())
                f.write("{\n" + ",\n".join(lines) + "\n}\n")
            os.replace(f"{path}.tmp", path)
        runs = runs or [read_json(CURVES, f"{stage}.json") for stage in ("stage1", "stage1_tts", "stage2")]
    except (OSError, ValueError) as e:
        fail(f"{e}; give the folders of complete runs, such as out/tiny_stage1")
    for run in runs:
        print(f"\n{run['stage']}, asked \"{run['asked']}\"\n\n{table(run)}")


if __name__ == "__main__":
    main()
