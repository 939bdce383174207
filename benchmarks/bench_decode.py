"""What each decoder buys: Pass@1 against forward passes and against tokens per second, a curve for each.

    python -m benchmarks.bench_decode

For each checkpoint and each configuration of `curves` and `long_curves`: Pass@1 on all problems, then seconds on the
first batch of them, in turn with all other configurations of that checkpoint and length. Writes decoding.csv, as it
goes, and from it decoding.md and decoding.png (benchmarks/report_decode.py) into the folder --output.
"""

import argparse
import csv
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common, report_decode
from blockwise import scoring
from blockwise.cli import progress, run_script
from blockwise.decoding import decode
from blockwise.decoding.settings import DTYPES, Settings
from blockwise.prompts import METAMATH, format_of, question_ids
from blockwise.run.ranks import Ranks
from eval import load_problems


def curves(length: int, size: int) -> dict[str, list[dict]]:
    """{decoder: its settings, from careful to fast}, for answers of `length` tokens in blocks of `size`."""
    fewer = [{"steps": length // tokens} for tokens in (1, 2, 4)]
    thresholds = [{"threshold": share} for share in (0.99, 0.9, 0.8, 0.7, 0.5)]
    whole = {"block_length": length}
    near = {"remasking": "nearness", "window": 2 * size + 1}
    return {
        "plain": fewer[:2],
        "exact": fewer,
        "no blocks": [whole | steps for steps in fewer],
        "no blocks: nearness": [whole | near | steps for steps in fewer],
        **{f"conv: window {n * size + 1}": conv(length, n * size + 1) for n in (1, 2, 4, 8)},
        "threshold": thresholds,
        "factor": [{"factor": value} for value in (0.1, 0.25, 0.5, 1.0, 1.5)],
        "prefix cache": [{"cache": "prefix"} | steps for steps in fewer],
        "dual cache": [{"cache": "dual"} | steps for steps in fewer],
        "threshold, dual cache": [share | {"cache": "dual"} for share in thresholds],
        "suffix": [{"suffix": n * size} for n in (2, 1, 0)],
        "suffix: and the last": [{"suffix": n * size, "suffix_last": True} for n in (1, 0)],
    }


def long_curves(length: int, size: int) -> dict[str, list[dict]]:
    """The same for answers with twice as many masks, of which many stand behind the answer's end.

    All but the first two stop at the end of an answer.
    """
    stop, dual, some = {"stop_at_end": True}, {"cache": "dual"}, {"suffix": 3 * size}
    thresholds = [{"threshold": share} | stop for share in (0.99, 0.9, 0.8)]
    return {
        "plain": [{"steps": length}],
        "exact": [{"steps": length}],
        "stop at the end": [{"steps": length // tokens} | stop for tokens in (1, 2)],
        f"conv: window {8 * size + 1}": [point | stop for point in conv(length, 8 * size + 1)],
        "threshold": thresholds,
        "dual cache": [dual | stop],
        "threshold, dual cache": [point | dual for point in thresholds],
        "suffix": [{"suffix": n * size} | stop for n in (4, 3, 2, 1, 0)],
        "suffix: and the last": [{"suffix": n * size, "suffix_last": True} | stop for n in (3, 1)],
        "threshold, suffix": [point | some for point in thresholds],
        "threshold, dual cache, suffix": [point | dual | some for point in thresholds],
    }


def conv(length: int, window: int) -> list[dict]:
    """Conv decoding with 1, 2 and 4 tokens a step, as far as such a window reaches the end of the answer then."""
    points = [{"sampler": "conv", "window": window, "steps": length // tokens} for tokens in (1, 2, 4)]
    return [point for point in points if point["steps"] * (window // 2) >= 2 * length]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["demo_run/fullseq_step0100", "demo_run/blockwise_step0100"]
    parser.add_argument("--models", nargs="+", default=names, help="folders of checkpoints, or hub ids")
    parser.add_argument("--data", default="demo_run/heldout/train.jsonl", help="jsonl file of problems, as for eval.py")
    parser.add_argument("--limit", type=int, default=0, help="only the first N problems (default: 0, which is all)")
    parser.add_argument("--output", default="demo_run/decoding", help="folder of the results")
    parser.add_argument("--gen_length", type=int, default=16, help="tokens of an answer; for long_curves twice as many")
    parser.add_argument("--block_length", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.task = "gsm8k"  # how load_problems reads --data
    return args


@torch.no_grad()
def plain(model, prompts: list[list[int]], settings: Settings) -> tuple[Tensor, int]:
    """LLaDA's sampler as it is published, which dLLM's block sampler follows: what decode.decode is compared with.

    In every step the whole canvas goes through the model, logits are made at all positions, and of each row the most
    confident masked positions of the block are written: of a block's tokens, its share of the steps each. Of the
    settings it knows gen_length, block_length and steps. Returns what decode.decode returns.
    """
    config, length, size = model.config, settings.gen_length, settings.block_length
    start, steps = max(map(len, prompts)), settings.steps * size // length
    ids = torch.full((len(prompts), start + length), config.mask_token_id, device=model.device)  # (B, L)
    seen = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : start - len(prompt)], seen[row, : start - len(prompt)] = config.pad_token_id, False
        ids[row, start - len(prompt) : start] = torch.tensor(prompt)
    quota = [size // steps + (step < size % steps) for step in range(steps)]
    for end in range(start + size, start + length + 1, size):
        for number in quota:
            masked = ids == config.mask_token_id  # (B, L)
            logits = model(input_ids=ids, attention_mask=None if seen.all() else seen).logits  # (B, L, V)
            token = logits.argmax(dim=-1)  # (B, L)
            confidence = logits.softmax(dim=-1).gather(-1, token[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence[~masked] = -torch.inf
            for row in range(len(ids)):
                chosen = confidence[row].topk(number).indices
                ids[row, chosen] = token[row, chosen]
    return ids[:, start:], len(prompts) * settings.steps


@dataclass
class Subject:
    """A checkpoint with its problems as prompts."""

    model: torch.nn.Module
    tokenizer: object
    ends: list[int]
    prompts: list[list[int]]
    gold: list[str]

    def run(self, decoder: str, settings: Settings, batch: slice) -> tuple[list[list[int]], int]:
        """The answers to a batch of the problems, up to their ends, and the rows that went through the model."""
        prompts, generator = self.prompts[batch], torch.Generator(self.model.device).manual_seed(batch.start)
        if decoder == "plain":
            ids, rows = plain(self.model, prompts, settings)
        else:
            ids, rows = decode.decode(self.model, prompts, settings, self.ends, generator)
        return [answer[: decode.length(answer, self.ends)] for answer in ids.tolist()], rows

    def right(self, answers: list[list[int]]) -> list[bool]:
        """Which of the answers to all problems are right."""
        texts = [decode.completion(self.tokenizer, answer, self.ends) for answer in answers]
        return [scoring.same_number(text, gold) for text, gold in zip(texts, self.gold, strict=True)]


def load(name: str, problems: list[dict], args: argparse.Namespace, device: torch.device) -> Subject:
    """A checkpoint that is asked as it was trained."""
    model, tokenizer = decode.load(name, args.dtype, device)
    way = format_of(name, None, None, METAMATH)
    prompts = [question_ids(tokenizer, problem["question"], way) for problem in problems]
    gold = [problem["gold"] for problem in problems]
    return Subject(model, tokenizer, decode.end_ids(model, tokenizer), prompts, gold)


def measure_answers(subject: Subject, decoder: str, settings: Settings, batch_size: int) -> tuple[list[bool], dict]:
    """Which problems a decoder solves, and the columns of the table that do not depend on the machine's load."""
    answers, rows = [], 0
    for start in range(0, len(subject.prompts), batch_size):
        some, passes = subject.run(decoder, settings, slice(start, start + batch_size))
        answers, rows = answers + some, rows + passes
    right = subject.right(answers)
    low, high = scoring.wilson(sum(right), len(right))
    return right, {
        "problems": len(right), "pass_at_1": sum(right) / len(right), "low": low, "high": high,
        "forwards_per_token": rows / sum(map(len, answers)),
    }  # fmt: skip


def measure(subject: Subject, table: list[tuple], args: argparse.Namespace, device: torch.device, write) -> list[dict]:
    """Measures configurations, (decoder, settings, first columns of its row); returns their rows, which `write` gets.

    The first one is what speeds are compared with, the first `exact` one what Pass@1 is compared with.
    """
    rows, solved = [], []
    for decoder, settings, columns in progress(table, desc="answers"):
        right, found = measure_answers(subject, decoder, settings, args.batch_size)
        solved.append(right)
        rows.append(columns | found)
        write(rows)
    exact = solved[next(number for number, (decoder, *_) in enumerate(table) if decoder == "exact")]
    for row, right in zip(rows, solved):
        _, _, (low, high), _ = scoring.paired(exact, right)
        row |= {"to_exact": (sum(right) - sum(exact)) / len(exact), "to_exact_low": low, "to_exact_high": high}
    batch, tokens = slice(0, args.batch_size), []

    def run(decoder, settings):
        answers, _ = subject.run(decoder, settings, batch)
        tokens.append(sum(map(len, answers)))

    variants = {number: lambda c=config: run(*c[:2]) for number, config in enumerate(table)}
    times = common.in_turn(variants, args.repeats, device)
    for number, row in enumerate(rows):
        ratio, low, high = common.ratios(times[0], times[number])
        speed = tokens[number] / statistics.median(times[number])
        row |= {"tokens_per_second": speed, "times_as_fast": ratio, "slowest": low, "fastest": high}
    write(rows)
    return rows


def configurations(name: str, args: argparse.Namespace) -> list[list[tuple]]:
    """For the short and the long answers of a checkpoint: (decoder, settings, first columns of its row) for each."""
    tables = []
    for length, decoders in ((args.gen_length, curves), (2 * args.gen_length, long_curves)):
        usual, table = {"gen_length": length, "block_length": args.block_length, "steps": length}, []
        for decoder, points in decoders(length, args.block_length).items():
            for point in points:
                flags = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in point.items())
                columns = {"checkpoint": Path(name).name, "gen_length": length, "decoder": decoder, "flags": flags}
                table.append((decoder, Settings(**(usual | point)), columns))
        tables.append(table)
    return tables


def main():
    args = parse_args()
    logging.getLogger("blockwise.decoding.conv").setLevel(logging.ERROR)  # else each batch tells of masks left
    problems, device = load_problems(args), Ranks.from_environment().device
    tables = {name: configurations(name, args) for name in args.models}  # before the first model is loaded
    output, done = Path(args.output), []
    output.mkdir(parents=True, exist_ok=True)

    def write(rows):
        with open(output / "decoding.csv", "w", newline="") as file:
            lines = csv.DictWriter(file, report_decode.COLUMNS, lineterminator="\n")
            lines.writeheader()
            for row in [*done, *rows]:
                lines.writerow({key: round(value, 4) if type(value) is float else value for key, value in row.items()})

    for name in args.models:
        subject = load(name, problems, args, device)
        for table in tables[name]:
            done += measure(subject, table, args, device, write)
    print(report_decode.report(output))
    common.print_json(args)


if __name__ == "__main__":
    run_script(main)
