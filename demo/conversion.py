"""What demo_a2d.sh does in Python: its text and prompts, and at the end a table, samples and a picture.

python -m demo.conversion text demo_a2d_run [FILE]
python -m demo.conversion summary demo_a2d_run
"""

import json
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

from blockwise.cli import InputError, read_jsonl, run_script
from plot_loss import read_losses, smooth

HELD_OUT = 8  # every eighth topic
PASSAGE = 60  # words of a held-out passage: the first 24 are the prompt, the next 8 the gap
GAP = "[MASK:12]"
METHODS = ("mdlm", "bd3lm")


def main():
    command, run, *file = sys.argv[1:]
    if command == "text":
        write_text(Path(run), *(split_file(file[0]) if file else split_topics()))
    else:
        bounds = read_bounds(Path(run))
        draw(Path(run), bounds)
        show_bounds(bounds)
        show_samples(Path(run), "continued", ("base", *METHODS))
        show_samples(Path(run), "filled", ("base", "mdlm"))
        print(f"\nLoss curves and bounds: {run}/loss.png.")


# ---------------------------------------------------------------- before the training


def split_topics() -> tuple[str, str]:
    """The documentation that comes with Python, of training and held out.

    Topics repeat paragraphs of each other. Each is used once, so that none of those held out is trained on.
    """
    seen, texts = set(), []
    for text in topics.values():
        new = [paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in seen]
        seen |= {paragraph.strip() for paragraph in new}
        texts.append("\n\n".join(new))
    training = (text for number, text in enumerate(texts) if number % HELD_OUT)
    return "\n\n".join(training), "\n\n".join(texts[::HELD_OUT])


def split_file(path: str) -> tuple[str, str]:
    """A user's text, of training and held out: the last tenth. Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path} cannot be read: {error}") from error
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def write_text(run: Path, training: str, held_out: str) -> None:
    """Writes both texts, and two held-out passages as prompts to continue and with gaps to fill in."""
    (run / "train.txt").write_text(training, encoding="utf-8")
    (run / "held_out.txt").write_text(held_out, encoding="utf-8")
    print(f"{len(training):,} characters of training, {len(held_out):,} held out")
    passages = [words for part in held_out.split("\n\n") if len(words := part.split()) >= PASSAGE]
    passages = (passages or [held_out.split()])[:2]
    texts = [[" ".join(part) for part in (words[:24], words[24:32], words[32:PASSAGE])] for words in passages]
    continued = [{"prompt": start, "truth": f"{gap} {end}"} for start, gap, end in texts]
    filled = [{"prompt": start, "infill": f"{GAP} {end}", "truth": gap} for start, gap, end in texts]
    for kind, rows in (("continued", continued), ("filled", filled)):
        lines = (f"{json.dumps(row)}\n" for row in rows)
        (run / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- after it


def read_bounds(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Method -> bound and standard error before its training, and after it."""
    text = (run / "bounds.txt").read_text(encoding="utf-8")
    found = [(float(value), float(error or 0)) for value, error in re.findall(r": (\S+)(?: ± (\S+))?", text)]
    return {"mdlm": found[:2], "bd3lm": found[2:]}


def draw(run: Path, bounds: dict) -> None:
    """The picture: loss curves on the left, bounds before and after on the right."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=(3, 2))
    for number, method in enumerate(METHODS):
        steps, losses = read_losses(str(run / f"{method}_logs" / "train_loss.csv"))
        (line,) = left.plot(steps, smooth(losses, 5), label=f"{method.upper()} (mean of 5 steps)")
        left.plot(steps, losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
        for place, (value, error), strength in zip((number - 0.2, number + 0.2), bounds[method], (0.35, 1.0)):
            bar = right.bar(place, value, 0.36, yerr=error, color=line.get_color(), alpha=strength, capsize=3)
            right.bar_label(bar, fmt="%.2f", padding=3)
    left.set(xlabel="optimizer step", ylabel="nats per token", title="training loss")
    right.set(ylabel="nats per token", title="held-out bound, lower is better")
    places = [number + shift for number in range(len(METHODS)) for shift in (-0.2, 0.2)]
    right.set_xticks(places, [f"{method.upper()}\n{when}" for method in METHODS for when in ("before", "after")])
    right.margins(y=0.12)
    left.locator_params(axis="x", integer=True)
    left.grid(alpha=0.3)
    left.legend()
    figure.savefig(run / "loss.png", dpi=150)


def show_bounds(bounds: dict) -> None:
    print(f"\n{'held-out bound, nats per token':<32}{'before':>16}{'after':>16}")
    for method, pairs in bounds.items():
        print(f"{method.upper():<32}" + "".join(f"{f'{value:.2f} ± {error:.2f}':>16}" for value, error in pairs))


def show_samples(run: Path, kind: str, names: tuple[str, ...]) -> None:
    """Prints what checkpoints wrote for each prompt, below what the text has there."""
    answers = {name: [row for _, row in read_jsonl(run / f"{kind}_{name}.jsonl")] for name in names}
    for number, (_, row) in enumerate(read_jsonl(run / f"{kind}.jsonl")):
        print(f"\n{row['prompt']} ...{row.get('infill', '').removeprefix(GAP)}\n  text   {row['truth']}")
        for name, rows in answers.items():
            written = rows[number].get("filled") or [rows[number]["completion"]]
            print(f"  {name:<6} {' '.join(written[0].split())}")


if __name__ == "__main__":
    run_script(main)
