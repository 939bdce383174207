"""Block diffusion (BD3LM, arXiv 2503.09573): every block of an answer is trained at once, behind a clean prefix.

    deepspeed --num_gpus 8 train_bd3lm.py [--NAME=value ...]

The constants below are the knobs; those that are not here are the ones of train_fullseq.py, with its values. A step
takes every sample through the model twice, masked and clean (masking.py has the picture): it has twice the tokens of a
step of the other trainers, and supervises all blocks. The model learns to see no later block, so that its checkpoints
are decoded block by block with an exact cache.
"""

import sys

from blockwise.cli import run_script
from blockwise.knobs import at_least, between, one_of, override
from train_fullseq import *  # noqa: F403

# MASK_LOW replaces the first; the second is not needed, as no block sees a later one: all lengths are trained anyway
del MASK_PROB_EPS, RANDOM_LENGTH  # noqa: F821

CKPT_DIR = "ckpts_bd3lm"  # start of the names of the checkpoint and log folders

# ---------------------------------------------------------------- method
BLOCK_SIZE: at_least(1) = 32  # tokens; that of decoding, too
BLOCKS_FROM: one_of("answer", "sample") = "answer"  # where the first block starts; decoding does the same
MASK_LOW: between(0.0, 1.0) = 1e-3  # mask ratios are uniform between this ...
MASK_HIGH: between(0.0, 1.0) = 1.0  # ... and this
MASK_RATIO: one_of("block", "sample") = "block"  # block: one ratio per block, as in the paper; sample: one per sample
ATTENTION: one_of("sdpa", "flex") = "sdpa"  # flex: PyTorch's flex_attention; needs a GPU, not measured yet
BOUND_WEIGHTS = True  # True: loss weighted 1/p, the likelihood bound; False: the mean over the masked tokens


def main():
    knobs = override(globals(), sys.argv[1:])
    import torch

    from blockwise import trainer
    from blockwise.cli import InputError

    if not knobs.MASK_LOW < knobs.MASK_HIGH:
        raise InputError(f"MASK_LOW={knobs.MASK_LOW} must be below MASK_HIGH={knobs.MASK_HIGH}.")
    if knobs.ATTENTION == "flex" and not torch.cuda.is_available():
        raise InputError("ATTENTION='flex' needs a GPU: on CPUs, PyTorch cannot train with it; use 'sdpa'.")
    blocks = {"block_diffusion_size": knobs.BLOCK_SIZE, "block_diffusion_from": knobs.BLOCKS_FROM}
    trainer.train(knobs, noise, config=blocks)


def noise(batch, generator, knobs):
    """Masks all blocks of a global batch (masking.Batch), and adds the clean samples. Returns a masking.TwoStreams."""
    import masking

    length, block = masking.sample_blocks(
        batch.prompt_len, batch.length, knobs.MAX_LEN, knobs.BLOCK_SIZE, from_sample=knobs.BLOCKS_FROM == "sample"
    )
    masked, p = masking.block_diffusion_masks(
        batch.prompt_len, length, block, low=knobs.MASK_LOW, high=knobs.MASK_HIGH,
        per_block=knobs.MASK_RATIO == "block", generator=generator,
    )  # fmt: skip
    masked, p, block = masking.to_width(batch, masked, p, block)
    length = length.clamp(max=masked.shape[1])  # with EOS_TAIL, a last block that is filled up may reach further
    weights = masking.loss_weights(
        masked, p, length - batch.prompt_len, bound=knobs.BOUND_WEIGHTS, per_token=knobs.LOSS_MEAN == "token"
    )
    return masking.two_streams(batch, masked, weights, knobs.MASK_ID, block, flex=knobs.ATTENTION == "flex")


if __name__ == "__main__":
    run_script(main)
