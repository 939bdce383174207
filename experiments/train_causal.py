"""Control K1: clean prefix and hidden suffix without blocks. Each sample trains all of its answer from one place on.

The place is the start of a block of train_blockwise.py, whose knobs these are; only what is hidden and scored differs.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from cli import override, run  # noqa: E402
from train_blockwise import *  # noqa: E402, F403

del PREFIX_MASK_RATE, SUFFIX_MASK_PROB, BOUND_WEIGHTS  # noqa: F821  (they have no meaning here)
CKPT_DIR = "ckpts_causal_sft"


def main():
    knobs = override(globals(), sys.argv[1:])
    import masking
    import sft

    def hide(prompt_len, length, block, generator):
        start = prompt_len + block * knobs.BLOCK_SIZE  # what is before it counts as prompt
        hidden, scored, _ = masking.full_sequence_masks(
            start, length, knobs.MAX_LEN, mask_prob_eps=knobs.MASK_PROB_EPS, generator=generator
        )
        return hidden, masking.sample_mean_weights(scored)

    sft.train(knobs, turns=lambda answer_len: masking.num_blocks(answer_len, knobs.BLOCK_SIZE), hide=hide)


if __name__ == "__main__":
    run(main)
