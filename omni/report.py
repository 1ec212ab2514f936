"""
The report of an evaluation, for people: report.md, report.html, and pictures.

Why: a figure says how often, and only the replies say why. report.html is one file without anything outside
it: every reply with its sound, the worst first, to be filtered by category and verdict.
"""
import base64
import html
import io
import json
import os

import librosa
import numpy as np
import soundfile

from omni import checkpoint
from omni.files import read_json, replace_file
from omni.score import interval

LISTENED = 400                         # replies whose sound report.html holds, the worst: some 15 MB
VERDICTS = ("not answered", "wrong", "heard wrong", "not judged", "right")       # the worst first


def verdict(turn):
    """One of VERDICTS."""
    if turn["error"]:
        return "not answered"
    if turn["right"] is None:
        return "not judged"
    if not turn["right"]:
        return "wrong"
    return "right" if turn.get("heard_right") in (True, None) else "heard wrong"


def by_category(turns):
    """{category: (replies, share that is right in percent, low, high)}, the largest first. What is not judged
    is left out."""
    found = {}
    for turn in turns:
        if turn["right"] is not None:
            found.setdefault(turn["category"], []).append(turn)
    result = {}
    for name, mine in sorted(found.items(), key=lambda pair: -len(pair[1])):
        hits = [(turn["right"], 1) for turn in mine]
        result[name] = len(mine), *interval([turn["dialogue"] for turn in mine], hits)
    return result


def show(value, low=None, high=None):
    """A figure with its interval, as text."""
    digits = 1 if abs(value) >= 1 or value == 0 else 3
    text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    return text if low is None else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def table(figures, categories, others):
    """The figures, the share of right replies by category, and what others published, as Markdown."""
    lines = ["| figure | value (95 % interval) |", "|---|---|"]
    lines += [f"| {name} | {show(*value)} |" for name, value in figures.items()]
    if categories:
        lines += ["", "| category | replies | right, % (95 % interval) |", "|---|---|---|"]
        lines += [f"| {name} | {n} | {show(*value)} |" for name, (n, *value) in categories.items()]
    if others:
        names = list(dict.fromkeys(name for _, values, _ in others for name in values))
        lines += ["", f"| published | {' | '.join(names)} | source |", "|" + "---|" * (len(names) + 2)]
        for model, values, source in others:
            row = " | ".join(str(values.get(name, "")) for name in names)
            lines.append(f"| {model} | {row} | {source} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- pictures

def save(figure, path):
    figure.tight_layout()
    figure.savefig(path + ".tmp", dpi=100, format="png")
    os.replace(path + ".tmp", path)


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_figures(path, categories, turns):
    """Right replies by category with their intervals; how word errors and first audio are spread."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, max(3, 0.3 * len(categories) + 1)))
    names = list(categories)[::-1]
    values = np.array([categories[name][1:] for name in names]).reshape(-1, 3)
    left.barh(names, values[:, 0], color="#0b7a6f", xerr=np.abs(values[:, 1:].T - values[:, 0]), capsize=2)
    left.set(xlabel="right, %", xlim=(0, 105))
    rates = [100 * turn["errors"][0] / max(1, turn["errors"][1]) for turn in turns if turn.get("errors")]
    middle.hist(rates, bins=20, color="#0b7a6f")
    middle.set(xlabel="word error rate of a reply, %", ylabel="replies")
    right.hist([1000 * turn["first_audio"] for turn in turns if turn.get("first_audio")], bins=20,
               color="#0b7a6f")
    right.set(xlabel="first audio, ms")
    save(figure, path)
    plt.close(figure)


def log_mel_picture(wav, rate):
    mel = librosa.feature.melspectrogram(y=wav, sr=rate, hop_length=rate // 100, n_mels=80, fmax=8000)
    return librosa.power_to_db(mel, ref=np.max, top_db=70)


def draw_replies(path, folder, turns):
    """Log-mel and units of some replies, a row each."""
    plt = pyplot()
    figure, axes = plt.subplots(2 * len(turns), 1, figsize=(10, 2.6 * len(turns)), squeeze=False,
                                height_ratios=[4, 1] * len(turns))
    for upper, lower, turn in zip(axes[::2, 0], axes[1::2, 0], turns):
        wav, rate = soundfile.read(f"{folder}/{turn['sound']}", dtype="float32")
        upper.imshow(log_mel_picture(wav, rate), origin="lower", aspect="auto",
                     extent=(0, len(wav) / rate, 0, 80))
        upper.set_title(f"{verdict(turn)}: {turn['text'][:90]}", fontsize=9, loc="left")
        upper.set_yticks([])
        lower.imshow(np.array(turn["units"])[None], aspect="auto", cmap="nipy_spectral", vmin=0, vmax=6560,
                     extent=(0, len(turn["units"]) / 25, 0, 1))
        lower.set_yticks([])
        lower.set_ylabel("units", rotation=0, ha="right", va="center", fontsize=8)
    save(figure, path)
    plt.close(figure)


def draw_demo(path, runs, folder, turn):
    """One PNG: the losses of the runs and, unless the turn is None, the log-mels of its question and its
    reply with the texts below them. The losses have one scale: on its own, the noise of a run whose loss
    hardly changes would fill its panel."""
    plt = pyplot()
    figure = plt.figure(figsize=(12, 7 if turn else 3.5))
    grid = figure.add_gridspec(2 if turn else 1, 1)
    upper = grid[0].subgridspec(1, len(runs))
    for i, run in enumerate(runs):
        log = read_json(checkpoint.newest_checkpoint(run), "meta.json")["log"]
        axes = figure.add_subplot(upper[i], sharey=figure.axes[0] if i else None)
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            steps = [line["step"] for line in log if key in line]
            axes.plot(steps, [line[key] for line in log if key in line], style, label=key, markersize=3)
        axes.set(title=os.path.basename(run), xlabel="step", yscale="log")
        axes.set_ylabel("" if i else "nats per target")
        axes.legend()
    if turn:
        lower = grid[1].subgridspec(1, 2)
        for i, (side, text) in enumerate((("question", turn["question"]), ("reply", turn["text"]))):
            wav, rate = soundfile.read(f"{folder}/{turn[f'{side}_file']}", dtype="float32")
            axes = figure.add_subplot(lower[i])
            axes.imshow(log_mel_picture(wav, rate), origin="lower", aspect="auto",
                        extent=(0, len(wav) / rate, 0, 80))
            axes.set(title=side, xlabel=f"seconds\n{text}", ylabel="mel bin")
    save(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------- gallery

def opus(wav, rate):
    """A sound as the bytes of an Opus file."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(wav, -1, 1), rate, format="OGG", subtype="OPUS")
    return file.getvalue()


def write_gallery(folder, turns, question):
    """gallery.md: turns as a table, right or wrong, with Opus files beside it, whose names are noted in the
    turns as "question_file" and "reply_file". question(turn): its sound (n,) at 16 kHz."""
    lines = ["| | asked | answered | heard | |", "|---|---|---|---|---|"]
    for turn in turns:
        name, sounds = f"{turn['dialogue']}-{turn['turn'] + 1}", {}
        heard = question(turn)
        if heard is not None:
            sounds["question"] = heard, 16000
        if turn["sound"]:
            sounds["reply"] = soundfile.read(f"{folder}/{turn['sound']}", dtype="float32")
        play = {}
        for side, (wav, rate) in sounds.items():
            turn[f"{side}_file"] = f"{name}-{side}.ogg"
            with open(f"{folder}/{turn[f'{side}_file']}", "wb") as file:
                file.write(opus(wav, rate))
            play[side] = f"[▶]({turn[f'{side}_file']}) "
        mark = verdict(turn)
        if mark != "right":
            mark += ": " + (turn["error"] or turn["reference"] or " or ".join(turn["references"]))
        lines.append(f"| {turn['dialogue']}.{turn['turn'] + 1} | "
                     f"{play.get('question', '')}{turn['question']} | "
                     f"{play.get('reply', '(silent) ')}{turn['text']} | {turn.get('heard', '')} | {mark} |")
    replace_file(f"{folder}/gallery.md", "\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------- the page

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@title@</title><style>
:root { color-scheme: light dark; --ink: #1c1b19; --muted: #6a6a66; --line: #dddbd5; --back: #faf9f6;
        --card: #fff; --accent: #0b7a6f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ecebe7; --muted: #a3a29d; --line: #383835;
        --back: #171716; --card: #20201e; --accent: #4db6a9; } }
body { margin: 0 auto; max-width: 1080px; padding: 16px; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 8px 0; }
.muted, small { color: var(--muted); }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
td, th { text-align: left; vertical-align: top; padding: 3px 18px 3px 0;
         border-bottom: 1px solid var(--line); }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 48px; }
details { overflow-x: auto; }
img { max-width: 100%; background: #fff; border-radius: 8px; }
nav { position: sticky; top: 0; background: var(--back); padding: 10px 0; display: flex; flex-wrap: wrap;
      gap: 8px; border-bottom: 1px solid var(--line); }
select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
        border-radius: 8px; padding: 5px 8px; min-width: 0; }
input { flex: 1 1 160px; }
article { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--line);
          border-radius: 10px; padding: 10px 14px; margin: 10px 0; overflow-wrap: anywhere; }
article.right { border-left-color: var(--accent); } article.wrong { border-left-color: #c0392b; }
article p { margin: 2px 0; } article b { font-weight: 600; }
audio { height: 30px; width: 240px; max-width: 100%; vertical-align: middle; }
</style></head><body>
<h1>@title@</h1><p class="muted">@about@</p>
<div class="tables">@tables@</div>
<details><summary>Pictures</summary>@pictures@</details>
<nav><select id="verdict" aria-label="Verdict"></select><select id="category" aria-label="Category"></select>
<input id="words" type="search" placeholder="words in question or reply" aria-label="Words">
<span id="count" class="muted"></span></nav>
<main id="list"></main>
<script type="application/json" id="rows">@rows@</script>
<script>
const rows = JSON.parse(document.getElementById("rows").textContent), $ = id => document.getElementById(id);
const add = (parent, tag, text, name) => {
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
for (const key of ["verdict", "category"]) {
  const counts = {};
  for (const row of rows) counts[row[key]] = (counts[row[key]] ?? 0) + 1;
  add($(key), "option", `every ${key}`).value = "";
  for (const name in counts) add($(key), "option", `${name} (${counts[name]})`).value = name;
}
function line(parent, label, text, sound) {
  const p = add(parent, "p");
  if (sound) Object.assign(add(p, "audio"), {controls: true, preload: "none", src: sound});
  add(p, "span", ` ${label} `, "muted");
  add(p, "span", text);
}
function show() {
  const words = $("words").value.toLowerCase();
  const shown = rows.filter(row => (!$("verdict").value || row.verdict == $("verdict").value)
    && (!$("category").value || row.category == $("category").value)
    && (!words || (row.question + row.text + row.heard).toLowerCase().includes(words)));
  $("count").textContent = `${shown.length} of ${rows.length} replies, the worst first`;
  $("list").replaceChildren();
  for (const row of shown.slice(0, 200)) {
    const bad = row.verdict == "wrong" || row.verdict == "not answered";
    const node = add($("list"), "article", undefined, bad ? "wrong" : row.verdict.replaceAll(" ", "-"));
    add(add(node, "p"), "small", `${row.name} · ${row.category} · ${row.verdict}${row.facts}`);
    line(node, "asked", row.question, row.asked);
    line(node, "answered", row.text || "(nothing)", row.said);
    if (row.heard) line(node, "heard", row.heard);
    if (row.wanted) line(node, "right is", row.wanted);
  }
  if (shown.length > 200) add($("list"), "p", "The first 200 are shown.", "muted");
}
for (const id of ["verdict", "category", "words"]) $(id).oninput = show;
show();
</script></body></html>
"""


def as_html(markdown):
    """Our own tables of Markdown as HTML."""
    tables = []
    for block in markdown.strip().split("\n\n"):
        rows = [line.strip("| ").split(" | ") for line in block.splitlines() if not line.startswith("|-")]
        lines = []
        for row, tag in zip(rows, ["th"] + ["td"] * len(rows)):
            lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
        tables.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
    return "".join(tables)


def data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def write_page(folder, title, subtitle, markdown, turns, question):
    """report.html. turns: the worst first; question(turn): its sound (n,) at 16 kHz, or None."""
    rows = []
    for i, turn in enumerate(turns):
        facts = ""
        if turn.get("errors"):
            facts += f" · {turn['errors'][0]} word errors of {turn['errors'][1]}"
        if turn.get("first_audio"):
            facts += f" · first audio {1000 * turn['first_audio']:.0f} ms"
        facts += "".join(f" · {note}" for note in turn["notes"])
        row = {"name": f"{turn['id']}.{turn['turn'] + 1}", "category": turn["category"], "facts": facts,
               "verdict": verdict(turn), "question": turn["question"], "text": turn["text"],
               "heard": turn.get("heard", ""),
               "wanted": turn["error"] or turn["reference"] or " or ".join(turn["references"])}
        if i < LISTENED:
            asked = question(turn)
            if asked is not None:
                row["asked"] = data_url("audio/ogg", opus(asked, 16000))
            if turn["sound"]:
                row["said"] = data_url("audio/ogg", opus(*soundfile.read(f"{folder}/{turn['sound']}")))
        rows.append(row)
    pictures = []
    for name in ("figures.png", "replies.png"):
        if os.path.exists(f"{folder}/{name}"):
            with open(f"{folder}/{name}", "rb") as file:
                pictures.append(f'<img alt="{name}" src="{data_url("image/png", file.read())}">')
    parts = {"title": html.escape(title), "about": html.escape(subtitle), "tables": as_html(markdown),
             "pictures": "".join(pictures), "rows": json.dumps(rows).replace("<", "\\u003c")}
    page = PAGE
    for name, text in parts.items():                  # the rows last: nothing in them is looked at
        page = page.replace(f"@{name}@", text)
    replace_file(f"{folder}/report.html", page)
