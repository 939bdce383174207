"""How fast decoding is: exactly in batches of 16 against one by one, and each speed option against exact decoding.

    python -m benchmarks.bench_decode --model demo_run/blockwise_step0100 --data demo_run/heldout/train.jsonl

All variants run in turn in one process on the same problems. Prints, relative to exact decoding in batches, how many
times as fast each is, with the spread over the repeats; its forward passes and Pass@1; which share of the answers'
tokens is the same; and a JSON line. Without --model: random weights of the size given, no Pass@1.
"""

import argparse
import statistics
from dataclasses import replace

import torch

from benchmarks import common
from blockwise import scoring
from blockwise.cli import run_script
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.prompts import METAMATH, question_ids
from blockwise.run.ranks import Ranks
from eval import load_problems

OPTIONS = {
    "exact, batches": {},
    "exact, one by one": {},
    "threshold 0.9": {"threshold": 0.9},
    "stop at the end": {"stop_at_end": True},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "all, dual cache": {"threshold": 0.9, "stop_at_end": True, "cache": "dual"},
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint, or hub id")
    parser.add_argument("--data", help="jsonl file of problems, as for eval.py")
    parser.add_argument("--limit", type=int, default=32, help="problems")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--gen_length", type=int, default=32)
    parser.add_argument("--block_length", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    common.add_model_flags(parser)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.task = "gsm8k"  # how load_problems reads --data
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together")
    return args


def load(args, device):
    """Model, prompts, function (list of answers) -> share of right ones, and ids that end an answer."""
    if args.model:
        model, tokenizer = decode.load(args.model, args.dtype, device)
        problems, ends = load_problems(args), decode.end_ids(model, tokenizer)
        prompts = [question_ids(tokenizer, problem["question"], METAMATH) for problem in problems]

        def right(answers):
            texts = [decode.completion(tokenizer, ids, ends) for ids in answers]
            return sum(scoring.same_number(text, p["gold"]) for text, p in zip(texts, problems)) / len(problems)

        return model, prompts, right, ends
    model = common.random_model(args, device).eval()
    lengths = torch.randint(64, 128, (args.limit,)).tolist()
    vocab_size = model.config.vocab_size
    return model, [torch.randint(8, vocab_size, (n,)).tolist() for n in lengths], lambda _: float("nan"), []


def main():
    args = parse_args()
    exact = Settings(args.gen_length, args.block_length, args.gen_length)
    device = Ranks.from_environment().device
    model, prompts, right, ends = load(args, device)
    answers, forwards = {}, {}

    def run_all(name):
        size = 1 if name == "exact, one by one" else args.batch_size
        answers[name], forwards[name] = [], 0
        for start in range(0, len(prompts), size):
            settings = replace(exact, **OPTIONS[name])
            ids, rows = decode.decode(model, prompts[start : start + size], settings, ends)
            answers[name] += ids.tolist()
            forwards[name] += rows / len(prompts)

    times = common.in_turn({name: lambda name=name: run_all(name) for name in OPTIONS}, args.repeats, device)
    first, *_ = OPTIONS
    print(f"\n{'':18}  times as fast (min - max)  forwards  Pass@1  tokens as in exact decoding")
    report, wanted = {}, [ids[: decode.length(ids, ends)] for ids in answers[first]]
    for name in OPTIONS:
        ratio, low, high = common.ratios(times[first], times[name])
        pairs = [pair for found, exact in zip(answers[name], wanted) for pair in zip(found, exact)]
        report[name] = {
            "ratio": ratio, "low": low, "high": high, "forwards": forwards[name],
            "pass_at_1": right(answers[name]),
            "same_tokens": statistics.fmean(found == exact for found, exact in pairs),
        }  # fmt: skip
        line = "{:18}  {ratio:13.2f} ({low:.2f} - {high:.2f})  {forwards:>8.1f}  {pass_at_1:>6.1%}  {same_tokens:>8.1%}"
        print(line.format(name, **report[name]))
    seconds, ceiling = statistics.median(times[first]), common.matmul_ceiling(device)
    per_second = len(prompts) * args.gen_length / seconds
    print(f"exact, batches: {per_second:,.0f} tokens/s, counting all {args.gen_length} of an answer;", end=" ")
    length = sum(map(len, prompts)) // len(prompts) + args.gen_length
    rows = len(prompts) * forwards[first]
    flops = common.step_flops(model.config, 0, rows * length, length, rows * args.block_length, backward=0)
    print(f"{flops / seconds / ceiling:.0%} of the matmul ceiling, {ceiling / 1e12:.3f} TFLOP/s")
    common.print_json(args, variants=report, times=times, matmul_tflops=ceiling / 1e12)


if __name__ == "__main__":
    run_script(main)
