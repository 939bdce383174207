"""The settings of block-by-block decoding, and their flags. Imports nothing heavy."""

import argparse
import math
from dataclasses import dataclass, fields

from blockwise.cli import InputError

DTYPES = ("auto", "bfloat16", "float32")  # what decode.load takes


@dataclass
class Settings:
    """How to decode (decode.py). The last three trade accuracy for speed; with their defaults decoding is exact."""

    gen_length: int = 256  # tokens of the answer
    block_length: int = 32  # tokens of a block; best the BLOCK_SIZE of training
    steps: int = 256  # forward passes for the whole answer, shared evenly by the blocks
    temperature: float = 0.0  # 0 = the most likely token, else Gumbel sampling
    remasking: str = "low_confidence"  # which tokens wait: low_confidence, or random ones
    cfg_scale: float = 0.0  # classifier-free guidance: a second pass with the prompt masked
    suppress_end: bool = False  # write tokens that end an answer only when nothing else is left in the block
    threshold: float = 0.0  # write every token whose confidence is above this; 0 = as many as steps says
    stop_at_end: bool = False  # write no further blocks after one with a token that ends the answer
    cache: str = "none"  # keys and values that are kept within a block: none, prefix, or dual (prefix and suffix)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type and not (type(value) is int and field.type is float):
                raise InputError(f"{field.name} {value!r} is not of type {field.type.__name__}.")
        blocks, rest = divmod(self.gen_length, self.block_length) if self.block_length > 0 else (0, 1)
        if rest or blocks < 1:
            raise InputError(f"gen_length {self.gen_length} is not a multiple of block_length {self.block_length}.")
        if self.steps < 1 or self.steps % blocks:
            raise InputError(f"steps {self.steps} is not a multiple of the {blocks} blocks of the answer.")
        if not (0 <= self.temperature < math.inf and 0 <= self.cfg_scale < math.inf and 0 <= self.threshold < 1):
            raise InputError("temperature and cfg_scale must be at least 0, threshold at least 0 and below 1.")
        if self.remasking not in ("low_confidence", "random"):
            raise InputError(f"remasking {self.remasking!r} is neither 'low_confidence' nor 'random'.")
        if self.cache not in ("none", "prefix", "dual"):
            raise InputError(f"cache {self.cache!r} is none of 'none', 'prefix', 'dual'.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each setting to an argparse parser, and those for adapters, numbers and random draws."""
    for field in fields(Settings):
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true")
        elif field.name == "block_length":
            said = f"tokens of a block (default: {field.default}, or that of a block-diffusion checkpoint)"
            parser.add_argument("--block_length", type=int, help=said)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    parser.add_argument("--adapter", help="folder of LoRA adapters in PEFT's format, run on --model without merging")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on CPU")
    parser.add_argument("--seed", type=int, default=0, help="of temperature and random remasking")


def check_flags(args: argparse.Namespace) -> None:
    """Checks parsed arguments before the model is read, which may have a block length of its own. Raises InputError."""
    from_flags(args, block_length=args.gen_length)  # fits any gen_length and steps


def from_flags(args: argparse.Namespace, block_length: int | None = None) -> Settings:
    """The Settings of parsed arguments; checks the seed, too. Raises InputError.

    block_length: of a checkpoint that was trained for it, where no flag says another.
    """
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} must be at least 0 and below 2^63.")
    values = {field.name: getattr(args, field.name) for field in fields(Settings)}
    if args.block_length is None:
        values["block_length"] = block_length or Settings.block_length
    return Settings(**values)
