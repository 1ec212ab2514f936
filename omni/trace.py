"""
What passes through each part in one reply: `python sample.py --trace`.

Why: shapes are understood sooner from an example than from docstrings. reference/walkthrough.md follows one
question through the table that this prints.
"""
import time

import torch


def shape(x):
    """Sizes of the first tensor in x, or how long a list is, as "2 x 192"."""
    while isinstance(x, (list, tuple)) and x and not isinstance(x[0], int):
        x = x[0]
    sizes = x.shape if torch.is_tensor(x) else [len(x)]
    return " x ".join(map(str, sizes))


def trace(engine, codec):
    """Watch the parts of an engine, and a codec (None: text only). Returns a function that prints what they
    did since it was called last: calls, milliseconds in all, and the shapes of the first call. Times on a GPU
    are those of asking for the work, except where a result is waited for."""
    omni, seen = engine.omni, {}
    generator = omni.speech_generator
    parts = [
        ("encoder", omni.model.speech_encoder, "forward", "log-mel at 100 Hz -> frames at 50 Hz"),
        ("adapter", omni.model.speech_projector, "forward", "5 frames -> 1 position of the LLM, 10 Hz"),
        ("LLM", engine.llm, "step", "positions -> states: the prompt, then each token"),
        ("fusion", generator, "fuse", "a state and its token -> a row for the speech LM"),
        ("speech LM", engine.speech_lm, "step", "rows read, then units one by one -> states"),
        ("head", engine, "head", "a state -> logits of 6,561 units and EOS")]
    if codec:
        parts.append(("codec", codec, "next_pieces", "units -> samples"))

    def watch(part, original):
        def wrapper(*args, **more):
            start = time.perf_counter()
            y = original(*args, **more)
            seconds = time.perf_counter() - start
            given = args[1] if part == "codec" else args[0]
            row = seen.setdefault(part, {"calls": 0, "ms": 0.0, "in": shape(given), "out": shape(y)})
            row["calls"], row["ms"] = row["calls"] + 1, row["ms"] + 1000 * seconds
            return y
        return wrapper
    for part, owner, method, _ in parts:
        setattr(owner, method, watch(part, getattr(owner, method)))

    def show():
        print(f"\n{'part':12}{'calls':>6}{'ms':>8}  {'first in':16}{'first out':16}what it does")
        for part, _, _, about in parts:
            if part in seen:
                row = seen[part]
                print(f"{part:12}{row['calls']:6}{row['ms']:8.1f}  {row['in']:16}{row['out']:16}{about}")
        seen.clear()
    return show
