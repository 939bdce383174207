"""Starts trainings in a second instead of ten: imports everything once, then forks the ranks of each run.

Reads requests, a JSON line each: {"script", "argv", "ranks", "runs", "cwd", "output", "faults"}, and answers with the
exit codes of the ranks and the seconds that it took; runs: how many of the same start at the same time. Nothing here
runs a tensor operation before the fork. The events of a run, at which it can be killed, are all that it does to files
below its CKPT_DIR, and its optimizer steps.
"""

import errno
import json
import os
import re
import resource
import runpy
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import deepspeed

from blockwise import cli, engine, trainer
from blockwise.run import files

ROOT = Path(__file__).parent.parent.parent

TIMEOUT = 100  # seconds in which all ranks must have ended by themselves
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def prepare():
    """Does once what every run does in its first second."""
    engine.import_muon()
    assert deepspeed.ops.__compatible_ops__  # runs a C compiler


def free_ports(number):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def main():
    answers = open(os.dup(1), "w")  # noqa: SIM115
    os.dup2(2, 1)  # what a compiler says is no answer
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        began, ports = time.monotonic(), free_ports(request["runs"])
        ranks = [start(request, rank, port) for port in ports for rank in range(request["ranks"])]
        codes = wait(ranks, began, request["faults"].get("together", False))
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - began}), file=answers, flush=True)


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
        Faults(request["faults"], rank)
        cli.time = SimpleNamespace(sleep=lambda seconds: None)  # no launcher will end a rank that waits for that
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

    Events are changes of files below a folder, flushes, and optimizer steps; each has a line: `number kind path`,
    `number os.rename path to path`, `number step step`. faults: "folder": that folder; "rank": whose events, the others
    have no faults; "trace": file that gets the lines, of every rank another, with its number behind the name; "at":
    [pattern, number of a signal], which the rank gets before the first event whose line it matches; "full": pattern of
    the event from which on nothing can be written; "bytes": no file can become larger; "elsewhere": folder in which the
    rank works, as if it did not share that of the run.
    """

    def __init__(self, faults, rank):
        if not faults or rank != faults.get("rank", rank if "trace" in faults else 0):
            return
        self.faults, self.count, self.sent, self.full = faults, 0, False, False
        self.fsync, self.write, self.step = os.fsync, files.write, trainer.train_step
        self.trace = open(f"{faults['trace']}{rank}", "a") if "trace" in faults else None  # noqa: SIM115
        sys.addaudithook(self.audit)
        os.fsync, files.write, trainer.train_step = self.counted_fsync, self.counted_write, self.counted_step
        if "elsewhere" in faults:
            os.chdir(faults["elsewhere"])
        if "bytes" in faults:
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults["bytes"], resource.RLIM_INFINITY))

    def event(self, kind, what):
        self.count += 1
        line = f"{self.count} {kind} {what}"
        if self.trace:
            os.write(self.trace.fileno(), f"{line}\n".encode())
        if "at" in self.faults and not self.sent and re.search(self.faults["at"][0], line):
            self.sent = True
            os.kill(os.getpid(), self.faults["at"][1])
        self.full = self.full or ("full" in self.faults and re.search(self.faults["full"], line))
        if self.full and kind in ("open", "os.mkdir", "fsync", "chunk"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, kind, args):
        writes = kind == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or kind in CHANGES) and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(args[0])
            if kind in ("os.remove", "os.rmdir") and args[1] >= 0:  # in an open folder, as rmtree does
                path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
            path = os.path.abspath(path)
            if path.startswith(self.faults["folder"]):
                self.event(kind, f"{path} to {os.path.abspath(args[1])}" if kind == "os.rename" else path)

    def counted_fsync(self, descriptor):
        self.event("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self.fsync(descriptor)

    def counted_write(self, path, chunks):
        def counted():
            for i, chunk in enumerate(chunks):
                if i < 2:  # nothing of the file is written, or a part of it
                    self.event("chunk", os.path.abspath(path))
                yield chunk

        return self.write(path, counted())

    def counted_step(self, run, step, *more):
        self.event("step", step)
        result = self.step(run, step, *more)
        self.event("stepped", step)
        return result


if __name__ == "__main__":
    main()
