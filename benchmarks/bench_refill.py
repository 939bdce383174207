"""Answers to many problems with a batch that stays full, as eval.py decodes, against whole batches one after the other.

    python -m benchmarks.bench_refill

Random weights answer random prompts. Some tokens of the vocabulary, one in every --end_every, end an answer, so that
answers are of very different lengths. Both ways get the same prompts, longest first, in turn. Prints how many times as
fast the full batch is, with the spread over the repeats, the lengths of the answers, and a JSON line.
"""

import argparse
import statistics

import torch

from benchmarks import common
from blockwise.cli import run_script
from blockwise.decoding import decode, refill
from blockwise.decoding.settings import Settings
from blockwise.run.ranks import Ranks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--gen_length", type=int, default=128)
    parser.add_argument("--block_length", type=int, default=8)
    parser.add_argument("--end_every", type=int, default=20)
    common.add_model_flags(parser, d_model=64, n_layers=3)
    parser.set_defaults(vocab_size=640)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main():
    args = parse_args()
    device = Ranks.from_environment().device
    model = common.random_model(args, device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1  # with the usual ones, answers consist of a few tokens
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(16, 65, (args.problems,), generator=generator).sort(descending=True).values.tolist()
    prompts = [torch.randint(8, args.vocab_size, (size,), generator=generator).tolist() for size in sizes]
    ends = list(range(8, args.vocab_size, args.end_every))
    settings = Settings(args.gen_length, args.block_length, args.gen_length, stop_at_end=True)
    found = {}

    def whole_batches():
        for start in range(0, len(prompts), args.batch_size):
            ids, _ = decode.decode(model, prompts[start : start + args.batch_size], settings, ends)
            found.update({("whole", start + row): ids[row].tolist() for row in range(len(ids))})

    def full_batch():
        for together in refill.answers(model, prompts, settings, ends, args.batch_size):
            found.update({("full", number): ids.tolist() for number, ids, _ in together})

    times = common.in_turn({"whole": whole_batches, "full": full_batch}, args.repeats, device)
    ratio, low, high = common.ratios(times["whole"], times["full"])
    lengths = [decode.length(found["whole", number], ends) for number in range(len(prompts))]
    same = sum(found["whole", number] == found["full", number] for number in range(len(prompts)))
    low_tenth, middle, high_tenth = (statistics.quantiles(lengths, n=10)[k] for k in (0, 4, 8))
    print(f"a batch of {args.batch_size} that stays full: {ratio:.2f} ({low:.2f} - {high:.2f}) times as fast")
    print(f"{same} of {len(prompts)} answers are the same, token for token")
    print(f"tokens of an answer: {middle:.0f} (median), {low_tenth:.0f} and {high_tenth:.0f} (first and last tenth)")
    medians = {f"{name}_seconds": statistics.median(some) for name, some in times.items()}
    common.print_json(args, ratio=ratio, low=low, high=high, same=same, lengths=lengths, **medians)


if __name__ == "__main__":
    run_script(main)
