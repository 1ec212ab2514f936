"""
The one config mechanism. A day of training with a misspelled key is a day lost, so every knob passes one
gate: the key exists, its type fits, nobody sets it twice, and a mistake costs one clear line, never a
traceback.

    @dataclass(frozen=True)
    class Config:
        lr: float = 3e-4  # peak learning rate

    cfg = configure(Config)  # python train.py config/tiny.py --lr 1e-3 --steps=100 --resume

The dataclass is the list of knobs. A config file has Python syntax but is parsed and never executed: a config
from a stranger is data, not code. Later files win over earlier ones, and the command line over all files.
"""
import ast
import difflib
import inspect
import io
import math
import operator
import os
import reprlib
import sys
import textwrap
import tokenize
import typing
from dataclasses import fields

# The types a field may have, each also as `X | None`, and how an error describes a value that would do.
FORMS = {int: "a whole number like 1000", float: "a finite number like 3e-4", bool: "True or False",
         str: "a text in quotes", tuple[int, ...]: "whole numbers like 2,3",
         tuple[str, ...]: "texts like 'a','b'"}
BOOLS = {"true": True, "1": True, "false": False, "0": False}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def fail(message) -> typing.NoReturn:
    """Print `error: <message>` as one line on stderr and exit with code 2: how every script refuses bad
    input."""
    line = " ".join(str(message).splitlines())
    sys.stderr.write(f"error: {line}\n")              # one write, or the lines of two processes mix
    raise SystemExit(2)


def did_you_mean(word, known, otherwise):
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def evaluate(node, names):
    """The value of one expression, given the file's earlier assignments; ValueError for what a config may not
    hold."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            result = node.value
        case ast.Name(id=name):
            if name not in names:
                raise ValueError(f"{name!r} is not set above; " + did_you_mean(
                    name, [*names, "True", "False", "None"], "set it first, or quote it if it is text"))
            result = names[name]
        case ast.Tuple(elts=elts) | ast.List(elts=elts):
            result = tuple(evaluate(e, names) for e in elts)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = calculate(ast.Mult, -1, evaluate(operand, names))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            result = calculate(type(op), evaluate(left, names), evaluate(right, names))
        case _:
            raise ValueError(f"`{ast.unparse(node)[:60]}` is not allowed; write a literal, arithmetic or "
                             "earlier name")
    if isinstance(result, int) and abs(result) > 2**64 or isinstance(result, str) and len(result) > 10_000:
        raise ValueError("value too large; numbers stay within 2 ** 64 and texts within 10,000 characters")
    return result


def calculate(op, a, b):
    """a op b on two numbers, or + on two strings."""
    numbers = {type(a), type(b)} <= {int, float}  # not bool
    if not numbers and not (op is ast.Add and type(a) is type(b) is str):
        raise ValueError(f"arithmetic wants two numbers (or text + text), not {reprlib.repr(a)} and "
                         f"{reprlib.repr(b)}")
    if op is ast.Pow and type(a) is type(b) is int and abs(a) > 1 and b > 64:    # 9 ** 9 ** 9 never returns
        raise ValueError("power too large; numbers stay within 2 ** 64")
    try:
        return OPERATORS[op](a, b)
    except ArithmeticError:
        raise ValueError(f"arithmetic on {a} and {b} divides by zero or overflows; change one of them")


def read_file(path):
    """Yield (key, value, "path:line") for each assignment of a config file; names that begin with _ are
    helpers."""
    if not path.endswith(".py"):
        fail(f"{path!r} is not a config file; write path.py, --key value or --key=value")
    try:
        with open(path, "rb") as f:
            body = ast.parse(f.read()).body
    except OSError as e:
        fail(f"{path}: {e.strerror}; give the path of a config file")
    except SyntaxError as e:
        fail(f"{path}:{e.lineno or 1}: {e.msg}; write plain `name = value` lines")
    except (ValueError, RecursionError, MemoryError):
        fail(f"{path}:1: a null byte or too deep nesting; write plain `name = value` lines")
    names = {}
    for i, node in enumerate(body):
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(value=ast.Constant(value=str())) if i == 0:
                continue  # the docstring
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if name in names:
                    fail(f"{where}: {name} is set a second time; delete one of the two lines")
                try:
                    names[name] = evaluate(value, names)
                except ValueError as e:
                    fail(f"{where}: {e}")
                except RecursionError:
                    fail(f"{where}: too deep nesting; write a shorter expression")
            case _:
                fail(f"{where}: only `name = value` lines belong in a config file; delete this one")
        if not name.startswith("_"):
            yield name, names[name], where


def read_command_line(argv, kinds):
    """The config file paths, and {key: value}; a value that does not parse stays text, for gate() to
    refuse."""
    paths, given = [], {}
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            paths.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        kind, optional = look_up(key, "command line", kinds)
        if key in given:
            fail(f"command line: --{key} is given twice; delete one of the two")
        if not equals:
            if kind is bool and (not argv or argv[0].lower() not in BOOLS):
                text = "true"  # a bare flag
            elif not argv or argv[0].startswith("--"):
                fail(f"command line: --{key} has no value; write --{key}=value, {FORMS[kind]}")
            else:
                text = argv.pop(0)
        value = None if optional and text.lower() == "none" else from_text(text, kind)
        given[key] = gate(key, value, "command line", kinds)
    return paths, given


def from_text(text, kind):
    if typing.get_origin(kind) is tuple:
        words = text.removesuffix(",").split(",") if text else []
        return tuple(from_text(word.strip(), typing.get_args(kind)[0]) for word in words)
    try:
        return BOOLS.get(text.lower(), text) if kind is bool else kind(text)
    except ValueError:
        return text


def look_up(key, where, kinds):
    if key not in kinds:
        fail(f"{where}: there is no key {key!r}; " + did_you_mean(key, kinds, "--help lists all keys"))
    return kinds[key]


def gate(key, value, where, kinds):
    """The value as its field wants it, or fail(). Files and the command line both come through here."""
    kind, optional = look_up(key, where, kinds)
    if kind is float and type(value) is int:
        value = float(value)
    if not fits(value, kind) and not (optional and value is None):
        fail(f"{where}: {key} must be {FORMS[kind]}{' (or None)' * optional}, not {reprlib.repr(value)}")
    return value


def fits(value, kind):
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and all(fits(v, typing.get_args(kind)[0]) for v in value)
    if type(value) is not kind:                       # not isinstance: True is not an int here
        return False
    return kind is not float or math.isfinite(value)


def kind_of(annotation):
    """(type, may it be None) of a field."""
    for kind in FORMS:
        if annotation in (kind, kind | None):
            return kind, annotation != kind
    raise TypeError(f"configure() has no rule for a field of type {annotation}")  # for the dataclass's author


def comments(Config):
    """{field: its trailing comment} from the source of the class; empty where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(Config))
    except (OSError, TypeError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    body = ast.parse(source).body[0].body
    return {n.target.id: by_line.get(n.end_lineno, "") for n in body if isinstance(n, ast.AnnAssign)}


def print_table(rows):
    widths = [min(36, max(map(len, column))) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def configure(Config, argv=None, show=True):
    """A Config made of its defaults, then the config files in order, then --key value; prints where each came
    from."""
    argv = list(sys.argv[1:] if argv is None else argv)
    annotations = typing.get_type_hints(Config)
    kinds = {f.name: kind_of(annotations[f.name]) for f in fields(Config)}
    if "-h" in argv or "--help" in argv:
        print(inspect.cleandoc(sys.modules["__main__"].__doc__ or ""), end="\n\n")
        notes = comments(Config)
        rows = []
        for f in fields(Config):
            kind = inspect.formatannotation(annotations[f.name])
            rows.append((f.name, kind, repr(f.default), notes.get(f.name, "")))
        print_table(rows)
        raise SystemExit(0)
    paths, given = read_command_line(argv, kinds)
    values, origin = {}, {}
    for path in paths:
        for key, value, where in read_file(path):
            values[key], origin[key] = gate(key, value, where, kinds), path
    try:
        cfg = Config(**values | given)
    except ValueError as e:  # __post_init__ refused a value
        fail(e)
    if show and os.environ.get("RANK", "0") == "0":
        origin |= dict.fromkeys(given, "command line")
        print_table([(key, repr(getattr(cfg, key)), origin.get(key, "default")) for key in kinds])
    return cfg
