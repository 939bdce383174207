"""The files to which rank 0 adds a line per optimizer step: train_loss.csv, metrics.csv, and others.

A tracker gets the numbers of a line of metrics.csv as soon as that is complete.
"""

import csv
import io
import json
import math
import resource
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from blockwise.run import files
from blockwise.run.ranks import Ranks, print0

METRICS = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "tokens_per_second", "peak_memory_gb")
VAL_LOSS = "val_loss"  # one more column of metrics.csv, of runs with validation
SAMPLES = "samples.jsonl"  # of previews
FILES = ("train_loss.csv", "metrics.csv", SAMPLES, "bad_steps.jsonl")


class Logs:
    """The log files in a run's folder. more: columns of metrics.csv behind METRICS, such as VAL_LOSS."""

    def __init__(self, ranks: Ranks, folder: Path, more: tuple[str, ...] = ()):
        self.ranks, self.folder, self.tracker = ranks, folder, None
        self.columns = (*METRICS, *more)

    def start(self, point: Path | None) -> None:
        """Brings the files to where they were at a resume point; without one, begins them."""
        with files.writing(self.folder):
            for name in FILES:
                if point and (point / name).exists():
                    files.replace(self.folder / name, (point / name).read_bytes())
                else:
                    (self.folder / name).unlink(missing_ok=True)
        if not point:
            self.add("train_loss.csv", METRICS[:2])
            self.add("metrics.csv", self.columns)

    def copy(self, folder: Path) -> dict:
        """Copies the files into a resume point. Returns what its manifest says of them."""
        existing = [name for name in FILES if (self.folder / name).exists()]
        for name in existing:
            files.sync(self.folder / name)
        return {name: files.write(folder / name, [(self.folder / name).read_bytes()]) for name in existing}

    def add(self, name: str, values: tuple | list) -> None:
        """Adds a line to a CSV file."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self.append(name, line.getvalue())

    def append(self, name: str, text: str) -> None:
        with files.writing(self.folder / name):
            files.append(self.folder / name, text)

    def add_step(
        self, step: int, lr: float, result, tokens_per_second: float, complete: bool, more: dict[str, float]
    ) -> None:
        """Adds the lines of a step, result being its trainer.Step; all ranks call this.

        complete: no validation loss of the step is to follow. more: the numbers of the columns behind METRICS.
        """
        self.ranks.on_first_rank(lambda: self.write_step(step, lr, result, tokens_per_second, complete, more))

    def write_step(
        self, step: int, lr: float, result, tokens_per_second: float, complete: bool, more: dict[str, float]
    ) -> None:
        short = [step, text_of(result.loss)]
        rest = [f"{lr:.6e}", f"{result.grad_norm:.6f}", result.supervised, f"{tokens_per_second:.1f}"]
        row = short + rest + [f"{peak_memory_gb():.3f}"]
        row += [f"{more[name]:.6f}" for name in self.columns[len(METRICS) :] if name in more]
        self.add("train_loss.csv", short)
        self.add("metrics.csv", row + [""] * (len(self.columns) - len(row)))
        if complete:
            self.track(dict(zip(self.columns, map(str, row))))
        if result.bad_rows:
            bad = {"step": step, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "rows": result.bad_rows}
            self.append("bad_steps.jsonl", json.dumps(bad) + "\n")
            print0(self.ranks, "bad step", f"{json.dumps(bad)}: the optimizer step was skipped")

    def add_validation(self, loss: float) -> None:
        """Completes the last line of metrics.csv."""
        path = self.folder / "metrics.csv"
        with files.writing(path):
            files.replace(path, path.read_text().removesuffix("\n") + f"{text_of(loss)}\n")
        self.track(self.last_row())

    def last_row(self) -> dict[str, str]:
        """The last line of metrics.csv."""
        return self.rows("metrics.csv")[-1]

    def start_tracker(self, tracker, first: int) -> None:
        """From now on, a tracker of trackers.py gets all lines; those before the step `first`, now."""
        self.tracker = tracker
        print0(self.ranks, "tracker", tracker.view)
        for row in self.rows("metrics.csv"):
            if int(row["step"]) < first:
                self.track(row)

    def track(self, row: dict[str, str]) -> None:
        """Gives a complete line of metrics.csv to the tracker, unless that has it already."""
        if self.tracker and int(row["step"]) >= self.tracker.first:
            numbers = {name: float(text) for name, text in row.items() if text and name != "step"}
            self.tracker.log(int(row["step"]), numbers)

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()

    def column(self, name: str) -> list[float]:
        """One of the columns of METRICS, or of those behind them, over all steps."""
        return [float(row[name]) for row in self.rows("metrics.csv")]

    def rows(self, name: str) -> list[dict[str, str]]:
        with open(self.folder / name, newline="") as file:
            return list(csv.DictReader(file))


def text_of(loss: float) -> str:
    return f"{loss:.6f}" if math.isfinite(loss) else "nan"


def peak_memory_gb() -> float:
    """Highest memory of this rank so far: of the GPU if there is one, else of the process."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
