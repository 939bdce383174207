"""Stopping and dying under the real deepspeed launcher: its runner, its launch.py, and two ranks."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import TRAINING, arguments, launcher_command
from outcome import check_finished, losses

KNOBS = {"EPOCHS": 100, "TOTAL_TRAIN_STEPS": 60, "SAVE_EVERY": 0, "RESUME_EVERY": 0}  # long enough to be met running


class Job:
    """A training of the baseline in a session of its own, and its processes once it runs."""

    def __init__(self, folder, base, pt_file, **changes):
        self.folder, self.output = folder, folder / "output"
        knobs = TRAINING | KNOBS | {"MODEL_NAME": base, "DATA_PT": pt_file} | changes
        command, env = launcher_command(2, "train_fullseq.py", *arguments("train_fullseq.py", knobs))
        with open(self.output, "w") as out:
            start = {"cwd": folder, "env": env, "stdout": out, "stderr": out, "start_new_session": True}
            self.runner = subprocess.Popen(command, **start)

    def text(self):
        return self.output.read_text()

    def wait_for_step(self, step):
        """Waits until a step is logged. Keeps the launcher and the ranks, in the order of their start."""
        until = time.monotonic() + 120
        while not list(self.folder.glob("out/*/train_loss.csv")) or len(losses(self.folder / "out")) < step:
            assert self.runner.poll() is None and time.monotonic() < until, self.text()
            time.sleep(0.05)
        self.launcher, *self.ranks = psutil.Process(self.runner.pid).children(recursive=True)
        assert len(self.ranks) == 2
        (lock,) = self.folder.glob("out/*_logs/lock")
        sharing = re.findall(rf"READ +(\d+) \S+:{lock.stat().st_ino} ", Path("/proc/locks").read_text())
        assert sorted(map(int, sharing)) == sorted(rank.pid for rank in self.ranks)  # each, in case another one dies

    def ended(self, seconds):
        """Waits until the runner, the launcher and the ranks have ended. Returns the runner's exit code."""
        until = time.monotonic() + seconds
        code = self.runner.wait(seconds)
        _, alive = psutil.wait_procs([self.launcher, *self.ranks], timeout=until - time.monotonic())
        assert not alive, self.text()
        return code


@pytest.fixture
def job(tmp_path, base, pt_file):
    """job(**knobs) starts a Job; what is left of it at the end of the test is killed."""
    jobs = []

    def start(**changes):
        jobs.append(Job(tmp_path, base, pt_file, **changes))
        return jobs[-1]

    yield start
    for one in jobs:
        for process in [one.runner, *getattr(one, "ranks", ())]:
            if process.poll() is None if process is one.runner else process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def reference(uninterrupted):
    return uninterrupted(ranks=2, script="train_fullseq.py", **KNOBS) / "out"


@dataclass
class Fault:
    """Something that ends a job: a signal that stops all ranks, SIGKILL to one of them, or SIGKILL to all processes."""

    send: Callable[[Job], object]
    code: int | None = None  # of `deepspeed`: that of the ranks if they end before it does; None: it varies
    seconds: int = 40  # in which all processes must have ended
    kind: str = "stops under the launcher"
    every: int = 0  # RESUME_EVERY of the job
    rank: int | None = None  # that is killed


DEATH = {"seconds": 60, "kind": "ranks killed under the launcher", "every": 2}
END = {"seconds": 10, "kind": "kill points: all processes under the launcher", "every": 4}
FAULTS = {
    "Ctrl-C": Fault(lambda job: os.killpg(job.runner.pid, signal.SIGINT)),
    "SIGUSR1 to the ranks": Fault(lambda job: [rank.send_signal(signal.SIGUSR1) for rank in job.ranks], 75),
    "SIGTERM to the launcher": Fault(lambda job: job.launcher.terminate(), 1),
    "SIGTERM to the runner": Fault(lambda job: job.runner.terminate(), -signal.SIGTERM),
    "SIGTERM to a rank": Fault(lambda job: job.ranks[1].terminate(), 75),
    "SIGTERM to all": Fault(lambda job: os.killpg(job.runner.pid, signal.SIGTERM), -signal.SIGTERM),
    "SIGKILL to the runner": Fault(lambda job: job.runner.kill(), -signal.SIGKILL),
    "SIGKILL to the launcher": Fault(lambda job: job.launcher.kill(), 0),
    "SIGKILL to rank 0": Fault(lambda job: job.ranks[0].kill(), rank=0, **DEATH),
    "SIGKILL to rank 1": Fault(lambda job: job.ranks[1].kill(), rank=1, **DEATH),
    "SIGKILL to all": Fault(lambda job: os.killpg(job.runner.pid, signal.SIGKILL), -signal.SIGKILL, **END),
}
CHAINS = (  # what happens to one run, one after the other
    ("SIGKILL to rank 1", "SIGKILL to all", "Ctrl-C"),
    ("SIGUSR1 to the ranks", "SIGTERM to the launcher", "SIGKILL to the runner"),
    ("SIGTERM to the runner", "SIGTERM to a rank", "SIGKILL to the launcher"),
    ("SIGTERM to all", "SIGKILL to rank 0"),
)


def pytest_generate_tests(metafunc):
    if "faults" in metafunc.fixturenames:
        assert {fault for chain in CHAINS for fault in chain} == FAULTS.keys()
        metafunc.parametrize("faults", CHAINS if metafunc.config.getoption("full") else CHAINS[:1], ids=" - ".join)


def test_ended_and_resumed_by_the_launcher(job, forked, reference, tmp_path, record_property, faults):
    """After each fault nobody is left, and there is a resume point; in the end, all is as in an uninterrupted run."""
    last = done = 0  # resume point, and steps in the log
    for name in faults:
        fault = FAULTS[name]
        record_property("fault", fault.kind)
        one = job(RESUME_EVERY=fault.every, RESUME=last > 0)
        one.wait_for_step(done + 5)
        fault.send(one)
        code, text = one.ended(fault.seconds), one.text()
        assert code == fault.code or fault.code is None, text
        assert not last or f"resumes after step {last}" in text
        last, done = max(points(tmp_path)), len(losses(tmp_path / "out"))
        assert done < 60
        if fault.kind == Fault.kind:  # the step was finished, and both ranks have written a resume point
            assert re.search(
                rf"stopped      by (SIG\w+|the end of its launcher|a signal to another rank), after step {last};", text
            )
            assert last == done
            assert "Traceback" not in text.split("runner.py")[0]
        elif fault.rank is not None:
            assert code != 0 and f"error: rank {fault.rank} is gone" in text and "Traceback" not in text
    resumed = forked(tmp_path, 2, "train_fullseq.py", **KNOBS, RESUME=True)
    assert not any(resumed.codes), resumed.output
    check_finished(tmp_path / "out", reference)


def points(folder):
    return [int(path.name[-4:]) for path in folder.glob("out/*_logs/resume_step????")]
