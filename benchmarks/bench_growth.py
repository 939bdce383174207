"""How cost grows: a training step over row length, batch and LoRA rank; pt.py and the start of a run over rows of data.

    python -m benchmarks.bench_growth --steps
    python -m benchmarks.bench_growth --data --rows 1000 10000 100000
    python -m benchmarks.bench_growth --text --tokens 10000 1000000
    python -m benchmarks.bench_growth --against FOLDER

Steps are those of bench_train.py ('ours'), each size in a process of its own. The data are the demo's additions; the
start of a run is the time from the launcher's command to the first line of train_loss.csv, with the demo's model on two
ranks. With --text it is that of train_fullseq.py on packed texts, here of random ids, and its memory; with --against,
that of another version of this repository, in turn with this one.
Prints tables and a JSON line.
"""

import argparse
import os
import shutil
import socket
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from blockwise import packing
from blockwise.cli import progress

ROOT = common.ROOT
RANKS = 2  # as in demo.sh
SWEEPS = {
    "length": (256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "rank": (16, 64, 256),
}


def grow_steps(args):
    """Seconds and memory of a step for each value of each sweep; the other sizes stay as the flags say."""
    results, sizes = [], [(name, value) for name, values in SWEEPS.items() for value in values]
    for name, value in progress(sizes, desc="sizes"):
        batch = {"batch": 2} if name == "length" else {}
        flags = argparse.Namespace(
            **{key: vars(args)[key] for key in ("vocab_size", "d_model", "n_layers", "llada_8b")}
        )
        run = common.own_process(
            "benchmarks.bench_train", flags, only="ours", repeats=args.repeats, **batch, **{name: value}
        )
        results.append({"what": name, "value": value, **run})
    print("what    value   s/step (min - max)       memory in MB")
    for row in results:
        print(f"{row['what']:<7} {row['value']:>5} {spread(row['seconds'], 3):<26} {row['mb']:8,.0f}")
    return results


def spread(seconds, digits):
    """The median and the range."""
    low, high = min(seconds), max(seconds)
    return f"{statistics.median(seconds):8.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def timed(command, folder, until=None):
    """Seconds that a command takes, or takes until a file has two lines. It must succeed."""
    events = {"until": lambda: until.exists() and until.read_text().count("\n") > 1} if until else {}
    seen = common.watched(command, folder, events)
    return seen["until" if until else "end"]


def start_command(rows_file, script="train_blockwise.py", root=ROOT):
    """A training with the demo's model, one step, by the scripts in `root`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    knobs = {"MODEL_NAME": ROOT / "demo/base", "DATA_PT": rows_file, "MASK_ID": 4, "MAX_LEN": 64, "MAX_SAMPLES": 0}
    knobs |= {"BF16": torch.cuda.is_available(), "LORA_RANK": 16, "TOTAL_TRAIN_STEPS": 1}
    launcher = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", RANKS, "--master_port", port]
    return [*launcher, root / script, "--CKPT_DIR=run/c", *(f"--{k}={v}" for k, v in knobs.items())]


def grow_data(args):
    """Seconds of pt.py, the size of its file, and seconds until a run's first step, for each number of rows."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rows in progress(args.rows, desc="rows"):
            make = [sys.executable, "-m", "experiments.make_data", "--output", folder / "data", "--rows", rows]
            timed(make, folder)
            prepare = [sys.executable, ROOT / "pt.py", "--model", ROOT / "demo/base", "--dataset", folder / "data"]
            prepare += ["--output", folder / "rows.pt", "--max_samples", 0]
            seconds, starts = timed(prepare, folder), []
            for _ in range(args.repeats):
                shutil.rmtree(folder / "run", ignore_errors=True)
                log = folder / "run/c_logs/train_loss.csv"
                starts.append(timed(start_command(folder / "rows.pt"), folder, until=log))
            size = (folder / "rows.pt").stat().st_size / 1e6
            results.append({"rows": rows, "pt_seconds": seconds, "mb": size, "start_seconds": starts})
            shutil.rmtree(folder / "data")
    print("     rows   pt.py in s   file in MB   s until the first step (min - max)")
    for row in results:
        print(f"{row['rows']:>9,} {row['pt_seconds']:12.1f} {row['mb']:12,.1f} {spread(row['start_seconds'], 1)}")
    return results


def compare_starts(args):
    """Seconds until a run's first step, and until its end, of this version and another one, in turn."""
    versions, results = {"here": ROOT, "there": Path(args.against).absolute()}, {"here": [], "there": []}
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name, "run/c_logs/train_loss.csv")
        timed([sys.executable, "-m", "experiments.make_data", "--output", folder / "data", "--rows", 1000], folder)
        prepare = [sys.executable, ROOT / "pt.py", "--model", ROOT / "demo/base", "--dataset", folder / "data"]
        timed([*prepare, "--output", folder / "rows.pt", "--max_samples", 0], folder)
        first_step = {"first step": lambda: log.exists() and log.read_text().count("\n") > 1}
        for _ in progress(range(args.repeats), desc="repeats"):
            for version, root in versions.items():
                shutil.rmtree(folder / "run", ignore_errors=True)
                results[version].append(
                    common.watched(start_command(folder / "rows.pt", root=root), folder, first_step)
                )
    for event in ("first step", "end"):
        seconds = {version: [seen[event] for seen in some] for version, some in results.items()}
        ratio, low, high = common.ratios(seconds["there"], seconds["here"])
        texts = [f"{version} {spread(some, 1).strip()} s" for version, some in seconds.items()]
        print(f"{event}: {', '.join(texts)}; {ratio:.2f} ({low:.2f} - {high:.2f}) times as fast")
    return results


def grow_text(args):
    """Seconds until the first step of a training on packed texts, and the memory of its first rank."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name, "run/c_logs/train_loss.csv")
        for tokens in progress(args.tokens, desc="tokens"):
            generator = np.random.default_rng(0)
            parts = (generator.integers(8, 256, min(2**20, tokens - i), np.int32) for i in range(0, tokens, 2**20))
            packing.write(folder / "text.pt", parts, 64)
            starts, memory = [], []
            for _ in range(args.repeats):
                shutil.rmtree(folder / "run", ignore_errors=True)
                starts.append(timed(start_command(folder / "text.pt", "train_fullseq.py"), folder, until=log))
                metrics = log.with_name("metrics.csv").read_text().splitlines()
                memory.append(float(metrics[1].split(",")[-1]))
            size = (folder / "text.pt").stat().st_size / 1e6
            results.append({"tokens": tokens, "mb": size, "start_seconds": starts, "memory_gb": max(memory)})
    print("       tokens   file in MB   s until the first step (min - max)   GB of a rank")
    for row in results:
        print(f"{row['tokens']:>13,} {row['mb']:12,.1f} {spread(row['start_seconds'], 1):<30} {row['memory_gb']:8.2f}")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_flags(parser)
    parser.add_argument("--steps", action="store_true", help="the training step")
    parser.add_argument("--data", action="store_true", help="pt.py and the start of a run")
    parser.add_argument("--text", action="store_true", help="the start of a run on packed texts")
    parser.add_argument("--against", help="folder of another version of this repository")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 1_000_000, 100_000_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    results = {"steps": grow_steps(args)} if args.steps else {}
    results |= {"data": grow_data(args)} if args.data else {}
    results |= {"text": grow_text(args)} if args.text else {}
    results |= {"starts": compare_starts(args)} if args.against else {}
    common.print_json(args, **results)


if __name__ == "__main__":
    main()
