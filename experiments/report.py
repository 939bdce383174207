"""results.csv as tables and figures for each claim: means over the seeds with 95 % intervals.

    python -m experiments.report

Writes experiments/report.md and experiments/figures/*.png. The intervals are Student's t over the seeds.
"""

import argparse
import textwrap
from pathlib import Path
from statistics import fmean, median, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from blockwise.cli import InputError, run_script  # noqa: E402
from experiments import text as texts  # noqa: E402
from experiments.claims import BLOCK_SIZES, BLOCKWISE, CLAIMS, FULLSEQ, name_of_blocks  # noqa: E402
from experiments.run import chosen_lr, read  # noqa: E402

HERE = Path(__file__).parent

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
    "N1": "a new rule of the task lag at equal steps and FLOPs",
    "N2": "noise in the prefix, a visible suffix, no blocks, on the task lag3",
    "N3": "where it ends: rank of the adapters, three times the steps, no new rule, on the task lag3",
    "N4": "training block size against decoding block size, on the task lag3",
    "N5": "a new rule at equal steps and FLOPs, when a token needs three earlier ones: the task lag3",
    "B1": "from scratch on text: the held-out bound by the size of the blocks",
    "B3": "block diffusion against fine-tuning by blocks and of the full sequence, on long additions",
    "B4": "block diffusion against fine-tuning by blocks and of the full sequence, on the task lag3",
}
HEAD = """# Results

Written by `python -m experiments.report` from results.csv and bounds.csv. C, K and B3: long additions, 1,600 training
problems, one base (demo/base), for each seed another fine-tuning. N and B4: the tasks lag and lag3, 25,600 training
problems, for each seed also another base. Every row of these is decoded on 300 other problems, in blocks of 4 tokens if
nothing else is said. B1: text, without a base. LR: learning rate; where several were tried, the one with the best
Pass@1 on seed 0 (B1: the lowest bound), which is not among the seeds of the row. Pass@1: the whole answer is right.
Token accuracy: the share of its digits that are right, by position. ± is a 95 % interval over seeds (Student's t).
Difference: of Pass@1, paired by seed, to the row in the column "to". Supervised tokens: masked and supervised, in the
whole training. Seconds: steps times the median step, on one CPU core.
"""
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, two-sided, for 2 to 10 seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(HERE / "results.csv"))
    parser.add_argument("--output", default=str(HERE), help="folder of report.md and figures/")
    args = parser.parse_args()
    claims, output = group(read(args.results), args.results), Path(args.output)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    text = [HEAD]
    for claim, settings in claims.items():
        final = {name: rows for name, rows in reported(claim, settings).items() if rows}
        figures = [("", draw)] * bool(final)
        figures += [("_steps", draw_steps)] * any(
            setting.curve and final.get(setting.name) for setting in CLAIMS[claim]
        )
        figures += [("_blocks", draw_blocks)] * any("training 1, " in setting.name for setting in CLAIMS[claim])
        text.append(f"## {claim}: {TITLES[claim]}\n")
        for end, picture in figures:
            picture(claim, settings if picture is draw_steps else final, output / f"figures/{claim}{end}.png")
            text.append(f"![{claim}](figures/{claim}{end}.png)\n")
        text += [table(claim, final), tried(claim, settings)]
    bounds = Path(args.results).with_name("bounds.csv")
    if bounds.exists():
        text.append(report_bounds(read(bounds, texts.COLUMNS), output))
    (output / "report.md").write_text("\n".join(filter(None, text)))
    print(f"{output}/report.md: {', '.join([*claims, *['B1'] * bounds.exists()])}")


def report_bounds(rows: list[dict[str, str]], output: Path) -> str:
    """B1 in Markdown, with its figure: the bound of each setting over seeds, and with each learning rate on seed 0."""
    means = [f"LR {lr:g}, seed 0" for lr in texts.LRS]
    lines = [f"## B1: {TITLES['B1']}\n", "![B1](figures/B1_blocks.png)\n"]
    lines += [f"| nats per token | LR | steps | mean | of each seed | {' | '.join(means)} |"]
    lines += ["|---" * (5 + len(means)) + "|"]
    reported = {}
    for setting in texts.SETTINGS:
        lr, own = texts.chosen_lr(setting, rows), [row for row in rows if row["setting"] == setting.name]
        final = [row for row in own if row["seed"] != "0" and float(row["lr"]) == lr]
        if not final:
            continue
        values = reported[setting.name] = [float(row["nats_per_token"]) for row in final]
        mean, half = interval(values)
        each = ", ".join(row["nats_per_token"] for row in final)
        grid = {float(row["lr"]): row["nats_per_token"] for row in own if row["seed"] == "0"}
        cells = [setting.name, f"{lr:g}", final[0]["steps"], f"{mean:.3f} ± {half:.3f}", each]
        lines.append(f"| {' | '.join([*cells, *(grid.get(lr, '') for lr in texts.LRS)])} |")
    draw_bounds(reported, output / "figures/B1_blocks.png")
    errors = [float(row["standard_error"]) for row in rows]
    lines.append(f"\nThe standard error over the held-out samples is {min(errors):.3f} to {max(errors):.3f}.\n")
    return "\n".join(lines)


def draw_bounds(bounds: dict[str, list[float]], path: Path) -> None:
    """The bound by the size of the blocks, with intervals and a dot per seed; full sequence as a line with its band."""
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for size in texts.SIZES:
        if values := bounds.get(texts.name_of(size)):
            mean, half = interval(values)
            panel.errorbar(size, mean, half, fmt="o", color="C0", capsize=3)
            panel.plot([size] * len(values), values, ".", color="0.6", zorder=0)
    if values := bounds.get(texts.FULL.name):
        mean, half = interval(values)
        panel.axhline(mean, color="C1", label=texts.FULL.name)
        panel.axhspan(mean - half, mean + half, color="C1", alpha=0.2, linewidth=0)
        panel.legend()
    panel.set_xscale("log", base=2)
    panel.set(xlabel="tokens of a block", ylabel="held-out bound (nats per token)")
    panel.set(xticks=texts.SIZES, xticklabels=texts.SIZES)
    panel.grid(alpha=0.3)
    finish(figure, "B1", path)


def group(rows: list[dict], path: str) -> dict[str, dict[str, list[dict]]]:
    """{claim: {setting: its rows}}, in the order of experiments/claims.py, rows by seed. Raises InputError."""
    claims = {claim: {setting.name: [] for setting in settings} for claim, settings in CLAIMS.items()}
    for number, row in enumerate(rows, start=2):
        if row["setting"] not in claims.get(row["claim"], {}):
            raise InputError(f"--results {path}, line {number}: experiments/claims.py has no such claim and setting.")
        claims[row["claim"]][row["setting"]].append(row)
    for settings in claims.values():
        for some in settings.values():
            some.sort(key=lambda row: (int(row["seed"]), float(row["lr"]), int(row["steps"])))
    return {claim: settings for claim, settings in claims.items() if any(settings.values())}


def reported(claim: str, settings: dict[str, list[dict]], all_steps: bool = False) -> dict[str, list[dict]]:
    """The rows to report: with the chosen learning rate, without the seed that chose it, of the last checkpoint."""
    every, chosen = [row for rows in settings.values() for row in rows], {}
    for setting in CLAIMS[claim]:
        rows = settings[setting.name]
        if setting.lrs or setting.lr_of:
            lr = chosen_lr(claim, setting, every)
            rows = [row for row in rows if row["seed"] != "0" and float(row["lr"]) == lr]
        last = max((int(row["steps"]) for row in rows), default=0)
        chosen[setting.name] = [row for row in rows if all_steps or int(row["steps"]) == last]
    return chosen


def interval(values):
    """Mean and half the width of its 95 % interval over the seeds (0 for one seed; a little wide for more than 10)."""
    if len(values) < 2:
        return fmean(values), 0.0
    return fmean(values), T95[min(len(values), 10) - 2] * stdev(values) / len(values) ** 0.5


def table(claim: str, settings: dict[str, list[dict]]) -> str:
    """A claim's table in Markdown."""
    lines = [
        "| setting | LR | steps | supervised tokens | seconds | Pass@1 | of each seed | difference "
        "| to | token accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    against = {setting.name: setting.against for setting in CLAIMS[claim]}
    first = next((name for name, rows in settings.items() if len(rows) > 1), None)
    for name, rows in settings.items():
        passed, tokens = (shown([float(row[key]) for row in rows]) for key in ("pass_at_1", "token_accuracy"))
        other = first if against[name] == "" else against[name]
        reference = {row["seed"]: float(row["pass_at_1"]) for row in settings.get(other, [])}
        pairs = [float(row["pass_at_1"]) - reference[row["seed"]] for row in rows if row["seed"] in reference]
        difference = (shown(pairs, "+"), other) if other != name and len(pairs) > 1 else ("", "")
        supervised = f"{fmean(int(row['supervised_tokens']) for row in rows):,.0f}"
        seconds = f"{median(float(row['seconds']) for row in rows):.0f}"
        each = ", ".join(f"{100 * float(row['pass_at_1']):.1f}" for row in rows)
        cells = [name, rows[0]["lr"], rows[0]["steps"], supervised, seconds, passed, each, *difference, tokens]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def tried(claim: str, settings: dict[str, list[dict]]) -> str:
    """Pass@1 on seed 0 with every learning rate that was tried, in Markdown, the chosen one bold; '' if none was."""
    tuned = [setting for setting in CLAIMS[claim] if setting.lrs and settings[setting.name]]
    if not tuned:
        return ""
    rates = sorted({lr for setting in tuned for lr in setting.lrs})
    lines = [f"| learning rate, seed 0 | {' | '.join(f'{lr:g}' for lr in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for setting in tuned:
        rows = settings[setting.name]
        last = {float(row["lr"]): float(row["pass_at_1"]) for row in rows if row["seed"] == "0"}  # of the last step
        lr = chosen_lr(claim, setting, rows)
        cells = [
            ("**{:.1%}**" if rate == lr else "{:.1%}").format(last[rate]) if rate in last else "" for rate in rates
        ]
        lines.append(f"| {setting.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(values, sign=""):
    """Their mean with its interval, in percent; for one value, that value."""
    mean, half = interval(values)
    return f"{mean:{sign}.1%}" + (f" ± {half:.1%}" if len(values) > 1 else "")


def draw(claim: str, settings: dict[str, list[dict]], path: Path) -> None:
    """Pass@1 and token accuracy of each setting, with intervals, and a dot per seed."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.2 + 0.35 * len(settings)), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, (("pass_at_1", "Pass@1"), ("token_accuracy", "token accuracy"))):
        for y, rows in enumerate(settings.values()):
            values = [100 * float(row[key]) for row in rows]
            mean, half = interval(values)
            inside = [[min(half, mean)], [min(half, 100 - mean)]]  # no rate is below 0 or above 100 %
            panel.errorbar(mean, y, xerr=inside, fmt="o", color="C0", capsize=3)
            panel.plot(values, [y] * len(values), ".", color="0.6", zorder=0)
        panel.set(xlabel=f"{label} (%)", yticks=range(len(settings)), yticklabels=settings)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_ylim(len(settings) - 0.5, -0.5)
    finish(figure, claim, path)


def draw_steps(claim: str, settings: dict[str, list[dict]], path: Path) -> None:
    """Pass@1 of the checkpoints of a training: the mean over the seeds, and each seed as a thin line."""
    checkpoints = reported(claim, settings, all_steps=True)
    curves = [setting for setting in CLAIMS[claim] if setting.curve and checkpoints[setting.name]]
    pairs = list(dict.fromkeys(what_of(setting) for setting in curves))  # a panel for each pair of methods
    figure, _ = plt.subplots(1, len(pairs), figsize=(5 * len(pairs), 3.6), sharey=True, layout="constrained")
    for setting in curves:
        panel = figure.axes[pairs.index(what_of(setting))]
        color, by_seed, by_step = {FULLSEQ: "C1", BLOCKWISE: "C0"}[setting.script], {}, {}
        for row in checkpoints[setting.name]:
            step, passed = int(row["steps"]), 100 * float(row["pass_at_1"])
            by_seed.setdefault(row["seed"], []).append((step, passed))
            by_step.setdefault(step, []).append(passed)
        for points in by_seed.values():
            panel.plot(*zip(*points), color=color, alpha=0.3, linewidth=1)
        means = [fmean(values) for values in by_step.values()]
        panel.plot(list(by_step), means, color=color, linewidth=2.5, label=setting.name.partition(", ")[0])
        panel.set(xlabel="optimizer steps", title=what_of(setting), ylim=(-2, 102))
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Pass@1 (%)")
    figure.axes[0].legend()
    finish(figure, claim, path)


def what_of(setting) -> str:
    """`rule 1` of `block-wise, rule 1`."""
    return setting.name.partition(", ")[2]


def draw_blocks(claim: str, settings: dict[str, list[dict]], path: Path) -> None:
    """Mean Pass@1 by the block size of training and of decoding, as a heat map."""

    def value(train, block):
        rows = settings.get(name_of_blocks(train, block))
        return 100 * fmean(float(row["pass_at_1"]) for row in rows) if rows else float("nan")

    sizes = [size for size in BLOCK_SIZES if name_of_blocks(size, size) in settings]
    values = [[value(train, block) for block in sizes] for train in sizes]
    figure, panel = plt.subplots(figsize=(6, 5), layout="constrained")
    image = panel.imshow(values, cmap="viridis")
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for y, row in enumerate(values):
        for x, number in enumerate(row):
            panel.text(x, y, f"{number:.1f}", ha="center", va="center", color="black" if number > middle else "white")
    panel.set(xlabel="tokens of a block in decoding", ylabel="tokens of a block in training")
    panel.set(xticks=range(len(sizes)), xticklabels=sizes, yticks=range(len(sizes)), yticklabels=sizes)
    figure.colorbar(image, label="Pass@1 (%)")
    finish(figure, claim, path)


def finish(figure, claim: str, path: Path) -> None:
    figure.suptitle(textwrap.fill(f"{claim}: {TITLES[claim]}", int(12 * figure.get_figwidth())), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
