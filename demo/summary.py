"""The end of demo.sh: a table of what was trained and how it answers, and one answer block by block.

python -m demo.summary demo_run BLOCK_SIZE
"""

import csv
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockwise  # noqa: F401  (registers the model type, so that the Auto classes below work)
import chat
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.prompts import METAMATH, question_ids
from eval import figures, read_answers

BASE = Path("demo/base")
ROWS = (
    ("full sequence", "fullseq"),
    ("block-wise, equal steps", "blockwise"),
    ("block-wise, equal tokens", "blockwise_equal_tokens"),
)


def trained(run: Path, name: str) -> tuple[str, Path]:
    """The columns of a trainer's line: steps, supervised tokens, tokens through the model; its checkpoint's folder."""
    with open(run / f"{name}_logs" / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    supervised = sum(int(row["supervised_tokens"]) for row in metrics)
    with open(run / f"{name}_logs" / "ablation_config.json") as file:
        knobs = json.load(file)
    size = knobs["MICRO_BSIZE"] * knobs["GRAD_ACC"] * knobs["derived"]["ranks"] * knobs["MAX_LEN"]
    (folder,) = run.glob(f"{name}_step*")
    return f"{len(metrics):>7}{supervised:>19,}{len(metrics) * size / 1e6:>12.2f} M", folder


def show_answer(folder: Path, problem: dict, block_size: int) -> None:
    """Prints how a checkpoint answers a problem."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = question_ids(tokenizer, problem["question"], METAMATH)
    settings = Settings(4 * block_size, block_size, 4 * block_size)
    print(f"{folder} answers {problem['question']}   (right: {problem['gold']!r})")
    ends = decode.end_ids(model, tokenizer)
    steps = ((ids[0].tolist(), rows) for ids, rows in decode.stream(model, [prompt], settings, ends))
    chat.show_blocks(steps, tokenizer, model.config.mask_token_id, ends, block_size)


def main():
    run, block_size = Path(sys.argv[1]), int(sys.argv[2])
    transformers.utils.logging.disable_progress_bar()
    print(f"\n{'':<26}{'steps':>6}{'supervised tokens':>19}{'compute':>14}{'Pass@1':>9}{'95 % interval':>17}")
    rows = [("base", "", BASE)] + [(label, *trained(run, name)) for label, name in ROWS]
    for label, training, folder in rows:
        answers = read_answers(run / "results" / f"{folder.name}-gsm8k")
        right, (low, high), *_ = figures(list(answers.values()))
        print(f"{label:<25}{training:<40}{right:>9.1%}{f'{low:.1%} - {high:.1%}':>17}  {folder}")
    print(f"\nCompute: tokens through the model in training, padding included. Loss curves: {run / 'loss.png'}.")
    print(f"Pass@1 is on {len(answers)} problems that were not trained on, in blocks of {block_size}.\n")
    show_answer(folder, answers[0], block_size)


if __name__ == "__main__":
    main()
