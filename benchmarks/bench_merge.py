"""Seconds and peak memory of writing a merged checkpoint (merge.py), against a second model that is merged in memory.

    python -m benchmarks.bench_merge --gigabytes 1

Makes a checkpoint with random weights and LoRA adapters for it, then runs both ways in turn, each in its own process.
The plain way is what PEFT's documentation shows: load the base, merge_and_unload, save_pretrained. Prints seconds, the
highest memory of the process beyond what it had before the merge, their ratios with the spread, how far the two
results are apart, and a JSON line.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tqdm import tqdm

import llada
import merge
import sft
from experiments.make_base import make_config


def make(folder, gigabytes, d_model, vocab_size):
    """Writes folder/base, folder/adapter (PEFT) and folder/factors.pt (see merge.lora_factors)."""
    layer, ends = 13 * d_model**2, 2 * vocab_size * d_model  # parameters
    n_layers = max(1, round((gigabytes * 1e9 / 2 - ends) / layer))
    torch.manual_seed(0)
    model = llada.LLaDAForCausalLM(make_config(vocab_size, d_model, n_layers)).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=sft.LINEARS, init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.save_pretrained(folder / "adapter")
    torch.save(merge.lora_factors(model), folder / "factors.pt")


def ours(folder, out):
    out.mkdir()
    merge.merge_weights(folder / "base", out, torch.load(folder / "factors.pt"))
    merge.copy_side_files(folder / "base", out)


def plain(folder, out):
    model = llada.LLaDAForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, folder / "adapter", autocast_adapter_dtype=False)
    model.merge_and_unload().save_pretrained(out, max_shard_size="400MB")


def measure(way, folder, args):
    """Runs one way in this process, or makes the checkpoint. Prints seconds and MB of memory growth as JSON."""
    before, began = memory(), time.perf_counter()
    if way == "make":
        make(folder, args.gigabytes, args.d_model, args.vocab_size)
    else:
        {"ours": ours, "plain": plain}[way](folder, folder / way)
    print(json.dumps({"seconds": time.perf_counter() - began, "mb": memory() - before}))


def own_process(way, folder, args):
    """measure in a new process, as memory that has been used once counts for ever. Returns what it printed."""
    command = [sys.executable, "-m", "benchmarks.bench_merge", "--measure", way, folder]
    command += ["--gigabytes", args.gigabytes, "--d_model", args.d_model, "--vocab_size", args.vocab_size]
    done = subprocess.run(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory():
    """The highest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 * (1.024 if sys.platform != "darwin" else 1e-3)


def difference(folder):
    """The largest difference of two results, and the largest weight of one of them."""
    largest = highest = 0.0
    for file in llada.weight_files(folder / "ours"):
        with safe_open(file, "pt") as mine:
            for name in mine.offset_keys():
                for other in llada.weight_files(folder / "plain"):
                    with safe_open(other, "pt") as theirs:
                        if name in theirs.offset_keys():
                            a, b = mine.get_tensor(name).float(), theirs.get_tensor(name).float()
                            largest, highest = (
                                max(largest, (a - b).abs().max().item()),
                                max(highest, a.abs().max().item()),
                            )
    return largest, highest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--d_model", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=126464)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own_process("make", folder, args)
        size = sum(file.stat().st_size for file in llada.weight_files(folder / "base")) / 1e6
        tensor = args.vocab_size * args.d_model * 2 / 1e6
        runs = {"ours": [], "plain": []}
        for _ in tqdm(range(args.repeats), desc="repeats"):
            for way, results in runs.items():
                shutil.rmtree(folder / way, ignore_errors=True)
                results.append(own_process(way, folder, args))
        largest, highest = difference(folder)
    print(f"checkpoint of {size:,.0f} MB, largest tensor {tensor:,.0f} MB")
    for way, results in runs.items():
        seconds, grown = (statistics.median(run[key] for run in results) for key in ("seconds", "mb"))
        print(f"{way:<6} {seconds:6.2f} s, memory grows by {grown:6,.0f} MB")
    ratios = {}
    for key in ("seconds", "mb"):
        each = [theirs[key] / mine[key] for mine, theirs in zip(runs["ours"], runs["plain"])]
        ratios[key] = statistics.median(each), min(each), max(each)
        print("plain / ours, {}: {:.1f} ({:.1f} to {:.1f})".format(key, *ratios[key]))
    print(f"largest difference of the two results {largest:.2g}, of weights up to {highest:.2g}")
    machine = {"device": f"{os.cpu_count()} CPU cores", "torch": torch.__version__}
    shown = {key: value for key, value in vars(args).items() if key != "measure"}
    print(json.dumps(shown | machine | {"checkpoint_mb": size, "tensor_mb": tensor, "runs": runs, "ratios": ratios}))


if __name__ == "__main__":
    main()
