"""Draws the loss curves of one or more runs into a PNG: the logged values faintly, a moving average over them.

python plot_loss.py ckpts_stagewise_sft_32_logs/train_loss.csv ckpts_fullseq_sft_logs/train_loss.csv
"""

import argparse
import csv
import math
from pathlib import Path

from blockwise.cli import InputError, run_script


def read_losses(path: str):
    """The (step, loss) columns of a train_loss.csv, without steps that had no loss (nan). Raises InputError."""
    try:
        with open(path, newline="") as file:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a CSV with the columns step,loss ({error}).") from error
    rows = [(step, loss) for step, loss in rows if not math.isnan(loss)]
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
    curves = [(Path(path).resolve().parent.name.removesuffix("_logs"), *read_losses(path)) for path in args.csv]

    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, steps, losses in curves:
        window = max(1, len(losses) // 10)
        (line,) = axes.plot(steps, smooth(losses, window), label=f"{label} (mean of {window // 2 * 2 + 1} steps)")
        axes.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise InputError(f"--output {args.output} cannot be written: {error}") from error
    print(f"{args.output}: {', '.join(label for label, *_ in curves)}")


if __name__ == "__main__":
    run_script(main)
