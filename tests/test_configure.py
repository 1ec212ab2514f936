"""Config abuse: every mistake costs one line that names the thing and the fix, exit code 2, and runs no
code."""
import os
import sys
from dataclasses import dataclass

import pytest

from omni.configure import configure


@dataclass(frozen=True)
class Config:
    steps: int = 100  # optimizer steps
    lr: float = 3e-4  # peak learning rate
    resume: bool = False  # continue the run in out/
    data: str = "data/tiny"  # a dataset folder
    layers: tuple[int, ...] = (
        1, 2)  # which layers train
    parts: tuple[str, ...] = ("adapter",)  # which parts train
    seed: int | None = None  # None: from the clock
    init: "str | None" = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; write at least 1")


def write(folder, text, name="a.py"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(capsys, argv):
    """The one line of a refused run."""
    with pytest.raises(SystemExit) as stop:
        configure(Config, argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_precedence(tmp_path, monkeypatch, capsys):
    """A later source wins, wherever the files stand, and the table says which one did."""
    monkeypatch.delenv("RANK", raising=False)
    one = '"""doc"""\n_k = 10\nsteps = 2 * _k ** 2  # 200\nlr = 1\nseed = -(7 % 4)\nlayers = 3, _k // 3'
    two = 'lr = 1e-3 / 2\ndata = "a" + "b"\nparts = ["x", "y"]\nresume = True\ninit = data'
    one, two = write(tmp_path, one, "one.py"), write(tmp_path, two, "two.py")
    cfg = configure(Config, ["--data=c=d", one, "--seed", "5", two, "--resume", "false"])
    assert cfg == Config(200, 5e-4, False, "c=d", (3, 3), ("x", "y"), 5, "ab")
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["steps"].endswith("one.py")
    assert rows["lr"].endswith("two.py")
    assert rows["data"].endswith("command line")
    assert configure(Config, []) == Config()
    assert capsys.readouterr().out.count("default") == 8


def test_values_from_the_command_line():
    """Each type has its spelling, and a float stays a float."""
    argv = "--steps=1_000 --lr 1 --layers 2,3 --parts=a,b --seed none --init NONE --data -x --resume".split()
    cfg = configure(Config, argv, show=False)
    assert cfg == Config(1000, 1.0, True, "-x", (2, 3), ("a", "b"), None, None)
    assert type(cfg.lr) is float
    cfg = configure(Config, ["--layers=4,", "--parts=", "--data=", "--resume=0"], show=False)
    assert (cfg.layers, cfg.parts, cfg.data, cfg.resume) == ((4,), (), "", False)


def test_only_the_main_process_shows(monkeypatch, capsys):
    """Eight ranks print one table."""
    monkeypatch.setenv("RANK", "1")
    configure(Config, [])
    assert capsys.readouterr().out == ""


COMMAND_LINE = [  # arguments, a fragment of the refusal
    ("--stpes 3", "no key 'stpes'; did you mean 'steps'?"),
    ("--zzz 3", "--help lists all keys"),
    ("--steps 1e3", "steps must be a whole number like 1000, not '1e3'"),
    ("--steps --lr 1", "--steps has no value; write --steps=value"),
    ("--data", "--data has no value"),
    ("--lr nan", "lr must be a finite number like 3e-4, not nan"),
    ("--lr=-inf", "not -inf"),
    ("--lr=", "lr must be a finite number"),
    ("--resume=maybe", "resume must be True or False, not 'maybe'"),
    ("--layers 2,x", "layers must be whole numbers like 2,3"),
    ("--layers 2,,3", "layers must be"),
    ("--seed x", "seed must be a whole number like 1000 (or None)"),
    ("--steps none", "steps must be"),
    ("--lr 1 --lr=1", "--lr is given twice"),
    ("--steps 0", "steps is 0; write at least 1"),  # ValueError of __post_init__
    ("nowhere.py", "nowhere.py: No such file"),
    ("lr=3", "'lr=3' is not a config file; write path.py, --key value or --key=value"),
    ("-lr 3", "'-lr' is not a config file"),
]


@pytest.mark.parametrize("argv, fragment", COMMAND_LINE, ids=[a for a, _ in COMMAND_LINE])
def test_command_line_abuse(capsys, argv, fragment):
    """No mistake on the command line is guessed at, ignored, or shown as a traceback."""
    assert fragment in refusal(capsys, argv.split())


BIG_TEXT = "_a = 0\n_s0 = 'aaaaaaaa'\n" + "".join(f"_s{i + 1} = _s{i} + _s{i}\n" for i in range(60))
BIG_TUPLE = "_t0 = (1, 1)\n" + "".join(f"_t{i + 1} = _t{i}, _t{i}\n" for i in range(60)) + "lr = _t60"

FILES = [  # a config file, a fragment of the refusal
    ("\n\nstep = 3", "a.py:3: there is no key 'step'; did you mean 'steps'?"),
    ("steps = 2.5", "a.py:1: steps must be a whole number like 1000, not 2.5"),
    ("steps = True", "steps must be"),
    ("steps = None", "steps must be"),
    ("resume = 'true'", "resume must be True or False, not 'true'"),
    ("resume = true", "'true' is not set above; did you mean 'True'?"),
    ("resume = 1", "resume must be"),
    ("lr = 1e999", "lr must be a finite number like 3e-4, not inf"),
    ("lr = '3e-4'", "lr must be"),
    ("lr = True", "lr must be"),
    ("lr = (-1) ** 0.5", "lr must be"),
    ("lr = 1 / 0", "divides by zero"),
    ("lr = 1e300 ** 2", "overflows"),
    ("data = 3", "data must be a text in quotes, not 3"),
    ("data = tiny", "quote it if it is text"),
    ("layers = (1, 2.0)", "layers must be whole numbers like 2,3"),
    ("layers = 3", "layers must be"),
    ("lr = 1\nsteps = 2\nlr = 1", "a.py:3: lr is set a second time"),
    ("steps = _n\n_n = 3", "a.py:1: '_n' is not set above"),
    ("steps = 9 ** 9 ** 9", "too large"),
    ("_a = 2 ** 60\n_b = _a * _a", "a.py:2: value too large"),
    (BIG_TEXT, "too large"),
    (BIG_TUPLE, "lr must be"),
    ("data = 'a' * 9", "arithmetic wants two numbers"),
    ("data = '%9999999999d' % 1", "arithmetic wants two numbers"),
    ("data = 'a' + 3", "arithmetic wants"),
    ("import os", "a.py:1: only `name = value` lines belong"),
    ("lr: float = 3", "only `name = value`"),
    ("lr = steps = 3", "only `name = value`"),
    ("steps = 3\nsteps += 1", "a.py:2: only"),
    ("if True:\n    lr = 3", "a.py:1: only"),
    ("data = f'{3}'", "a.py:1: `f'{3}'` is not allowed"),
    ("data = 'a'.upper", "`'a'.upper` is not allowed"),
    ("layers = [i for i in (1, 2)]", "is not allowed"),
    ("data = b'a'", "is not allowed"),
    ("lr = 1\nsteps = = 3", "a.py:2: invalid syntax; write plain `name = value` lines"),
    ("lr = (1,", "a.py:1: '(' was never closed"),
    ("lr = 1\0", "null byte"),
    (b"data = '\xff'", "utf-8"),
    ("steps = " + "-" * 50_000 + "1", "too deep nesting"),
    ("steps = 1" + " + 1" * 5_000, "too deep nesting"),
    ("steps = 1" + " + 1" * 990, "a.py:1: too deep nesting"),  # parses; pytest's own stack lies below it
]


@pytest.mark.parametrize("text, fragment", FILES, ids=range(len(FILES)))
def test_file_abuse(tmp_path, capsys, text, fragment):
    """A bad config file is refused with file and line, at once, however hostile."""
    assert fragment in refusal(capsys, [write(tmp_path, text)])


def test_a_config_file_is_never_executed(tmp_path, capsys):
    """A config from a stranger is data: the system call in it makes no marker file."""
    marker = tmp_path / "marker"
    path = write(tmp_path, f"_x = __import__('os').system('touch {marker}')")
    assert "a.py:1: `__import__('os').system(" in refusal(capsys, [path])
    assert not marker.exists()


def test_a_folder_is_no_config(tmp_path, capsys):
    """A folder, even one named like a file, is named in the refusal."""
    os.mkdir(tmp_path / "b.py")
    assert "b.py: Is a directory; give the path of a config file" in refusal(capsys, [str(tmp_path / "b.py")])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(monkeypatch, capsys, flag):
    """Help is complete: the script's docstring, and each key with its type, default and comment."""
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Train a model.")
    with pytest.raises(SystemExit) as stop:
        configure(Config, ["--steps", "3", flag])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert out.startswith("Train a model. steps")
    for row in ("steps int 100 optimizer steps", "layers tuple[int, ...] (1, 2) which layers train",
                "seed int | None None None: from the clock", "init str | None None"):
        assert row in out


def test_help_without_source(capsys):
    """A class made in a REPL has no source, and still has help."""
    space = {"__name__": "nowhere"}
    source = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass C:\n    lr: float = 1.0  # x"
    exec(source, space)
    with pytest.raises(SystemExit) as stop:
        configure(space["C"], ["--help"])
    assert stop.value.code == 0
    assert "lr  float  1.0" in capsys.readouterr().out
