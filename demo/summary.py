"""The end of demo.sh: a table of what was trained and how it answers, and one answer block by block.

python -m demo.summary demo_run BLOCK_SIZE
"""

import csv
import sys
from pathlib import Path
from statistics import fmean, median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockwise  # noqa: F401  (registers the model type, so that the Auto classes below work)
import chat
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.prompts import prompt_ids, user_message
from eval import figures, read_answers

BASE = Path("demo/base")


def trained(run, name):
    """The columns of a trainer's line: steps, first and last loss, tokens per second; and its checkpoint's folder."""
    with open(run / f"{name}_logs" / "metrics.csv", newline="") as file:
        metrics = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    tenth = max(1, len(metrics) // 10)
    first, last = (fmean(row["loss"] for row in part) for part in (metrics[:tenth], metrics[-tenth:]))
    speed = median(row["tokens_per_second"] for row in metrics)
    (folder,) = run.glob(f"{name}_step*")
    return f"{len(metrics):>6}{first:>12.3f}{last:>11.3f}{speed:>10,.0f}", folder


def show_answer(folder, answers, block_size):
    """Prints how a checkpoint answers the first problem."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = prompt_ids(tokenizer, [user_message(answers[0]["question"])])
    settings = Settings(4 * block_size, block_size, 4 * block_size)
    print(f"{folder} answers {answers[0]['question']}   (right: {answers[0]['gold']!r})")
    ends = decode.end_ids(model, tokenizer)
    steps = (ids[0].tolist() for ids, _ in decode.stream(model, [prompt], settings, ends))
    chat.show_blocks(steps, tokenizer, model.config.mask_token_id, ends, block_size)


def main():
    run, block_size = Path(sys.argv[1]), int(sys.argv[2])
    print(
        f"\n{'':<14}{'steps':>6}{'first loss':>12}{'last loss':>11}{'tokens/s':>10}{'Pass@1':>9}{'95 % interval':>17}"
    )
    rows = [("base", "", BASE)]
    rows += [
        (label, *trained(run, name)) for name, label in (("fullseq", "full sequence"), ("blockwise", "block-wise"))
    ]
    for label, training, folder in rows:
        answers = read_answers(run / "results" / f"{folder.name}-gsm8k")
        share, (low, high), *_ = figures(list(answers.values()))
        print(f"{label:<14}{training:<39}{share:>9.1%}{f'{low:.1%} - {high:.1%}':>17}  {folder}")
    print(f"\nFirst and last loss are means over a tenth of the steps; curves: {run / 'loss.png'}. Pass@1 is on")
    print(f"{len(answers)} problems that were not trained on, in blocks of {block_size}.\n")
    show_answer(folder, answers, block_size)


if __name__ == "__main__":
    main()
