"""Every command that the README shows exists and parses: a newcomer copies them."""
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configure import read_file

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({c for c in LINES if c})


def keys_of(script):
    """The fields of a script's Config, read from its source (train.py cannot be imported without training)."""
    return set(re.findall(r"^    (\w+): .+ = .+  # ", (ROOT / script).read_text(), re.M))


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    """Scripts and config files exist, and every key on the line and in the config files is one that the script has."""
    words = shlex.split(command)
    if words[0] == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]]).returncode == 0
        return
    script = next((w for w in words if w.endswith(".py") and not w.startswith("config/")), None)
    if script:
        known = keys_of(script)
        assert len(known) > 4
        for word in words[words.index(script) + 1:]:
            if word.startswith("--"):
                assert word[2:].split("=")[0] in known | {"help"}
            elif word.endswith(".py"):
                assert {key for key, _, _ in read_file(str(ROOT / word))} <= known


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_config(path):
    """No config file holds a key that its script does not know."""
    assert {key for key, _, _ in read_file(str(path))} <= keys_of("data.py" if path.name.startswith("data") else "train.py")


def test_there_are_commands():
    assert sum(".py" in c for c in COMMANDS) >= 8
