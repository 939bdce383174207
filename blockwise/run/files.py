"""Files that exist whole or not at all: written under another name, flushed to the disk, hashed, renamed.

Functions raise OSError, as from a full disk; `writing` turns it into one sentence. Imports nothing heavy.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from blockwise.cli import InputError

MANIFEST = "manifest.json"
PIECE = 2**24  # bytes that are written at a time
TENSOR_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # of a number in a safetensors file
locks = {}  # {folder: its open lock file}: whoever closes any descriptor of that file unlocks the folder


@contextmanager
def writing(what: str | Path):
    """Turns an OSError, as from a full disk, into an InputError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(f"{what} cannot be written: {error.strerror}{where}. What exists is kept.") from error


def sync(path: str | Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: str | Path, chunks: Iterable) -> dict:
    """Writes a new file from bytes-like chunks and flushes it to the disk. Returns what a manifest says of it."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            data = memoryview(chunk)
            data = data.cast("B") if data.nbytes else b""
            for start in range(0, len(data), PIECE):  # one call of the system takes at most 2 GB
                piece = data[start : start + PIECE]
                file.write(piece)
                digest.update(piece)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def line(data: bytes) -> dict:
    """What a manifest says of a file with these bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def existing(path: Path) -> dict:
    """Flushes a file that a library has written. Returns what a manifest says of it."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def replace(path: str | Path, content: str | bytes) -> None:
    """Writes a file, text or bytes, that is whole or as it was before. Runs at the same time use other names."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        write(unfinished, [content.encode() if isinstance(content, str) else content])
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def append(path: str | Path, text: str) -> None:
    """Adds text to a file, all of it or none."""
    with open(path, "a+b", buffering=0) as file:
        size, data = file.seek(0, os.SEEK_END), text.encode()
        try:
            if file.write(data) < len(data):  # what a disk does that has room for a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def lock(folder: Path, shared: bool = False) -> None:
    """Locks a folder until this process has ended, or makes its lock shared, without a moment in which there is none.

    shared: other processes may share the lock, as the ranks of a run do. Raises InputError if others are in the way.
    """
    with writing(folder):
        if folder not in locks:
            locks[folder] = open(folder / "lock", "a+")  # noqa: SIM115
        try:
            fcntl.lockf(locks[folder], (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # systems differ in which of them a held lock raises
            raise InputError(f"another run, or a process that it has left, works in {folder}.") from None


# ---------------------------------------------------------------- folders with a manifest


def publish(ranks, unfinished: Path, folder: Path, write_files: Callable[[Path], dict], content: dict) -> None:
    """Makes a folder of which all ranks write files; it has its name only once all of it is on the disk.

    write_files: the folder to write to -> {file name: what `write` returned}, of this rank's files. content: more for
    the manifest. Raises InputError on all ranks, with nothing left behind, if any rank cannot write.
    """

    def make():
        with writing(folder):
            unfinished.mkdir()

    def write_mine():
        with writing(folder):
            return write_files(unfinished)

    def finish():
        with writing(folder):
            write_manifest(unfinished, content | {"files": {k: v for part in parts for k, v in part.items()}})
            sync(unfinished)
            unfinished.rename(folder)  # fails if another run has made that folder meanwhile
            sync(folder.parent)

    try:
        ranks.on_first_rank(make)
        parts = ranks.on_all_ranks(write_mine)
        ranks.on_first_rank(finish)
    except InputError:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest(content: dict) -> bytes:
    """The bytes of a manifest."""
    return (json.dumps(content | {"sha256": digest(content)}, indent=2) + "\n").encode()


def write_manifest(folder: Path, content: dict) -> dict:
    return write(folder / MANIFEST, [manifest(content)])


def read_manifest(folder: Path) -> dict:
    """The content of a folder's manifest. Raises ValueError if it is not what was written, OSError if it is missing."""
    content = json.loads((folder / MANIFEST).read_text())
    if not isinstance(content, dict) or content.pop("sha256", None) != digest(content):
        raise ValueError("its manifest is not what was written")
    return content


def check(folder: Path, name: str, manifest: dict) -> None:
    """Compares a file with its line of the manifest. Raises ValueError or OSError."""
    wanted, path = manifest["files"][name], folder / name
    if path.stat().st_size != wanted["bytes"]:
        raise ValueError(f"{name} has {path.stat().st_size:,} bytes, its manifest says {wanted['bytes']:,}")
    if sha256(path) != wanted["sha256"]:
        raise ValueError(f"{name} is not what was written: its sha256 differs")


# ---------------------------------------------------------------- the safetensors format


def read_tensor_header(file) -> dict[str, dict]:
    """Reads the header of an open safetensors file: {tensor: {dtype, shape, data_offsets}}, in the data's order."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def tensor_header(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """The first bytes of a safetensors file of {tensor: (dtype, shape)}, whose data follow in that order."""
    content, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        offsets = [end, end := end + TENSOR_BYTES[dtype] * math.prod(shape)]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data 8-byte aligned
    return len(text).to_bytes(8, "little") + text
