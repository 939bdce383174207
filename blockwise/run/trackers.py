"""Shows the numbers of metrics.csv in TensorBoard, trackio or Weights & Biases; see TRACKER.

Each package is imported only if it is named, and on rank 0 only. A tracker has `log`, `close`, `view`, a line about how
it is looked at, and `first`, the first step that it lacks. A resumed run continues that of its tracker: steps that are
trained a second time, because the run was killed behind its last resume point, do not come twice.
"""

import json
import os
import shutil
from importlib import util

from blockwise.cli import InputError
from blockwise.run import files
from blockwise.run.run_folder import RunFolder

PROJECT = "blockwise-sft"  # unless WANDB_PROJECT or TRACKIO_PROJECT is set


def check(name: str) -> None:
    """Raises InputError if the package of a tracker, or of none (""), is not installed."""
    spec = util.find_spec(name) if name else None
    if name and not (spec and spec.origin):  # a folder wandb/ of earlier runs is found, too, but has no origin
        raise InputError(f"TRACKER={name!r}: that package is not installed; pip install {name}.")


def start(name: str, folder: RunFolder, first: int) -> "TensorBoard | Trackio | WandB":
    """The tracker of a run whose next step is `first`. Raises InputError."""
    if first == 1:  # what a start has left that was killed before its first resume point
        shutil.rmtree(folder.path / name, ignore_errors=True)
    return {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}[name](folder, first)


class TensorBoard:
    """Event files in {CKPT_DIR}_logs/tensorboard."""

    def __init__(self, folder: RunFolder, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder.path / "tensorboard"
        self.view = f"tensorboard --logdir {self.path.parent}"
        self.first = first if self.path.exists() else 1
        with files.writing(self.path):
            self.writer = SummaryWriter(self.path, purge_step=self.first)  # later steps of earlier files do not count
            if self.first == 1:
                constants = json.dumps(folder.constants(), indent=2)
                self.writer.add_text("constants", f"```\n{constants}\n```", global_step=1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        with files.writing(self.path):
            for name, number in numbers.items():
                self.writer.add_scalar(name, number, step)
            self.writer.flush()  # a resume point that follows must not be ahead of it

    def close(self) -> None:
        with files.writing(self.path):
            self.writer.close()


class Trackio:
    """A database in {CKPT_DIR}_logs/trackio, unless trackio's own environment variables say otherwise."""

    def __init__(self, folder: RunFolder, first: int):
        os.environ.setdefault("TRACKIO_DIR", str(folder.path.absolute() / "trackio"))  # read during the import
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        resume = "never" if first == 1 else "allow"
        self.view = f"TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {project}"
        self.run = trackio.init(project, folder.name, config=folder.constants(), resume=resume, embed=False)
        self.first = self.run._next_step

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class WandB:
    """A run at Weights & Biases, with its files in {CKPT_DIR}_logs/wandb. Online, steps that it has are ignored."""

    def __init__(self, folder: RunFolder, first: int):
        import wandb

        self.view = f"files in {folder.path}/wandb"
        earlier = sorted(folder.path.glob("wandb/*run-*"))  # their names end in the id of the run
        self.first = first if earlier else 1
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, dir=folder.path, resume="allow",
                id=earlier[-1].name.rpartition("-")[2] if earlier else None, config=folder.constants(),
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(f"TRACKER='wandb': {error} WANDB_MODE=offline needs no account.") from error

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()
