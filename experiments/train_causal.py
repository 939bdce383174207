"""Control K1: clean prefix and masked suffix without blocks. Each sample trains all of its answer from one place on.

The place is the start of a block of train_blockwise.py, whose knobs these are; only `noise` differs.

    deepspeed --num_gpus 1 --module experiments.train_causal [--NAME=value ...]
"""

import sys

from blockwise.cli import run_script
from blockwise.knobs import override
from train_blockwise import *  # noqa: F403

del PREFIX_MASK_RATE, SUFFIX_MASK_PROB, BOUND_WEIGHTS  # noqa: F821  (they have no meaning here)
CKPT_DIR = "ckpts_causal_sft"


def main():
    knobs = override(globals(), sys.argv[1:])
    import masking
    from blockwise import trainer

    trainer.train(knobs, noise, blocks=lambda answer_len: masking.num_blocks(answer_len, knobs.BLOCK_SIZE))


def noise(batch, generator, knobs):
    """Masks a global batch (masking.Batch) from the start of a block to the end of the answer: see masking.Noised."""
    import masking

    start = batch.prompt_len + batch.block * knobs.BLOCK_SIZE  # what is before it counts as prompt
    masked, supervised, _ = masking.full_sequence_masks(
        start, batch.length, knobs.MAX_LEN, mask_prob_eps=knobs.MASK_PROB_EPS, generator=generator
    )
    masked, supervised = masking.to_width(batch, masked, supervised)
    weights = masking.sample_mean_weights(supervised)
    return masking.Noised(batch.input_ids.masked_fill(masked, knobs.MASK_ID), supervised, batch.input_ids, weights)


if __name__ == "__main__":
    run_script(main)
