"""Full-sequence SFT of LLaDA, the baseline: tokens are hidden anywhere in the answer, and every hidden one is scored.

    deepspeed --num_gpus 8 train_fullseq.py [--NAME=value ...]

The constants below are the knobs; edit them here or override them on the command line. What is hidden and what is
scored is in masking.py; everything that this trainer has in common with train_blockwise.py is in sft.py.
"""

import sys

from cli import override, run

# ---------------------------------------------------------------- model and data
MODEL = "GSAI-ML/LLaDA-8B-Instruct"  # hub id or local folder
PT_FILE = "MathQA_256.pt"  # written by pt.py with the tokenizer of MODEL
CKPT_DIR = "ckpts_fullseq_sft"  # start of the names of the checkpoint and log folders
MASK_ID = 126336  # LLaDA's <|mdm_mask|>; other bases have other ids, and the config of the base is compared
MAX_LEN = 256  # every row is padded to this; longer rows are refused
MAX_SAMPLES = 200 * 32  # rows of PT_FILE to train on, from its start; 0 = all

# ---------------------------------------------------------------- method
MASK_PROB_EPS = 1e-3  # the mask ratio of a sample is uniform between this and 1
EOS_TAIL = False  # True: the padding up to MAX_LEN is part of the answer, as in LLaDA's own SFT
BOUND_WEIGHTS = False  # True: loss weighted 1/p, as in LLaDA's own SFT, in place of the masked mean

# ---------------------------------------------------------------- adapters
LORA_R = 256
LORA_ALPHA = 512
LORA_DROPOUT = 0.05  # 0.0 saves a third of the activation memory
TARGET_MODS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# ---------------------------------------------------------------- optimization
LR = 1e-5  # AdamW, betas (0.9, 0.95)
WEIGHT_DECAY = 0.0
WARMUP_RATIO = 0.1  # share of the steps with linear warm-up; then cosine
MIN_LR_RATIO = 0.01  # share of LR that is left in the last step
MAX_GRAD_NORM = 1.0
MICRO_BSIZE = 32  # rows per rank and forward pass; out of memory: halve this and double GRAD_ACC
GRAD_ACC = 1  # forward passes per optimizer step
EPOCHS = 1  # in each epoch every sample is trained once
TOTAL_TRAIN_STEPS = 0  # optimizer steps over the global batch; 0 = as many as EPOCHS gives
SAVE_EVERY = 0  # optimizer steps between checkpoints; 0 = once, at the end
SAMPLE_EVERY = 0  # steps between sample generations from a few training prompts, 0 = never
RESUME = False  # True: go on with the newest unfinished run of this CKPT_DIR
RESUME_EVERY = 0  # optimizer steps between resume points; 0 = only at checkpoints
MAX_BAD_STEPS = 3  # the run stops after so many steps in a row with a loss or gradient that is no number
SEED = 42
BF16 = True  # False = fp32, for CPUs
GRADIENT_CHECKPOINTING = False  # True: far less activation memory, at the price of one more forward pass
COMPILE = False  # True: torch compiles the decoder layers in the first steps; not measured on a GPU yet


def main():
    knobs = override(globals(), sys.argv[1:])
    import masking  # only now: a typing error in a knob is reported without waiting for torch
    import sft

    def hide(prompt_len, length, turn, generator):
        hidden, scored, p = masking.full_sequence_masks(
            prompt_len, length, MAX_LEN, mask_prob_eps=MASK_PROB_EPS, generator=generator
        )
        if BOUND_WEIGHTS:
            return hidden, masking.bound_weights(scored, p, blocks=1, answer_len=length - prompt_len)
        return hidden, masking.sample_mean_weights(scored)

    sft.train(knobs, turns=lambda answer_len: 0 * answer_len + EPOCHS, hide=hide)


if __name__ == "__main__":
    run(main)
