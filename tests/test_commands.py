"""The commands of README.md and reference/, one after the other in a folder of their own, as a newcomer types
them, with smaller numbers. It protects what is copied from a page: each command works, and after those before
it. torchrun and accelerate are left out here; tests/test_pipeline.py starts both."""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import urllib.request

import pytest
from conftest import ROOT, become, fork, run
from test_readme import commands_of, keys_of

from tiny import voices

DOCS = [ROOT / "README.md", *sorted((ROOT / "reference").glob("*.md"))]
SMALL = {"train": 24, "validation": 6, "test": 8, "processes": 1, "batch_size": 4, "epochs": 0.5,
         "workers": 0, "eval_dialogues": 2, "samples": 1, "dialogues": 1, "max_tokens": 8, "max_units": 30,
         "figures": 4, "codec_steps": 2}
# What is not run, and why; a word of the command tells. The pages say which need downloads or a GPU.
NOT_RUN = {
    "downloads or a GPU": ("downloads/", "hf", "owner/name --columns", "openbookqa", "curl", "large-v3",
                           "config/stage", "speedrun.sh", "small.sh", "piper"),
    "an account on the hub": ("omni.hub out/tiny_stage2 owner/name",),
    "makes the environment": ("venv", "pip install"),
    "its commands are those of this page": ("demo.sh",),
    "tests/test_language.py": ("second_language.sh",),
    "these tests": ("test.sh",),
    "test_the_server_starts below": ("python serve.py",),
    "tests/test_others.py": ("--source vocalnet", "--source slam"),
    "tests/test_costs.py": ("--what sizes",),
    "minutes, or much memory": ("bench.py",),
    "it serves until it is stopped": ("tensorboard",),
    "a place for a command": ("...",),
}


def inline(doc):
    """The commands within a document's sentences."""
    text = re.sub(r"```.*?```", "", doc.read_text(), flags=re.S)
    found = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    command = r"(python|accelerate|torchrun)\b.*(\.py| -m | -c )|bash runs/"
    return [code for code in found if re.match(command, code)]


def why_not(command):
    """Why a command is not run here, or None."""
    if "--folder" in command:
        return None
    return next((why for why, words in NOT_RUN.items() if any(word in command for word in words)), None)


COMMANDS = list(dict.fromkeys(command for doc in DOCS for command in commands_of(doc) + inline(doc)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The repository as a newcomer has it, with files of his own under the names that the pages use."""
    at = tmp_path_factory.mktemp("home")
    for name in "config model.py omni reference runs train.py data.py sample.py eval.py serve.py".split():
        (at / name).symlink_to(ROOT / name)
    for name in ("tiny", "out/english_codec"):        # as your_data.md has the second put together
        shutil.copytree(ROOT / "tiny", at / name)
    turns = [{"users": ["What is rain?"], "replies": ["Water."]},
             {"users": ["And snow?"], "replies": ["Ice."]}]
    question = ROOT / "reference/carrot/question.flac"
    for path in ("q1.wav", "q2.wav", "clip.wav", "recordings/q1.wav", "my_voice/001.wav", "downloads/q1.wav"):
        (at / path).parent.mkdir(exist_ok=True)
        shutil.copy(question, at / path)
    lines = {"dialogues.jsonl": turns, "corpus/german.jsonl": turns,
             "recordings/dialogues.jsonl": [turn | {"speech": ["q1.wav"]} for turn in turns],
             "my_voice/all.jsonl": [{"speech": "001.wav", "text": "What color is a carrot?"}]}
    for path, rows in lines.items():
        (at / path).parent.mkdir(exist_ok=True)
        rows = [row | {"id": f"row-{i}"} for i, row in enumerate(rows * 12)]
        (at / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [{"from": "human", "text": "What is rain?", "speech": "q1.wav"},
            {"from": "gpt", "text": "Water.", "unit": [1, 2, 3]}]
    released = [{"id": f"instruct_en_{i}", "conversation": said} for i in range(20)]
    (at / "downloads/instruct_en_200k_data_cosy2.json").write_text(json.dumps(released))
    (at / "sounddevice.py").write_text("from unittest.mock import MagicMock as OutputStream\n")   # --play
    return at


@pytest.fixture(scope="module")
def lacking():
    """Folders that were not made, since a synthesizer is not installed."""
    return set()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(home, lacking, command):
    reason = why_not(command)
    if reason:
        pytest.skip(f"not run: {reason}")
    words = shlex.split(command)
    lines = voices.missing(re.findall(r"(?:flite|festival)/\w+", command))
    if lines or lacking & set(words):                 # and what needs what it would have made
        lacking.update(word for key, word in zip(words, words[1:]) if key in ("--out_dir", "--out"))
        pytest.skip(f"not run: {'; '.join(lines) or 'no voice, see above'}")
    at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    words = words[at:]
    if words[0] != "-m":
        known = keys_of(words[0])
        small = SMALL | ({"held_out": 0.2} if "corpus/me" in words else {})      # of two dozen dialogues
        for key in small.keys() & known:
            if f"--{key}" in words:
                words[words.index(f"--{key}") + 1] = small[key]
            else:
                words += [f"--{key}", small[key]]
    run(sys.executable, *words, cwd=home)


def test_the_server_starts(home, tmp_path):
    """`python serve.py` with the checkpoint that the commands above made: its page comes, and Ctrl-C ends
    it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words, log = ["serve.py", "--ckpt", "out/tiny_stage2", "--port", port], tmp_path / "log"
    server = fork.Process(target=become, args=(words, log, log, home))
    server.start()
    end, page = time.time() + 60, ""
    while "<html" not in page:
        assert server.is_alive() and time.time() < end, log.read_text()
        time.sleep(0.2)
        with contextlib.suppress(urllib.error.URLError):
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read().decode()
    os.kill(server.pid, signal.SIGINT)
    server.join(30)
    assert server.exitcode in (0, -signal.SIGINT), log.read_text()


def test_reasons():
    """Nothing stands in NOT_RUN that no command needs any more, and most commands of ours run."""
    for word in (word for words in NOT_RUN.values() for word in words):
        assert any(word in command for command in COMMANDS), word
    assert sum(why_not(command) is None for command in COMMANDS) > 50
