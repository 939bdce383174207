"""Texts as samples of one length for pre-training: packed one behind the other, in a file that is memory-mapped.

The file is in the safetensors format, with one tensor `ids` of (samples, max_len) int32: a billion tokens are 4 GB on
the disk and no Python objects. It is written as a stream and has its name only once it is whole.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blockwise.cli import InputError
from blockwise.run import files

HEADER = 256  # bytes for the header, which is known only at the end


@dataclass
class Packed:
    """What a file of packed texts holds."""

    samples: int
    left_over: int  # tokens behind the last whole sample, which are not in the file


def token_ids(
    batches: Iterable[list[str]], ids_of: Callable, end: int | None, max_tokens: int = 0
) -> Iterator[np.ndarray]:
    """The ids of texts, int32, one behind the other, up to max_tokens (0 = no limit). end: an id behind each text."""
    left = max_tokens or float("inf")
    for batch in batches:
        for ids in ids_of(batch):
            ids = ids.astype(np.int32) if end is None else np.append(ids, end).astype(np.int32)
            ids = ids[: int(min(len(ids), left))]
            left -= len(ids)
            yield ids
            if not left:
                return


def write(path: str | Path, pieces: Iterable[np.ndarray], max_len: int) -> Packed:
    """Cuts ids into samples of exactly max_len, whatever pieces they come in, and writes them. Raises InputError."""
    path, tail, samples = Path(path), np.empty(0, np.int32), 0
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with files.writing(f"--output {path}"), open(unfinished, "xb") as file:
            file.seek(8 + HEADER)
            for piece in pieces:
                tail = np.concatenate([tail, piece]) if len(tail) else piece
                whole = len(tail) // max_len
                file.write(tail[: whole * max_len].tobytes())
                tail, samples = tail[whole * max_len :], samples + whole
            if not samples:
                raise InputError(f"nothing to write: the texts have {len(tail)} tokens, one sample has {max_len}.")
            size = samples * max_len * 4
            header = {"ids": {"dtype": "I32", "shape": [samples, max_len], "data_offsets": [0, size]}}
            file.seek(0)
            file.write(HEADER.to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER))
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
            files.sync(path.absolute().parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return Packed(samples, len(tail))


def read(path: str | Path) -> Tensor | None:
    """The ids of a file of packed texts, (samples, max_len) int32, memory-mapped; None if it is another file."""
    try:
        with safe_open(path, "pt") as file:
            ids = file.get_tensor("ids") if list(file.keys()) == ["ids"] else None
    except (SafetensorError, OSError):
        return None
    return ids if ids is not None and ids.dtype == torch.int32 and ids.dim() == 2 else None
