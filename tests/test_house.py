"""The order of the house: which file imports which, what a function of train.py may read, how long lines and
files are. It protects what a reader of one evening relies on: no file needs one that comes later."""
import ast
import builtins
import symtable

import pytest
from conftest import ROOT

# ---------------------------------------------------------------------------------- who imports whom

GROUND = ("omni.audio", "omni.files", "omni.configure", "omni.packing")         # these import none of ours
COMMANDS = ("train", "sample", "eval", "bench", "serve")
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for pattern in ("*.py", "omni/*.py", "tiny/*.py") for path in ROOT.glob(pattern)}


def floor(name):
    """Which floor of the house a module is on; an arrow points to the same floor, or to one below."""
    if name in GROUND:
        return 0
    if name == "model":
        return 1
    if name.startswith("omni."):
        return 2
    if name == "data":
        return 3
    return 4                                          # the commands; tiny/ stands beside the house


def imports(nodes):
    """The modules of ours that these syntax nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & SOURCES.keys()


def outside_functions(node):
    """The syntax nodes that are executed when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from outside_functions(child)


TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
ALL = {name: imports(ast.walk(tree)) for name, tree in TREES.items()}           # inside functions, too
AT_ONCE = {name: imports(outside_functions(tree)) for name, tree in TREES.items()}


def test_the_house_has_the_rooms_that_this_test_knows():
    """A file at the top level is a command or one of the two that they share."""
    assert {name for name in SOURCES if "." not in name} == {*COMMANDS, "data", "model"}
    assert set(GROUND) < SOURCES.keys()


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if not name.startswith("tiny.")))
def test_arrows_point_one_way(name):
    """Commands -> data.py -> omni/ -> model.py -> omni/audio.py and omni/packing.py. Only a command may
    import a command, and only sample.py, which answers questions for eval.py too. Nothing imports tiny/
    before someone asks for the embedded world."""
    house = {other for other in ALL[name] if not other.startswith("tiny.")}
    assert {other for other in house if floor(other) > floor(name)} == set()
    assert house & set(COMMANDS) <= {"sample"}
    assert AT_ONCE[name] <= house
    if name in GROUND:
        assert house == set()
    if name == "model":
        assert house == {"omni.audio", "omni.packing"}


def test_no_circle():
    """Take away the files that import nothing that is left, again and again: everything goes."""
    left = dict(ALL)
    while free := [name for name in left if not left[name] & left.keys()]:
        for name in free:
            del left[name]
    assert not left


# ---------------------------------------------------------------------------------- train.py, downwards

def bindings(source):
    """{name: lines where the script itself binds it}, outside of functions and classes."""
    lines = {}
    scopes = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
              ast.GeneratorExp)

    def visit(node):
        names = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        for name in names:
            lines.setdefault(name, []).append(node.lineno)
        if not isinstance(node, scopes):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return lines


def reads(table):
    """The global names that a function or class uses, with what is defined inside of it."""
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    for child in table.get_children():
        names |= reads(child)
    return names


def read_from_below(source):
    """What functions and classes of a script read although it is not bound above them, or bound again below:
    [(reader, name)]."""
    bound, found = bindings(source), []
    for table in symtable.symtable(source, "script", "exec").get_children():
        if table.get_type() not in ("function", "class"):
            continue
        for name in sorted(reads(table)):
            known = name in bound or hasattr(builtins, name)
            if not known or max(bound.get(name, [0])) > table.get_lineno():
                found.append((table.get_name(), name))
    return found


def test_functions_of_the_script_read_nothing_that_comes_later():
    """Who reads train.py from top to bottom has seen every name when a function uses it."""
    assert read_from_below((ROOT / "train.py").read_text()) == []


def test_a_name_from_below_is_found():
    """The test above can fail: a global that is assigned later, also in a nested function."""
    source = "a = 1\ndef f(x):\n    def g():\n        return a + b + len(x)\n    return g\nb = 2\n"
    assert read_from_below(source) == [("f", "b")]
    assert read_from_below("b = 2\n" + source) == [("f", "b")]          # bound again below
    assert read_from_below("b = 2\n" + source.removesuffix("b = 2\n")) == []


# ------------------------------------------------------------------------------- lines and files

TEXT = {".py", ".sh", ".yaml", ".toml", ".ini", ".txt", ".md"}
FOLDERS = ("config", "omni", "tiny", "tests", "runs", "reference", ".ci")
WIDTH = 110
EVENING = ("train.py", "model.py", "data.py", "sample.py")


def text_files():
    """The project's own text files. runs/out holds what runs have written."""
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*")
    kept = [path for path in paths if path.suffix in TEXT and ROOT / "runs" / "out" not in path.parents]
    return sorted(str(path.relative_to(ROOT)) for path in kept)


@pytest.mark.parametrize("name", text_files())
def test_no_long_line(name):
    """No line is longer than 110 characters, prose included. Rows of Markdown tables, which begin with |,
    cannot be broken; nothing else is exempt, also no command in a block of code."""
    long = []
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        if len(line) > WIDTH and not (name.endswith(".md") and line.startswith("|")):
            long.append(f"{name}:{number}: {len(line)} characters")
    assert not long, "\n".join(long)


def test_four_files_are_one_evening():
    """What a newcomer reads stays short enough to read."""
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in EVENING}
    assert sum(lines.values()) <= 1300, lines
