"""Where this process runs: its number among all that the launcher started, and its device."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cli import InputError


@dataclass
class Place:
    """Where this process stands among all ranks, and its device. Without a launcher, it is the only one."""

    rank: int
    world: int
    local_rank: int  # on this machine
    local_world: int
    device: torch.device

    @classmethod
    def from_environment(cls):
        """Reads what the deepspeed launcher or torchrun says, takes this rank's GPU or its share of the cores."""
        env = os.environ
        local_rank, world = int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)  # torchrun's, deepspeed's name
        if torch.cuda.is_available() and env.get("DS_ACCELERATOR") != "cpu":
            torch.cuda.set_device(local_rank)
            device = torch.device("cuda", local_rank)
        else:
            device = torch.device("cpu")
            if local_world > 1 and "OMP_NUM_THREADS" not in env:  # else ranks would wait for each other's threads
                torch.set_num_threads(max(1, os.cpu_count() // local_world))
        return cls(int(env.get("RANK", 0)), world, local_rank, local_world, device)

    def on_all_ranks(self, function):
        """Runs a function on every rank. Returns what each of them returned, by rank, once all are through.

        An InputError of any rank is raised on all, so that none waits for one that has ended.
        """
        try:
            mine = function(), None
        except InputError as error:
            mine = None, str(error)
        everyone = [mine]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, mine)
        for _, problem in everyone:
            if problem:
                raise InputError(problem)
        return [result for result, _ in everyone]

    def on_first_rank(self, function):
        """Runs a function on the first rank once all are here; they wait for it. Returns on all what it returned."""
        if self.world > 1:
            dist.barrier()
        return self.on_all_ranks(function if self.rank == 0 else lambda: None)[0]
