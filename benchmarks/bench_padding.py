"""What PAD_TO and GROUP_BY_LENGTH save on the lengths of real data, and what they do to the loss.

    python -m benchmarks.bench_padding --data gsm8k/train.jsonl --heldout gsm8k/test.jsonl

Trains the same small model (random weights from a seed, all of them trained, block-wise) with each of the settings, one
step of each in turn, on the same samples; the global batches are those of blockwise/trainer.py. The tokenizer is made
from the data, as in bench_data. Prints CPU seconds per step against the default's, and losses: of the last quarter of
the steps, each under its own padding, and at the end on the first held-out samples, all under the default's padding;
the JSON line has that with every batch padded to its longest sample, too. A repeat is a seed. Without DeepSpeed, on the
CPU, in fp32. Before, it prints which share of the default's tokens goes through the model at several sizes of the
global batch.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from datasets import Dataset, disable_progress_bars

import masking
import train_blockwise
from benchmarks import common
from benchmarks.bench_data import make_tokenizer
from blockwise import engine, formats, trainer
from blockwise.cli import progress, read_jsonl, run_script
from blockwise.data import make_samples, schedule
from blockwise.encoding import PROBES, Encoder, encode
from blockwise.models import llada
from blockwise.prompts import METAMATH
from blockwise.run.ranks import Ranks
from experiments.make_base import MASK_ID, make_config

HELD_OUT = 8  # batches
SIZES = (8, 32, 256)  # global batches
SETTINGS = {
    "default": {},
    "PAD_TO longest": {"PAD_TO": "longest"},
    "and GROUP_BY_LENGTH": {"PAD_TO": "longest", "GROUP_BY_LENGTH": True},
}
RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))


class Training:
    """A model in training with some knobs, step by step."""

    def __init__(self, args, knobs, data, vocab_size):
        self.knobs = SimpleNamespace(**knobs)
        config = make_config(vocab_size, args.d_model, args.n_layers)
        config.update(trainer.BLOCK_DIFFUSION)
        torch.manual_seed(self.knobs.SEED)
        self.model = llada.LLaDAForCausalLM(config)
        self.samples, size = make_samples(data, self.knobs, config), self.knobs.MICRO_BSIZE
        blocks = masking.num_blocks(self.samples.length - self.samples.prompt_len, self.knobs.BLOCK_SIZE)
        lengths = self.samples.end if self.knobs.GROUP_BY_LENGTH else None
        plan = schedule(blocks, self.knobs.EPOCHS, self.knobs.SEED, lengths, size)
        self.run = SimpleNamespace(
            knobs=self.knobs, ranks=RANKS, samples=self.samples, plan=plan, noise=train_blockwise.noise, rollouts=None
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.knobs.LR, betas=(0.9, 0.95))
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: engine.lr_factor(done, args.steps, self.knobs)
        )
        self.losses, self.seconds, self.tokens = [], 0.0, 0

    def loss(self, noised):
        logits = self.model(input_ids=noised.input_ids, logits_to_keep=noised.supervised).logits
        return masking.weighted_nll(logits, noised)

    def step(self, number):
        began = time.process_time()
        _, noised = trainer.global_batch(self.run, number)
        loss = self.loss(noised)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.knobs.MAX_GRAD_NORM)
        self.optimizer.step()
        self.warmup.step()
        self.losses.append(loss.item())
        self.seconds += time.process_time() - began
        self.tokens += noised.input_ids.numel()

    @torch.no_grad()
    def heldout(self, data, pad_to):
        """The loss of held-out samples, padded this way: the mean over batches, each sample with one of its blocks."""
        knobs = SimpleNamespace(**vars(self.knobs) | {"PAD_TO": pad_to, "SEED": 0})
        samples = make_samples(data, knobs, self.model.config)
        blocks = masking.num_blocks(samples.length - samples.prompt_len, knobs.BLOCK_SIZE)
        plan = schedule(blocks, 1, knobs.SEED)
        run = SimpleNamespace(
            knobs=knobs, ranks=RANKS, samples=samples, plan=plan, noise=train_blockwise.noise, rollouts=None
        )
        batches = range(1, 1 + len(plan) // knobs.MICRO_BSIZE)
        return statistics.fmean(self.loss(trainer.global_batch(run, number)[1]).item() for number in batches)


def read(path, tokenizer, args):
    """The samples of a jsonl file of questions and answers, and a line on their lengths."""
    rows = Dataset.from_list([{"query": row["question"], "response": row["answer"]} for _, row in read_jsonl(path)])
    found = encode(rows, Encoder(tokenizer, formats.METAMATH, METAMATH, rows[:PROBES]), args.max_len)
    samples = [{"prompt_len": int(start), "full_ids": torch.from_numpy(ids)} for start, ids in found.samples]
    return samples, found.lengths_report()


def one_seed(args, seed, data, heldout, vocab_size):
    """Trains with each setting, in turn. {name: what was measured}"""
    knobs = {name: value for name, value in vars(train_blockwise).items() if name.isupper()}
    knobs |= {"DATA_PT": args.data, "MAX_LEN": args.max_len, "MICRO_BSIZE": args.batch, "LR": args.lr, "SEED": seed}
    knobs |= {"MASK_ID": MASK_ID, "MAX_SAMPLES": 0, "EPOCHS": 1 + args.steps * args.batch // len(data)}
    trainings = {name: Training(args, knobs | more, data, vocab_size) for name, more in SETTINGS.items()}
    for step in progress(range(1, args.steps + 1), desc=f"seed {seed}", unit="step"):
        for training in trainings.values():
            training.step(step)
    return {
        name: {
            "seconds": training.seconds / args.steps,
            "tokens": training.tokens / args.steps,
            "loss": statistics.fmean(training.losses[-max(1, args.steps // 4) :]),
            **{pad_to: training.heldout(heldout, pad_to) for pad_to in ("max_len", "longest")},
        }
        for name, training in trainings.items()
    }


def print_shares(args, data, vocab_size):
    """Tokens of an epoch against the default's, from the plan alone."""
    knobs = {"DATA_PT": args.data, "MAX_LEN": args.max_len, "MAX_SAMPLES": 0, "MASK_ID": MASK_ID, "EOS_TAIL": False}
    config = SimpleNamespace(pad_token_id=1, vocab_size=vocab_size, block_diffusion_size=None)
    samples = make_samples(data, SimpleNamespace(**knobs, PAD_TO="longest"), config)
    for size in SIZES:
        for name, lengths in (("PAD_TO longest", None), ("and GROUP_BY_LENGTH", samples.end)):
            order = schedule(torch.ones_like(samples.end), 1, 0, lengths, size)[:, 0]
            padded_to = samples.padded_to(order[: len(order) // size * size].view(-1, size))
            print(f"global batch {size:3}: {padded_to.double().mean() / args.max_len:.0%} of the tokens, {name}")


def span(values, digits):
    middle, low, high = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} - {high})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="jsonl file of rows with question and answer, as GSM8K's")
    parser.add_argument("--heldout", required=True, help="another one, for the loss at the end")
    parser.add_argument("--max_len", type=int, default=256)
    parser.add_argument("--d_model", type=int, default=64)
    parser.add_argument("--n_layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    args = parser.parse_args()
    disable_progress_bars()
    tokenizer = make_tokenizer(METAMATH.wrapped(row["question"]) + row["answer"] for _, row in read_jsonl(args.data))
    data, lengths = read(args.data, tokenizer, args)
    heldout, _ = read(args.heldout, tokenizer, args)
    heldout = heldout[: HELD_OUT * args.batch]
    print(f"{len(data):,} samples, {lengths}")
    print_shares(args, data, len(tokenizer))
    every = [one_seed(args, seed, data, heldout, len(tokenizer)) for seed in range(args.repeats)]
    losses = "training loss          held-out loss          less the default's"
    print(f"{'':20} tokens/step  s/step  share of the default's    {losses}")
    for name in SETTINGS:
        mine = {key: [seed[name][key] for seed in every] for key in every[0][name]}
        shares = [seed[name]["seconds"] / seed["default"]["seconds"] for seed in every]
        more = [seed[name]["max_len"] - seed["default"]["max_len"] for seed in every]
        sizes = f"{statistics.fmean(mine['tokens']):11,.0f} {statistics.median(mine['seconds']):7.3f}"
        losses = f"{span(mine['loss'], 3):22} {span(mine['max_len'], 3):22} {span(more, 3)}"
        print(f"{name:20} {sizes}  {span(shares, 2):24} {losses}")
    common.print_json(args, seeds=every)


if __name__ == "__main__":
    run_script(main)
