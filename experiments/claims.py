"""What experiments/run.py runs: the tasks, and for each claim the settings that are compared, one line each."""

from dataclasses import dataclass, field

BLOCKWISE, FULLSEQ, CAUSAL = "train_blockwise.py", "train_fullseq.py", "experiments/train_causal.py"
BD3LM = "train_bd3lm.py"
BATCH, HELD_OUT = 32, 300  # samples of an optimizer step; problems that are decoded, never trained on
BLOCK, GEN_LENGTH = 4, 16  # an answer has 16 tokens
COMMON = {"MASK_ID": 4, "MAX_SAMPLES": 0, "BF16": False, "MICRO_BSIZE": BATCH, "LORA_DROPOUT": 0.0}


@dataclass(frozen=True)
class Task:
    """Problems of experiments/make_data.py, their base, and the knobs that all trainings on them have."""

    name: str
    rule: int | None  # of lag and lag3; addition has none
    rows: int  # that every training has; an epoch is rows / BATCH steps
    digits: int  # of an answer that token accuracy counts, the last ones
    base_steps: int  # of pre-training on rule 0, one base for each seed; 0 = the base is the demo's
    knobs: dict = field(hash=False)


def lag_task(name, rule, base_steps):
    return Task(name, rule, 25_600, 16, base_steps, {"MAX_LEN": 26, "LORA_RANK": 4, "SAVE_EVERY": 50})


ADDITION = Task("addition", None, 1_600, 13, 0, {"MAX_LEN": 52, "LORA_RANK": 16, "LR": 2e-3})
LAG = {rule: lag_task("lag", rule, 1_000) for rule in (0, 1, 2)}
LAG3 = {rule: lag_task("lag3", rule, 1_600) for rule in (0, 1, 2)}
BASE_FLAGS = {"batch_size": 64, "lr": 3e-3, "vocab_size": 264, "d_model": 64, "n_layers": 3}  # of make_base.py
LRS = (2e-3, 5e-3, 1e-2, 2e-2)  # tried on seed 0; the best is used for the seeds that are reported
ADDITION_LRS = (1e-3, 2e-3, 5e-3, 1e-2)
FEW_LRS = LRS[:3]
FULL_LRS = (1e-3, 2e-3, 5e-3)  # of full fine-tuning


@dataclass
class Setting:
    """One line of a claim's table: how to train, and how to decode."""

    name: str
    script: str = BLOCKWISE  # "" = the base as it is
    knobs: dict = field(default_factory=dict)
    decoding: dict = field(default_factory=dict)
    task: Task = ADDITION
    lrs: tuple = ()  # learning rates to choose from on seed 0; () = that of the knobs
    lr_of: str = ""  # instead: the name of the setting of this claim whose choice is used
    against: str | None = ""  # the setting that it is compared with; "" = the first with several seeds, None = none
    curve: bool = False  # decode all checkpoints, not only the last


def decoding(block, steps_per_block=None, gen_length=GEN_LENGTH):
    steps = gen_length // block * (steps_per_block or block)
    return {"gen_length": gen_length, "block_length": block, "steps": steps}


BOTH = (("full sequence", FULLSEQ), ("block-wise", BLOCKWISE))


def lag(name, script=BLOCKWISE, task=LAG[1], against="", curve=False, lrs=LRS, lr_of="", **knobs):
    """A setting on the task lag or lag3, its learning rate chosen from lrs, or that of another setting."""
    lrs = () if lr_of else lrs
    return Setting(name, script, knobs, task=task, lrs=lrs, lr_of=lr_of, against=against, curve=curve)


def lag_pair(what, task=LAG[1], lr_of="", **how):
    """Both methods on such a task, compared. lr_of: `what` of the pair from which they take their learning rates."""
    first = f"{BOTH[0][0]}, {what}"
    return [
        lag(
            f"{name}, {what}", script, task, None if script == FULLSEQ else first,
            lr_of=f"{name}, {lr_of}" if lr_of else "", **how,
        )
        for name, script in BOTH
    ]  # fmt: skip


def blocks(train, block, task, **lr):
    """A setting of a table of training block sizes against decoding block sizes."""
    return Setting(name_of_blocks(train, block), knobs={"BLOCK_SIZE": train}, decoding=decoding(block), task=task, **lr)


def name_of_blocks(train, block):
    return f"training {train}, decoding {block}"


BLOCK_SIZES = (1, 2, 4, 8, 16)
HALF = "block diffusion, half of the steps"  # of those that an epoch has
CLAIMS = {
    "C1": [
        Setting("base", ""),
        *(Setting(name, script, lrs=ADDITION_LRS) for name, script in BOTH),
    ],
    "C2": [  # in 4 epochs, every row trains each of its 4 blocks once
        Setting("full sequence, 1 epoch", FULLSEQ, lrs=ADDITION_LRS),
        Setting("block-wise, 4 epochs", knobs={"EPOCHS": 4}, lrs=ADDITION_LRS),
        Setting("full sequence, 4 epochs", FULLSEQ, {"EPOCHS": 4}, lrs=ADDITION_LRS),
    ],
    "C3": [blocks(train, block, ADDITION) for train in (1, 4, 8, 16) for block in (1, 4, 8, 16)],
    "C4": [Setting(f"prefix noise {rate}", knobs={"PREFIX_MASK_RATE": rate}) for rate in (0.0, 0.1, 0.2, 0.5)],
    "C5": [Setting(f"suffix masked {rate}", knobs={"SUFFIX_MASK_PROB": rate}) for rate in (1.0, 0.5, 0.0)],
    "K1": [Setting("block-wise"), Setting("rest of the answer", CAUSAL)],
    "K2": [Setting("block-wise"), Setting("visible future", knobs={"SUFFIX_MASK_PROB": 0.0})],
    "K3": [  # 12 tokens of padding behind the answer
        Setting(f"{name}, {what}", script, {"EOS_TAIL": tail, "MAX_LEN": 64}, decoding(BLOCK, gen_length=28))
        for name, script in BOTH
        for what, tail in (("answer only", False), ("EOS tail", True))
    ],
    "K4": [
        Setting(f"{name}, {what}", script, {"BOUND_WEIGHTS": bound}, against=f"{name}, masked mean" if bound else "")
        for name, script in BOTH
        for what, bound in (("masked mean", False), ("1/p", True))
    ],
    "K5": [
        Setting(f"{name}, {steps} steps a block of 8", script, knobs, decoding(8, steps))
        for name, script, knobs in (("full sequence", FULLSEQ, {}), ("block-wise", BLOCKWISE, {"BLOCK_SIZE": 8}))
        for steps in (8, 4, 2, 1)
    ],
    "K6": [
        Setting(f"{name}, dropout {rate}", script, {"LORA_DROPOUT": rate}, against=against)
        for name, script in BOTH
        for rate, against in ((0.0, ""), (0.05, f"{name}, dropout 0.0"))
    ],
    "N1": [
        Setting("base, rule 1", "", task=LAG[1], against=None),
        *lag_pair("rank 4, rule 1", curve=True),
        *lag_pair("rank 4, rule 2", LAG[2]),
        *lag_pair("rank 1, rule 1", LORA_RANK=1),
        *lag_pair("rank 1, rule 2", LAG[2], LORA_RANK=1),
    ],
    "N2": [
        lag("block-wise", task=LAG3[1], lrs=FEW_LRS),
        lag("prefix noise 0.1", task=LAG3[1], lrs=FEW_LRS, PREFIX_MASK_RATE=0.1),
        lag("prefix noise 0.5", task=LAG3[1], lrs=FEW_LRS, PREFIX_MASK_RATE=0.5),
        lag("visible suffix", task=LAG3[1], lrs=FEW_LRS, SUFFIX_MASK_PROB=0.0),
        lag("rest of the answer", CAUSAL, task=LAG3[1], lrs=FEW_LRS),
    ],
    "N3": [
        *(
            setting
            for rank in (1, 4, 16, 64)
            for setting in lag_pair(f"rank {rank}", LAG3[1], lrs=FEW_LRS, LORA_RANK=rank)
        ),
        *lag_pair("all weights", LAG3[1], lrs=FULL_LRS, LORA_RANK=0),
        *lag_pair("rank 1, 3 times the steps", LAG3[1], lr_of="rank 1", LORA_RANK=1, EPOCHS=3),
        Setting("base, same rule", "", task=LAG3[0], against=None),
        *lag_pair("same rule", LAG3[0], lrs=FEW_LRS),
    ],
    "N4": [
        blocks(
            train, block, LAG3[1], **({"lrs": FEW_LRS} if block == train else {"lr_of": name_of_blocks(train, train)})
        )
        for train in BLOCK_SIZES
        for block in BLOCK_SIZES
    ],
    "N5": [
        Setting("base, rule 1", "", task=LAG3[1], against=None),
        *lag_pair("rule 1", LAG3[1], curve=True),
        *lag_pair("rule 2", LAG3[2]),
    ],
    "B3": [  # a step of block diffusion has twice the tokens; its checkpoints are decoded with finished blocks kept
        Setting("base", ""),
        *(Setting(name, script, lrs=ADDITION_LRS) for name, script in BOTH),
        Setting(HALF, BD3LM, {"TOTAL_TRAIN_STEPS": 25}, lrs=ADDITION_LRS),
        Setting(f"{HALF}, masked mean", BD3LM, {"TOTAL_TRAIN_STEPS": 25, "BOUND_WEIGHTS": False}, lr_of=HALF),
        Setting("block diffusion, equal steps", BD3LM, lr_of=HALF),
    ],
    "B4": [
        *(lag(name, script, LAG3[1]) for name, script in BOTH),
        lag(HALF, BD3LM, LAG3[1], lrs=FEW_LRS, TOTAL_TRAIN_STEPS=400),
        lag("block diffusion, equal steps", BD3LM, LAG3[1], lr_of=HALF),
    ],
}  # fmt: skip
