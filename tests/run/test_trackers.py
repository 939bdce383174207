"""Trackers: what they show is metrics.csv, each step once, also after a run was stopped, killed and resumed."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys

import pytest

from blockwise.cli import InputError
from blockwise.run import trackers

LOGS = "out/run ö_logs"
KNOBS = {"VAL_EVERY": 3, "SAVE_EVERY": 0}  # validated after steps 3 and 4; resume points after each step


def test_a_folder_of_that_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="TRACKER='some_tracker': that package is not installed; pip install some_t"):
        trackers.check("some_tracker")
    trackers.check("")


def numbers(folder):
    """[{"step": 1, "loss": ..., ...}, ...] of metrics.csv, without empty columns."""
    with open(folder / LOGS / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def interrupted(forked, folder, pt_file, tracker):
    """A run that is stopped in step 3, before its validation, then killed after step 4, in its last resume point.

    So step 4 is trained twice. On two ranks: the second has no tracker.
    """
    knobs = {"ranks": 2, "MICRO_BSIZE": 1, "TRACKER": tracker, "VAL_PT": pt_file, **KNOBS}
    stopped = forked(folder, **knobs, faults={"at": ["step 3$", signal.SIGTERM]})
    assert stopped.codes == [75, 75], stopped.output
    killed = forked(
        folder, RESUME=True, **knobs,
        faults={"at": ["os.mkdir .*resume_step0004", signal.SIGKILL], "together": True},
    )  # fmt: skip
    assert -signal.SIGKILL in killed.codes and len(numbers(folder)) == 4, killed.output
    done = forked(folder, RESUME=True, **knobs)
    assert done.codes == [0, 0] and "after step 4" in done.output, done.output
    assert [sorted(row)[-1] for row in numbers(folder)] == ["tokens_per_second"] * 2 + ["val_loss"] * 2
    return done.output


def test_tensorboard(forked, pt_file, tmp_path):
    """Read with TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = interrupted(forked, tmp_path / "run", pt_file, "tensorboard")
    assert f"tracker      tensorboard --logdir {LOGS}\n" in said
    (tmp_path / "run" / LOGS / "tensorboard").rename(tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    rows = numbers(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == rows[-1].keys() - {"step"}
    for tag in events.Tags()["scalars"]:
        wanted = [(row["step"], pytest.approx(row[tag], rel=1e-6)) for row in rows if tag in row]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == wanted
    (text,) = events.Tensors("constants/text_summary")
    constants = json.loads(text.tensor_proto.string_val[0].decode().strip("`"))
    assert constants["LR"] == 1e-2 and len(constants["derived"]["val_data"]) == 64


def test_a_tracker_that_joins_later_gets_all_steps(forked, pt_file, tmp_path):
    """TRACKER may change when a run is resumed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stopped = forked(tmp_path / "run", faults={"at": ["step 2$", signal.SIGTERM]})
    assert stopped.codes == [75] and not (tmp_path / "run" / LOGS / "tensorboard").exists()
    assert forked(tmp_path / "run", RESUME=True, TRACKER="tensorboard").codes == [0]
    events = EventAccumulator(str(tmp_path / "run" / LOGS / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / LOGS / "ablation_config.json").read_text())["TRACKER"] == "tensorboard"


@pytest.mark.full
def test_trackio(forked, pt_file, tmp_path):
    """In its local database only."""
    pytest.importorskip("trackio")
    said = interrupted(forked, tmp_path / "run", pt_file, "trackio")
    folder = tmp_path / "run" / LOGS / "trackio"
    assert f"tracker      TRACKIO_DIR={folder} trackio show --project blockwise-sft\n" in said
    code = "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
    code += "(run,) = trackio.Api().runs('blockwise-sft')\n"
    code += "print(json.dumps([run.name, run.config, S.get_logs('blockwise-sft', run.name, run_id=run.id)]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRACKIO_DIR": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name, config, logs = json.loads(done.stdout)
    assert name == "run ö" and config["LR"] == 1e-2
    found = [{k: v for k, v in row.items() if k != "timestamp"} for row in logs]
    assert found == numbers(tmp_path / "run")


def records(file):
    """The records of a .wandb file: a log of LevelDB's format with a header of 7 bytes, in blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # no room for another head in this block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.full
def test_wandb(forked, pt_file, tmp_path):
    """Offline, where each start writes a folder of its own, with the id that the first one got."""
    pytest.importorskip("wandb")
    interrupted(forked, tmp_path / "run", pt_file, "wandb")
    files = sorted((tmp_path / "run" / LOGS / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3 and len({file.name for file in files}) == 1
    found = [record for file in files for record in records(file)]
    steps = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
             for record in found if record.HasField("history")]  # fmt: skip
    rows = [{k: v for k, v in step.items() if k[0] != "_"} | {"step": step["_step"]} for step in steps]
    assert rows == numbers(tmp_path / "run")
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.display_name, run.project) == ("run ö", "blockwise-sft") and files[0].name == f"run-{run.run_id}.wandb"
    assert {item.key: item.value_json for item in run.config.update}["LR"] == "0.01"
