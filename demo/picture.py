"""Draws how a checkpoint writes an answer block by block, as an animated SVG: docs/unmasking.svg.

    python -m demo.picture --model demo_run/blockwise_equal_tokens_step0500 --output docs/unmasking.svg

Every step of decoding is a moment of the film: grey boxes are masks, the framed block is being written, and the token
of the step is highlighted. Where SVGs are not animated, the finished answer is seen.
"""

import argparse
from html import escape
from pathlib import Path

import torch

from blockwise.cli import run_script
from blockwise.decoding import decode, film
from blockwise.decoding.settings import Settings
from blockwise.prompts import METAMATH, question_ids

QUESTION = "542955335424 + 845569212879"  # lowest digit first
BOX, GAP, BLOCK_GAP, LEFT, TOP, HEIGHT = 40, 4, 16, 20, 96, 190  # pixels
SECONDS, PAUSE = 0.7, 4  # of a step, and steps that the finished answer stays
STYLE = """text { font: 15px ui-monospace, Menlo, Consolas, monospace; fill: #24292f }
.small { font-size: 13px; fill: #57606a }
.token { fill: #ddf4ff; stroke: #54aeff }
.new { fill: #ffd33d; stroke: #bf8700 }
.mask { fill: #8c959f }
.frame { fill: none; stroke: #0969da; stroke-width: 2 }"""


def written(model, tokenizer, block: int, length: int) -> tuple[list[str], list[int]]:
    """The text of each token of the answer, and the step, from 1, in which each was written."""
    prompt = question_ids(tokenizer, QUESTION, METAMATH)
    tokens = film.record(model, prompt, Settings(length, block, length)).tokens
    return [tokenizer.decode([token.id]) for token in tokens], [token.step for token in tokens]


def shown(first: float, last: float, steps: int) -> str:
    """An animation that shows an element from step `first` until before step `last`."""
    total = steps + PAUSE
    start, end = (100 * max(0.0, step) / total for step in (first, last))
    frames = (
        f"0%,{start:.2f}%{{opacity:0}}{start + 0.01:.2f}%,{end - 0.01:.2f}%{{opacity:1}}{end:.2f}%,100%{{opacity:0}}"
    )
    return frames if end < 100 else f"0%,{start:.2f}%{{opacity:0}}{start + 0.01:.2f}%,100%{{opacity:1}}"


def picture(texts: list[str], written: list[int], block: int) -> str:
    """The SVG of an answer of tokens `texts`, of which token i was written in step written[i]."""
    steps, total = max(written), max(written) + PAUSE
    sizes = [max(BOX, 10 * len(text.strip()) + 16) for text in texts]
    places = [LEFT + sum(sizes[:i]) + i * GAP + i // block * BLOCK_GAP for i in range(len(texts))]
    width = places[-1] + sizes[-1] + LEFT
    styles, parts = [STYLE], []

    def add(element, first=0.0, last=total):
        name = f"a{len(parts)}"
        if (first, last) != (0.0, total):
            styles.append(f"@keyframes {name}{{{shown(first, last, steps)}}}")
            animation = f"animation:{name} {total * SECONDS:.1f}s step-end infinite"
            still = "" if last == total else "opacity:0;"
            element = f'<g style="{still}{animation}">{element}</g>'
        parts.append(element)

    def box(kind, x, size):
        return f'<rect class="{kind}" x="{x}" y="{TOP}" width="{size}" height="{BOX}" rx="6"/>'

    add(f'<text x="{LEFT}" y="34">{escape(QUESTION)} = ?</text>')
    add(f'<text class="small" x="{LEFT}" y="60">lowest digit first; the answer in blocks of {block}</text>')
    for place, size, text, step in zip(places, sizes, texts, written):
        label = f'<text x="{place + size / 2}" y="{TOP + 26}" text-anchor="middle">{escape(text.strip() or "␣")}</text>'
        add(box("mask", place, size), -1, step - 1)
        add(box("token", place, size) + label, step - 1, total)
        add(box("new", place, size) + label, step - 1, step)
    for number, start in enumerate(range(0, len(texts), block)):
        of_block = written[start : start + block]
        first, last = min(of_block) - 1, max(of_block)
        size = places[start + block - 1] + sizes[start + block - 1] - places[start] + 12
        frame = f'<rect class="frame" x="{places[start] - 6}" y="{TOP - 6}" width="{size}" height="{BOX + 12}" rx="8"/>'
        caption = f'<text class="small" x="{places[start]}" y="{TOP + BOX + 28}">block {number + 1} is written</text>'
        add(frame + caption, first or -1, last)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">'
    back = f'<rect width="{width}" height="{HEIGHT}" rx="10" fill="#f6f8fa"/>'
    return "\n".join([head, f"<style>{chr(10).join(styles)}</style>", back, *parts, "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint of the demo")
    parser.add_argument("--output", default="docs/unmasking.svg")
    parser.add_argument("--block_length", type=int, default=4)
    args = parser.parse_args()
    model, tokenizer = decode.load(args.model, "float32", torch.device("cpu"))
    texts, steps = written(model, tokenizer, args.block_length, 4 * args.block_length)
    Path(args.output).write_text(picture(texts, steps, args.block_length), encoding="utf-8")
    print(f"{args.output}: {''.join(texts)!r}, written in the steps {steps}")


if __name__ == "__main__":
    run_script(main)
