"""Files that are there whole or not at all: written under another name, flushed to the disk, read back, renamed.

Functions raise OSError, as from a full disk; `writing` turns it into one sentence. Imports nothing heavy.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from cli import InputError

MANIFEST = "manifest.json"
PIECE = 2**24  # bytes that are written and read back at a time
locks = {}  # {folder: its open lock file}: to close one would unlock the folder


@contextmanager
def writing(what):
    """Raises InputError in place of an OSError, as from a full disk."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(f"{what} cannot be written: {error.strerror}{where}. What is there is kept.") from error


def sync(path):
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path, chunks):
    """Writes a new file from chunks of bytes to the disk, and reads each back. Returns what a manifest says of it."""
    digest, size = hashlib.sha256(), 0
    with open(path, "x+b") as file:
        for piece in pieces(chunks):
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS: drops the piece from memory, so that the disk is read
                os.posix_fadvise(file.fileno(), size, len(piece), os.POSIX_FADV_DONTNEED)
            if os.pread(file.fileno(), len(piece), size) != piece:
                raise OSError(errno.EIO, "reading it gives other bytes than were written")
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def pieces(chunks):
    """Yields the bytes of bytes-like chunks, at most PIECE at a time, as one call of the system takes at most 2 GB."""
    for chunk in chunks:
        data = memoryview(chunk)
        data = data.cast("B") if data.nbytes else b""
        for start in range(0, len(data), PIECE):
            yield bytes(data[start : start + PIECE])


def replace(path, content):
    """Writes a file, text or bytes, that is whole or as it was before. Runs beside this one use other names."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        write(unfinished, [content.encode() if isinstance(content, str) else content])
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def append(path, text):
    """Adds text to a file, all of it or none."""
    with open(path, "a+b", buffering=0) as file:
        size, data = file.seek(0, os.SEEK_END), text.encode()
        try:
            if file.write(data) < len(data):  # what a disk does that has room for a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def lock(folder, first=0, parts=0):
    """Locks parts of a folder, from number `first` on (0 parts: all from there), until this process has ended.

    Raises InputError if another process holds one of them.
    """
    with writing(folder):
        if folder not in locks:
            locks[folder] = open(folder / "lock", "a")  # noqa: SIM115
        try:
            fcntl.lockf(locks[folder], fcntl.LOCK_EX | fcntl.LOCK_NB, parts, first)
        except (BlockingIOError, PermissionError):  # either is said where a lock is held
            raise InputError(f"another run, or a process that it has left, works in {folder}.") from None


def unlock(folder, first):
    """Leaves the parts of a folder from number `first` on to other processes."""
    fcntl.lockf(locks[folder], fcntl.LOCK_UN, 0, first)


# ---------------------------------------------------------------- folders with a manifest


def publish(place, unfinished, folder, write_files, content):
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
        place.on_first_rank(make)
        parts = place.on_all_ranks(write_mine)
        place.on_first_rank(finish)
    except InputError:
        if place.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, content):
    text = json.dumps(content | {"sha256": digest(content)}, indent=2) + "\n"
    write(folder / MANIFEST, [text.encode()])


def read_manifest(folder):
    """The content of a folder's manifest. Raises ValueError if it is not what was written, OSError if it is missing."""
    content = json.loads((folder / MANIFEST).read_text())
    if not isinstance(content, dict) or content.pop("sha256", None) != digest(content):
        raise ValueError("its manifest is not what was written")
    return content


def check(folder, name, manifest):
    """Compares a file with its line of the manifest. Raises ValueError or OSError."""
    wanted, path = manifest["files"][name], folder / name
    if path.stat().st_size != wanted["bytes"]:
        raise ValueError(f"{name} has {path.stat().st_size:,} bytes, its manifest says {wanted['bytes']:,}")
    if sha256(path) != wanted["sha256"]:
        raise ValueError(f"{name} is not what was written: its sha256 differs")
