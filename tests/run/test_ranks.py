"""The port at which ranks meet; conftest.launch runs the real launcher while the launcher's own port is taken."""

import os
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import taken

from blockwise.cli import InputError
from blockwise.run import ranks


def test_a_taken_port_is_one_sentence(monkeypatch):
    with taken() as port:
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InputError, match=rf"^port {port}, .* is taken, .*: deepspeed --master_port {port + 1} "):
            ranks.join_group(lambda: dist.init_process_group("gloo"))


PARENT = 20_000 + os.getppid() % 9_500


@pytest.mark.parametrize(
    "environment, port",
    [
        ({"MASTER_PORT": 29500, "WORLD_SIZE": 2, "LOCAL_SIZE": 2}, PARENT),
        ({"MASTER_PORT": 29500, "WORLD_SIZE": 4, "LOCAL_SIZE": 2}, 29500),  # several machines have no common launcher
        ({"MASTER_PORT": 29500, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}, 29500),  # torchrun has opened it already
        ({"MASTER_PORT": 29500, "WORLD_SIZE": 2}, 29500),  # srun
        ({"MASTER_PORT": 29501, "WORLD_SIZE": 2, "LOCAL_SIZE": 2}, 29501),  # --master_port 29501
    ],
)
def test_only_the_launchers_default_port_is_replaced(monkeypatch, environment, port):
    environment, seen = {name: str(value) for name, value in environment.items()}, []
    monkeypatch.setattr(ranks, "os", SimpleNamespace(environ=environment, getppid=os.getppid))
    ranks.join_group(lambda: seen.append(environment["MASTER_PORT"]))
    assert seen == [str(port)]
