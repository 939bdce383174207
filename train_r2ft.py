"""R2FT (arXiv 2509.15188): after SFT, a short training against repetition, with wrong answers that are made by rule.

    deepspeed --num_gpus 8 train_r2ft.py --MODEL_NAME=CHECKPOINT --TOTAL_TRAIN_STEPS=250 --MAX_SAMPLES=0 [--NAME=value]

The constants below are the knobs; those that are not here are the ones of train_fullseq.py, with its values. Each
answer is cut, and masked from there on. What really follows is chosen; rejected is the phrase before the cut, repeated
over and over (masking.py has a picture). One forward pass gives the probabilities of both. The paper trains 200 to 300
steps, from the checkpoint of an SFT.

VARIANT "answer" is the paper's: the cut is anywhere in the answer. VARIANT "block" is not from the paper but our own:
the cut is the start of a block, and chosen and rejected lie within that block, as block-by-block decoding writes it.
"""

import sys

from blockwise.cli import run_script
from blockwise.knobs import at_least, one_of, override
from train_fullseq import *  # noqa: F403

# those of the masks of SFT and of padding: here, all behind the cut is masked, up to MAX_LEN
del MASK_PROB_EPS, BOUND_WEIGHTS, LOSS_MEAN, RANDOM_LENGTH, PAD_TO, GROUP_BY_LENGTH  # noqa: F821

CKPT_DIR = "ckpts_r2ft"  # start of the names of the checkpoint and log folders

# ---------------------------------------------------------------- method
VARIANT: one_of("answer", "block") = "answer"  # answer: cut anywhere, as in the paper; block: at the start of a block
BLOCK_SIZE: at_least(1) = 32  # tokens, for VARIANT block; best the block length of decoding
BETA_W: at_least(0.0) = 1.0  # how much the mean log-probability of the chosen tokens counts in the margin ...
BETA_L: at_least(0.0) = 1.0  # ... and that of the rejected ones
GAMMA: at_least(0.0) = 0.0  # by how much the chosen ones should be ahead
BETA_A: at_least(0.0) = 0.1  # weight of the likelihood of the chosen tokens alone, an anchor
PHRASE_MIN: at_least(1) = 1  # tokens of the phrase that is repeated: at least ...
PHRASE_MAX: at_least(1) = 14  # ... and at most
REPEAT_MIN: at_least(2) = 30  # rejected tokens: at least ...
REPEAT_MAX: at_least(2) = 49  # ... and at most; fewer where MAX_LEN or the block ends
LR = 5e-6  # AdamW, betas (0.9, 0.95); half of SFT's


def main():
    knobs = override(globals(), sys.argv[1:])
    import masking  # only now: a mistyped knob is reported without waiting for torch
    from blockwise import trainer
    from blockwise.cli import InputError

    for what in ("PHRASE", "REPEAT"):
        low, high = getattr(knobs, f"{what}_MIN"), getattr(knobs, f"{what}_MAX")
        if low > high:
            raise InputError(f"{what}_MIN={low} must not be above {what}_MAX={high}.")
    blocks = (lambda answer_len: masking.num_blocks(answer_len, BLOCK_SIZE)) if VARIANT == "block" else None
    trainer.train(knobs, noise, loss, blocks)


def noise(batch, generator, knobs):
    """Cuts the answers of a global batch (masking.Batch), and adds the rejected ones. Returns a masking.Noised."""
    import torch

    import masking

    if knobs.VARIANT == "block":
        cut = batch.prompt_len + batch.block * knobs.BLOCK_SIZE
        end = (cut + knobs.BLOCK_SIZE).clamp(max=knobs.MAX_LEN)  # of the block, which decoding writes as a whole
        divisor = torch.minimum(end, batch.length) - cut  # the chosen tokens
    else:
        cut = masking.random_cuts(batch.prompt_len, batch.length, generator)
        end = torch.full_like(cut, knobs.MAX_LEN)
        divisor = batch.length - batch.prompt_len  # the whole answer, as in the paper: a late cut counts less
    rejected, repeated = masking.repetitions(
        batch.input_ids, batch.length, cut, end, phrase=(knobs.PHRASE_MIN, knobs.PHRASE_MAX),
        repeat=(knobs.REPEAT_MIN, knobs.REPEAT_MAX), generator=generator,
    )  # fmt: skip
    return masking.chosen_and_rejected(batch, cut, end, divisor, rejected, repeated, knobs.MASK_ID)


def loss(logits, part):
    """The share of a part of the global batch in its loss; see masking.preference_loss."""
    import masking

    return masking.preference_loss(logits, part, beta_w=BETA_W, beta_l=BETA_L, beta_a=BETA_A, gamma=GAMMA)


if __name__ == "__main__":
    run_script(main)
