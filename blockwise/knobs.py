"""The knobs of a training script: its ALL_CAPS constants, overridden by `--NAME=value`. Imports nothing heavy.

A constant's range stands next to its default, as an annotation, and its meaning behind it, as a comment:

    LORA_DROPOUT: between(0.0, 0.99) = 0.05  # 0.0 saves a third of the activation memory
"""

import ast
import difflib
import io
import math
import os
import sys
import tokenize
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import SimpleNamespace

from blockwise.cli import InputError

RENAMED = {"MODEL": "MODEL_NAME", "PT_FILE": "DATA_PT", "LORA_R": "LORA_RANK"}  # names of earlier versions


@dataclass(frozen=True)
class Range:
    """The values that a knob may have: numbers between two, one of some texts, or any text."""

    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    empty: bool = False  # whether the text may be empty

    def __str__(self):
        if self.empty:
            return "may be empty"
        if self.choices:
            return " or ".join(map(repr, self.choices))
        return f"at least {self.low}" if self.high == math.inf else f"{self.low} to {self.high}"


def at_least(low: float) -> Range:
    return Range(low)


def between(low: float, high: float) -> Range:
    return Range(low, high)


def one_of(*choices: str) -> Range:
    return Range(choices=choices)


def optional() -> Range:
    return Range(empty=True)


ANYTHING = Range()


@dataclass
class Knob:
    """What a script's source says about one of its constants."""

    values: Range
    comment: str
    section: str  # the heading above it


def override(script: dict, argv: list[str]) -> SimpleNamespace:
    """Sets the ALL_CAPS constants of a script from `--NAME=value` arguments, checks and returns all of them.

    script: the script's globals(), changed in place. Numbers, booleans and lists are Python literals; an int may stand
    for a float, no other change of type is accepted. The launcher's --local_rank passes; --help prints the knobs and
    ends the script. Raises InputError.
    """
    described = {name: knob for name, knob in describe(script["__file__"]).items() if name in script}
    values = {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if name in ("local_rank", "local-rank"):
            continue
        if arg in ("--help", "-h"):
            print_help(script, described)
        if not arg.startswith("--") or name not in described:
            raise InputError(f"{arg} is not a knob of this script.{suggestion(name, described)}")
        if not equals:
            raise InputError(f"{arg} needs a value, as in --{name}={script[name]!r}.")
        values[name] = parse(name, text, script[name], described[name].values)
    for name, knob in described.items():  # the constants in the script, too, may have been edited
        check(name, values.get(name, script[name]), knob.values)
    script.update(values)
    return SimpleNamespace(**{name: script[name] for name in described})


def suggestion(name: str, described: dict[str, Knob]) -> str:
    """What a user who gave an unknown name may have meant."""
    if name in RENAMED:
        return f" It is called --{RENAMED[name]} now."
    close = difflib.get_close_matches(name.upper(), described, n=1)
    return f" Did you mean --{close[0]}=...?" if close else f" The knobs are: {', '.join(described)}."


def parse(name: str, text: str, default, values: Range):
    """Reads `text` as a value of the type of `default`. Raises InputError."""
    value = text
    if not isinstance(default, str):
        # the errors are all that literal_eval can raise; the value stays text then, which the type check refuses
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
    kind = float if type(default) is int and type(values.low) is float else type(default)  # LR may be edited to 1
    if kind is float and type(value) is int:
        check(name, value, values)  # a number too large for a float is out of range, too
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"--{name}={text} is not of type {kind.__name__}; the default is {default!r}.")
    return value


def check(name: str, value, values: Range) -> None:
    """Refuses a value that a knob cannot have. Raises InputError."""
    if isinstance(value, list) and not (value and all(isinstance(item, str) and item for item in value)):
        raise InputError(f"{name}={value!r} is not a list of names.")
    if isinstance(value, str) and not (value or values.empty or "" in values.choices):
        raise InputError(f"{name} is empty.")
    if values.choices and value not in values.choices:
        raise InputError(f"{name}={value!r} must be {values}.")
    if type(value) in (int, float) and not (values.low <= value <= values.high and abs(value) < math.inf):
        raise InputError(f"{name}={value!r:.40} is out of range: it must be {values}.")


def describe(file: str | Path) -> dict[str, Knob]:
    """Reads the ALL_CAPS constants in a script's source, also those of modules from which it imports `*`."""
    source = Path(file).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= describe(util.find_spec(node.module).origin)
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if not (isinstance(target, ast.Name) and target.id.isupper() and isinstance(node, ast.Assign | ast.AnnAssign)):
            continue
        headings = [text for line, text in comments.items() if line < node.lineno and text.startswith("# ---")]
        values = range_of(getattr(node, "annotation", None), f"{file}, line {node.lineno}")
        section = headings[-1].strip("# -") if headings else "knobs of this script"
        knob = Knob(values, comments.get(node.end_lineno, "").removeprefix("# "), section)
        before = found.get(target.id, knob)  # of a module whose knob the script sets anew
        values, comment = before.values if knob.values == ANYTHING else knob.values, knob.comment or before.comment
        found[target.id] = Knob(values, comment, before.section)
    return found


def range_of(annotation: ast.expr | None, where: str) -> Range:
    """The Range that the annotation of a constant stands for. Raises InputError if it cannot be read."""
    if not isinstance(annotation, ast.Call):  # there is none, or it is a plain type
        return ANYTHING
    makers = {"at_least": at_least, "between": between, "one_of": one_of, "optional": optional}
    try:
        return makers[annotation.func.id](*map(ast.literal_eval, annotation.args))
    except (KeyError, ValueError, TypeError, AttributeError):
        said = ast.unparse(annotation)
        raise InputError(f"{where}: {said} must be {', '.join(makers)} with numbers or texts written out.") from None


def print_help(script: dict, described: dict[str, Knob]) -> None:
    """Prints what the script does and its knobs, once for all ranks, and ends the process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(script["__doc__"].strip())
        section, sections = None, list(dict.fromkeys(knob.section for knob in described.values()))
        for name, knob in sorted(described.items(), key=lambda item: sections.index(item[1].section)):
            if knob.section != section:
                section = knob.section
                print(f"\n{section}")
            values = "" if knob.values == ANYTHING else f"[{knob.values}] "
            print(f"  --{name}={script[name]!r}\n        {values}{knob.comment}".rstrip())
    sys.exit(0)
