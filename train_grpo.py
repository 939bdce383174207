"""GRPO on block decoding: the model answers problems, and answers that are better than others of their group count.

    deepspeed --num_gpus 8 train_grpo.py --MODEL_NAME=CHECKPOINT --DATA=train.jsonl [--NAME=value ...]

The constants below are the knobs; those that are not here are the ones of train_fullseq.py, with its values. A round
begins with PROMPTS problems, each answered GROUP times block by block; then UPDATES optimizer steps make the answers
with more REWARD than the mean of their group likelier, and the others less likely. ESTIMATOR says which probabilities
are meant; `block` has those of block decoding itself. docs/rl.md has the formulas.
"""

import sys

from blockwise.cli import run_script
from blockwise.knobs import at_least, between, one_of, optional, override
from train_fullseq import *  # noqa: F403

# the samples are the model's own answers: no file of pt.py, and masks of other kinds
del DATA_PT, VAL_PT, VAL_EVERY, EPOCHS, TOTAL_TRAIN_STEPS, GRAD_ACC  # noqa: F821
del MASK_PROB_EPS, EOS_TAIL, BOUND_WEIGHTS, LOSS_MEAN, RANDOM_LENGTH, PAD_TO, GROUP_BY_LENGTH  # noqa: F821

CKPT_DIR = "ckpts_grpo"  # start of the names of the checkpoint and log folders
MAX_LEN = 512  # tokens of a prompt and GEN_LENGTH; longer prompts are refused
MAX_SAMPLES = 0  # the first N problems of DATA; 0 = all

# ---------------------------------------------------------------- problems
DATA = "train.jsonl"  # a question per line, with what REWARD compares answers with; mostly as eval.py reads them
WRAP: optional() = ""  # the text around each question, as --wrap of eval.py; "" = as the model was trained
REWARD = "number"  # what an answer is worth: rewards of docs/rl.md, with weights, as in "number+0.5*format"
ALLOW_CODE_EXECUTION = False  # True: REWARD may run programs that the model has written; see docs/rl.md

# ---------------------------------------------------------------- rollouts
ROUNDS: at_least(1) = 100  # in each, PROMPTS x GROUP answers are made and trained
PROMPTS: at_least(1) = 32  # problems of a round
GROUP: at_least(2) = 8  # answers to each; MICRO_BSIZE x ranks must divide PROMPTS x GROUP
GEN_LENGTH: at_least(1) = 256  # tokens of an answer
BLOCK_SIZE: at_least(1) = 32  # tokens of a block; decode with the same
STEPS: at_least(1) = 128  # forward passes for an answer, shared by the blocks
TEMPERATURE: between(0.01, 10.0) = 1.0  # of sampling, and of the probabilities in the loss
REMASKING: one_of("low_confidence", "random") = "low_confidence"  # which tokens wait within a block

# ---------------------------------------------------------------- method
ESTIMATOR: one_of("block", "trace", "onestep") = "block"  # an update trains one block, one step of decoding, or all
P_MASK_PROMPT: between(0.0, 1.0) = 0.0  # onestep: how many tokens of the prompt are masked; 0.15 in diffu-GRPO
UPDATES: at_least(1) = 1  # optimizer steps per round, each on another block (step) of every rollout
EPSILON: between(0.0, 1.0) = 0.2  # ratios beyond 1 +- this are clipped
BETA: at_least(0.0) = 0.0  # weight of KL to the base, which needs adapters; 0 saves a forward pass
LR = 3e-6  # AdamW, betas (0.9, 0.95)
WARMUP_RATIO = 0.0  # share of the steps with warm-up; then LR_SCHEDULE
LR_SCHEDULE = "constant"  # wsd: constant, then linear over the last DECAY_RATIO
LORA_DROPOUT = 0.0  # must stay 0.0: with dropout, another model would answer than is trained


def main():
    knobs = override(globals(), sys.argv[1:])
    from blockwise import trainer  # only now: a mistyped knob is reported without waiting for torch
    from blockwise.rollouts import Rollouts

    rollouts = Rollouts(knobs)
    trainer.train(knobs, noise, rollouts.loss, rollouts=rollouts)


def noise(batch, generator, knobs):
    """Masks the rollouts of a global batch (masking.Batch) as ESTIMATOR says. Returns a masking.Noised."""
    import torch

    import masking

    seen, order, max_len = batch.extra["seen"], batch.extra["order"], batch.input_ids.shape[1]
    pos = torch.arange(max_len, device=seen.device)  # (L,)
    canvas = pos >= batch.prompt_len[:, None]  # (G, L): all that decoding writes
    if knobs.ESTIMATOR == "block":
        masked, supervised = masking.policy_block_masks(
            batch.prompt_len, batch.length, batch.block, max_len, knobs.BLOCK_SIZE, generator
        )
    elif knobs.ESTIMATOR == "trace":
        masked, supervised = masking.trace_masks(order, batch.block)
    else:
        masked, supervised = masking.one_step_masks(seen & ~canvas, canvas, knobs.P_MASK_PROMPT, generator)
    supervised = supervised & (pos < batch.extra["end"][:, None])  # nothing behind the end of an answer
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)  # padding does not count, as in decoding
    return masking.Noised(
        batch.input_ids.masked_fill(masked, knobs.MASK_ID), supervised, batch.input_ids,
        masking.token_mean_weights(supervised), extra={"advantage": batch.extra["advantage"]},
        model_args={"position_ids": positions} | ({} if seen.all() else {"attention_mask": seen}),
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
