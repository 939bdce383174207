"""Seconds and peak memory of writing a merged checkpoint, against a second model that is merged in memory.

    python -m benchmarks.bench_merge --gigabytes 1

Makes a checkpoint with random weights and LoRA adapters for it, then runs both ways in turn, each in its own process.
The plain way is what PEFT's documentation shows: load the base, merge_and_unload, save_pretrained. Prints seconds, the
highest memory of the process beyond what it had before the merge, their ratios with the spread, how far the two
results are apart, and a JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from benchmarks import common
from blockwise.cli import progress
from blockwise.models import checkpoint, llada
from blockwise.models.hub import weight_files
from experiments.make_base import make_config
from train_blockwise import TARGET_MODS


def make(folder, gigabytes, d_model, vocab_size):
    """Writes folder/base, folder/adapter (PEFT) and folder/factors.pt (see checkpoint.updates)."""
    layer, ends = 13 * d_model**2, 2 * vocab_size * d_model  # parameters
    n_layers = max(1, round((gigabytes * 1e9 / 2 - ends) / layer))
    torch.manual_seed(0)
    model = llada.LLaDAForCausalLM(make_config(vocab_size, d_model, n_layers)).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGET_MODS, init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.save_pretrained(folder / "adapter")
    torch.save(checkpoint.updates(model), folder / "factors.pt")


def ours(folder, out):
    out.mkdir()
    checkpoint.merge_weights(folder / "base", out, torch.load(folder / "factors.pt"))
    checkpoint.copy_side_files(folder / "base", out)


def plain(folder, out):
    model = llada.LLaDAForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder / "adapter", autocast_adapter_dtype=False)
    model.merge_and_unload().save_pretrained(out, max_shard_size="400MB")


def measure(way, folder, args):
    """Runs one way in this process, or makes the checkpoint. Prints seconds and MB of memory growth as JSON."""
    before, began = common.peak_memory_mb(), time.perf_counter()
    if way == "make":
        make(folder, args.gigabytes, args.d_model, args.vocab_size)
    else:
        {"ours": ours, "plain": plain}[way](folder, folder / way)
    print(json.dumps({"seconds": time.perf_counter() - began, "mb": common.peak_memory_mb() - before}))


def difference(folder):
    """The largest difference of two results, and the largest weight of one of them."""
    gap = largest = 0.0
    theirs = {name: file for file in weight_files(folder / "plain") for name in names(file)}
    for file in weight_files(folder / "ours"):
        for name in names(file):
            with safe_open(file, "pt") as a, safe_open(theirs[name], "pt") as b:
                mine, other = a.get_tensor(name).float(), b.get_tensor(name).float()
            gap, largest = max(gap, (mine - other).abs().max().item()), max(largest, mine.abs().max().item())
    return gap, largest


def names(file):
    with safe_open(file, "pt") as tensors:
        return list(tensors.offset_keys())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--d_model", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=126464)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=("make", "ours", "plain"), help="this alone, in --folder")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.way, Path(args.folder), args)
        return
    runs, size, gap, largest = run_both(args)
    report(args, runs, size, gap, largest)


def run_both(args: argparse.Namespace) -> tuple[dict[str, list[dict]], int, float, float]:
    """The measurements of each way, the checkpoint's bytes, and see difference. Ends if the results differ too much."""
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), {"plain": [], "ours": []}
        common.own_process(__spec__.name, args, way="make", folder=name)
        size = sum(file.stat().st_size for file in weight_files(folder / "base"))
        for _ in progress(range(args.repeats), desc="repeats"):
            for way, results in runs.items():
                shutil.rmtree(folder / way, ignore_errors=True)
                os.sync()  # so that no run waits for the disk because of the one before it
                results.append(common.own_process(__spec__.name, args, way=way, folder=name))
        gap, largest = difference(folder)
    if gap > 2**-7 * largest:  # each way rounds once or twice to bf16, with 8 bits
        raise SystemExit(f"the two ways differ by up to {gap}, at weights of up to {largest}")
    return runs, size, gap, largest


def report(args: argparse.Namespace, runs: dict[str, list[dict]], size: int, gap: float, largest: float) -> None:
    """Prints what was measured, and the JSON line."""
    print(f"checkpoint of {size / 1e6:,.0f} MB, largest tensor {args.vocab_size * args.d_model * 2 / 1e6:,.0f} MB")
    ratios = {}
    for way, results in runs.items():
        seconds, grown = (statistics.median(run[key] for run in results) for key in ("seconds", "mb"))
        print(f"{way:<6} {seconds:6.2f} s, memory grows by {grown:6,.0f} MB")
    most = max(run["mb"] for run in runs["ours"])
    limit = 1.3 * args.vocab_size * args.d_model * 2 / 1e6 + 300
    print(f"ours: at most {most:,.0f} MB; 1.3 times the largest tensor and 300 MB are {limit:,.0f}")
    for key, what in (("seconds", "times as fast"), ("mb", "times less memory")):
        ratios[key] = common.ratios([run[key] for run in runs["plain"]], [run[key] for run in runs["ours"]])
        print("{}: {:.1f} ({:.1f} to {:.1f})".format(what, *ratios[key]))
    print(f"largest difference of the two results {gap:.2g}, of weights up to {largest:.2g}")
    ceiling = common.copy_ceiling(torch.device("cpu"))
    share = size / statistics.median(run["seconds"] for run in runs["ours"]) / ceiling
    print(f"ours: {share:.0%} of the rate at which memory is copied ({ceiling / 1e9:.1f} GB/s)")
    common.print_json(
        args,
        tmpdir=tempfile.gettempdir(),
        checkpoint_mb=size / 1e6,
        runs=runs,
        ratios=ratios,
        copy_gb_per_s=ceiling / 1e9,
    )


if __name__ == "__main__":
    main()
