"""What a token costs in block diffusion, whose finished blocks are kept, against passes over the whole canvas.

    python -m benchmarks.bench_blocks --tokens_per_step 4

The same random weights are decoded in both ways, in turn. Prints the milliseconds of a token and how
many times as fast block diffusion is, with the spread over the repeats, and a JSON line.
"""

import argparse
import statistics

import torch

from benchmarks import common
from blockwise.cli import run_script
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.run.ranks import Ranks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gen_lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--tokens_per_step", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1)
    common.add_model_flags(parser, d_model=64, n_layers=3)
    parser.set_defaults(vocab_size=640)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = Ranks.from_environment().device
    model, report = common.random_model(args, device).eval(), {}
    prompts = torch.randint(8, args.vocab_size, (args.batch_size, args.prompt_length)).tolist()
    for length in args.gen_lengths:
        settings = Settings(length, args.block_length, length // args.tokens_per_step)
        times = common.in_turn(
            {
                "blocks": lambda settings=settings: run(model, prompts, settings, settings.block_length),
                "canvas": lambda settings=settings: run(model, prompts, settings, None),
            },
            args.repeats,
            device,
        )
        ratio, low, high = common.ratios(times["canvas"], times["blocks"])
        each = {name: 1000 * statistics.median(some) / length / args.batch_size for name, some in times.items()}
        report[length] = each | {"ratio": ratio, "low": low, "high": high}
        line = "gen_length {:>5,}: {canvas:7.2f} ms a token over the canvas, {blocks:7.2f} by blocks,"
        print(line.format(length, **each), f"{ratio:.2f} ({low:.2f} - {high:.2f}) times as fast")
    common.print_json(args, gen_lengths=report)


def run(model, prompts: list[list[int]], settings: Settings, block_diffusion_size: int | None) -> None:
    """Decodes as a checkpoint of block diffusion, or as any other."""
    model.config.block_diffusion_size = block_diffusion_size
    decode.decode(model, prompts, settings)


if __name__ == "__main__":
    run_script(main)
