"""The settings of block-by-block decoding, and their flags. Imports nothing heavy."""

import argparse
import math
from dataclasses import dataclass, field, fields

from blockwise.cli import InputError

DTYPES = ("auto", "bfloat16", "float32")  # what decode.load takes


def setting(default, text: str):
    """A field of Settings with the help text of its flag."""
    return field(default=default, metadata={"help": text})


def token_ids(text: str):
    """The same, for a list of token ids that is empty by default."""
    return field(default_factory=list, metadata={"help": text})


@dataclass
class Settings:
    """How to decode (decode.py). What is off by default trades accuracy for speed or changes what is written."""

    gen_length: int = setting(256, "tokens of the answer; its last block may be shorter")
    block_length: int = setting(32, "tokens of a block; best the BLOCK_SIZE of the training")
    steps: int = setting(256, "forward passes for the whole answer, shared by the blocks in proportion to their tokens")
    temperature: float = setting(0.0, "0 writes the most likely token, more draws from the probabilities")
    remasking: str = setting("low_confidence", "which tokens wait: low_confidence, random ones, or nearness")
    cfg_scale: float = setting(0.0, "classifier-free guidance: a second pass with the prompt masked")
    suppress_end: bool = setting(False, "write tokens that end an answer last in their block")
    threshold: float = setting(0.0, "write every token whose probability is above this; 0 = as many as --steps says")
    factor: float = setting(0.0, "write the n best tokens whose n-th probability is at least 1 - factor/(n+1); 0 = off")
    stop_at_end: bool = setting(False, "write no further blocks after one with a token that ends the answer")
    cache: str = setting("none", "keep keys and values within a block: none, prefix, or dual (prefix and suffix)")
    suffix: int = setting(-1, "how many masks behind the current block the model sees; -1 = all")
    suffix_last: bool = setting(False, "with --suffix, the model also sees the last mask of the answer")
    suppress_tokens: list = token_ids("ids of tokens that are never written")
    begin_suppress_tokens: list = token_ids("ids of tokens that are written last in their block")
    sampler: str = setting("blocks", "blocks from left to right, or conv: all of the answer, near what is written")
    window: int = setting(128, "tokens around what is written, for conv and nearness; made odd")
    top_k: int = setting(1, "the likeliest tokens that a position draws from, for conv")

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type is list:
                if type(value) is not list or any(type(token) is not int or token < 0 for token in value):
                    raise InputError(f"{one.name} {value!r} is not a list of token ids, such as [126081,126348].")
            elif type(value) is not one.type and not (type(value) is int and one.type is float):
                raise InputError(f"{one.name} {value!r} is not of type {one.type.__name__}.")
        if self.sampler == "conv":
            self.block_length = self.gen_length  # all of the answer is one block
        if self.gen_length < 1 or self.block_length < 1:
            raise InputError(f"gen_length {self.gen_length} and block_length {self.block_length} must be at least 1.")
        blocks = -(-self.gen_length // self.block_length)
        if self.steps < blocks:
            raise InputError(f"steps {self.steps} must be at least {blocks}, one for each block of the answer.")
        if any(not 0 <= value < math.inf for value in (self.temperature, self.cfg_scale, self.factor)):
            raise InputError("temperature and cfg_scale must be numbers of at least 0, and so must factor.")
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold {self.threshold} must be at least 0 and below 1.")
        if self.threshold and self.factor:
            raise InputError("threshold and factor both say how many tokens a pass writes; give one of them.")
        if self.suffix < -1 or self.suffix_last and self.suffix < 0:
            raise InputError(f"suffix {self.suffix} must be at least 0, or -1 for all; suffix_last needs a suffix.")
        if self.remasking not in ("low_confidence", "random", "nearness"):
            raise InputError(f"remasking {self.remasking!r} is none of 'low_confidence', 'random', 'nearness'.")
        if self.cache not in ("none", "prefix", "dual"):
            raise InputError(f"cache {self.cache!r} is none of 'none', 'prefix', 'dual'.")
        self.check_sampler()

    def check_sampler(self):
        """Refuses what a sampler has no use for, and a window that is too small for Conv decoding. Raises InputError.

        Text grows by at most window // 2 tokens a step, and by less while few tokens are written: with half as many
        steps as are asked for here, simulated answers of 512 tokens kept 70 to 150 masks, with as many, next to none.
        """
        if self.sampler not in ("blocks", "conv"):
            raise InputError(f"sampler {self.sampler!r} is neither 'blocks' nor 'conv'.")
        if self.window < 2 or self.top_k < 1:
            raise InputError("window must be at least 2, and top_k at least 1.")
        if self.sampler == "blocks":
            if self.top_k != 1 or (self.window != Settings.window and self.remasking != "nearness"):
                raise InputError("top_k is of sampler 'conv', and window of that and of remasking 'nearness'.")
            return
        plain = Settings()
        refused = "temperature", "remasking", "suppress_end", "threshold", "factor", "cache", "suffix"
        for name in (*refused, "begin_suppress_tokens"):
            if (value := getattr(self, name)) != getattr(plain, name):
                raise InputError(f"sampler 'conv' takes no {name} {value!r}; leave it at {getattr(plain, name)!r}.")
        if self.steps * (self.window // 2) < 2 * self.gen_length:
            raise InputError(
                f"{self.steps} steps with window {self.window} may not reach the end of gen_length {self.gen_length}: "
                f"steps x (window // 2) must be at least {2 * self.gen_length}."
            )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each setting to an argparse parser, and those for adapters, numbers and random draws."""
    for one in fields(Settings):
        flag, text = f"--{one.name}", one.metadata["help"]
        if one.type is bool:
            parser.add_argument(flag, action="store_true", help=f"{text} (default: off)")
        elif one.type is list:
            parser.add_argument(flag, type=int, nargs="+", default=[], metavar="ID", help=f"{text} (default: none)")
        elif one.name == "block_length":
            text = f"{text} (default: {one.default}, or that of a block-diffusion checkpoint)"
            parser.add_argument(flag, type=int, help=text)
        else:
            parser.add_argument(flag, type=one.type, default=one.default, help=f"{text} (default: {one.default})")
    parser.add_argument(
        "--adapter", help="folder of LoRA adapters in PEFT's format, run on --model without merging (default: none)"
    )
    text = "number type of the weights (default: auto, which is float32 on a CPU and the checkpoint's own on a GPU)"
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of all random draws (default: 0)")


def check_flags(args: argparse.Namespace) -> None:
    """Checks parsed arguments before the model is read, which may have a block length of its own. Raises InputError."""
    from_flags(args, block_length=args.gen_length)  # fits any gen_length and steps


def from_flags(args: argparse.Namespace, block_length: int | None = None) -> Settings:
    """The Settings of parsed arguments; checks the seed, too. Raises InputError.

    block_length: of a checkpoint that was trained for it, where no flag says another.
    """
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} must be at least 0 and below 2^63.")
    values = {one.name: getattr(args, one.name) for one in fields(Settings)}
    if args.block_length is None:
        values["block_length"] = block_length or Settings.block_length
    return Settings(**values)
