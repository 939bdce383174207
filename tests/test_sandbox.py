"""Programs of a model are run for real: right ones, wrong ones, and those that attack their tests or the machine."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from blockwise import rewards, sandbox, sandboxed
from blockwise.cli import InputError

ADD = sandbox.Tests(("assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 0) == 0"), wanted="add")
RIGHT = "def add(a, b):\n    return a + b\n"


def landlock_version():
    """What Linux itself says, 0 without Landlock; elsewhere 0."""
    libc = ctypes.CDLL(None)
    return max(libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), 1), 0) if sys.platform == "linux" else 0


pytestmark = pytest.mark.skipif(landlock_version() == 0, reason="programs are refused here: no Linux with Landlock")


def passed(program, *tests, **more):
    return sandbox.passed(program, sandbox.Tests(tests, **more) if tests else ADD)


# ---------------------------------------------------------------- right and wrong programs


def test_tests_are_counted_one_by_one():
    assert passed(RIGHT) == 3
    assert passed("def add(a, b):\n    return 4 if a == b else a + b\n") == 2
    assert passed("def add(a, b):\n    return a - b") == 1
    assert passed("def add(a, b)\n    return a + b") == 0 == passed("") == passed("\0") == passed("\udfff = 1")
    assert passed("def add(a, b):\n    if a == 1:\n        while True:\n            pass\n    return a + b") == 2
    assert passed("print('ü' * 10**6)\n" + RIGHT) == 3
    assert passed("def total(a, b):\n    return total(a, b - 1) + 1 if b else a") == 3  # under another name


VALUES = """
import math, collections, itertools
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
def same(x): return x
def kind(x): return type(x).__name__
def evens():
    yield from (0, 2, 4)
def sort(values): values.sort(); values.append(math.inf)
def fill(table, keys, seen): table['ö'] = [1]; seen.add(5)
def wrong(): raise ValueError('no such thing')
def own():
    class MyError(Exception): pass
    raise MyError('mine')
def many(): return collections.Counter('aab')
def odd(): return float('nan')
def options(a, *, b=2): return a, b
"""


PLAIN = (
    "None", "True", "-10**40", "1.5", "'a\"\\n🙂\\udfff'", "b'\\x00a'", "1+2j", "[1, [2]]", "(1, ('a',))", "{1, 2}",
    "()", "frozenset({1})", "{'a': {(1, 2): [None]}, 1: float('inf')}", "''", "[]", "{}", "set()",
)  # fmt: skip


def test_plain_values_go_to_the_program_and_back():
    tests = [
        f"assert same({v}) == {v} and type(same({v})) is type({v}) and kind({v}) == type({v}).__name__" for v in PLAIN
    ]
    assert passed(VALUES, *tests) == len(PLAIN)
    tests = ["assert many() == {'a': 2, 'b': 1}", "assert odd() != odd()", "assert options(1, b=(3,)) == (1, (3,))"]
    tests += ["from collections import deque\nassert same(deque([1])) == deque([1])"]
    assert passed(VALUES, *tests) == 4


def test_objects_of_the_program_can_be_used():
    tests = ["assert list(evens()) == [0, 2, 4] and sum(evens()) == 6", "s = Stack(1).push(2)\nassert len(s) == 2"]
    tests += ["assert s[0] == 1 and list(s.items) == [1, 2] and same(s).push(3)[2] == 3 and s.items is not s.items"]
    assert passed(VALUES, *tests) == 3


def test_tests_see_what_a_function_does_to_its_arguments():
    tests = ["x = [3, 1]\nsort(x)\nassert x == [1, 3, float('inf')]"]
    tests += ["t, s = {}, {1}\nfill(t, 1, s)\nassert t['ö'] == [1] and 5 in s"]
    assert passed(VALUES, *tests) == 2


def test_exceptions_of_the_program_arrive():
    catch = "try:\n    {}()\n    seen = None\nexcept {} as error:\n    seen = str(error)\nassert seen == {!r}"
    tests = [catch.format("wrong", "ValueError", "no such thing"), catch.format("own", "RuntimeError", "mine")]
    assert passed(VALUES, *tests) == 2


def test_what_cannot_be_given_to_a_program_fails_its_test_only():
    tests = (
        "same(lambda: 1)",
        "assert same(Stack) == Stack",
        "deep = []\ndeep.append(deep)\nsame(deep)",
        "assert same(1) == 1",
    )
    assert passed(VALUES, *tests) == 1


def test_a_test_that_leaves_or_does_not_end_fails():
    assert passed(RIGHT, "raise SystemExit", "import sys; sys.exit(0)", "assert add(1, 1) == 2") == 1
    assert passed(RIGHT, "assert add(1, 1) == 2", "import os; os._exit(0)", "pass") == 1
    assert passed(RIGHT, "while True: pass") == 0


# ---------------------------------------------------------------- the published forms of tests

MBPP = {
    "task_id": 11, "prompt": "Write a python function to remove first and last occurrence.", "test_setup_code": "",
    "code": "def remove_Occ(s,ch): \r\n    i, j = s.find(ch), s.rfind(ch)\r\n    return s[:i] + s[i+1:j] + s[j+1:]",
    "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"',
                  'assert remove_Occ("PHP","P") == "H"'],
}  # fmt: skip
HUMANEVAL = {"task_id": "HumanEval/32", "entry_point": "find_zero"}
HUMANEVAL["prompt"] = '''import math


def poly(xs: list, x: float):
    return sum([coeff * math.pow(x, i) for i, coeff in enumerate(xs)])


def find_zero(xs: list):
    """ xs are coefficients of a polynomial.
    """
'''
HUMANEVAL["canonical_solution"] = """    begin, end = -1., 1.
    while poly(xs, begin) * poly(xs, end) > 0:
        begin *= 2.0
        end *= 2.0
    while end - begin > 1e-10:
        center = (begin + end) / 2.0
        if poly(xs, center) * poly(xs, begin) > 0:
            begin = center
        else:
            end = center
    return begin
"""
HUMANEVAL["test"] = """

METADATA = {}


def check(candidate):
    for coeffs in ([1, 2], [-6, 11, -6, 1]):
        assert math.fabs(poly(coeffs, candidate(coeffs[:]))) < 1e-4
"""
KODCODE = {"question": "Write a function that adds numbers up, and a class that counts."}
KODCODE["test"] = """from solution import add_all
from solution import Count
import pytest

def test_add():
    assert add_all([1, 2]) == 3

def test_none():
    with pytest.raises(ValueError):
        add_all([])

def test_class():
    c = Count()
    c.more()
    assert c.n == 1
"""
KODCODE_PROGRAM = """class Count:
    def __init__(self): self.n = 0
    def more(self): self.n += 1
def add_all(xs):
    if not xs: raise ValueError
    return sum(xs)
"""
ASSERTS = {
    "question": "Double!",
    "tests": "from solution import double\nx = 4\nassert double(2) == x\nassert double(1) == 3\n",
}
ANSWER = "<reasoning>\nso\n</reasoning>\n<answer>\n```python\n{}```\n</answer>\n"


@pytest.mark.parametrize(
    "row, program, share",
    [
        (MBPP, MBPP["code"] + "\n", 1),
        (MBPP, "def remove_Occ(s, ch):\n    return 'heo'\n", 1 / 3),
        (HUMANEVAL, HUMANEVAL["canonical_solution"], 1),  # the body, and the whole function with a helper
        (HUMANEVAL, "def find_zero(xs):\n" + HUMANEVAL["canonical_solution"], 1),
        (HUMANEVAL, "def poly(xs, x):\n    return 0\ndef find_zero(xs):\n    return 7\n", 0),  # poly is the tests' own
        (HUMANEVAL, "", 0),
        (KODCODE, KODCODE_PROGRAM, 1),
        (KODCODE, "def add(xs):\n    return sum(xs)\n", 0),  # the import of Count fails
        (ASSERTS, "def double(x):\n    return 2 * x\n", 1 / 2),
    ],
)
def test_code(row, program, share):
    sandbox.tests_of(row, "a row")
    reward = rewards.REWARDS["code"]
    assert reward(ANSWER.format(program), row) == pytest.approx(0.5 + 0.5 * bool(program) + share)
    if row is MBPP:
        assert reward(f"```python\n{program}```", row) == pytest.approx(share)
        assert reward(f"<answer>no</answer>```python\n{program}```", row) == pytest.approx(share)
        assert reward(f"<answer> {program} </answer>", row) == 0 == reward("", row)


def test_code_is_off_unless_it_is_allowed():
    with pytest.raises(InputError, match="REWARD='code' runs programs .* say ALLOW_CODE_EXECUTION=True"):
        rewards.parse("code")
    assert rewards.parse("0.5*code+format", allow_code=True) == [("code", 0.5), ("format", 1)]


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "line 2 needs a text or a list of texts as tests, test or test_list"),
        ({"test": []}, "needs a text"),
        ({"test": ["assert 1", 2]}, "needs a text"),
        ({"tests": "def f(: pass"}, "line 2: its tests are not Python"),
        ({"tests": "x = 1"}, r"neither a function test...\(\) nor an assert"),
    ],
)
def test_rows_without_tests_are_named(row, message):
    with pytest.raises(InputError, match=message):
        rewards.check_row([("code", 1.0)], row, "rows.jsonl, line 2")


# ---------------------------------------------------------------- programs that attack their tests

EQUAL = """
class Equal{}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
def add(a, b): return Equal({})
"""
WRITE = """
import os
def write(text):
    for number in range(64):
        try: os.write(number, text)
        except OSError: pass
"""
CHEATS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit in the call": "def add(a, b): raise SystemExit(0)",
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "an object that equals everything": EQUAL.format("", ""),
    "a number that equals everything": EQUAL.format("(int)", 7),
    "a list that equals everything": EQUAL.format("(list)", "[7]"),
    "a text that equals everything": EQUAL.format("(str)", 7),
    "no assert": """
import builtins
builtins.AssertionError = type('E', (BaseException,), {})
builtins.exec = builtins.compile = lambda *args: None
def add(a, b): return 7
""",
    "names of Python": "bool = int = len = isinstance = lambda *args: True\ndef add(a, b): return 7",
    "a report of its own": WRITE + "write(b'111')",
    "a report of its own in the call": WRITE + "def add(a, b): write(b'111')",
    "a list of names of its own": WRITE + 'write(b\'{"value": {"add": 3}}\\n\')',
    "a reply that is not JSON": WRITE + "def add(a, b): write(b'[' * 10**5 + b'\\n')",
    "a reply without an end": WRITE + "def add(a, b): write(b'1' * 10**7)",
    "the frames above it": """
import sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        frame.f_globals.update(pack=lambda *args: 3, json=None, report=1)
        frame = frame.f_back
    return 7
""",
    "the end of recursion": "def add(a, b): return add(a, b)",
    "a crash": """
import sys
sys.setrecursionlimit(10**9)
class Deep:
    def __repr__(self): return repr(self)
def add(a, b): return repr(Deep())
""",
    "at the exit": "import atexit, os\natexit.register(lambda: os.write(1, b'111'))\nraise ValueError",
    "no function": "add = 3",
    "NaN": "def add(a, b): return float('nan')",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS)
def test_programs_that_do_not_add_pass_no_test(program):
    assert passed(program) == 0


def test_a_program_cannot_find_out_what_is_expected():
    """It looks at all objects, open files and variables that it can get at."""
    search = """
import gc, os, sys
def seen():
    found = [repr(o) for o in gc.get_objects() if type(o) in (list, dict, tuple, str)]
    found += [repr(os.environ), repr(sys.argv)]
    for number in range(64):
        try: found.append(repr(os.pread(number, 10**6, 0)))
        except OSError: pass
    return '7310' + '5549' in ''.join(found), len(found) > 100
"""
    assert passed(search, "expected = 73105549\nassert seen() == (False, True)") == 1


# ---------------------------------------------------------------- programs that attack the machine


def refused(attempts, kind="PermissionError"):
    """Makes sure that a program meets this exception in each of the attempts, which are Python expressions."""
    program = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *args):
    if getattr(libc, name)(*args) < 0: raise OSError(ctypes.get_errno(), name)
def attempt(text):
    try: return repr(eval(text))
    except BaseException as error: return type(error).__name__
"""
    tests = [f"assert attempt({text!r}) == {kind!r}" for text in attempts]
    if passed(program, *tests) < len(tests):
        assert [text for text, test in zip(attempts, tests) if not passed(program, test)] == []


def test_files_can_be_neither_read_nor_changed(tmp_path):
    (tmp_path / "secret").write_text("of the parent")
    file, parent = repr(str(tmp_path / "secret")), os.getpid()
    refused([
        f"open({file}).read()", f"open({file}, 'w')", f"os.remove({file})", f"os.rename({file}, {file} + '2')",
        f"os.listdir({str(tmp_path)!r})", f"os.truncate({file}, 0)", f"os.chmod({file}, 0)",
        f"os.utime({file}, (0, 0))", f"os.mkdir({file} + '2')", f"os.symlink('a', {file} + '2')",
        f"os.link({file}, {file} + '2')", f"os.setxattr({file}, 'user.a', b'1')", f"os.chown({file}, 1, 1)",
        f"os.mkfifo({file} + '2')",
        "open('/tmp/a', 'w')", "open('/dev/shm/a', 'w')", "open(os.__file__, 'a')", "open('/etc/passwd')",
        f"open({str(ROOT / 'README.md')!r})", f"open('/proc/{parent}/environ')", f"open('/proc/{parent}/mem', 'rb')",
        f"os.listdir('/proc/{parent}/fd')", "open('/proc/self/environ')",
    ])  # fmt: skip
    assert (tmp_path / "secret").read_text() == "of the parent" and os.listdir(tmp_path) == ["secret"]


def test_other_processes_are_out_of_reach():
    parent = os.getpid()
    refused([
        "os.fork()", "subprocess.run(['/bin/true'])", "os.execv('/bin/true', ['a'])",
        "os.posix_spawn('/bin/true', ['a'], {})", f"os.kill({parent}, 9)", f"os.kill({parent}, 0)", "os.kill(-1, 9)",
        "os.kill(0, 9)", f"os.killpg({parent}, 9)", f"os.pidfd_open({parent})", f"raw('ptrace', 16, {parent}, 0, 0)",
        f"resource.prlimit({parent}, resource.RLIMIT_CPU, (0, 0))", f"os.setpriority(0, {parent}, 19)",
        f"os.sched_setaffinity({parent}, [0])", "raw('unshare', 0x10000000)", "raw('prctl', 1, 0, 0, 0, 0)",
        "raw('syscall', 425, 1, 0)", "raw('shmget', 7, 10**6, 0o1666)",
    ])  # fmt: skip
    refused(["threading.Thread(target=print).start()"], "RuntimeError")


def test_there_is_no_network():
    refused(["socket.socket()", "socket.socket(socket.AF_UNIX)", "socket.create_connection(('127.0.0.1', 80))"])
    refused(["socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)"])


def test_limits_cannot_be_raised_and_hold(monkeypatch):
    refused(["resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"], "ValueError")
    refused(["bytearray(10**10)", "[0] * 10**9", "'x' * 2 * 10**9"], "MemoryError")
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 1)
    loop = "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass\n"
    began = os.times()
    assert passed(loop + RIGHT) == 0
    ended = os.times()
    assert 0.5 < ended.children_user + ended.children_system - began.children_user - began.children_system < 3


def test_a_program_that_waits_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 1)
    monkeypatch.setattr(sandbox, "PATIENCE", -1)
    ignore = "import signal, time\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
    began = time.monotonic()
    assert passed(RIGHT + ignore + "def wait(): time.sleep(1000)", "assert add(1, 1) == 2", "wait()", "add(1, 1)") == 1
    assert time.monotonic() - began < 20


def test_a_program_knows_nothing_of_the_training(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    tests = "assert env() == expected", "assert files() == 7"  # two pipes, all others are /dev/null
    program = """
import os
def env(): return dict(os.environ)
def files():
    return sum(map(opened, range(64)))
def opened(n):
    try: return bool(os.fstat(n))
    except OSError: return False
"""
    before = f"expected = {sandbox.ENVIRONMENT!r}"
    assert passed(program, *tests, before=before) == 2


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_left():
    files, processes = len(os.listdir("/proc/self/fd")), children(os.getpid())
    passed(RIGHT), passed("import os\nos._exit(0)")
    assert len(os.listdir("/proc/self/fd")) == files and children(os.getpid()) == processes


def test_programs_end_when_the_training_is_killed():
    code = "from blockwise import sandbox\nsandbox.passed('import time\\ntime.sleep(1000)', sandbox.Tests(('pass',)))"
    training = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(started := children(training.pid)) < 2:
        time.sleep(0.05)
    time.sleep(1)  # until they have become what they are
    assert all(map(alive, started))
    training.kill()
    training.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("missing", [444, 446, 157])  # Landlock's calls and prctl, which are not there in old systems
def test_where_programs_cannot_be_confined_none_is_run(missing):
    code = f"""
from blockwise import rewards, sandboxed
sandboxed.call(sandboxed.libc.prctl, sandboxed.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
sandboxed.forbid([{missing}], {sandboxed.MACHINES[os.uname().machine][1]})
rewards.parse("code", allow_code=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "InputError: REWARD code: programs of the model cannot be run safely on this system." in done.stderr
