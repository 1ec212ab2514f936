"""What the pages for learning show is what the code prints: walkthrough.md, you_should_see.md."""
import json
import re
import sys

import pytest
import torch
from conftest import ROOT, run

from data import chat_ids
from omni import checkpoint, watch
from omni.audio import log_mel, read_audio
from omni.codec import load_codec, stream
from omni.engine import Engine, quicken
from omni.trace import trace

PAGE = (ROOT / "reference/walkthrough.md").read_text()
BLOCKS = re.findall(r"```text\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the first two commands of the page print."""
    folder, carrot = tmp_path_factory.mktemp("carrot") / "corpus", "reference/carrot"
    run(sys.executable, "data.py", "config/data_folder.py", "--path", f"{carrot}/dialogues.jsonl",
        "--audio_root", carrot, "--out_dir", folder, "--held_out", "0", "--processes", "1")
    return run(sys.executable, "data.py", "--show", "0", "--out_dir", folder)


@pytest.mark.parametrize("block", BLOCKS[:3], ids=["clip", "LLM", "speech LM"])
def test_the_tables_are_what_data_py_shows(shown, block):
    """Line by line and in this order; `...` stands for lines that are left out."""
    left = iter(shown.splitlines())
    assert len(BLOCKS) == 4 and block.count("\n") > 2
    for line in block.splitlines():
        assert line == "..." or line in left, line


def test_the_shapes_are_what_the_model_computes(monkeypatch, capsys):
    """The page's question through an untrained model of the same sizes, which is made to say what the trained
    one said: what goes in and comes out of each part, and how often each part runs."""
    omni, tokenizer, _ = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    codec = load_codec("tiny/codec.pt")
    engine = Engine(quicken(omni.eval(), [torch.float32]), max_units=29)
    mel = log_mel(read_audio(ROOT / "reference/carrot/question.flac"), 80, False)
    said = [*tokenizer("A carrot is orange.")["input_ids"], engine.eos]
    head, written = omni.lm_head.forward, iter(said)
    monkeypatch.setattr(omni.lm_head, "forward", lambda x: torch.nn.functional.one_hot(
        torch.tensor([next(written)]), head(x).shape[-1]))
    show = trace(engine, codec)
    units = [x for kind, x in engine.generate(chat_ids(tokenizer, []), [mel], seed=0) if kind == "units"]
    samples = sum(map(len, stream(codec, units)))
    capsys.readouterr()
    show()
    rows = [re.match(r"([a-zA-Z ]+?) +(\d+) +[\d.]+  (.*?)  +(.*?)  +(.*)", line).groups()
            for line in capsys.readouterr().out.splitlines()[2:]]
    wanted = [re.match(r"([a-zA-Z ]+?) +(\d+) +[\d.]+  (.*?)  +(.*?)  +(.*)", line).groups()
              for line in BLOCKS[3].splitlines()[2:]]
    assert sum(map(len, units)) == 29 and samples == 29 * 640
    for got, page in zip(rows, wanted, strict=True):
        if page[0] not in ("speech LM", "head", "codec"):             # these are called once more, for EOS
            assert got[1] == page[1]
        assert got[0] == page[0] and got[2:] == page[2:]


def test_the_curves_on_the_page_are_the_kept_ones():
    """you_should_see.md has the tables that `python -m omni.watch` prints."""
    page = (ROOT / "reference/you_should_see.md").read_text()
    printed = run(sys.executable, "-m", "omni.watch")
    tables = re.findall(r"\| step .*?(?=\n\n|\Z)", printed.rstrip(), re.S)
    assert len(tables) == 3 and all(table in page for table in tables)


def test_a_run_becomes_a_table(tmp_path, monkeypatch, capsys):
    """Steps, losses, validations and what the first sample said, from a run's folder; --save keeps it, so
    that the next call without arguments shows it; a folder without a run is one line."""
    run_folder = tmp_path / "run"
    (run_folder / "final").mkdir(parents=True)
    (run_folder / "samples").mkdir()
    log = [{"step": step, "loss": 1 / step, "accuracy": 0.5, "lr": 1.0} for step in range(10, 130, 10)]
    log.append({"step": 100, "val_loss": 0.25, "val_accuracy": 0.75, "val_exact": 0.125})
    config = {"stage": "stage1", "corpus": "c", "lr": 0.5, "seed": 7}
    meta = {"config": config, "git": "abc", "log": log}
    (run_folder / "final/meta.json").write_text(json.dumps(meta))
    sample = "sample 0: Who -> that? -> Nobody. | 2 units: 1 2\n"
    (run_folder / "samples/step-000100-0.txt").write_text(sample)
    monkeypatch.setattr(watch, "CURVES", str(tmp_path))
    table = ["| step | loss | right | validation loss | right | exact | says |",
             "|---|---|---|---|---|---|---|", "| 10 | 0.100 | 50 % | - | - | - | - |",
             "| 100 | 0.010 | 50 % | 0.250 | 75 % | 12 % | Nobody. |",
             "| 120 | 0.008 | 50 % | - | - | - | - |"]
    monkeypatch.setattr(sys, "argv", ["watch", str(run_folder), "--save", "a machine"])
    watch.main()
    assert "\n".join(table) in capsys.readouterr().out
    kept = json.loads((tmp_path / "stage1.json").read_text())
    assert kept["config"] == {"corpus": "c", "lr": 0.5} and kept["device"] == "a machine"
    assert kept["asked"] == "Who -> that?"
    monkeypatch.setattr(sys, "argv", ["watch", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        watch.main()
    assert stopped.value.code == 2 and "holds no complete run" in capsys.readouterr().err
