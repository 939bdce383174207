"""The training samples: read from a .pt file, checked, padded; and their order in training.

Letters in shapes: N samples of the data, L positions with padding, P pairs of a sample and a block.
"""

import pickle
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import masking
from blockwise import packing, prompts
from blockwise.cli import InputError
from blockwise.prompts import PromptFormat

CHECKED = 2**14  # samples of texts whose ids are checked at a time
ROUND = 32  # tokens; with PAD_TO "longest", batches are padded to a multiple of this


@dataclass
class Samples:
    """The training samples as tensors."""

    ids: Tensor  # (N, L) int32, padded on the right; of texts: on the CPU, in the file, and perhaps shorter
    prompt_len: Tensor  # (N,) where the answer starts
    length: Tensor  # (N,) where it ends
    number: Tensor  # (N,) which entry of DATA_PT it is
    unanswered: int  # samples that were left out because nothing follows their prompt
    padding: int = 0  # the id that is padded with
    width: int = 0  # of texts: the tokens that they are padded to; 0 = these are no texts, and padded already
    extra: dict[str, Tensor] = field(default_factory=dict)  # (N, ...) more for masking.Batch
    end: Tensor | None = None  # (N,) with PAD_TO "longest": behind these, there is only padding

    def to(self, device: torch.device) -> "Samples":
        """All but the ids of texts, which may be larger than the device's memory."""
        ids = self.ids if self.width else self.ids.to(device)
        rest = (tensor.to(device) for tensor in (self.prompt_len, self.length, self.number))
        extra = {name: tensor.to(device) for name, tensor in self.extra.items()}
        end = None if self.end is None else self.end.to(device)
        return Samples(ids, *rest, self.unanswered, self.padding, self.width, extra, end)

    def padded_to(self, sample: Tensor) -> Tensor:
        """The tokens that batches of samples are padded to: MAX_LEN, or what PAD_TO says. (..., G) indices -> (...)"""
        max_len = self.width or self.ids.shape[1]
        if self.end is None:
            return torch.full(sample.shape[:-1], max_len)
        return ((self.end[sample].amax(dim=-1) + ROUND - 1) // ROUND * ROUND).clamp(max=max_len)

    def batch(self, sample: Tensor, block: Tensor) -> masking.Batch:
        """These samples, (G,) indices, padded; see padded_to. block: (G,), see masking.Batch.

        With EOS_TAIL, answers end where the batch does.
        """
        width = int(self.padded_to(sample))
        ids = self.ids[sample.to(self.ids.device), :width].to(sample.device).long()
        ids = F.pad(ids, (0, width - ids.shape[1]), value=self.padding)
        extra = {name: tensor[sample] for name, tensor in self.extra.items()}
        return masking.Batch(ids, self.prompt_len[sample], self.length[sample].clamp(max=width), block, extra)


def make_samples(data: list | Tensor, knobs: SimpleNamespace, config) -> Samples:
    """Checks what read_pt has read against the model's config and the knobs, pads to MAX_LEN. Raises InputError."""
    path = knobs.DATA_PT
    if isinstance(data, Tensor):
        return text_samples(data, knobs, config)
    for i, entry in enumerate(data):
        if problem := sample_problem(entry, knobs.MAX_LEN):
            raise InputError(f"{path}: sample {i} {problem}")
    full_ids = [entry["full_ids"] for entry in data]
    ids = pad_sequence(full_ids, batch_first=True, padding_value=config.pad_token_id)  # (all samples, longest)
    check_ids(path, ids, config.vocab_size, knobs.MASK_ID)
    prompt_len = torch.tensor([entry["prompt_len"] for entry in data])
    length = torch.tensor([len(entry) for entry in full_ids])
    answered = (prompt_len < length).nonzero()[:, 0]
    used = answered[: knobs.MAX_SAMPLES or None]
    if not len(used):
        raise InputError(
            f"{path}: no usable sample; none of its {len(data)} samples has an answer. Write it anew with pt.py."
        )
    ids = F.pad(ids[used].int(), (0, knobs.MAX_LEN - ids.shape[1]), value=config.pad_token_id)  # (N, L)
    prompt_len, length, unanswered = prompt_len[used], length[used], len(data) - len(answered)
    end = ends(prompt_len, length, knobs, config)
    if knobs.EOS_TAIL:
        length = torch.full_like(length, knobs.MAX_LEN)
    return Samples(ids, prompt_len, length, used, unanswered, config.pad_token_id, end=end)


def text_samples(ids: Tensor, knobs: SimpleNamespace, config) -> Samples:
    """Samples of packed texts, (N, any) int32, which have no prompts; see make_samples."""
    if ids.shape[1] > knobs.MAX_LEN:
        problem = f"has samples of {ids.shape[1]} tokens, more than MAX_LEN={knobs.MAX_LEN}"
        raise InputError(f"{knobs.DATA_PT} {problem}; raise that, or run pt.py with --max_len {knobs.MAX_LEN}.")
    ids = ids[: knobs.MAX_SAMPLES or None]
    for first in range(0, len(ids), CHECKED):
        check_ids(knobs.DATA_PT, ids[first : first + CHECKED], config.vocab_size, knobs.MASK_ID, first)
    number = torch.arange(len(ids))
    prompt_len, length = torch.zeros_like(number), torch.full_like(number, ids.shape[1])
    end = ends(prompt_len, length, knobs, config)
    if knobs.EOS_TAIL:
        length = torch.full_like(number, knobs.MAX_LEN)
    return Samples(ids, prompt_len, length, number, 0, config.pad_token_id, knobs.MAX_LEN, end=end)


def ends(prompt_len: Tensor, length: Tensor, knobs: SimpleNamespace, config) -> Tensor | None:
    """Where samples end with PAD_TO "longest", (N,); None if they are to be padded to MAX_LEN.

    prompt_len, length: (N,). Block diffusion also trains the padding that fills up a last block.
    """
    if getattr(knobs, "PAD_TO", "max_len") == "max_len":  # objectives that mask all up to MAX_LEN lack this knob
        return None
    if not config.block_diffusion_size:
        return length
    first = torch.zeros_like(length) if config.block_diffusion_from == "sample" else prompt_len
    return masking.fill_blocks(first, length, knobs.MAX_LEN, config.block_diffusion_size)


# what a damaged zip, or a good zip with a bad pickle, makes zipfile and torch.load raise
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError)
UNREADABLE += (RuntimeError, LookupError, TypeError, ValueError)


def read_pt(path: str | Path) -> list | Tensor:
    """The list in a .pt file, read without running any code from it, or the ids of packed texts. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; write it with pt.py, or name another file.")
    if (ids := packing.read(path)) is not None:
        return ids
    damaged = f"{path} is truncated, damaged or was not written by pt.py; write it anew."
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip, but torch.load does not look at its checksums
            if file.testzip():
                raise InputError(damaged)
        samples = torch.load(path, weights_only=True)
    except UNREADABLE as error:
        raise InputError(damaged) from error
    if not isinstance(samples, list) or not samples:
        raise InputError(f"{path} does not hold a list of samples; write it anew with pt.py.")
    return samples


def stored_format(path: str | Path) -> PromptFormat | None:
    """How the questions in a .pt file were put, as pt.py has stored it; None if the file does not say. InputError."""
    if not zipfile.is_zipfile(path):
        return None  # packed texts
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if name.split("/")[1:] == [prompts.FILE]]
        return PromptFormat.from_json(file.read(names[0]), path) if names else None


def sample_problem(entry, max_len: int) -> str | None:
    """What is wrong with the form of one entry of a .pt file, or None."""
    if not isinstance(entry, dict) or not {"prompt_len", "full_ids"} <= entry.keys():
        return "lacks the keys prompt_len and full_ids; write the file anew with pt.py."
    ids, prompt_len = entry["full_ids"], entry["prompt_len"]
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.long or ids.dim() != 1:
        return "has full_ids that are not a 1-D LongTensor; write the file anew with pt.py."
    if type(prompt_len) is not int or not 0 <= prompt_len <= len(ids):
        return f"has prompt_len {prompt_len}, outside its {len(ids)} tokens; write the file anew with pt.py."
    if len(ids) > max_len:
        return f"has {len(ids)} tokens, more than MAX_LEN={max_len}; raise that, or run pt.py with --max_len {max_len}."
    return None


def check_ids(path: str | Path, ids: Tensor, vocab_size: int, mask_id: int, first: int = 0) -> None:
    """Refuses ids (N, any) outside the vocabulary or the mask itself; samples are counted from `first`. InputError."""
    outside = (ids < 0) | (ids >= vocab_size)
    for bad, why in (
        (
            outside,
            f"outside the model's vocabulary of {vocab_size:,}; prepare the file with the tokenizer of MODEL_NAME.",
        ),
        (ids == mask_id, "which is MASK_ID; samples hold no masks, so MASK_ID or the tokenizer is not the model's."),
    ):
        if bad.any():
            sample, position = (int(x) for x in bad.nonzero()[0])
            raise InputError(f"{path}: sample {first + sample} contains the id {int(ids[sample, position])}, {why}")


def schedule(blocks: Tensor, epochs: int, seed: int, length: Tensor | None = None, size: int = 0) -> Tensor:
    """The order of training: (P, 2) pairs (sample, block), from the seed alone, the same for every number of ranks.

    blocks: (N,) how many blocks each sample has. In every epoch each sample that has an unused block left comes once,
    in random order, with one of its unused blocks, uniformly: so each pair comes at most once, and samples whose blocks
    are used up drop out. Step s trains the pairs from (s - 1) * G on.
    length, size: of GROUP_BY_LENGTH, the samples' lengths (N,) and the global batch; see by_length.
    """

    def generator(*purpose):
        return torch.Generator().manual_seed(derive_seed(seed, *purpose))

    most = int(blocks.max())
    has = torch.arange(most) < blocks[:, None]  # (N, most)
    order = random_order(has, generator("turns"))  # this name and "rows" make the numbers
    pairs = []
    for epoch in range(min(epochs, most)):
        left = (blocks > epoch).nonzero()[:, 0]
        left = left[torch.randperm(len(left), generator=generator("rows", epoch))]
        if length is not None:
            begun = sum(map(len, pairs)) % size  # pairs of the global batch that the epoch before has begun
            left = by_length(left, length, size, -begun % size, generator("groups", epoch))
        pairs.append(torch.stack([left, order[left, epoch]], dim=1))
    return torch.cat(pairs)


def random_order(has: Tensor, generator: torch.Generator) -> Tensor:
    """The order in which each sample's blocks are used; those that it does not have come last. (N, S) each."""
    keys = torch.rand(has.shape, generator=generator)
    return keys.masked_fill(~has, 2.0).argsort(dim=1)


def by_length(order: Tensor, length: Tensor, size: int, head: int, generator: torch.Generator) -> Tensor:
    """Puts samples of like length into the same global batches of `size`, as transformers' group_by_length does.

    order: an epoch's samples, shuffled; length: of all samples. Mega-batches of 50 global batches, or of a quarter of
    the epoch if that is fewer, are sorted. Other than there, batches then come in random order, so that neither the
    learning rate nor the last step of a run depends on length; but the one with the longest sample is the first: what
    is too large for the memory ends the run at once. The first `head` samples, which fill up a batch of the epoch
    before, and those too few for another batch stay as they were shuffled.
    """
    whole = (len(order) - head) // size  # batches
    if whole < 1:
        return order
    body, batches = order[head : head + whole * size], []
    for mega in body.split(size * max(1, min(len(order) // (4 * size), 50))):
        parts = mega[length[mega].argsort(descending=True, stable=True)].split(size)
        batches += [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    longest = max(range(whole), key=lambda i: int(length[batches[i][0]]))  # each begins with its longest
    batches.insert(0, batches.pop(longest))
    return torch.cat([order[:head], *batches, order[head + whole * size :]])


def derive_seed(seed: int, *names) -> int:
    """An independent 63-bit seed for each purpose, the same on every machine."""
    return random.Random(repr((seed, *names))).getrandbits(63)
