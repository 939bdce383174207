"""ablation_config.json: the constants of a run and what else it depends on; only a run with the same is resumed."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from blockwise.cli import InputError
from blockwise.run import files
from blockwise.run.ranks import Ranks, print0
from blockwise.run.run_folder import CONSTANTS, RunFolder

MAY_CHANGE_ON_RESUME = {"RESUME", "RESUME_EVERY", "MAX_BAD_STEPS", "SAVE_DTYPE", "TRACKER"}  # no number depends on them
# knobs that earlier versions lack, and what these did
NEWER = {"VAL_PT": "", "VAL_EVERY": 0, "BASE_4BIT": False, "PAD_TO": "max_len", "GROUP_BY_LENGTH": False}
CONTENT = {"val_data": "VAL_PT", "model": "MODEL_NAME"}  # the digest of what a knob names; "data": see data_knob
VERSIONS = ("torch", "transformers", "deepspeed", "peft")
WARNED_OF = {"commit", *VERSIONS}  # which may be others when a run is resumed


def constants_of(knobs: SimpleNamespace, ranks: Ranks, steps: int, base: str, **derived) -> dict:
    """All constants in force, and under "derived" what the run depends on besides. base: see hub.fingerprint."""
    derived = {
        "script": Path(sys.argv[0]).name,
        "ranks": ranks.world_size,
        "total_steps": steps,
        "data": files.sha256(vars(knobs)[data_knob(vars(knobs))]),
        "model": base,
        "commit": commit(),
    } | derived
    if vars(knobs).get("VAL_PT"):
        derived["val_data"] = files.sha256(knobs.VAL_PT)
    return vars(knobs) | {"derived": derived | {name: version(name) for name in VERSIONS}}


def data_knob(constants: dict) -> str:
    """Which knob names the data: samples of pt.py, or problems that the model answers itself."""
    return "DATA_PT" if "DATA_PT" in constants else "DATA"


def commit() -> str | None:
    """The commit of this repository, with "-dirty" where files differ from it; None if it is no clone or git fails."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # a repository further up would be another one
        return None
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        root,
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None


def keep_or_compare(folder: RunFolder, constants: dict, ranks: Ranks) -> None:
    """Writes the constants of a new run, or compares them with those of the run to resume. Raises InputError."""
    before = folder.constants()
    if before is None:
        write(folder, constants)
    else:
        compare(folder, before, constants, ranks)


def write(folder: RunFolder, constants: dict) -> None:
    with files.writing(folder.path):
        files.replace(folder.path / CONSTANTS, json.dumps(constants, indent=2) + "\n")


def update(folder: RunFolder, knobs: SimpleNamespace) -> None:
    """Writes what a resumed run may change, once it is resumed."""
    before = folder.constants()
    now = before | {name: vars(knobs)[name] for name in MAY_CHANGE_ON_RESUME}
    if now != before:
        write(folder, now)


def compare(folder: RunFolder, before: dict, constants: dict, ranks: Ranks) -> None:
    """Refuses to resume a run with other constants: an InputError that names one. Warns of other versions."""
    before, was, now = NEWER | before, before["derived"], constants["derived"]
    changed = [(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]
    if "val_data" not in was:  # then VAL_PT has changed, too
        changed = [change for change in changed if change[0] != "val_data"]
    for name, old, new in changed:
        if name in WARNED_OF:
            print0(ranks, "warning", f"the run was started with {name} {old}, this is {new}: numbers may differ")
    different = [change for change in changed if change[0] not in WARNED_OF]
    for name in constants.keys() - MAY_CHANGE_ON_RESUME - {"derived"}:
        if before.get(name) != constants[name]:
            different.append((name, before.get(name), constants[name]))
    if different:
        name, old, new = different[0]
        change = f"{name} was {old!r}, now it is {new!r}"
        content = CONTENT | {"data": data_knob(constants)}
        if name in content:
            change = f"the content of {constants[content[name]]} has changed"
        raise InputError(f"{folder.path} is another run: {change}. Start a new one without --RESUME=True.")
