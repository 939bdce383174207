"""Where this process runs: its number among all that the launcher started, and its device."""

import os
from dataclasses import dataclass

import torch


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
