"""Files that exist whole or not at all, on a disk with room for a part of them; locks of folders."""

import resource
import signal
import subprocess

import pytest
from conftest import locked

from blockwise.cli import InputError
from blockwise.run import files


@pytest.fixture
def small_disk():
    """No file can become larger than 100 bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_append_adds_all_or_nothing(tmp_path, small_disk):
    path = tmp_path / "ö.csv"
    files.append(path, "ä" * 45 + "\n")
    with pytest.raises(OSError):
        files.append(path, "0123456789\n")  # there is room for nine bytes
    assert path.read_text() == "ä" * 45 + "\n"
    files.append(path, "12345678\n")
    assert path.read_text().endswith("\n12345678\n") and path.stat().st_size == 100


def test_replace_leaves_the_old_file_and_no_other(tmp_path, small_disk):
    path = tmp_path / "samples.pt"
    files.replace(path, b"old")
    with pytest.raises(OSError):
        files.replace(path, b"x" * 101)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    files.replace(path, "new ö")
    assert path.read_text() == "new ö" and list(tmp_path.iterdir()) == [path]


def test_a_manifest_notices_every_change_of_itself_and_of_files(tmp_path):
    line = files.write(tmp_path / "data", [b"some ", b"bytes"])
    files.write_manifest(tmp_path, {"step": 3, "files": {"data": line}})
    manifest = files.read_manifest(tmp_path)
    assert manifest == {"step": 3, "files": {"data": line}} and files.check(tmp_path, "data", manifest) is None
    text = (tmp_path / "manifest.json").read_text()
    for place in range(0, len(text) - 1, 7):
        changed = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        (tmp_path / "manifest.json").write_text(changed)
        if changed.split() != text.split():
            with pytest.raises(ValueError):
                files.read_manifest(tmp_path)
    for content, said in ((b"some byte", "says 10"), (b"some bytez", "sha256 differs")):
        (tmp_path / "data").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            files.check(tmp_path, "data", manifest)


def test_a_lock_keeps_other_processes_out(tmp_path):
    with locked(tmp_path):
        for shared in (False, True):
            with pytest.raises(InputError, match="another run, or a process that it has left, works in"):
                files.lock(tmp_path, shared)
    files.lock(tmp_path)  # as that process has ended
    with pytest.raises(subprocess.CalledProcessError), locked(tmp_path, shared=True):
        pass


def test_a_shared_lock_lets_other_ranks_in_and_keeps_other_runs_out(tmp_path):
    """As the first rank does it: it locks the folder for itself, then shares that lock with the ranks of its run."""
    files.lock(tmp_path)
    files.lock(tmp_path, shared=True)
    with locked(tmp_path, shared=True):  # another rank
        with pytest.raises(InputError):
            files.lock(tmp_path)
        files.lock(tmp_path, shared=True)  # a refusal takes nothing away
        with pytest.raises(subprocess.CalledProcessError), locked(tmp_path):  # another run
            pass
    files.lock(tmp_path)  # as the other rank has ended
