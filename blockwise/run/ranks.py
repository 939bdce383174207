"""The processes that the launcher started: which one this is, its device, and how they act together."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from blockwise.cli import InputError

DEFAULT_PORT = "29500"  # of the deepspeed launcher, the same for every run


@dataclass
class Ranks:
    """This process among all ranks, and its device. Without a launcher, it is the only one."""

    rank: int
    world_size: int
    local_rank: int  # on this machine
    local_world_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Reads what the deepspeed launcher or torchrun says, takes this rank's GPU or its share of the cores."""
        env = os.environ
        local_rank, world_size = int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_world_size = int(
            env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world_size
        )  # torchrun, deepspeed
        if torch.cuda.is_available() and env.get("DS_ACCELERATOR") != "cpu":
            torch.cuda.set_device(local_rank)
            device = torch.device("cuda", local_rank)
        else:
            device = torch.device("cpu")
            if local_world_size > 1 and "OMP_NUM_THREADS" not in env:  # else ranks would wait for each other's threads
                torch.set_num_threads(max(1, os.cpu_count() // local_world_size))
        return cls(int(env.get("RANK", 0)), world_size, local_rank, local_world_size, device)

    def on_all_ranks(self, function: Callable[[], Any]) -> list:
        """Runs a function on every rank. Returns what each of them returned, by rank, once all have finished.

        An InputError of any rank is raised on all, so that none waits for one that has ended.
        """
        try:
            mine = function(), None
        except InputError as error:
            mine = None, str(error)
        everyone = [mine]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, mine)
        for _, problem in everyone:
            if problem:
                raise InputError(problem)
        return [result for result, _ in everyone]

    def on_first_rank(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the first rank once all are here; they wait for it. Returns on all what it returned."""
        if self.world_size > 1:
            dist.barrier()
        return self.on_all_ranks(function if self.rank == 0 else lambda: None)[0]


def join_group(init: Callable[[], object]) -> None:
    """Lets the ranks talk to each other, through init(), which starts torch's process group. Raises InputError.

    They meet at a port of the first machine. If deepspeed's launcher has started all ranks on this machine and was
    given no port, it becomes one that depends on the launcher's number, so that several runs do not meet each other.
    """
    env = os.environ
    if env.get("MASTER_PORT") == DEFAULT_PORT and env.get("LOCAL_SIZE") == env["WORLD_SIZE"]:  # deepspeed's LOCAL_SIZE
        env["MASTER_PORT"] = str(20_000 + os.getppid() % 9_500)  # below the ports that systems give out by themselves
    try:
        init()
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = env["MASTER_PORT"]
        what = f"port {port}, at which the ranks meet, is taken, perhaps by another run on this machine"
        raise InputError(f"{what}; name another: deepspeed --master_port {int(port) + 1} {sys.argv[0]} ...") from error


def print0(ranks: Ranks, what: str, text: str) -> None:
    """Prints a line of the report, on rank 0 only."""
    if ranks.rank == 0:
        tqdm.write(f"{what:<13}{text}")
