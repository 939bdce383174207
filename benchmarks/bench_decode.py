"""How fast decoding is: exactly in batches of 16 against one by one, and each speed option against exact decoding.

    python -m benchmarks.bench_decode --model demo_run/blockwise_step0100 --data demo_run/heldout/train.jsonl

All variants run in turn in one process on the same problems. Prints, relative to exact decoding in batches, how many
times as fast each is, with the spread over the repeats; its forward passes and Pass@1; which share of the answers'
tokens is the same; and a JSON line. Without --model: random weights of the size given, no Pass@1.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

import decode
import evaluate
import llada
import pt
import scoring
from cli import run
from experiments.make_base import make_config
from place import Place
from settings import Settings

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
    parser.add_argument("--data", help="jsonl file of problems, as for evaluate.py")
    parser.add_argument("--limit", type=int, default=32, help="problems")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--gen_length", type=int, default=32)
    parser.add_argument("--block_length", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--d_model", type=int, default=256, help="this and the next without --model")
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=126464)
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
        problems, ends = evaluate.load_problems(args), decode.end_ids(model, tokenizer)
        prompts = [pt.prompt_ids(tokenizer, [pt.user_turn(problem["question"])]) for problem in problems]

        def right(answers):
            texts = [decode.completion(tokenizer, ids, ends) for ids in answers]
            return sum(scoring.same_number(text, p["gold"]) for text, p in zip(texts, problems)) / len(problems)

        return model, prompts, right, ends
    torch.manual_seed(0)
    with device:
        model = llada.LLaDAForCausalLM(make_config(args.vocab_size, args.d_model, args.n_layers))
    model = model.to(torch.float32 if device.type == "cpu" else torch.bfloat16).eval()
    lengths = torch.randint(64, 128, (args.limit,)).tolist()
    return model, [torch.randint(8, args.vocab_size, (n,)).tolist() for n in lengths], lambda _: float("nan"), []


def main():
    args = parse_args()
    exact = Settings(args.gen_length, args.block_length, args.gen_length)
    device = Place.from_environment().device
    model, prompts, right, ends = load(args, device)
    times, answers, forwards = {name: [] for name in OPTIONS}, {}, {}
    for repeat in tqdm(range(args.repeats + 1), desc="repeats"):
        for name, options in OPTIONS.items():
            size = 1 if name == "exact, one by one" else args.batch_size
            found, rows, began = [], 0, time.perf_counter()
            for start in range(0, len(prompts), size):
                some = prompts[start : start + size]
                ids, cost = decode.decode(model, some, replace(exact, **options), ends)
                found, rows = found + ids.tolist(), rows + cost
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - began)
            answers[name], forwards[name] = found, rows / len(prompts)
    first, *_ = OPTIONS
    print(f"\n{'':18}  times as fast (min - max)  forwards  Pass@1  tokens as in exact decoding")
    report, wanted = {}, [ids[: decode.length(ids, ends)] for ids in answers[first]]
    for name in OPTIONS:
        ratios = [exact / other for exact, other in zip(times[first], times[name])]
        pairs = [pair for found, exact in zip(answers[name], wanted) for pair in zip(found, exact)]
        report[name] = {
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "forwards": forwards[name],
            "pass_at_1": right(answers[name]),
            "same_tokens": statistics.fmean(found == exact for found, exact in pairs),
        }  # fmt: skip
        line = "{:18}  {ratio:13.2f} ({low:.2f} - {high:.2f})  {forwards:>8.1f}  {pass_at_1:>6.1%}  {same_tokens:>8.1%}"
        print(line.format(name, **report[name]))
    per_second = len(prompts) * args.gen_length / statistics.median(times[first])
    print(
        f"exact, batches of {args.batch_size}: {per_second:,.0f} tokens/s, counting all {args.gen_length} of an answer"
    )
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"}
    print(json.dumps(vars(args) | asdict(exact) | machine | {"torch": torch.__version__, "variants": report}))


if __name__ == "__main__":
    run(main)
