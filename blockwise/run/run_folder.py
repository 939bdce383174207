"""The folders of a run: which ones they are, and whether the run is new, unfinished or finished.

{CKPT_DIR}_logs holds the logs, the constants and the resume points, {CKPT_DIR}_stepXXXX a checkpoint each. All folders
of one run end alike: in nothing, or in -v2, -v3, ...
"""

import json
import re
import shutil
from contextlib import suppress
from enum import Enum
from itertools import count
from pathlib import Path

from blockwise.cli import InputError
from blockwise.run import files

CONSTANTS = "ablation_config.json"
RESUME_POINT = "resume_step"  # and the number of the step


class Status(Enum):
    """What a run folder holds."""

    NEW = "nothing that a run could be resumed from"
    UNFINISHED = "resume points"
    FINISHED = "no resume points any more, and the checkpoint of the last step exists"


class RunFolder:
    """{CKPT_DIR}_logs of one run."""

    def __init__(self, ckpt_dir: str, suffix: str = ""):
        self.ckpt_dir, self.suffix = ckpt_dir, suffix
        self.path = Path(f"{ckpt_dir}_logs{suffix}")
        self.name = f"{Path(ckpt_dir).name}{suffix}"

    def checkpoint(self, step: int) -> Path:
        return Path(f"{self.ckpt_dir}_step{step:04d}{self.suffix}")

    def resume_points(self) -> list[Path]:
        """The folders of the resume points, newest first."""
        found = self.path.glob(f"{RESUME_POINT}*")
        return sorted((path for path in found if step_of(path) is not None), key=step_of, reverse=True)

    def constants(self) -> dict | None:
        """The constants of the run; None before they are written. Raises InputError if they are damaged."""
        path = self.path / CONSTANTS
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            content["derived"]["total_steps"] + 0  # what `status` needs
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged; start a new run without --RESUME=True.") from None
        return content

    def status(self) -> Status:
        """A run saves its last checkpoint before it removes its resume points, so their order tells how far it came."""
        if any(self.path.glob(f"{RESUME_POINT}*")):  # also one that is removed in part
            return Status.UNFINISHED
        constants = self.constants()
        if constants and self.checkpoint(constants["derived"]["total_steps"]).exists():
            return Status.FINISHED
        return Status.NEW

    def remove_unfinished(self) -> None:
        """Removes what a run left that was killed while saving."""
        with files.writing(self.path):
            for left in self.path.glob("*.unfinished"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def step_of(point: Path) -> int | None:
    """The step of a resume point; None for a folder that is not one, or is not complete."""
    number = point.name.removeprefix(RESUME_POINT)
    return int(number) if number.isdecimal() else None


def new_run(ckpt_dir: str) -> RunFolder:
    """Makes the folder of a new run: the first suffix that neither logs nor checkpoints have. Raises InputError."""
    start = Path(ckpt_dir)
    try:
        start.parent.mkdir(parents=True, exist_ok=True)
        names = {folder.name for folder in start.parent.iterdir()}
        for v in count(1):
            suffix = f"-v{v}" if v > 1 else ""
            used = re.compile(re.escape(start.name) + rf"_(logs|step\d+){suffix}")
            if not any(used.fullmatch(name) for name in names):
                folder = RunFolder(ckpt_dir, suffix)
                with suppress(FileExistsError):  # another run has made it meanwhile
                    folder.path.mkdir()
                    files.sync(start.parent)
                    return folder
    except OSError as error:
        raise InputError(f"CKPT_DIR={ckpt_dir}: its folder cannot be written ({error.strerror}).") from error


def run_to_resume(ckpt_dir: str) -> RunFolder | None:
    """The newest run that is not finished, or, if all are, the newest; None if there is no run. Raises InputError."""
    start, suffixes = Path(ckpt_dir), {}
    for folder in start.parent.glob("*") if start.parent.is_dir() else ():
        if name := re.fullmatch(re.escape(start.name) + r"_logs(-v(\d+))?", folder.name):
            suffixes[int(name[2] or 1)] = name[1] or ""
    runs = [RunFolder(ckpt_dir, suffix) for _, suffix in sorted(suffixes.items(), reverse=True)]
    return next((run for run in runs if run.status() is not Status.FINISHED), runs[0] if runs else None)
