"""The files to which rank 0 adds a line per optimizer step: train_loss.csv, metrics.csv, and others."""

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
SAMPLES = "samples.jsonl"  # of previews
FILES = ("train_loss.csv", "metrics.csv", SAMPLES, "bad_steps.jsonl")


class Logs:
    """The log files in a run's folder."""

    def __init__(self, ranks: Ranks, folder: Path):
        self.ranks, self.folder = ranks, folder

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
            self.add("metrics.csv", METRICS)

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

    def add_step(self, step: int, lr: float, result, tokens_per_second: float) -> None:
        """Adds the lines of a step, result being its trainer.Step; all ranks call this."""
        self.ranks.on_first_rank(lambda: self.write_step(step, lr, result, tokens_per_second))

    def write_step(self, step: int, lr: float, result, tokens_per_second: float) -> None:
        short = [step, f"{result.loss:.6f}" if math.isfinite(result.loss) else "nan"]
        rest = [f"{lr:.6e}", f"{result.grad_norm:.6f}", result.supervised, f"{tokens_per_second:.1f}"]
        self.add("train_loss.csv", short)
        self.add("metrics.csv", short + rest + [f"{peak_memory_gb():.3f}"])
        if result.bad_rows:
            bad = {"step": step, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "rows": result.bad_rows}
            self.append("bad_steps.jsonl", json.dumps(bad) + "\n")
            print0(self.ranks, "bad step", f"{json.dumps(bad)}: the optimizer step was skipped")

    def losses(self) -> list[float]:
        with open(self.folder / "train_loss.csv", newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]


def peak_memory_gb() -> float:
    """Highest memory of this rank so far: of the GPU if there is one, else of the process."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
