"""What the watching thread does, with a process instead of the other rank. Under the launcher: tests/faults."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = """
import os, signal, subprocess, sys, time
from types import SimpleNamespace
from blockwise.run import signals
signals.GRACE = 1
other = subprocess.Popen(["sleep", "20"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
ranks = SimpleNamespace(rank=0, local_rank=0, local_world_size=2, on_all_ranks=lambda function: [function(), other.pid])
try:
    with signals.Watch(ranks, signals.launchers()) as it:
        it.patience = 2  # as under DeepSpeed's launcher
        exec(sys.argv[1])
    print("stop", it.stop, signal.getsignal(signal.SIGTERM).name)
finally:
    other.kill()
"""
SEND = "os.kill(os.getpid(), signal.{}); "


def python(script, *args):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script, *args], env=env, capture_output=True, text=True, timeout=60)


def watched(code):
    began = time.monotonic()
    done = python(SCRIPT, code)
    return done, time.monotonic() - began


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_only_sets_a_flag(name):
    done, _ = watched(SEND.format(name) + "time.sleep(0.5)")
    assert done.returncode == 0 and done.stdout == f"stop {name} SIG_DFL\n", done.stderr


WAITS, FAILS = "other.kill(); time.sleep(50)", "other.kill(); other.wait(); raise RuntimeError('gloo')"


@pytest.mark.parametrize("code", [WAITS, FAILS])
def test_without_the_other_rank_the_process_ends_and_says_so(code):
    """Both where the main thread waits forever, as in NCCL, and where it gets an error, as in gloo."""
    done, seconds = watched(code)
    assert done.returncode == 1 and seconds < 20
    assert done.stderr.strip() == "error: rank 1 is gone. The same command with --RESUME=True resumes the run."


def test_an_error_of_this_rank_itself_is_not_blamed_on_others():
    done, _ = watched("raise RuntimeError('out of memory')")
    assert done.returncode == 1 and "RuntimeError: out of memory" in done.stderr and "is gone" not in done.stderr


def test_a_step_that_does_not_end_after_sigterm_is_given_up():
    code = SEND.format("SIGTERM") + "time.sleep(4)\nwith it.step(): time.sleep(50)"
    done, seconds = watched(code)
    assert done.returncode == 1 and seconds < 20 and "did not end within 2 s of SIGTERM" in done.stderr


@pytest.mark.parametrize("name, before", [("SIGTERM", ""), ("SIGUSR1", "with it.step(): ")])
def test_saving_and_other_signals_have_no_limit(name, before):
    done, _ = watched(before + SEND.format(name) + "time.sleep(4)")
    assert done.returncode == 0 and done.stdout == f"stop {name} SIG_DFL\n", done.stderr


ALONE = """
import os, signal, sys, time
from types import SimpleNamespace
from blockwise.run import signals
signals.end_at_once()
if sys.argv[2] == "after":
    with signals.Watch(SimpleNamespace(rank=0, local_rank=0, local_world_size=1, on_all_ranks=lambda pid: [pid()]), []):
        pass
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
time.sleep(5)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_before_and_after_the_watch_a_signal_ends_with_the_code_of_stopping(name, when):
    """Slurm ends the ranks that are left when the first has ended, and a job script looks at the highest code."""
    done = python(ALONE, name, when)
    assert done.returncode == 75 and not done.stderr


@pytest.mark.parametrize("name, number", [("a shell", 0), ("torchrun", 1)])
def test_only_launchers_are_watched(name, number):
    """A process that something else has started, such as a shell in the background, may outlive that."""
    child = "from blockwise.run import signals; print(len(signals.launchers()))"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    done = python(parent, child, name)
    assert done.returncode == 0 and done.stdout == f"{number}\n", done.stderr
