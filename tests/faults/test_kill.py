"""A run that is killed with SIGKILL anywhere and resumed ends as if nothing had happened, to the byte.

Anywhere: before every change of a file below CKPT_DIR, before every flush, within files, before and after every step;
see Faults in server.py. `--full` tries far more of these events.
"""

import signal

import pytest
from outcome import check_finished, check_left

# where a run is when a signal stops it, and its exit code then
STOPS = {
    "ablation_config": 75,
    "stepped 2": 75,
    "chunk .*resume_step0002.*/rank0": 75,
    "chunk .*/step0003.*model": 75,
    "/step0004": 0,
}
RENAMES = ("/step0003.unfinished to ", "/step0004.unfinished to ")  # of checkpoints; the shares may miss them
SETUPS = {"1 rank": {"ranks": 1}, "2 ranks": {"ranks": 2, "BF16": True, "MICRO_BSIZE": 1}}


def pytest_generate_tests(metafunc):
    """The points of a run at which it is killed, as shares of its events, or as what is in the event's line."""
    if "point" in metafunc.fixturenames:
        full = metafunc.config.getoption("full")
        one, two = (48, 12) if full else (8, 3)
        points = [("1 rank", (i + 0.5) / one, 0, True) for i in range(one)]
        points += [("2 ranks", (i + 0.5) / two, i % 2, i % 3 == 2) for i in range(two)]
        points += [(setup, place, 0, True) for place in RENAMES for setup in SETUPS][: None if full else 1]
        metafunc.parametrize("setup, point, rank, together", points)


def phase(event):
    """What the run is doing at an event, a line `number kind path`."""
    _, kind, path = event.split(" ", 2)
    if "resume_step" in path or "/step0" in path:
        what = "resume point" if "resume_step" in path else "checkpoint"
        return f"{what}, rename" if kind == "os.rename" else what
    return "step" if kind in ("step", "stepped") else "logs"


def test_killed_and_resumed(forked, uninterrupted, tmp_path, record_property, setup, point, rank, together):
    """rank: which is killed; together: the others are at the same moment, else they must end by themselves."""
    reference = uninterrupted(**SETUPS[setup])
    events = (reference / f"trace{rank}").read_text().splitlines()
    event = next(line for line in events if point in line) if point in RENAMES else events[int(point * len(events))]
    record_property("fault", f"kill points: {setup}, {phase(event)}")
    run = tmp_path / "run"
    faults = {"at": [f"^{event.split()[0]} ", signal.SIGKILL], "rank": rank, "together": together}
    killed = forked(run, **SETUPS[setup], faults=faults)
    assert -signal.SIGKILL in killed.codes, killed.output
    assert killed.seconds < 60 and (together or None not in killed.codes), "the other rank must end by itself"
    check_left(run / "out", reference / "out")
    resumed = forked(run, **SETUPS[setup], RESUME=True)
    assert not any(resumed.codes), resumed.output
    check_finished(run / "out", reference / "out")


NUMBERS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("place, number", zip(STOPS, NUMBERS, strict=True))
def test_stopped_and_resumed(forked, uninterrupted, tmp_path, record_property, place, number):
    """Before the first step it ends at once; in a step and while it saves, that is finished, and at most one step more.

    What happens under the launcher: test_launcher.py.
    """
    record_property("fault", "stops at a chosen moment")
    reference = uninterrupted(**SETUPS["1 rank"])
    stopped = forked(tmp_path / "run", faults={"at": [place, number]})
    assert stopped.codes == [STOPS[place]] and "Traceback" not in stopped.output, stopped.output
    check_left(tmp_path / "run/out", reference / "out")
    if stopped.codes == [75]:
        assert not list((tmp_path / "run").rglob("*unfinished*"))
        assert forked(tmp_path / "run", RESUME=True).codes == [0]
    check_finished(tmp_path / "run/out", reference / "out")


def test_nothing_is_renamed_before_it_is_on_the_disk(uninterrupted):
    """What a loss of power needs: files and folders are flushed before a rename, and its folder after it."""
    written, unsure, renames = set(), set(), 0
    for event in (uninterrupted(**SETUPS["1 rank"]) / "trace0").read_text().splitlines():
        _, kind, path = event.split(" ", 2)
        if kind in ("open", "os.mkdir"):
            written |= {path, path.rpartition("/")[0]}
        elif kind == "fsync":
            written.discard(path)
            unsure.discard(path)
        elif kind == "os.rename":
            old, new = path.split(" to ")
            assert not [file for file in written if f"{file}/".startswith(f"{old}/")], event
            unsure.add(new.rpartition("/")[0])
            renames += 1
        elif kind in ("step", "os.remove"):  # what was there before may go only now
            assert not unsure, event
    assert renames == 2 + 4 + 2 + 4  # constants and ds_zero2.json, resume points, checkpoints, resume points that go


OTHERS = {
    "full fine-tuning": {"LORA_RANK": 0, "LORA_DROPOUT": 0.0},
    "block diffusion": {"script": "train_bd3lm.py", "BLOCKS_FROM": "sample"},
    "R2FT": {"script": "train_r2ft.py", "VARIANT": "block"},
    "random lengths": {"script": "train_fullseq.py", "RANDOM_LENGTH": 0.5, "LOSS_MEAN": "token", "LR_SCHEDULE": "wsd"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_trainings_stopped_and_resumed(forked, uninterrupted, tmp_path, record_property, other):
    record_property("fault", "stops at a chosen moment")
    knobs = SETUPS["2 ranks"] | OTHERS[other]
    reference = uninterrupted(**knobs)
    stopped = forked(tmp_path / "run", **knobs, faults={"at": ["stepped 2", signal.SIGTERM]})
    assert set(stopped.codes) == {75}, stopped.output
    assert not any(forked(tmp_path / "run", **knobs, RESUME=True).codes)
    check_finished(tmp_path / "run/out", reference / "out")
