"""What every script shares: bad input ends it with one sentence, jsonl files, progress. Imports nothing heavy."""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = {  # of requirements.txt, as they are imported, and of what those bring
    "torch", "transformers", "deepspeed", "peft", "datasets", "safetensors", "fastokens", "tqdm", "psutil",
    "math_verify", "matplotlib", "rich", "huggingface_hub", "numpy",
}  # fmt: skip
STOPPED = os.EX_TEMPFAIL  # 75, the exit code of a training that was stopped by a signal and can be resumed


class InputError(ValueError):
    """Something the user gave cannot be used. The message names it and says what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Runs main(); an InputError ends the process with its sentence and exit code 1, and so does a missing package.

    All ranks meet the same bad input, so one of them reports it: the others wait 10 seconds, in which the job ends.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        how = "`source .venv/bin/activate`, or `pip install -r requirements.txt`"
        sys.exit(f"error: the package {error.name} is not in this Python, {sys.executable}: {how}.")
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)
        sys.exit(f"error: {error}")
    finally:
        gc.freeze()  # at its end, Python would look for garbage among all objects once more, for more than a second


def read_jsonl(path: str | Path) -> list[tuple[int, dict]]:
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
            json.dumps(row, ensure_ascii=False).encode()  # JSON can hold half of a surrogate pair, tokenizers cannot
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON in UTF-8: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object.")
        rows.append((number, row))
    return rows


class Lines:
    """A text stream on which the redrawing of a progress bar becomes one line each time."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\r", "").rstrip(" \n")
        if text:
            self.stream.write(f"{text}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(*args, **kwargs):
    """A tqdm progress bar on stderr; where that is a file or a pipe, a line every 30 seconds and one at the end."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)
    return tqdm(*args, **kwargs, file=Lines(sys.stderr), mininterval=30, miniters=1, ncols=100)
