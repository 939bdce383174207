"""Starts trainings in a second instead of ten: imports everything once, then forks the ranks of each run.

Reads requests, a JSON line each: {"script", "argv", "ranks", "cwd", "output", "faults"}, and answers with the exit
codes of the ranks and the seconds that the run took. Nothing here runs a tensor operation before the fork. The events
of a run, at which it can be killed, are all that it does to files below its CKPT_DIR, and its optimizer steps.
"""

import errno
import json
import os
import resource
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import files  # noqa: E402
import sft  # noqa: E402

TIMEOUT = 100  # seconds in which all ranks must have ended by themselves
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    for line in sys.stdin:
        request = json.loads(line)
        began, port = time.monotonic(), free_port()
        ranks = [start(request, rank, port) for rank in range(request["ranks"])]
        codes = wait(ranks, began, request.get("faults", {}).get("together", False))
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - began}), flush=True)


def wait(ranks, began, together):
    """The exit codes of the ranks; None for one that did not end. together: one that is killed takes all along."""
    codes = [None] * len(ranks)
    while None in codes and time.monotonic() < began + TIMEOUT:
        for rank, pid in enumerate(ranks):
            if codes[rank] is None and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(done[1])
        if together and -signal.SIGKILL in codes:
            break
        time.sleep(0.02)
    for rank, pid in enumerate(ranks):
        if codes[rank] is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return codes


def start(request, rank, port):
    """Forks one rank, in a process group with rank 0. Returns its process id."""
    if pid := os.fork():
        return pid
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_SIZE": request["ranks"]}
    os.environ |= {k: str(v) for k, v in (env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}
    sys.argv = [request["script"], f"--local_rank={rank}", *request["argv"]]
    code = 1
    try:
        Faults(request.get("faults", {}), rank)
        runpy.run_path(str(ROOT / request["script"]), run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Faults:
    """Counts the events of a rank, and lets it be killed, or fail to write, at one of them.

    faults: "rank": whose events count, the others have no faults; "trace": file that gets a line for each event;
    "kill": number of the event before which the rank is killed; "full": that from which on the disk is full;
    "signal": [event, number of the signal that the rank sends to itself]; "after": seconds until it is killed;
    "bytes": no file can become larger; "folder": events are changes of files below it.
    """

    def __init__(self, faults, rank):
        if not faults or rank != faults.get("rank", 0):
            return
        self.faults, self.count, self.fsync, self.write = faults, 0, os.fsync, files.write
        self.trace = open(faults["trace"], "a") if "trace" in faults else None  # noqa: SIM115
        self.step = sft.train_step
        sys.addaudithook(self.audit)
        os.fsync, files.write, sft.train_step = self.counted_fsync, self.counted_write, self.counted_step
        if "bytes" in faults:
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults["bytes"], resource.RLIM_INFINITY))
        if "after" in faults:
            threading.Timer(faults["after"], os.kill, (os.getpid(), signal.SIGKILL)).start()

    def event(self, name, path=""):
        self.count += 1
        if self.trace:
            os.write(self.trace.fileno(), f"{self.count} {name} {path}\n".encode())
        if self.count == self.faults.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self.faults.get("signal", [0])[0]:
            os.kill(os.getpid(), self.faults["signal"][1])
        if self.count >= self.faults.get("full", self.count + 1) and name in ("open", "os.mkdir", "fsync", "chunk"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, name, args):
        if name in CHANGES or (name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            path = os.path.abspath(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
            if path.startswith(self.faults["folder"]):
                self.event(name, path)

    def counted_fsync(self, descriptor):
        self.event("fsync")
        self.fsync(descriptor)

    def counted_write(self, path, chunks):
        def counted():
            for i, chunk in enumerate(chunks):
                if i < 2:  # nothing of the file is written, or a part of it
                    self.event("chunk", os.path.abspath(path))
                yield chunk

        return self.write(path, counted())

    def counted_step(self, *args, **more):
        self.event("step")
        result = self.step(*args, **more)
        self.event("stepped")
        return result


if __name__ == "__main__":
    main()
