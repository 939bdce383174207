"""A disk that is full from some place on: one sentence, the last good state stays, nothing half-written is left.

Simulated in two ways: every write below CKPT_DIR fails from an event on (see server.py), or no file can become larger
than N bytes (RLIMIT_FSIZE), which fails in the middle of a file.
"""

import resource
import sys

import pytest
from outcome import check_finished, check_left

import pt
from blockwise import cli
from blockwise.run import files

PLACES = {  # the fault, and what the sentence names
    "folder": ({"full": r"os.mkdir .*_logs$"}, "CKPT_DIR=out/run ö: its folder cannot be written"),
    "constants": ({"full": "open .*ablation_config"}, "out/run ö_logs cannot be written"),
    "engine configuration": ({"full": "chunk .*_logs/ds_zero2"}, "out/run ö_logs cannot be written"),
    "first line of the losses": ({"full": "open .*/train_loss.csv"}, "train_loss.csv cannot be written"),
    "line of the losses": ({"full": "stepped 2"}, "train_loss.csv cannot be written"),
    "folder of a resume point": ({"full": "os.mkdir .*resume_step0002"}, "resume_step0002 cannot be written"),
    "tensors of a resume point": ({"full": "chunk .*resume_step0002.*/rank0"}, "resume_step0002 cannot be written"),
    "those of rank 1": ({"full": "chunk .*resume_step0002.*/rank1", "rank": 1}, "resume_step0002 cannot be written"),
    "flush of a resume point": ({"full": "fsync .*resume_step0002.*/rank0"}, "resume_step0002 cannot be written"),
    "log in a resume point": ({"full": "chunk .*resume_step0003.*/metrics.csv"}, "resume_step0003 cannot be written"),
    "manifest of a resume point": ({"full": "chunk .*resume_step0003.*manifest"}, "resume_step0003 cannot be written"),
    "shard of a checkpoint": ({"full": "chunk .*/step0003.*model-00003"}, "run ö_step0003 cannot be written"),
    "shard of rank 1": ({"full": "chunk .*/step0003.*model", "rank": 1}, "run ö_step0003 cannot be written"),
    "adapters of a checkpoint": ({"full": "chunk .*/step0003.*adapter_model"}, "run ö_step0003 cannot be written"),
    "their config": ({"full": "open .*/step0004.*adapter_config"}, "run ö_step0004 cannot be written"),
    "their manifest": ({"full": "chunk .*/step0004.*adapter/manifest"}, "run ö_step0004 cannot be written"),
    "tokenizer of a checkpoint": ({"full": "chunk .*/step0004.*tokenizer"}, "run ö_step0004 cannot be written"),
    "manifest of a checkpoint": ({"full": "chunk .*/step0004.unfinished/manifest"}, "run ö_step0004 cannot be written"),
    "files of 20 kB": ({"bytes": 20_000}, "resume_step0001 cannot be written"),
    "files of 120 kB": ({"bytes": 120_000}, "resume_step0001 cannot be written"),
}
SAMPLE = (
    "constants", "tensors of a resume point", "shard of rank 1", "their config", "manifest of a checkpoint",
    "files of 20 kB",
)  # fmt: skip


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", PLACES if metafunc.config.getoption("full") else SAMPLE)


def test_a_full_disk(forked, uninterrupted, tmp_path, record_property, place):
    record_property("fault", "disk full")
    faults, named = PLACES[place]
    ranks = 2 if "rank" in faults else 1
    reference = uninterrupted(ranks=ranks)
    full = forked(tmp_path / "run", ranks, faults=faults)
    assert full.codes == [1] * ranks, full.output
    # every rank says it here; a launcher ends those that say it late
    assert full.output.count(named) == ranks and "Traceback" not in full.output, full.output
    check_left(tmp_path / "run/out", reference / "out")
    assert not list((tmp_path / "run").rglob("*unfinished*"))
    room = forked(tmp_path / "run", ranks, RESUME=True)
    assert not any(room.codes), room.output
    check_finished(tmp_path / "run/out", reference / "out")


@pytest.mark.parametrize("before", [b"", b"the samples of before"])
def test_samples_that_do_not_fit(base, dataset_folder, tmp_path, monkeypatch, record_property, before):
    """pt.py: the file of before stays as it was."""
    record_property("fault", "disk full")
    output, replace, limits = tmp_path / "samples.pt", files.replace, resource.getrlimit(resource.RLIMIT_FSIZE)

    def replace_with_little_room(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            replace(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    output.write_bytes(before)
    monkeypatch.setattr(files, "replace", replace_with_little_room)
    flags = ("--model", base, "--dataset", dataset_folder, "--output", output)
    monkeypatch.setattr(sys, "argv", ["pt.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        cli.run_script(pt.main)
    assert f"--output {output} cannot be written: File too large" in end.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["samples.pt"] and output.read_bytes() == before
