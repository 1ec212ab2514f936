"""The documents' figures say what the model is and what a reply did: sizes against the backbones and the
configs, marks against STAGES, bursts and losses against the record, files against what draws them."""
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT

from model import STAGES
from omni import draw
from omni.audio import MEL_RATE, UNIT_RATE
from omni.codec import load_codec
from omni.costs import model_of
from omni.cosyvoice import CosyVoice2

FIGURES = ROOT / "reference" / "figures"
SVG = "{http://www.w3.org/2000/svg}"
RECORD = {"question": "What <is> it & why?", "reply": "It is a cat.", "machine": "a machine", "R": 3, "W": 10,
          "text": [[20, "It"], [22, " is"], [24, " a"], [50, " cat"], [52, "."], [54, draw.END]],
          "reads": [[25, 27, 3], [55, 57, 4]], "units": [[32, 5], [40, 5], [66, 10], [75, 7]],
          "sound": [[34, 0.05], [42, 0.2], [68, 0.4], [77, 0.4], [78, 0.03]]}


def parse(text):
    return ElementTree.fromstring(text)


def texts(tree):
    return [element.text for element in tree.iter(SVG + "text")]


def boxes(tree, kind, y=None):
    """The rectangles of a class, as (x, width); y: those that begin there."""
    found = [e.attrib for e in tree.iter(SVG + "rect") if e.get("class") == kind]
    return [(float(e["x"]), float(e["width"])) for e in found if y is None or float(e["y"]) == y]


def tiny_sizes():
    """Those of the backbones in tiny/, from their own files."""
    width = json.loads((ROOT / "tiny/qwen2/config.json").read_text())["hidden_size"]
    dims = torch.load(ROOT / "tiny/whisper.pt", weights_only=True)["dims"]
    return {"mels": dims["n_mels"], "encoder": dims["n_audio_state"], "LLM": width, "speech LM": width,
            "rate": load_codec(str(ROOT / "tiny/codec.pt")).sample_rate, "R": 3, "W": 10}


def real_sizes():
    return draw.sizes(model_of("0.5B"), CosyVoice2.sample_rate)


def test_pipeline_is_drawn_from_the_sizes():
    """What is committed is what today's backbones and config make, and shows the paper's rates and sizes."""
    text = draw.pipeline(tiny_sizes(), real_sizes())
    assert (FIGURES / "pipeline.svg").read_text() == text
    shown = texts(parse(text))
    assert {f"{MEL_RATE} Hz", "50 Hz", "10 Hz", f"{UNIT_RATE} Hz", "(128, T)", "(T/2, 1280)", "(T/10, 896)",
            "24,000 Hz", "units (U,), 6,561 codes", "5 frames in 1",
            "reads 3 rows, writes 10 units"} <= set(shown)


def test_pipeline_marks_what_each_stage_trains():
    """One filled mark for each part of each stage; the encoder and the codec are never trained."""
    tree = parse(draw.pipeline(tiny_sizes(), real_sizes()))
    marks = [circle.get("class") for circle in tree.iter(SVG + "circle")]
    assert marks.count("unit") == sum(map(len, STAGES.values())) == 5
    assert len(marks) == 4 * len(STAGES)
    assert texts(tree).count("never") == 2


def test_reply_holds_the_events():
    """As many bursts, pieces of sound, tokens and reads as the record, bursts where the record has them."""
    tree = parse(draw.reply(RECORD))
    bursts = boxes(tree, "unit", 213.0)
    assert len(bursts) == len(RECORD["units"])
    assert len(boxes(tree, "text", 131.0)) == len(RECORD["text"])
    assert len(boxes(tree, "text", 187.0)) == len(RECORD["reads"])
    assert len(boxes(tree, "wav", 440.0)) == len(RECORD["sound"])
    ends = [x + width for x, width in bursts]
    scale = (ends[-1] - ends[0]) / (75 - 32)                                  # pixels in a ms
    assert [round((end - ends[0]) / scale + 32) for end in ends] == [32, 40, 66, 75]
    seconds = [width + 1 for _, width in boxes(tree, "wav", 440.0)]           # a gap of one pixel
    assert seconds[2] / seconds[1] == pytest.approx(2, abs=0.02)
    shown = texts(tree)
    assert {"first text 20 ms", "first audio 34 ms", "3 + sep", RECORD["question"]} <= set(shown)


def test_layout_holds_every_position():
    """N + 1 + U positions, U + 1 of them with loss (reference/architecture.md), in blocks of R + W."""
    tree = parse(draw.layout(RECORD))
    N, U = 6, 27
    read = boxes(tree, "text") + boxes(tree, "muted") + boxes(tree, "unit")
    assert (len(boxes(tree, "text")), len(boxes(tree, "muted")), len(boxes(tree, "unit"))) == (N, 1, U)
    assert len(boxes(tree, "off")) == U + 1
    assert len({x for x, _ in read}) == RECORD["R"] + RECORD["W"]
    assert max(x + width for x, width in read) < draw.WIDTH


@pytest.mark.parametrize("name", ["reply", "layout"])
def test_a_committed_figure_is_what_draws_its_record(name):
    """A figure keeps its record: today's code draws the same file from it."""
    text = (FIGURES / f"{name}.svg").read_text()
    record = json.loads(parse(text).find(SVG + "metadata").text)
    assert getattr(draw, name)(record) == text
    assert sum(count for _, count in record["units"]) == pytest.approx(
        UNIT_RATE * sum(seconds for _, seconds in record["sound"]))


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.svg")), ids=lambda path: path.name)
def test_a_figure_needs_nothing_from_outside(path):
    """GitHub shows it through <img>: no scripts, links or fonts; a title and a description for who cannot see
    it; both themes; and it scales."""
    text = path.read_text()
    tree = parse(text)
    assert tree.find(SVG + "title").text and len(tree.find(SVG + "desc").text) > 80
    assert tree.get("viewBox") and "prefers-color-scheme: dark" in text
    assert not re.search(r"<script|href|url\(|@import", text)
    defined = set(re.findall(r"\.(\w+) \{", tree.find(SVG + "style").text))
    used = {name for e in tree.iter() for name in e.get("class", "").split()}
    assert used <= defined
