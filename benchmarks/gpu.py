"""All that the docs say of a GPU, measured on one, with random weights of LLaDA-8B's shape that are made there.

    bash benchmarks/gpu.sh

Every row is measured by a process of its own, so that an out-of-memory, a crash or a row that takes too long costs only
that row; every part has a time limit. Each result is written to benchmarks/results.jsonl at once, as a JSON line with
the card, its driver and the versions; `python -m benchmarks.gpu_tables` turns them into the tables of
docs/performance.md. --toy runs the same with tiny models, on a CPU where there is no GPU; its lines go to the screen.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import gpu_rows
from blockwise import engine
from blockwise.cli import InputError, run_script

RESULTS = Path(__file__).with_name("results.jsonl")
VERSIONS = ("torch", "transformers", "deepspeed", "peft")


@dataclass
class Part:
    """Rows that belong together: what measures them, which, and the seconds that all of them may take."""

    measure: Callable[..., Iterator[dict]]
    limit: int
    rows: list[dict]


def training(script="train_blockwise", shape="8b", **knobs):
    return {"script": script, "shape": shape, **knobs}


def blockwise(rows, dropout, **knobs):
    return training(MICRO_BSIZE=rows, LORA_DROPOUT=dropout, **knobs)


# the rows that are wanted most come first in each part
PARTS = {
    "check": Part(gpu_rows.check_decoding, 60, [{}]),
    "losses": Part(
        gpu_rows.check_losses,
        120,
        [
            {"script": "train_blockwise"},
            {"script": "train_bd3lm", "ATTENTION": "sdpa"},
            {"script": "train_bd3lm", "ATTENTION": "flex"},
            {"script": "train_blockwise", "COMPILE": True},
        ],
    ),
    "train": Part(
        gpu_rows.train,
        420,
        [
            blockwise(16, 0.05, GRAD_ACC=2),  # the quickstart's
            blockwise(32, 0.0),
            blockwise(32, 0.05),  # the published defaults
            blockwise(32, 0.0, COMPILE=True),
            blockwise(16, 0.05),
            blockwise(16, 0.05, COMPILE=True),
            blockwise(32, 0.05, GRADIENT_CHECKPOINTING=True),
            blockwise(32, 0.0, GRADIENT_CHECKPOINTING=True),
            blockwise(32, 0.0, GRADIENT_CHECKPOINTING=True, COMPILE=True),
            blockwise(16, 0.0),
            blockwise(8, 0.05),
            blockwise(8, 0.0),
            blockwise(16, 0.05, LORA_RANK=64),
            blockwise(16, 0.05, LORA_RANK=16),
            blockwise(64, 0.0, GRADIENT_CHECKPOINTING=True),
        ],
    ),
    "plain": Part(gpu_rows.plain, 240, [{"shape": "8b", "batch": 8, "rank": 256}]),
    "decode": Part(gpu_rows.decode, 240, [{"shape": "8b", "batch": batch} for batch in (1, 64)]),
    "bd3lm": Part(
        gpu_rows.train,
        180,
        [
            training("train_bd3lm", MICRO_BSIZE=8, LORA_DROPOUT=0.0, ATTENTION="sdpa"),
            training("train_bd3lm", MICRO_BSIZE=8, LORA_DROPOUT=0.0, ATTENTION="flex"),
            training("train_bd3lm", MICRO_BSIZE=16, LORA_DROPOUT=0.0, ATTENTION="sdpa"),
            training("train_bd3lm", MICRO_BSIZE=16, LORA_DROPOUT=0.0, ATTENTION="flex"),
            training("train_fullseq", MICRO_BSIZE=16, LORA_DROPOUT=0.0),
        ],
    ),
    "full": Part(
        gpu_rows.train,
        120,
        [
            training(shape="1b", MICRO_BSIZE=32, LORA_RANK=0),
            training(shape="1b", MICRO_BSIZE=32, LORA_RANK=0, COMPILE=True),
        ],
    ),
    "start": Part(gpu_rows.start, 360, [{"shape": "1b"}, {"shape": "8b"}]),
}  # fmt: skip


def rows_of(part: Part, toy: bool, gpu: bool) -> list[dict]:
    """The rows of a part; for --toy shrunk, each once, and on a CPU without those that only a GPU can train."""
    if not toy:
        return part.rows
    rows = [gpu_rows.shrunk(row) for row in part.rows if gpu or not gpu_rows.needs_gpu(row)]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def measured(measure: Callable[..., Iterator[dict]], row: dict, limit: float) -> Iterator[dict]:
    """Yields what a process of its own finds, and last how that ended, if not well.

    measure(**row) yields results; each gets the status "ok". A torch.OutOfMemoryError becomes the status "out of
    memory". A process that takes longer than `limit` seconds is killed with all that it has started.
    """
    context, until = multiprocessing.get_context("fork"), time.monotonic() + limit
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(measure, row, sender))
    process.start()
    os.setpgid(process.pid, process.pid)  # a group of its own, with all that it starts
    sender.close()
    try:
        while receiver.poll(max(0.0, until - time.monotonic())):
            yield receiver.recv()
        yield {"status": f"stopped after {limit:.0f} s"}
    except EOFError:  # the process has closed its end
        process.join(10)
        if process.exitcode:
            yield {"status": f"failed with exit code {process.exitcode}"}
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def in_child(measure: Callable[..., Iterator[dict]], row: dict, sender) -> None:
    """Sends what measure(**row) yields."""
    try:
        for result in measure(**row):
            sender.send({"status": "ok", **result})
    except torch.OutOfMemoryError as error:
        sender.send({"status": "out of memory", "message": str(error).partition(". ")[0]})


def machine() -> dict:
    """Card, driver and versions."""
    found = {"device": f"{os.cpu_count()} CPU cores", "driver": None}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        found["device"], found["driver"] = said.split(", ")
    return found | {name: version(name) for name in VERSIONS} | {"cuda": torch.version.cuda}


def run_part(name: str, args: argparse.Namespace, about: dict) -> None:
    """Measures the rows of a part and writes a line for each result."""
    part, began = PARTS[name], time.monotonic()
    for row in rows_of(part, args.toy, about["driver"] is not None):
        left = part.limit - (time.monotonic() - began)
        results = (
            measured(part.measure, row, left) if left > 0 else [{"status": "not tried: its part had no time left"}]
        )
        for result in results:
            line = json.dumps({"benchmark": "gpu.py", "toy": args.toy, "part": name, "row": row, **result, **about})
            print(line, flush=True)
            if args.results:
                with open(args.results, "a") as file:
                    file.write(line + "\n")
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="these parts only")
    parser.add_argument("--toy", action="store_true", help="tiny models, also on a CPU")
    parser.add_argument("--results", help=f"file to which lines are added (default: {RESULTS.name}; with --toy none)")
    args = parser.parse_args()
    about = machine()
    if about["driver"] is None and not args.toy:
        raise InputError("no CUDA GPU was found; bash benchmarks/gpu.sh --toy tries everything on a CPU.")
    engine.import_muon()  # seconds, which each process would take anew
    args.results = args.results or (None if args.toy else RESULTS)
    for name in args.part:
        run_part(name, args, about)


if __name__ == "__main__":
    run_script(main)
