"""results.csv as one table and one figure per claim: means over the seeds with 95 % intervals.

    python -m experiments.report

Writes experiments/report.md and experiments/figures/*.png. The intervals are Student's t over the seeds: they tell how
much another seed would change, not another base, other problems or another task.
"""

import argparse
import csv
from pathlib import Path
from statistics import fmean, median, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
from blockwise.cli import InputError, run_script  # noqa: E402
from experiments.run import CLAIMS, COLUMNS  # noqa: E402

TITLES = {
    "C1": "block-wise against full-sequence at equal steps and FLOPs",
    "C2": "block-wise against full-sequence at equal supervised tokens",
    "C3": "training block size against decoding block size, at equal steps",
    "C4": "noise in the prefix",
    "C5": "share of the suffix that is masked",
    "K1": "no blocks: from a block's start to the end of the answer",
    "K2": "block loss with a visible future",
    "K3": "the padding up to MAX_LEN as part of the answer, decoded with gen_length 28",
    "K4": "loss weighted 1/p x number of blocks",
    "K5": "fewer decoding steps",
    "K6": "dropout on the inputs of the adapters (the trainers' default is 0.05)",
}
HEAD = """# Results

Written by `python -m experiments.report` from results.csv. Every training starts from demo/base and has the same 1,600
problems; every row is decoded on the same 300 others, in blocks of 4 tokens if nothing else is said. Pass@1: the whole
number is right. Token accuracy: the share of its 13 digits that are right, by position. ± is a 95 % interval over the
seeds (Student's t); "against" is the difference to the first row with several seeds, paired by seed. Supervised tokens:
masked and supervised, in the whole training. Seconds: steps times the median step, on one CPU core.
"""
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, two-sided, for 2 to 10 seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(HERE / "results.csv"))
    parser.add_argument("--output", default=str(HERE), help="folder of report.md and figures/")
    args = parser.parse_args()
    claims, output = read(args.results), Path(args.output)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    text = [HEAD]
    for claim, settings in claims.items():
        text.append(table(claim, settings))
        draw(claim, settings, output / "figures" / f"{claim}.png")
    (output / "report.md").write_text("\n".join(text))
    print(f"{output}/report.md: {', '.join(claims)}")


def read(path):
    """{claim: {setting: rows, one per seed}}, in the order of experiments/run.py. Raises InputError."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames
    except OSError as error:
        raise InputError(
            f"--results {path} cannot be read: {error.strerror}; write it with experiments/run.py."
        ) from error
    if columns != COLUMNS:
        raise InputError(f"--results {path} is not a CSV with the columns of experiments/run.py.")
    claims = {claim: {setting.name: [] for setting in settings} for claim, settings in CLAIMS.items()}
    for number, row in enumerate(rows, start=2):
        if None in row.values():
            raise InputError(f"--results {path}, line {number} is not whole; remove it.")
        if row.get("setting") not in claims.get(row.get("claim"), {}):
            raise InputError(f"--results {path}, line {number}: experiments/run.py has no such claim and setting.")
        claims[row["claim"]][row["setting"]].append(row)
    claims = {claim: {name: rows for name, rows in settings.items() if rows} for claim, settings in claims.items()}
    return {claim: settings for claim, settings in claims.items() if settings}


def interval(values):
    """Mean and half the width of its 95 % interval over the seeds (0 for one seed; a little wide for more than 10)."""
    if len(values) < 2:
        return fmean(values), 0.0
    return fmean(values), T95[min(len(values), 10) - 2] * stdev(values) / len(values) ** 0.5


def table(claim, settings):
    """A claim's table in Markdown."""
    lines = [
        f"## {claim}: {TITLES[claim]}\n\n![{claim}](figures/{claim}.png)\n",
        "| setting | seeds | steps | supervised tokens | seconds | Pass@1 | against | token accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next((rows for rows in settings.values() if len(rows) > 1), [])
    reference = {row["seed"]: float(row["pass_at_1"]) for row in first}
    for setting, rows in settings.items():
        passed, tokens = (shown([float(row[key]) for row in rows]) for key in ("pass_at_1", "token_accuracy"))
        pairs = [float(row["pass_at_1"]) - reference[row["seed"]] for row in rows if row["seed"] in reference]
        against = shown(pairs, "+") if rows is not first and len(pairs) > 1 else ""
        supervised = fmean(int(row["supervised_tokens"]) for row in rows)
        seconds = median(float(row["seconds"]) for row in rows)
        start = f"| {setting} | {len(rows)} | {rows[0]['steps']} | {supervised:,.0f} | {seconds:.0f} |"
        lines.append(f"{start} {passed} | {against} | {tokens} |")
    return "\n".join(lines) + "\n"


def shown(values, sign=""):
    """Their mean with its interval, in percent; for one value, that value."""
    mean, half = interval(values)
    return f"{mean:{sign}.1%}" + (f" ± {half:.1%}" if len(values) > 1 else "")


def draw(claim, settings, path):
    """Pass@1 and token accuracy of each setting, with intervals, and a dot per seed."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.2 + 0.35 * len(settings)), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, (("pass_at_1", "Pass@1"), ("token_accuracy", "token accuracy"))):
        for y, rows in enumerate(settings.values()):
            values = [100 * float(row[key]) for row in rows]
            mean, half = interval(values)
            panel.errorbar(mean, y, xerr=half, fmt="o", color="C0", capsize=3)
            panel.plot(values, [y] * len(values), ".", color="0.6", zorder=0)
        panel.set(xlabel=f"{label} (%)", yticks=range(len(settings)), yticklabels=settings)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_ylim(len(settings) - 0.5, -0.5)
    figure.suptitle(f"{claim}: {TITLES[claim]}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
