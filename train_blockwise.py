"""Blockwise SFT of LLaDA: each sample trains one block of its answer, seen as block-by-block decoding will see it.

    deepspeed --num_gpus 8 train_blockwise.py [--NAME=value ...]

The constants below are the knobs; edit them here or override them on the command line. The method is in masking.py,
what trainers share in blockwise/trainer.py.
"""

import sys

from blockwise.cli import run_script
from blockwise.knobs import at_least, between, one_of, optional, override

# ---------------------------------------------------------------- model and data
MODEL_NAME = "GSAI-ML/LLaDA-8B-Instruct"  # hub id or local folder
DATA_PT = "MathQA_256.pt"  # written by pt.py with the tokenizer of MODEL_NAME
VAL_PT: optional() = ""  # like DATA_PT, for a validation loss; "" = none
CKPT_DIR = "ckpts_stagewise_sft_32"  # start of the names of checkpoint and log folders
MASK_ID: at_least(0) = 126336  # LLaDA's <|mdm_mask|>; compared with the base's config
MAX_LEN: at_least(2) = 256  # tokens; samples are padded to this, longer ones refused
MAX_SAMPLES: at_least(0) = 200 * 32  # the first N samples of DATA_PT; 0 = all

# ---------------------------------------------------------------- method
BLOCK_SIZE: at_least(1) = 32  # tokens; best the block length of decoding
MASK_PROB_EPS: between(0.0, 1.0) = 1e-3  # the mask ratio of a sample is uniform between this and 1
PREFIX_MASK_RATE: between(0.0, 1.0) = 0.0  # of the earlier blocks; decoding shows them complete
SUFFIX_MASK_PROB: between(0.0, 1.0) = 1.0  # of the later blocks; decoding has not written them
EOS_TAIL = False  # True: the padding up to MAX_LEN is part of the answer, as in LLaDA's own SFT
BOUND_WEIGHTS = False  # True: loss weighted 1/p x number of blocks, Theorem 3.3

# ---------------------------------------------------------------- adapters
LORA_RANK: at_least(0) = 256  # 0 = full fine-tuning, without adapters
LORA_ALPHA: at_least(0) = 0  # 0 = twice LORA_RANK
LORA_DROPOUT: between(0.0, 0.99) = 0.05  # 0.0 saves a third of the activation memory
TARGET_MODS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # layers with adapters

# ---------------------------------------------------------------- optimization
LR: between(1e-12, 1.0) = 1e-5  # AdamW, betas (0.9, 0.95)
WEIGHT_DECAY: between(0.0, 1.0) = 0.0
WARMUP_TYPE: one_of("linear", "log") = "linear"  # log: DeepSpeed's WarmupCosineLR, as in the reference
WARMUP_RATIO: between(0.0, 1.0) = 0.1  # share of steps with warm-up; then LR_SCHEDULE
LR_SCHEDULE: one_of("cosine", "constant", "wsd") = "cosine"  # wsd: constant, then linear over the last DECAY_RATIO
DECAY_RATIO: between(0.0, 1.0) = 0.1  # share of the steps in which wsd decays
MIN_LR_RATIO: between(0.0, 1.0) = 0.01  # share of LR left in the last step; LR_SCHEDULE constant ignores it
MAX_GRAD_NORM: at_least(1e-12) = 1.0  # larger gradients are scaled down
MICRO_BSIZE: at_least(1) = 32  # per rank and forward pass; out of memory: halve this, double GRAD_ACC
GRAD_ACC: at_least(1) = 1  # forward passes per optimizer step
EPOCHS: at_least(1) = 1  # in each, a sample trains one block that it has not trained yet
TOTAL_TRAIN_STEPS: at_least(0) = 0  # 0 = as many as EPOCHS gives
SEED: between(0, 4294967295) = 42  # of sample order, masks, adapters, dropout

# ---------------------------------------------------------------- saving and resuming
SAVE_EVERY: at_least(0) = 0  # steps between checkpoints; 0 = once, at the end
SAVE_DTYPE: one_of("bfloat16", "float16", "float32") = "bfloat16"  # bfloat16 rounds small updates away
VAL_EVERY: at_least(0) = 0  # steps between validations; 0 = once, at the end
SAMPLE_EVERY: at_least(0) = 0  # steps between answers to training prompts in samples.jsonl; 0 = never
TRACKER: one_of("", "tensorboard", "trackio", "wandb") = ""  # gets metrics.csv, too
RESUME = False  # True: resume the newest unfinished run of this CKPT_DIR
RESUME_EVERY: at_least(0) = 0  # steps between resume points; 0 = only at checkpoints
MAX_BAD_STEPS: at_least(1) = 3  # the run stops after N non-finite losses or gradients in a row

# ---------------------------------------------------------------- speed and memory
PAD_TO: one_of("max_len", "longest") = "max_len"  # longest: pad only to the global batch's longest sample
GROUP_BY_LENGTH = False  # True: a global batch has samples of like length
BF16 = True  # False = fp32, for CPUs
BASE_4BIT = False  # True: the base in 4 bits; needs bitsandbytes
GRADIENT_CHECKPOINTING = False  # True: far less memory for one more forward pass
COMPILE = False  # True: compiled layers; not measured on a GPU yet


def main():
    knobs = override(globals(), sys.argv[1:])
    import masking  # only now: a mistyped knob is reported without waiting for torch
    from blockwise import trainer

    trainer.train(knobs, noise, blocks=lambda answer_len: masking.num_blocks(answer_len, BLOCK_SIZE))


def noise(batch, generator, knobs):
    """Masks a global batch (masking.Batch) as block-by-block decoding shows it. Returns a masking.Noised."""
    import masking

    masked, supervised, p = masking.blockwise_masks(
        batch.prompt_len, batch.length, batch.block, knobs.MAX_LEN, block_size=knobs.BLOCK_SIZE,
        mask_prob_eps=knobs.MASK_PROB_EPS, prefix_mask_rate=knobs.PREFIX_MASK_RATE,
        suffix_mask_prob=knobs.SUFFIX_MASK_PROB, generator=generator,
    )  # fmt: skip
    masked, supervised = masking.to_width(batch, masked, supervised)
    weights = masking.sample_mean_weights(supervised)
    if knobs.BOUND_WEIGHTS:
        answer_len = batch.length - batch.prompt_len
        weights = masking.bound_weights(supervised, p, masking.num_blocks(answer_len, knobs.BLOCK_SIZE), answer_len)
    return masking.Noised(batch.input_ids.masked_fill(masked, knobs.MASK_ID), supervised, batch.input_ids, weights)


if __name__ == "__main__":
    run_script(main)
