"""Stopping and dying under the real deepspeed launcher: its runner, its launch.py, and two ranks."""

import os
import signal
import subprocess
import time

import psutil
import pytest
from conftest import TRAINING, arguments, launcher_command
from outcome import check_finished, losses

KNOBS = {"EPOCHS": 100, "TOTAL_TRAIN_STEPS": 60, "SAVE_EVERY": 0, "RESUME_EVERY": 0}  # long enough to be met running


class Job:
    """A training of the baseline in a session of its own, and its processes once it runs."""

    def __init__(self, folder, base, pt_file, **changes):
        self.folder, self.output = folder, folder / "output"
        knobs = TRAINING | KNOBS | {"MODEL": base, "PT_FILE": pt_file} | changes
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


@pytest.fixture
def reference(uninterrupted):
    return uninterrupted(ranks=2, script="train_fullseq.py", **KNOBS) / "out"


def points(folder):
    return [int(path.name[-4:]) for path in folder.glob("out/*_logs/resume_step????")]


def resume(forked, folder, reference):
    done = forked(folder, 2, "train_fullseq.py", **KNOBS, RESUME=True)
    assert not any(done.codes), done.output
    check_finished(folder / "out", reference)


# who gets the signal, and the exit code of `deepspeed`: that of the ranks if they end before it does; None: it varies
STOPS = {
    "Ctrl-C": (lambda job: os.killpg(job.runner.pid, signal.SIGINT), None),
    "SIGUSR1 to the ranks": (lambda job: [rank.send_signal(signal.SIGUSR1) for rank in job.ranks], 75),
    "SIGTERM to the launcher": (lambda job: job.launcher.terminate(), 1),
    "SIGTERM to the runner": (lambda job: job.runner.terminate(), -signal.SIGTERM),
    "SIGTERM to a rank": (lambda job: job.ranks[1].terminate(), 75),
    "SIGTERM to all": (lambda job: os.killpg(job.runner.pid, signal.SIGTERM), -signal.SIGTERM),
    "SIGKILL to the runner": (lambda job: job.runner.kill(), -signal.SIGKILL),
    "SIGKILL to the launcher": (lambda job: job.launcher.kill(), 0),
}


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("full")
    if "stop" in metafunc.fixturenames:
        metafunc.parametrize("stop", STOPS if full else ["Ctrl-C"])
    if "rank" in metafunc.fixturenames:
        metafunc.parametrize("rank", [0, 1] if full else [1])


def test_asked_to_stop(job, forked, reference, tmp_path, record_property, stop):
    """The step is finished, a resume point is written by both ranks, and nobody is left."""
    record_property("fault", "stops under the launcher")
    send, code = STOPS[stop]
    one = job()
    one.wait_for_step(3)
    send(one)
    assert one.ended(40) == code or code is None, one.text()
    (point,) = points(tmp_path)
    assert f"stopped      as asked, after step {point}" in one.text() and point == len(losses(tmp_path / "out"))
    assert point < 60 and "Traceback" not in one.text().split("runner.py")[0]
    resume(forked, tmp_path, reference)


def test_a_rank_that_dies_takes_the_run_down(job, forked, reference, tmp_path, record_property, rank):
    record_property("fault", "ranks killed under the launcher")
    one = job(RESUME_EVERY=2)
    one.wait_for_step(5)
    one.ranks[rank].kill()
    assert one.ended(60) != 0
    assert f"error: rank {rank} is gone" in one.text() and "Traceback" not in one.text()
    assert points(tmp_path)
    resume(forked, tmp_path, reference)


def test_all_killed_and_resumed_by_the_launcher(job, reference, tmp_path, record_property):
    record_property("fault", "kill points: all processes under the launcher")
    one = job(RESUME_EVERY=4)
    one.wait_for_step(10)
    os.killpg(one.runner.pid, signal.SIGKILL)
    one.ended(10)
    again = job(RESUME_EVERY=4, RESUME=True)
    again.wait_for_step(12)
    assert again.ended(100) == 0, again.text()
    assert "goes on after step" in again.text()
    check_finished(tmp_path / "out", reference)
