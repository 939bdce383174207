"""The tables and the picture of decoding.csv, which bench_decode writes.

    python -m benchmarks.report_decode --output benchmarks/figures

bench_decode does the same at its end.
"""

import argparse
import csv
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from blockwise.cli import InputError, run_script

COLUMNS = {  # and how each is read
    "checkpoint": str, "gen_length": int, "decoder": str, "flags": str, "problems": int, "pass_at_1": float,
    "low": float, "high": float, "forwards_per_token": float, "to_exact": float, "to_exact_low": float,
    "to_exact_high": float, "times_as_fast": float, "slowest": float, "fastest": float, "tokens_per_second": float,
}  # fmt: skip
LOSS = 0.02  # of Pass@1: what a setting of the short table may lose, see best
HEAD = """# Decoding

Written by `python -m benchmarks.bench_decode` from decoding.csv. Every configuration answers the same problems. Pass@1
with its 95 % interval (Wilson); to exact: the difference to exact decoding with one token a step, with its interval
for paired answers (Newcombe); passes: forward passes per token of the answers; times as fast: than `plain` with one
token a step, in the same run, the median of the repeats and their range. `plain` is LLaDA's published sampler.
"""
COLORS = ["black", "C0", "0.6", "C5", "C1", "gold", "C2", "C3", "C4", "C9", "C6", "C8", "navy"]
MARKERS = "os^Dv"


def read(path: Path) -> list[dict]:
    """The rows of decoding.csv for which everything is measured. Raises InputError."""
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["times_as_fast"]]
        rows = [{key: kind(row[key]) for key, kind in COLUMNS.items()} for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not what bench_decode writes: {error!r}. Run that again.") from error
    if not rows:
        raise InputError(f"{path} has no row with seconds yet; run bench_decode again, to its end.")
    return rows


def by(rows: list[dict], *keys: str) -> Iterable[tuple]:
    """(values of the keys, their rows), in the order of the file, where such rows stand together."""
    return ((values, list(some)) for values, some in groupby(rows, key=lambda row: tuple(row[key] for key in keys)))


def report(folder: Path) -> str:
    """Writes decoding.md and decoding.png from the folder's decoding.csv; returns the short tables."""
    rows = read(folder / "decoding.csv")
    short = short_tables(rows)
    (folder / "decoding.md").write_text("\n".join([HEAD, short, *long_tables(rows)]))
    draw(rows, folder / "decoding.png")
    return short


def short_tables(rows: list[dict]) -> str:
    """The best setting of each decoder in Markdown, a table for each gen_length."""
    parts = []
    for length in dict.fromkeys(row["gen_length"] for row in rows):
        some = [row for row in rows if row["gen_length"] == length]
        names = list(dict.fromkeys(row["checkpoint"] for row in some))
        parts.append(f"| `gen_length` {length} | {' | '.join(f'`{name}`' for name in names)} |")
        parts.append("|---" * (len(names) + 1) + "|")
        for decoder in dict.fromkeys(row["decoder"] for row in some):
            points = [row for row in some if row["decoder"] == decoder]
            cells = [best([row for row in points if row["checkpoint"] == name]) for name in names]
            parts.append(f"| {decoder} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def best(points: list[dict]) -> str:
    """A cell of the short table: of a decoder's settings, the fastest that loses at most LOSS.

    That is, against exact decoding, and against the best of its own, if that is better.
    """
    top = max(row["pass_at_1"] for row in points)
    least = max(top, points[0]["pass_at_1"] - points[0]["to_exact"]) - LOSS
    good = [row for row in points if round(row["pass_at_1"] - least, 6) >= 0]
    if not good:
        return f"none; at best {top:.1%}"
    row = max(good, key=lambda row: row["times_as_fast"])
    return f"{code(row['flags'])}{row['pass_at_1']:.1%}, {speed(row)}"


def code(flags: str) -> str:
    """The flags of a row as Markdown, in front of something else."""
    return f"`{flags}`: " if flags else ""


def speed(row: dict) -> str:
    """`2.1 (2.0 - 2.3) times`."""
    return f"{row['times_as_fast']:.1f} ({row['slowest']:.1f} - {row['fastest']:.1f}) times"


def long_tables(rows: list[dict]) -> list[str]:
    """All configurations in Markdown, a table for each checkpoint and gen_length."""
    lines = []
    for (name, length), some in by(rows, "checkpoint", "gen_length"):
        lines += [f"## {name}, gen_length {length}, {some[0]['problems']} problems\n"]
        lines += ["| decoder | flags | Pass@1 | to exact | passes | times as fast | tokens/s |", "|---" * 7 + "|"]
        for row in some:
            low, high = (f"{100 * row[key]:+.1f}" for key in ("to_exact_low", "to_exact_high"))
            cells = [
                row["decoder"], f"`{row['flags']}`" * bool(row["flags"]),
                f"{row['pass_at_1']:.1%} ({row['low']:.1%} - {row['high']:.1%})",
                f"{100 * row['to_exact']:+.1f} ({low} to {high})", f"{row['forwards_per_token']:.2f}",
                speed(row), f"{row['tokens_per_second']:,.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def front(points: list[dict], cost: str, sign: int) -> list[dict]:
    """The rows of which none is better both in Pass@1 and in cost. sign: 1 if less of it is better, -1 if more."""
    kept, reached = [], -1.0
    for row in sorted(points, key=lambda row: (sign * row[cost], -row["pass_at_1"])):
        if row["pass_at_1"] > reached:
            kept.append(row)
            reached = row["pass_at_1"]
    return kept


def draw(rows: list[dict], path: Path) -> None:
    """A row of panels for each checkpoint: against passes and against tokens per second, for each gen_length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["checkpoint"] for row in rows))
    lengths = sorted({row["gen_length"] for row in rows})
    panels = [(lengths[0], "forwards_per_token"), *((length, "tokens_per_second") for length in lengths)]
    size = (5.2 * len(panels), 4.2 * len(names) + 1.2)
    figure, axes = plt.subplots(len(names), len(panels), figsize=size, layout="constrained", squeeze=False)
    styles = style(dict.fromkeys(row["decoder"] for row in rows))
    for name, line in zip(names, axes):
        for (length, cost), panel in zip(panels, line):
            some = [row for row in rows if (row["checkpoint"], row["gen_length"]) == (name, length)]
            draw_panel(panel, some, cost, styles)
            panel.set_title(f"{name}, gen_length {length}", fontsize=10)
        line[0].set_ylabel("Pass@1 (%)")
    handles = [plt.Line2D([], [], label=in_legend(rows, decoder), **how) for decoder, how in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def style(decoders: Iterable[str]) -> dict[str, dict]:
    """A color for each decoder, the same for all variants of one, `name: variant`; their markers differ."""
    families, styles = {}, {}
    for decoder in decoders:
        families.setdefault(decoder.partition(":")[0], []).append(decoder)
    for color, members in zip(COLORS, families.values(), strict=False):
        for marker, decoder in zip(MARKERS, members, strict=False):
            styles[decoder] = {"color": color, "marker": marker, "linewidth": 1.3, "markersize": 4.5}
    return styles


def draw_panel(panel, rows: list[dict], cost: str, styles: dict[str, dict]) -> None:
    """Pass@1 against a cost: a curve for each decoder; circles around settings of which none is better in both."""
    for (decoder,), points in by(rows, "decoder"):
        shares = [100 * row["pass_at_1"] for row in points]
        panel.plot([row[cost] for row in points], shares, alpha=0.85, **styles[decoder])
    exact = next(row for row in rows if row["decoder"] == "exact")
    panel.axhspan(100 * exact["low"], 100 * exact["high"], color="C0", alpha=0.1, linewidth=0)
    for number, row in enumerate(front(rows, cost, 1 if cost == "forwards_per_token" else -1)):
        where, (_, text) = (row[cost], 100 * row["pass_at_1"]), what_varies(rows, row["decoder"], row)
        panel.plot(*where, "o", markersize=10, markerfacecolor="none", markeredgecolor="0.3", zorder=5)
        above = (0, 8 if number % 2 else -15)  # neighbours take turns, so that their texts do not meet
        panel.annotate(text, where, xytext=above, textcoords="offset points", ha="center", fontsize=8)
    panel.set_xscale("log", base=2)
    panel.margins(0.08)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    panel.set_xlabel("forward passes per token" if cost == "forwards_per_token" else "tokens per second")
    panel.grid(alpha=0.3)


def what_varies(rows: list[dict], decoder: str, row: dict) -> tuple[str, str]:
    """The flags, without dashes, that differ among a decoder's settings, and their values in one of them."""
    points = [flags(other) for other in rows if other["decoder"] == decoder]
    mine = flags(row)
    varying = [key for key in mine if len({point.get(key) for point in points}) > 1]
    return ", ".join(varying), ", ".join(mine[key] for key in varying)


def flags(row: dict) -> dict[str, str]:
    """`--steps 4 --stop_at_end` -> {"steps": "4", "stop_at_end": ""}"""
    return {key: value for key, _, value in (part.partition(" ") for part in row["flags"].split("--")[1:])}


def in_legend(rows: list[dict], decoder: str) -> str:
    """The name of a decoder, and which flag its points differ in."""
    row = next(row for row in rows if row["decoder"] == decoder)
    varying, _ = what_varies(rows, decoder, row)
    return f"{decoder} ({varying})" if varying else decoder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo_run/decoding", help="folder of decoding.csv")
    print(report(Path(parser.parse_args().output)))


if __name__ == "__main__":
    run_script(main)
