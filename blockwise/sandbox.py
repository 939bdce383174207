"""Runs programs that a model has written against tests, and counts those that they pass.

The program and its tests are two child processes; sandboxed.py is what they do, and says what they cannot do.
"""

import ast
import builtins
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blockwise.cli import InputError

SCRIPT = Path(__file__).with_name("sandboxed.py")
ENVIRONMENT = {"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # nothing of our own
MOST_SECONDS = 10  # of CPU time for one program; 1 for each test, and 1 more
PATIENCE = 5  # seconds that are waited besides twice that time


@dataclass(frozen=True)
class Tests:
    """The tests of a row: texts of Python, each of which passes if it raises nothing."""

    tests: tuple[str, ...]
    before: str = ""  # stands before them, and ...
    before_program: str = ""  # ... before the program
    wanted: str = ""  # the function that the tests call; if the program has none, its first function is taken


# ---------------------------------------------------------------- the tests of a row


def tests_of(row: dict, where: str) -> Tests:
    """The tests of a row of MBPP, HumanEval, KodCode, or of the same form. Raises InputError.

    A list has a test in each text. Of a text, each function test...() is a test; without one, each assert of it is.
    With `entry_point`, check(entry_point) is the only test, and the program continues the text `prompt`.
    """
    found = next((row[name] for name in ("tests", "test", "test_list") if name in row), None)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{where} needs a text or a list of texts as tests, test or test_list, for REWARD code.")
    try:
        trees = [ast.parse(text) for text in texts]
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where}: its tests are not Python: {error}") from None
    imports = row.get("test_imports") or []
    setup = "\n".join([*(imports if isinstance(imports, list) else []), row.get("test_setup_code") or ""])
    if not isinstance(found, str):
        return Tests(tuple(texts), setup, setup, wanted(texts[0]))
    if isinstance(name := row.get("entry_point"), str):
        prompt = row["prompt"] if isinstance(row.get("prompt"), str) else ""
        return Tests((f"check({name})",), f"{prompt}\n{found}", prompt, name)
    body = trees[0].body
    tests = [f"{one.name}()" for one in body if isinstance(one, ast.FunctionDef) and one.name.startswith("test")]
    if tests:
        return Tests(tuple(tests), found, setup, wanted(found))
    asserts = [one for one in body if isinstance(one, ast.Assert)]
    if not asserts:
        raise InputError(f"{where}: its tests have neither a function test...() nor an assert.")
    before = "\n".join(ast.unparse(one) for one in body if one not in asserts)
    return Tests(tuple(map(ast.unparse, asserts)), before, setup, wanted(found))


def wanted(tests: str) -> str:
    """The function that tests import, or that their first assert calls; "" if it is one of Python's."""
    found = re.search(r"from solution import (\w+)", tests) or re.search(r"assert\s+(\w+)\s*\(", tests)
    return found[1] if found and not hasattr(builtins, found[1]) else ""


# ---------------------------------------------------------------- running them


def passed(program: str, tests: Tests) -> int:
    """How many of the tests a program passes."""
    first = re.search(r"^(?:async )?def (\w+)", program, re.MULTILINE)
    program = f"{tests.before_program}\n{program}\n"
    if tests.wanted and first:
        program += f"globals().setdefault({tests.wanted!r}, {first[1]})\n"
    cpu = min(1 + len(tests.tests), MOST_SECONDS)
    requests, replies = os.pipe(), os.pipe()  # (read, write) each
    with ExitStack() as running:
        try:
            other = start(running, "program", {"program": program}, cpu, requests[0], replies[1])
            source = {"before": tests.before, "tests": tests.tests, "wanted": tests.wanted}
            own = start(running, "tests", source, cpu, replies[0], requests[1])
        finally:
            for end in (*requests, *replies):
                os.close(end)
        try:
            report, _ = own.communicate(timeout=2 * cpu + PATIENCE)
        except subprocess.TimeoutExpired:
            own.kill()
            other.kill()
            report, _ = own.communicate()
    return report[: len(tests.tests)].count(b"1")


def start(running: ExitStack, role: str, source: dict, cpu: int, read: int, write: int) -> subprocess.Popen:
    """Starts one of the two processes. `running` ends it."""
    with tempfile.TemporaryFile("w+") as content:
        json.dump(source, content)
        content.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(SCRIPT), role, str(cpu), str(read), str(write)], stdin=content,
            stdout=subprocess.PIPE if role == "tests" else subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd="/", env=ENVIRONMENT, pass_fds=(read, write), start_new_session=True,
        )  # fmt: skip
    running.enter_context(process)  # waits for it
    running.callback(process.kill)
    return process


@functools.cache
def check() -> None:
    """Makes sure that this system keeps programs from doing harm. Raises InputError."""
    if passed("def works(): return sum(map(int, '12'))", Tests(("assert works() == 3",))) != 1:
        raise InputError(
            "REWARD code: programs of the model cannot be run safely on this system. It needs Linux 5.13 or newer on "
            "x86-64 or aarch64, with Landlock and seccomp, which a container may forbid."
        )
