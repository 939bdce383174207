"""Draws the loss curves of one or more runs into a PNG: the logged values faintly, a moving average over them.

Validation losses, if there are some in a metrics.csv next to the given file, are points on a dashed line.

python plot_loss.py ckpts_stagewise_sft_32_logs/train_loss.csv ckpts_fullseq_sft_logs/train_loss.csv
"""

import argparse
import csv
import math
from pathlib import Path

from blockwise.cli import InputError, run_script


def read_column(path: str | Path, column: str) -> list[tuple[int, float]]:
    """The pairs (step, value) of a CSV, without those whose value is empty or nan. Raises InputError."""
    try:
        with open(path, newline="") as file:
            rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column] != ""]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a CSV with the columns step,{column} ({error}).") from error
    return [(step, value) for step, value in rows if not math.isnan(value)]


def read_validation(path: str) -> list[tuple[int, float]]:
    """The pairs (step, validation loss) of the run with this train_loss.csv, perhaps none. Raises InputError."""
    metrics = Path(path).with_name("metrics.csv")
    validated = metrics.is_file() and metrics.read_text().partition("\n")[0].endswith(",val_loss")
    return read_column(metrics, "val_loss") if validated else []


def read_losses(path: str):
    """The (step, loss) columns of a train_loss.csv, without steps that had no loss (nan). Raises InputError."""
    rows = read_column(path, "loss")
    if not rows:
        raise InputError(f"{path} holds no step with a loss yet.")
    return zip(*rows)


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving average; towards the ends the window shrinks, so that there is a value for every step."""
    half = window // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in windows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", help="train_loss.csv of a run; its folder's name becomes the label")
    parser.add_argument("--output", default="loss.png")
    args = parser.parse_args()
    curves = [
        (Path(path).resolve().parent.name.removesuffix("_logs"), *read_losses(path), read_validation(path))
        for path in args.csv
    ]

    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, steps, losses, validation in curves:
        window = max(1, len(losses) // 10)
        (line,) = axes.plot(steps, smooth(losses, window), label=f"{label} (mean of {window // 2 * 2 + 1} steps)")
        axes.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
        if validation:
            axes.plot(*zip(*validation), "o--", color=line.get_color(), markersize=4, label=f"{label}, validation")
    axes.set(xlabel="optimizer step", ylabel="loss" if any(curve[3] for curve in curves) else "training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise InputError(f"--output {args.output} cannot be written: {error}") from error
    print(f"{args.output}: {', '.join(label for label, *_ in curves)}")


if __name__ == "__main__":
    run_script(main)
