"""What ends a run from outside: a signal, a launcher that is gone, a rank that has died.

A signal only sets a flag, which the training loop shares among the ranks once a step. A thread looks after the rest: it
ends the process where the main thread cannot, because it waits for a rank that will never come.
"""

import math
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

import psutil

from blockwise.cli import STOPPED
from blockwise.run.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE = 10  # seconds in which the main thread may report itself what fails since another rank is gone
TERM = 25  # seconds from SIGTERM to the end of the optimizer step; launchers kill after 30
KILLERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed.run")


class Watch:
    """Watches the process while the `with` block runs. `stop`: what stops the run, such as a signal's name, or None.

    launchers: see launchers(), of the start of the process, as one that has ended since has no number any more.
    """

    def __init__(self, ranks: Ranks, launchers: list):
        self.ranks, self.launchers, self.stop, self.step_began = ranks, launchers, None, math.inf
        pids, first = ranks.on_all_ranks(os.getpid), ranks.rank - ranks.local_rank
        others = set(range(first, first + ranks.local_world_size)) - {ranks.rank}
        self.siblings = {rank: psutil.Process(pids[rank]) for rank in others}  # on this machine
        self.patience = TERM if any(map(kills, launchers)) else math.inf

    def __enter__(self):
        self.inbox, self.outbox = socket.socketpair()
        self.outbox.setblocking(False)
        # a handler waits for the main thread, which may be in a collective; this descriptor gets the number at once
        self.wakeup = signal.set_wakeup_fd(self.outbox.fileno())
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        since = time.monotonic()
        while isinstance(error, RuntimeError) and time.monotonic() < since + 3:  # of a collective that lacks a rank?
            if (rank := self.gone()) is not None:
                self.end(f"rank {rank} is gone")
            time.sleep(0.1)
        self.outbox.send(b"\0")
        self.thread.join()
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def step(self):
        """Marks an optimizer step; only that may not take long once SIGTERM has come, but saving may."""
        self.step_began = time.monotonic()
        yield
        self.step_began = math.inf

    def look(self):
        """The thread: reads the signals as they come, and looks at the other processes once a second."""
        since = terminated = math.inf
        while True:
            ready, *_ = select.select([self.inbox], [], [], 1.0)
            for number in self.inbox.recv(64) if ready else b"":
                if number == 0:
                    return
                self.stop = signal.Signals(number).name
                if number == signal.SIGTERM:
                    terminated = min(terminated, time.monotonic())
            if not self.stop and not all(map(alive, self.launchers)):
                self.stop = "the end of its launcher"
            if (rank := self.gone()) is not None:
                since = min(since, time.monotonic())
                if time.monotonic() > since + GRACE:
                    self.end(f"rank {rank} is gone")
            if time.monotonic() > max(terminated, self.step_began) + self.patience:
                self.end(f"the optimizer step did not end within {self.patience} s of SIGTERM")

    def gone(self) -> int | None:
        """A rank of this machine whose process has ended, or None."""
        return next((rank for rank, process in self.siblings.items() if not alive(process)), None)

    def end(self, reason: str) -> None:
        """Ends this process from any thread; one of the ranks that are left says why."""
        if all(rank > self.ranks.rank for rank, process in self.siblings.items() if alive(process)):
            print(
                f"\nerror: {reason}. The same command with --RESUME=True resumes the run.", file=sys.stderr, flush=True
            )
        os._exit(1)


def end_at_once() -> None:
    """Lets signals end the process with STOPPED, before and after the time of the Watch: nothing is lost then."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(STOPPED))


def launchers() -> list[psutil.Process]:
    """The launcher of this rank and, above DeepSpeed's, its runner; none if something else started it, as a shell.

    If one of them is killed, the ranks would run on with nobody to stop them.
    """
    try:
        parent = psutil.Process(os.getppid())
        runner = parent.parent() if KILLERS[0] in parent.cmdline() else None
    except psutil.Error:  # started by a system process that we may not look at, as under some Slurms
        return []
    return [process for process in (parent, runner) if process and kills(parent)]


def kills(launcher: psutil.Process) -> bool:
    """Whether it kills the ranks 30 seconds after SIGTERM, as DeepSpeed's and torch's do."""
    try:
        return any(name in part for part in launcher.cmdline() for name in KILLERS)
    except psutil.Error:  # it has ended
        return False


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.is_running()
    except psutil.NoSuchProcess:
        return False
