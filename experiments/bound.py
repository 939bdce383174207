"""The held-out likelihood bound of a checkpoint, in nats per token of the answers: an upper bound of their true cost.

    python -m experiments.bound --model CKPT --data held_out.pt

A checkpoint of block diffusion has the bound of its block size (2503.09573), any other that of full-sequence masking
(2502.09992, equation 5). Both are estimated with random masks, whose mask ratios are uniform between 1e-3 and 1; in
blocks of one token every token is masked once, and the bound is the exact negative log-likelihood.
"""

import argparse
from statistics import fmean, stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import masking
from blockwise.cli import InputError, progress, run_script
from blockwise.data import make_samples, read_pt
from blockwise.decoding import decode
from blockwise.run.ranks import Ranks

LOWEST = 1e-3  # mask ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or hub id")
    parser.add_argument("--data", required=True, help="file of pt.py, of samples that were not trained on")
    parser.add_argument("--max_len", type=int, default=0, help="MAX_LEN of the training; 0 = that of texts, else 256")
    parser.add_argument("--block_size", type=int, default=0, help="of the bound; 0 = that of the model's config")
    parser.add_argument("--draws", type=int, default=8, help="random masks of each sample")
    parser.add_argument("--samples", type=int, default=0, help="only the first N samples; 0 = all")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    args = parser.parse_args()
    if min(args.draws, args.batch_size) < 1 or min(args.samples, args.max_len, args.block_size) < 0:
        parser.error("--draws and --batch_size must be at least 1, --samples, --max_len and --block_size at least 0")
    data, device = read_pt(args.data), Ranks.from_environment().device
    model, _ = decode.load(args.model, "auto", device)
    if args.block_size:  # a base that is not trained yet has none
        model.config.block_diffusion_size = args.block_size
    batch = held_out(data, args.data, model.config, args.max_len, args.samples)
    generator = torch.Generator(device).manual_seed(args.seed)
    bound = held_out_bound(model, batch, args.draws, args.batch_size, generator).tolist()
    error = f" ± {stdev(bound) / len(bound) ** 0.5:.4f} (standard error)" if len(bound) > 1 else ""
    tokens = int((batch.length - batch.prompt_len).sum())
    print(f"{args.model}: {fmean(bound):.4f}{error} nats per token, {len(bound):,} samples, {tokens:,} tokens")


def held_out(data: list | Tensor, path: str, config, max_len: int = 0, number: int = 0) -> masking.Batch:
    """What read_pt has read as one batch, on the CPU, padded to max_len. number: of samples. Raises InputError."""
    max_len = max_len or (data.shape[1] if isinstance(data, Tensor) else 256)
    if max_len > config.max_position_embeddings:
        raise InputError(f"--max_len {max_len}: the model has {config.max_position_embeddings} positions.")
    knobs = {"DATA_PT": path, "MAX_LEN": max_len, "MAX_SAMPLES": number, "EOS_TAIL": False}
    samples = make_samples(data, SimpleNamespace(**knobs, MASK_ID=config.mask_token_id), config)
    every = torch.arange(len(samples.length))
    return samples.batch(every, torch.zeros_like(every))


@torch.no_grad()
def held_out_bound(model, batch: masking.Batch, draws: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """The bound of each of N samples in nats per token of its answer, (N,) on the CPU, averaged over random masks.

    model: in evaluation mode; its config says whether it sees later blocks. batch_size: samples of a forward pass;
    generator: on the model's device. As in training, a last block that is not whole is filled up with padding, which
    counts in the nats, but not in the tokens.
    """
    size, from_sample = decode.block_diffusion_size(model.config), decode.blocks_from_sample(model.config)
    starts = range(0, len(batch.length), batch_size)
    tensors = (batch.input_ids, batch.prompt_len, batch.length, batch.block)
    batch = masking.Batch(*(tensor.to(model.device) for tensor in tensors))
    draws = 1 if size == 1 else draws  # which is exact
    total = torch.zeros(len(batch.length), dtype=torch.float64)
    with progress(total=draws * len(starts), desc="bound", unit="pass") as bar:
        for _ in range(draws):
            noised = noise(batch, size, from_sample, model.config.mask_token_id, generator)
            for start in starts:
                some = slice(start, start + batch_size)
                total[some] += nats(model, noised.rows(some)).cpu() / draws
                bar.update()
    return total


def noise(
    batch: masking.Batch, size: int | None, from_sample: bool, mask_id: int, generator: torch.Generator
) -> masking.Noised:
    """Masks the answers of a batch; the weights make of each sample's losses its bound per token.

    size: tokens of a block; None: the answer is one block, and the model sees no clean copy of it. from_sample: blocks
    are counted from the start of the sample, not of the answer.
    """
    start, length, max_len = batch.prompt_len, batch.length, batch.input_ids.shape[1]
    filled, block = masking.sample_blocks(start, length, max_len, size or max_len, from_sample)
    end = filled if size else length
    lowest = 1.0 if size == 1 else LOWEST
    masked, p = masking.block_diffusion_masks(
        start, end, block, low=lowest, high=1.0, per_block=True, generator=generator
    )
    weights = masking.bound_weights(masked, p, 1, length - start) * len(length)  # a sum over the sample, not a mean
    if size:
        return masking.two_streams(batch, masked, weights, mask_id, block)
    return masking.Noised(batch.input_ids.masked_fill(masked, mask_id), masked, batch.input_ids, weights)


def nats(model, part: masking.Noised) -> Tensor:
    """The weighted loss of each sample of a part, (B,) float64."""
    logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits  # (n, V)
    losses = F.cross_entropy(logits.double(), part.targets[part.supervised], reduction="none")  # (n,)
    weighted = torch.zeros(part.weights.shape, dtype=torch.float64, device=losses.device)  # (B, L')
    weighted[part.supervised] = losses * part.weights[part.supervised]
    return weighted.sum(dim=1)


if __name__ == "__main__":
    run_script(main)
