"""
Figures for the documents: `python bench.py --what figures --ckpt out/tiny_stage2` draws them anew.

Why: a figure drawn by hand is wrong after the next change. Here the sizes come from the models, the marks
from STAGES, and times, bursts and positions from a reply that was timed while it was made.

A figure is one SVG file without scripts or fonts, in colors that follow the reader's theme, wide enough for
a page and readable on a telephone. A record is what `record` in bench.py keeps of a reply, times in ms after
the question's end:

    question, reply, machine   texts;  R, W: rows read, units written in turn
    text     [[ms, token]]              as the LLM writes them, the last one `<|im_end|>`
    reads    [[begin, end, rows]]       the speech LM reads fused rows, at the end with `<sep>`
    units    [[ms, number]]             pieces of bursts
    sound    [[ms, seconds]]            what the codec adds
"""
import json
import math
from html import escape

from model import IGNORE, STAGES, speech_sequence
from omni.audio import DOWNSAMPLE, MEL_RATE, SAMPLE_RATE, UNIT_RATE, UNIT_VOCAB

WIDTH = 500
END = "<|im_end|>"
NAMES = {"stage1": "1", "stage1_tts": "1 TTS", "stage2": "2"}         # of the stages, in the documents
STYLE = """
:root { --back: #faf9f6; --card: #fff; --ink: #1c1b19; --muted: #63635f; --line: #c9c7c0; --on: #fff;
  --text: #b4560b; --unit: #0b7a6f; --wav: #2f62b5; }
@media (prefers-color-scheme: dark) { :root { --back: #171716; --card: #242422; --ink: #ecebe7;
  --muted: #a9a8a3; --line: #4a4a46; --on: #171716; --text: #f0a35e; --unit: #4db6a9; --wav: #8ab4f8; } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.back { fill: var(--back); } .card { fill: var(--card); stroke: var(--line); }
.muted { fill: var(--muted); font-size: 13px; } .bold { font-weight: 600; } .small { font-size: 13px; }
.on { fill: var(--on); font-size: 12px; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.text { fill: var(--text); } .unit { fill: var(--unit); } .wav { fill: var(--wav); }
.rule { stroke: var(--line); } .flow { stroke: var(--muted); fill: none; stroke-width: 1.5; }
.off { fill: none; stroke: var(--line); stroke-width: 1.5; } .dash { stroke-dasharray: 3 3; }
"""


def say(x, y, text, kind=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def box(x, y, width, height, kind, r=2):
    at = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {at} rx="{r}" class="{kind}"/>'


def line(x1, y1, x2, y2, kind="rule"):
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{kind}"/>'


def arrow(x, y1, y2):
    """Downwards."""
    return f'<path d="M{x} {y1}V{y2 - 1}m-4 -5l4 5l4 -5" class="flow"/>'


def svg(title, about, height, parts, record=None):
    """The file's text. record: kept in it, so that a figure can be drawn again without the run."""
    kept = f"<metadata>{escape(json.dumps(record), False)}</metadata>" if record else ""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-labelledby="title about">')
    lines = [head, f'<title id="title">{escape(title)}</title>', f'<desc id="about">{escape(about)}</desc>',
             kept, f"<style>{STYLE}</style>", box(0, 0, WIDTH, height, "back", 8), *parts]
    return "\n".join(filter(None, lines)) + "\n</svg>\n"


# --------------------------------------------------------------------------------------------------- pipeline

def sizes(omni, rate):
    """What the pipeline shows of a model; rate: of its codec's sound, in Hz."""
    return {"mels": omni.model.speech_encoder.n_mels, "encoder": omni.config["speech_encoder_hidden_size"],
            "LLM": omni.config["hidden_size"], "speech LM": omni.config["speech_generator"]["hidden_size"],
            "rate": rate, "R": omni.R, "W": omni.W}


def pipeline(tiny, real):
    """From a question to a reply: parts, rates, shapes, and what each stage trains. tiny, real: `sizes` of
    the embedded world and of the 0.5B release."""
    R, W, half = tiny["R"], tiny["W"], MEL_RATE // 2

    def both(form, key):
        return form.format(tiny[key]), form.format(real[key])
    rows = [                       # name, what it does, its name in STAGES; what comes out, of both sizes
        ("question", "a recording", None, f"{SAMPLE_RATE // 1000} kHz", ("wav (samples,)", "")),
        ("log-mel", "fixed arithmetic", None, f"{MEL_RATE} Hz", both("({}, T)", "mels")),
        ("Whisper encoder", "hears", "speech encoder", f"{half} Hz", both("(T/2, {})", "encoder")),
        ("adapter", f"{DOWNSAMPLE} frames in 1", "speech adapter", f"{half // DOWNSAMPLE} Hz",
         both("(T/10, {})", "LLM")),
        ("LLM", "writes text, token by token", "LLM", "states h_i", both("(N, {})", "LLM")),
        ("gate fusion", "h_i with the embedding of y_i", "gate fusion", "rows", both("(N, {})", "speech LM")),
        ("speech LM", f"reads {R} rows, writes {W} units", "speech LM", f"{UNIT_RATE} Hz",
         (f"units (U,), {UNIT_VOCAB:,} codes", "")),
        ("codec", "units to sound, streaming", "codec", "wav", both("{:,} Hz", "rate"))]
    columns = dict(zip(STAGES, (WIDTH - 126, WIDTH - 78, WIDTH - 30)))
    parts = [say(24, 46, "shapes", "muted"), say(128, 46, "tiny", "muted"), say(228, 46, "0.5B", "muted"),
             say(WIDTH - 78, 24, "trained in stage", "muted middle")]
    parts += [say(x, 46, NAMES[stage], "bold middle") for stage, x in columns.items()]
    y = 58
    for name, does, part, rate, (small, large) in rows:
        parts += [box(12, y, 326, 30, "card", 6), say(24, y + 20, name, "bold"),
                  say(328, y + 20, does, "muted end")]
        trained = [stage for stage in STAGES if part in STAGES[stage]]
        for stage, x in columns.items():
            if trained:
                kind = "unit" if stage in trained else "off"
                parts.append(f'<circle cx="{x}" cy="{y + 15}" r="7" class="{kind}"/>')
        if part and not trained:
            parts.append(say(columns["stage1_tts"], y + 20, "never", "muted middle"))
        y += 30
        gap = 52 if name in ("LLM", "speech LM") else 30
        parts += [arrow(28, y, y + gap), say(42, y + 20, rate, "bold small"),
                  say(128, y + 20, small, "small"), say(228, y + 20, large, "small")]
        if name == "LLM":
            parts += [say(42, y + 40, "tokens y_i", "bold small text"),
                      say(128, y + 40, "(N,), shown as they come", "small text")]
        if name == "speech LM":
            for i in range(2 * (R + W)):
                kind = "text" if i % (R + W) < R else "unit"
                parts.append(box(42 + 11 * i, y + 32, 9, 9, kind))
        y += gap
    parts += [box(12, y, 326, 30, "card", 6), say(24, y + 20, "reply", "bold"),
              say(328, y + 20, "plays while the LLM writes on", "muted end")]
    about = (f"Sound at {SAMPLE_RATE} Hz becomes a log-mel at {MEL_RATE} Hz. Whisper's encoder makes {half} "
             f"states a second of it, the adapter {half // DOWNSAMPLE}. The LLM writes text tokens. Gate "
             f"fusion mixes its states with the tokens' embeddings. The speech LM reads {R} such rows and "
             f"writes {W} units in turn, {UNIT_RATE} units for a second of sound, which the codec makes.")
    about += "".join(f" Stage {NAMES[stage]} trains {' and '.join(STAGES[stage])}." for stage in STAGES)
    return svg("From a question to a spoken reply", about, y + 42, parts)


# ------------------------------------------------------------------------------------------------------ reply

def ticks(at, y, stop, unit):
    """An axis from 0 on with up to nine marks."""
    step = next(step for power in range(-2, 9) for step in (10 ** power, 2 * 10 ** power, 5 * 10 ** power)
                if stop <= 8 * step)
    parts = [line(at(0), y, at(stop), y)]
    for i in range(int(stop / step) + 1):
        text = f"{i * step:g}" + (f" {unit}" if i == 0 else "")
        parts += [line(at(i * step), y, at(i * step), y + 4), say(at(i * step), y + 19, text, "muted middle")]
    return parts


def words(tokens):
    return "".join(tokens).replace(END, " (end)").strip()


def reply(record):
    """A reply in time: how it is made and, below and on another scale, how it is heard."""
    text, sound, reads = record["text"], record["sound"], record["reads"]
    first_text, first_sound, made = text[0][0], sound[0][0], sound[-1][0]
    longest, seconds = max(piece for _, piece in sound), sum(piece for _, piece in sound)
    stop, until, played = 10 * math.ceil((made + 4) / 10), 0, []
    for ms, piece in sound:                 # a piece is played once it is there and the last one over
        played.append((max(until, ms / 1000), piece))
        until = sum(played[-1])
    whole = max(until, made / 1000)

    def at(ms):
        return 104 + ms * (WIDTH - 120) / stop
    parts = [say(16, 28, record["question"], "bold"), say(16, 48, record["reply"], "bold text"),
             say(16, 76, "How it is made, ms after the question's end", "muted")]
    for ms, name, y in ((first_text, "first text", 98), (first_sound, "first audio", 116)):
        parts += [line(at(ms), y - 10, at(ms), 350, "flow dash"),
                  say(at(ms) + 5, y, f"{name} {ms:.0f} ms", "bold small")]
    for name, y in (("writes text", 142), ("reads rows", 198), ("writes units", 226), ("adds sound, s", 302),
                    ("plays", 336)):
        parts.append(say(16, y, name, "small"))
    parts += [box(at(0), 131, at(first_text) - at(0) - 3, 12, "card"),
              say(at(0), 160, "hears", "small muted")]
    begin = 0
    for n, (read, end, rows) in enumerate(reads):     # the last one reads <sep> too
        block = [(ms, token) for ms, token in text if begin < ms <= read]
        begin, last, said = read, n + 1 == len(reads), words(token for _, token in block)
        parts += [say(at(block[0][0]) - 2, 160 + 16 * (n % 2), said, "small text"),
                  box(at(read), 187, max(3, at(end) - at(read)), 12, "text"),
                  say(at(end) + 4, 198, f"{rows - 1} + sep" if last else f"{rows}", "small text")]
    parts += [box(at(ms) - 2, 131, 4, 12, "text") for ms, _ in text]
    for ms, count in record["units"]:
        begin = max(x for x in [end for _, end, _ in reads] + [x for x, _ in sound] if x < ms)
        parts += [box(at(begin), 213, at(ms) - at(begin), 18, "unit"),
                  say((at(begin) + at(ms)) / 2, 226, str(count), "on middle")]
    before, level = 0, 0
    for ms, piece in sound:
        top = 304 - 30 * piece / longest
        level = min(top - 4, level - 13) if at(ms) - before < 30 else top - 4
        before = at(ms)
        parts += [box(before - 2, top, 4, 304 - top, "wav"),
                  say(before, level, f"{piece:.2f}", "small middle wav")]
    for begin, piece in played:
        end = min(stop, 1000 * (begin + piece))
        parts.append(box(at(1000 * begin), 324, max(0, at(end) - at(1000 * begin)), 14, "wav"))
    parts += ticks(at, 350, stop, "ms")

    def later(s):
        return 16 + s * (WIDTH - 32) / whole
    parts += [say(16, 408, "How it is heard: the same reply, in seconds", "muted"),
              box(later(0), 420, later(made / 1000) - later(0), 12, "unit"),
              say(later(made / 1000) + 6, 431, f"made in {made / 1000:.2f} s", "small")]
    for begin, piece in played:
        parts.append(box(later(begin), 440, later(begin + piece) - later(begin) - 1, 18, "wav"))
        if piece > 0.07 * whole:
            parts.append(say(later(begin + piece / 2), 453, f"{piece:.2f}", "on middle"))
    parts += [*ticks(later, 468, whole, "s"), say(16, 512, record["machine"], "small muted")]
    about = (f"The first text comes after {first_text:.0f} ms, the first sound after {first_sound:.0f} ms. "
             f"The speech LM writes {', '.join(str(count) for _, count in record['units'])} units. All "
             f"{seconds:.2f} seconds of speech are made after {made / 1000:.2f} seconds.")
    return svg("One reply, from its first token to its last sound", about, 526, parts, record)


# ----------------------------------------------------------------------------------------------------- layout

def layout(record):
    """The sequence that the speech LM would be trained on for this reply: what it reads, R + W positions a
    line, and below that what it is to predict."""
    R, W, tokens = record["R"], record["W"], [token for _, token in record["text"]]
    count = sum(count for _, count in record["units"])
    N, sep, eos, unit = len(tokens), -1, -2, 1000     # ids: text 0 .., sep, eos, units from 1000 on
    ids, rows, labels = speech_sequence(range(N), range(count), sep, unit, eos, R, W)
    names = {sep: "sep", eos: "EOS", IGNORE: ""}
    names |= {i: f"c{i + 1}" for i in range(N)} | {unit + i: f"u{i + 1}" for i in range(count)}
    parts = [say(12, 28, "Upper cells: what the speech LM reads.", "muted"),
             say(12, 48, "Lower cells: what it is to predict there; no cell, no loss.", "muted")]
    size, y, k = (WIDTH - 22) / (R + W), 16, R + W
    for i, (id, row, label) in enumerate(zip(ids, rows, labels)):
        begins = row >= 0 and (i == 0 or rows[i - 1] < 0)                     # a block
        if begins or k == R + W:
            y, k = y + (76 if begins else 58), 0
        if begins:
            parts.append(say(12, y - 6, words(tokens[row:row + R]), "small text"))
        x = 12 + k * size
        kind = "text" if row >= 0 else "muted" if id == sep else "unit"
        parts += [box(x, y, size - 2, 24, kind), say(x + size / 2 - 1, y + 16, names[id], "on middle")]
        if label != IGNORE:
            parts += [box(x, y + 26, size - 2, 22, "off"),
                      say(x + size / 2 - 1, y + 41, names[label], "small middle")]
        k += 1
    losses = sum(label != IGNORE for label in labels)
    text = f"{len(ids)} positions, {losses} with loss: {count} units and EOS"
    parts.append(say(12, y + 72, text, "muted"))
    about = (f"{len(ids)} positions: {N} rows of text, sep, {count} units. {losses} carry loss: those before "
             f"a unit or EOS. {R} rows of text are followed by {W} units, the last rows by sep and the rest.")
    return svg("What the speech LM reads and what it learns to write", about, y + 86, parts, record)
