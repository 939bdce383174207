"""The training rows: read from a .pt file, checked, padded; and their order in training. Letters as in sft.py."""

import pickle
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from cli import InputError


@dataclass
class Rows:
    """The training rows as tensors."""

    ids: torch.Tensor  # (N, L) int32, right-padded
    prompt_len: torch.Tensor  # (N,) where the answer starts
    length: torch.Tensor  # (N,) where it ends
    number: torch.Tensor  # (N,) which row of PT_FILE it is
    unanswered: int  # rows that were left out because there is nothing after their prompt

    def to(self, device):
        tensors = (self.ids, self.prompt_len, self.length, self.number)
        return Rows(*(tensor.to(device) for tensor in tensors), self.unanswered)


def make_rows(data, knobs, config):
    """Checks the rows of PT_FILE against the model's config and the knobs, pads them to MAX_LEN. Raises InputError."""
    path = knobs.PT_FILE
    for i, row in enumerate(data):
        if problem := row_problem(row, knobs.MAX_LEN):
            raise InputError(f"{path}: row {i} {problem}")
    full_ids = [row["full_ids"] for row in data]
    ids = pad_sequence(full_ids, batch_first=True, padding_value=config.pad_token_id)  # (all rows, longest)
    check_ids(path, ids, config.vocab_size, knobs.MASK_ID)
    prompt_len = torch.tensor([row["prompt_len"] for row in data])
    length = torch.tensor([len(row) for row in full_ids])
    answered = (prompt_len < length).nonzero()[:, 0]
    used = answered[: knobs.MAX_SAMPLES or None]
    if not len(used):
        raise InputError(
            f"{path}: no usable row; none of its {len(data)} rows has an answer. Write it anew with pt.py."
        )
    ids = F.pad(ids[used].int(), (0, knobs.MAX_LEN - ids.shape[1]), value=config.pad_token_id)  # (N, L)
    if knobs.EOS_TAIL:
        length = torch.full_like(length, knobs.MAX_LEN)
    return Rows(ids, prompt_len[used], length[used], used, unanswered=len(data) - len(answered))


# what a damaged zip, or a good zip with a bad pickle, makes zipfile and torch.load raise
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError)
UNREADABLE += (RuntimeError, LookupError, TypeError, ValueError)


def read_pt(path):
    """The list in a .pt file, read without running any code from it. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; write it with pt.py, or name another with --PT_FILE=...")
    damaged = f"{path} is truncated, damaged or was not written by pt.py; write it anew."
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip, but torch.load does not look at its checksums
            if file.testzip():
                raise InputError(damaged)
        rows = torch.load(path, weights_only=True)
    except UNREADABLE as error:
        raise InputError(damaged) from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} does not hold a list of rows; write it anew with pt.py.")
    return rows


def row_problem(row, max_len):
    """What is wrong with the form of one row of a .pt file, or None."""
    if not isinstance(row, dict) or not {"prompt_len", "full_ids"} <= row.keys():
        return "lacks the keys prompt_len and full_ids; write the file anew with pt.py."
    ids, prompt_len = row["full_ids"], row["prompt_len"]
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.long or ids.dim() != 1:
        return "has full_ids that are not a 1-D LongTensor; write the file anew with pt.py."
    if type(prompt_len) is not int or not 0 <= prompt_len <= len(ids):
        return f"has prompt_len {prompt_len}, outside its {len(ids)} tokens; write the file anew with pt.py."
    if len(ids) > max_len:
        return f"has {len(ids)} tokens, more than MAX_LEN={max_len}; raise that, or run pt.py with --max_len {max_len}."
    return None


def check_ids(path, ids, vocab_size, mask_id):
    """Refuses ids (N, any) that are outside the vocabulary or are the mask itself. Raises InputError."""
    outside = (ids < 0) | (ids >= vocab_size)
    for bad, why in (
        (outside, f"outside the model's vocabulary of {vocab_size:,}; prepare the file with the tokenizer of MODEL."),
        (ids == mask_id, "which is MASK_ID; rows hold no masks, so MASK_ID or the tokenizer is not the model's."),
    ):
        if bad.any():
            row, column = (int(x) for x in bad.nonzero()[0])
            raise InputError(f"{path}: row {row} contains the id {int(ids[row, column])}, {why}")


def schedule(turns, epochs, seed):
    """The order of training: (P, 2) pairs (row, turn), from the seed alone, the same for every number of ranks.

    turns: (N,) how often each row can be drawn at all; in Blockwise SFT, its number of blocks. In every epoch each row
    that has a turn left is drawn once, in random order, and takes one of its unused turns, uniformly: so each pair
    comes at most once, and rows that are used up drop out. Step s trains the pairs from (s - 1) * G on.
    """

    def generator(*purpose):
        return torch.Generator().manual_seed(derive_seed(seed, *purpose))

    most = int(turns.max())
    keys = torch.rand(len(turns), most, generator=generator("turns"))
    keys[torch.arange(most) >= turns[:, None]] = 2.0  # turns that the row does not have come last
    order = keys.argsort(dim=1)  # (N, most): the row's turns in the order of their use
    pairs = []
    for epoch in range(min(epochs, most)):
        left = (turns > epoch).nonzero()[:, 0]
        left = left[torch.randperm(len(left), generator=generator("rows", epoch))]
        pairs.append(torch.stack([left, order[left, epoch]], dim=1))
    return torch.cat(pairs)


def derive_seed(seed, *names):
    """An independent 63-bit seed for each purpose, the same on every machine."""
    return random.Random(repr((seed, *names))).getrandbits(63)
