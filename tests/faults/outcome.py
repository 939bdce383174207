"""What a training may leave behind, and when two of them have left the same."""

import csv
import hashlib
import json
import re

# in the folder adapter/
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md", "prompt_format.json"}


def results(folder):
    """What is compared: {file: bytes} of the losses and of all that has the name of a checkpoint."""
    kept = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and re.search(r"^[^/]*(_step\d{4}(-v\d+)?/|/train_loss.csv$)", name):
            kept[name] = file.read_bytes()
    return kept


def check_left(folder, reference):
    """After a fault: every checkpoint there is whole, so is every resume point, and every line of the CSV is right."""
    wanted = results(reference)
    for name, content in results(folder).items():
        if not name.endswith("train_loss.csv"):
            assert wanted[name] == content, name
        else:
            assert wanted[name].startswith(content), content  # a part of it, in whole lines
            assert content == b"" or content.endswith(b"\n")
    checkpoints = {path.name for path in folder.glob("*_step????")}
    for path in reference.glob("*_step????"):
        if path.name in checkpoints:  # none of its files is missing
            assert names(path) == names(folder / path.name)
    for point in folder.glob("*_logs/resume_step????"):
        check_point(point)


def names(checkpoint):
    """The files of a checkpoint, those of its adapters included."""
    adapter = {file.name for file in checkpoint.glob("adapter/*")}
    assert adapter in (ADAPTER, set()), "all of them, or none after full fine-tuning"
    return {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*")}


def check_point(point):
    """A folder with the name of a resume point holds what its manifest says. Computed without the code under test."""
    manifest = json.loads((point / "manifest.json").read_text())
    said = manifest.pop("sha256")
    assert said == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    assert {file.name for file in point.iterdir()} == manifest["files"].keys() | {"manifest.json"}
    for name, line in manifest["files"].items():
        data = (point / name).read_bytes()
        assert line == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def check_finished(folder, reference):
    """A finished run has left the same losses and checkpoints as the uninterrupted one, and nothing unfinished."""
    assert results(folder) == results(reference) and results(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}
    for checkpoint in folder.glob("*_step????"):
        assert names(checkpoint)
    assert not list(folder.rglob("*unfinished*")) and not list(folder.rglob("resume_step*"))


def losses(folder):
    (file,) = folder.glob("*_logs/train_loss.csv")
    with open(file, newline="") as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]
