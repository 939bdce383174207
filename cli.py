"""What the user gives: constants as flags, jsonl files, and bad input as one sentence. Imports nothing heavy."""

import ast
import difflib
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

STOPPED = os.EX_TEMPFAIL  # 75, the exit code of a training that was asked to stop and can go on with --RESUME=True


class InputError(ValueError):
    """Something the user gave cannot be used. The message names it and says what to do."""


# (lowest, highest) value of each numeric knob; a knob without a line here may have any value of its type.
RANGES = {
    "MASK_ID": (0, math.inf), "SEED": (0, 2**63 - 1),
    "MAX_LEN": (2, math.inf), "MAX_SAMPLES": (0, math.inf), "EPOCHS": (1, math.inf),
    "BLOCK_SIZE": (1, math.inf), "MASK_PROB_EPS": (0.0, 1.0),
    "PREFIX_MASK_RATE": (0.0, 1.0), "SUFFIX_MASK_PROB": (0.0, 1.0),
    "LORA_R": (1, math.inf), "LORA_ALPHA": (1, math.inf), "LORA_DROPOUT": (0.0, 0.99),
    "LR": (1e-12, 1.0), "WARMUP_RATIO": (0.0, 1.0), "MIN_LR_RATIO": (0.0, 1.0), "WEIGHT_DECAY": (0.0, 1.0),
    "MAX_GRAD_NORM": (1e-12, math.inf),
    "MICRO_BSIZE": (1, math.inf), "GRAD_ACC": (1, math.inf),
    "TOTAL_TRAIN_STEPS": (0, math.inf), "SAVE_EVERY": (0, math.inf), "SAMPLE_EVERY": (0, math.inf),
    "RESUME_EVERY": (0, math.inf), "MAX_BAD_STEPS": (1, math.inf),
}  # fmt: skip
FLOATS = {name for name, (low, _) in RANGES.items() if isinstance(low, float)}


def override(script, argv):
    """Sets the ALL_CAPS constants of a script from `--NAME=value` arguments, checks and returns all of them.

    script: the script's globals(), changed in place, so that its functions see the values in force.
    Numbers, booleans and lists are Python literals; an int may stand for a float, no other change of type is accepted.
    The launcher's --local_rank passes. Returns a namespace of the constants. Raises InputError.
    """
    knobs = [name for name in script if name.isupper()]
    values = {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if name in ("local_rank", "local-rank"):
            continue
        if not arg.startswith("--") or name not in knobs:
            close = difflib.get_close_matches(name.upper(), knobs, n=1)
            hint = f" Did you mean --{close[0]}=...?" if close else ""
            raise InputError(f"{arg} is not a knob of this script.{hint} The knobs are: {', '.join(knobs)}.")
        if not equals:
            raise InputError(f"{arg} needs a value, as in --{name}={script[name]!r}.")
        values[name] = parse(name, text, script[name])
    for name in knobs:  # the constants in the script, too, may have been edited
        check(name, values.get(name, script[name]))
    script.update(values)
    return SimpleNamespace(**{name: script[name] for name in knobs})


def parse(name, text, default):
    """Reads `text` as a value of the type of `default`. Raises InputError."""
    value = text
    if not isinstance(default, str):
        # the errors are all that literal_eval can raise; the value stays text then, which the type check refuses
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
    kind = float if type(default) is int and name in FLOATS else type(default)  # a float may be written as 1
    if kind is float and type(value) is int:
        check(name, value)  # a number too large for a float is out of range, too
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"--{name}={text} is not of type {kind.__name__}; the default is {default!r}.")
    return value


def check(name, value):
    """Refuses a value that a knob cannot have. Raises InputError."""
    if isinstance(value, list) and not (value and all(isinstance(item, str) and item for item in value)):
        raise InputError(f"{name}={value!r} is not a list of names.")
    if isinstance(value, str) and not value:
        raise InputError(f"{name} is empty.")
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if type(value) in (int, float) and not (low <= value <= high and abs(value) < math.inf):
        raise InputError(f"{name}={value!r:.40} is out of range: it must be between {low} and {high}.")


def read_jsonl(path):
    """The objects of a jsonl file, as a list of (line number, dict). Raises InputError that names the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"{path} has no rows.")
    rows = []
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # JSON can hold halves of letters, tokenizers cannot
        except ValueError as error:
            raise InputError(f"{path}, line {number} is no JSON in UTF-8: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is no JSON object.")
        rows.append((number, row))
    return rows


def run(main):
    """Runs main(); an InputError ends the process with its sentence and exit code 1.

    All ranks meet the same bad input, so one of them says it: the others give it 10 seconds, in which the job ends.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)
        sys.exit(f"error: {error}")
