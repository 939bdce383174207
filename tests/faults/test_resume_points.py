"""Damaged resume points are noticed, the one before is used, and the run still ends as the uninterrupted one."""

import hashlib
import json
import shutil
import signal

import pytest
from outcome import check_finished

RANKS = 2  # and both have files that can be damaged


@pytest.fixture(scope="module")
def stopped(forked, tmp_path_factory):
    """A run that was stopped after its third step: with resume points 2 and 3, and no checkpoint yet."""
    folder = tmp_path_factory.mktemp("stopped")
    done = forked(folder, RANKS, faults={"at": ["step 3$", signal.SIGUSR1]})
    assert done.codes == [75, 75], done.output
    assert {path.name for path in (folder / "out").glob("*/resume_*")} == {"resume_step0002", "resume_step0003"}
    return folder


def sealed(point, **changes):
    """Gives a point a manifest with changes and the right digest of its own, as somebody who wants to mislead would."""
    content = json.loads((point / "manifest.json").read_text()) | changes
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (point / "manifest.json").write_text(json.dumps(content))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def pickled(path):
    path.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def halved(point):
    """Adapters of another run: a share of them is missing, and sizes and digests are right."""
    from safetensors.torch import load_file, save_file

    file = point / "rank1.safetensors"
    save_file({name: value[: len(value) // 2] for name, value in load_file(file).items() if value.dim()}, file)
    line = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    sealed(point, files=json.loads((point / "manifest.json").read_text())["files"] | {file.name: line})


DAMAGES = {
    "tensors of rank 0 cut": lambda point: cut(point / "rank0.safetensors", -1),
    "tensors of rank 1 cut to nothing": lambda point: cut(point / "rank1.safetensors", 0),
    "a bit of the adapters flipped": lambda point: flip(point / "rank0.safetensors", -5000),
    "a bit of the header flipped": lambda point: flip(point / "rank1.safetensors", 20),
    "the last bit flipped": lambda point: flip(point / "rank1.safetensors", -1),
    "tensors missing": lambda point: (point / "rank1.safetensors").unlink(),
    "log missing": lambda point: (point / "train_loss.csv").unlink(),
    "log cut": lambda point: cut(point / "train_loss.csv", -3),
    "manifest missing": lambda point: (point / "manifest.json").unlink(),
    "manifest cut": lambda point: cut(point / "manifest.json", -30),
    "manifest empty": lambda point: cut(point / "manifest.json", 0),
    "manifest a list": lambda point: (point / "manifest.json").write_text("[]"),
    "a digit of the manifest": lambda point: flip(point / "manifest.json", 12),
    "manifest of another step": lambda point: sealed(point, step=1),
    "manifest without files": lambda point: sealed(point, files={}),
    "wrong hash": lambda point: sealed(point, files={"rank0.safetensors": {"bytes": 1, "sha256": "0" * 64}}),
    "tensors of another run": halved,
    "a pickle instead of tensors": lambda point: pickled(point / "rank0.safetensors"),
    "empty folder": lambda point: [file.unlink() for file in point.iterdir()],
    "ranks swapped": lambda point: (point / "rank0.safetensors").replace(point / "rank1.safetensors"),
}
SAMPLE = (
    "tensors of rank 1 cut to nothing",
    "a bit of the adapters flipped",
    "manifest missing",
    "tensors of another run",
)


def pytest_generate_tests(metafunc):
    if "damage" in metafunc.fixturenames:
        metafunc.parametrize("damage", DAMAGES if metafunc.config.getoption("full") else SAMPLE)


def test_the_point_before_is_used(forked, uninterrupted, stopped, tmp_path, record_property, damage):
    record_property("fault", "damaged resume points")
    shutil.copytree(stopped, tmp_path / "run")
    (point,) = (tmp_path / "run/out").glob("*/resume_step0003")
    DAMAGES[damage](point)
    done = forked(tmp_path / "run", RANKS, RESUME=True)
    assert not any(done.codes), done.output
    assert done.output.count("resume_step0003 is damaged: ") == 1 and "resumes after step 2" in done.output
    check_finished(tmp_path / "run/out", uninterrupted(ranks=RANKS) / "out")
    assert not list(tmp_path.rglob("executed"))


def test_if_all_are_damaged_nothing_is_touched(forked, stopped, tmp_path, record_property):
    record_property("fault", "damaged resume points")
    shutil.copytree(stopped, tmp_path / "run")
    for point in (tmp_path / "run/out").glob("*/resume_step*"):
        cut(point / "rank0.safetensors", 100)
    before = {path: path.read_bytes() for path in (tmp_path / "run/out").rglob("*") if path.is_file()}
    done = forked(tmp_path / "run", RANKS, RESUME=True)
    assert done.codes == [1, 1] and "no resume point of out/run ö_logs is undamaged" in done.output
    assert {path: path.read_bytes() for path in (tmp_path / "run/out").rglob("*") if path.is_file()} == before
