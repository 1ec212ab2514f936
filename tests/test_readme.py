"""What the docs show exists: a newcomer copies their commands and follows their links."""
import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from omni.configure import read_file

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "project.md", *sorted((ROOT / "reference").glob("*.md"))]


def commands_of(doc):
    """The lines of a document's bash blocks, without comments and with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", doc.read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [command for command in commands if command]


COMMANDS = sorted({command for doc in DOCS for command in commands_of(doc)})


def keys_of(script):
    """The fields of a script's config, read from its source: importing train.py would train."""
    tree = ast.parse((ROOT / script).read_text())
    configs = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    return {node.target.id for config in configs for node in config.body if isinstance(node, ast.AnnAssign)}


def anchors_of(doc):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", doc.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    """Scripts and config files exist, and the script knows every key on the line and in the config files."""
    words = shlex.split(command)
    if words[0] == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]]).returncode == 0
        return
    scripts = [word for word in words if word.endswith(".py") and not word.startswith("config/")]
    if not scripts or words[0] == "pytest":
        return
    known = keys_of(scripts[0])
    assert len(known) > 4
    at = words.index(scripts[0])
    for word in words[:at]:
        assert not word.startswith("config/") or (ROOT / word).exists()              # of accelerate launch
    for word in words[at + 1:]:
        if word.startswith("--"):
            assert word[2:].split("=")[0] in known | {"help"}
        elif word.endswith(".py"):
            assert {key for key, _, _ in read_file(str(ROOT / word))} <= known


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_config(path):
    """No config file holds a key that its script does not know."""
    script = "data.py" if path.name.startswith("data") else "train.py"
    assert {key for key, _, _ in read_file(str(path))} <= keys_of(script)


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_links(doc):
    """Links to files of the repository and to headings lead somewhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", doc.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = doc.parent / path if path else doc
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_there_are_commands():
    assert sum(".py" in command for command in COMMANDS) >= 20


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 2200
