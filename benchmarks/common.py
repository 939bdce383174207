"""What the benchmarks share: variants timed in turn, ratios with their spread, the hardware's ceiling, a JSON line."""

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from blockwise.cli import progress
from blockwise.models import llada
from experiments.make_base import make_config
from train_blockwise import TARGET_MODS

LLADA_8B = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "weight_tying": False, "mask_token_id": 126336,
    "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
ROOT = Path(__file__).parent.parent
MODEL_FLAGS = ("vocab_size", "d_model", "n_layers", "llada_8b")


def add_model_flags(parser, d_model=256, n_layers=4):
    """The flags of a model with random weights."""
    parser.add_argument("--vocab_size", type=int, default=126464)
    parser.add_argument("--d_model", type=int, default=d_model)
    parser.add_argument("--n_layers", type=int, default=n_layers)
    parser.add_argument("--llada_8b", action="store_true", help="LLaDA-8B's sizes instead of these three")


def random_model(args, device):
    """A model with random weights, made on the device, of the size that add_model_flags says."""
    config = make_config(args.vocab_size, args.d_model, args.n_layers)
    config = llada.LLaDAConfig.from_dict(LLADA_8B) if args.llada_8b else config
    config.max_position_embeddings = 4096
    return random_weights(config, device)


def random_weights(config, device):
    """A model with random weights, made on the device: fp32 on CPUs, else bf16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            return llada.LLaDAForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def parameters(config, rank):
    """Numbers of parameters of a model, and of adapters of `rank` on all its linears."""
    with torch.device("meta"):
        model = llada.LLaDAForCausalLM(config)
        base = model.num_parameters()
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGET_MODS))
    return base, model.num_parameters(only_trainable=True)


def in_turn(variants, repeats, device):
    """{name: function} -> {name: seconds of each repeat}. All run in turn; a first round, not counted, warms up."""
    times = {name: [] for name in variants}
    for repeat in progress(range(repeats + 1), desc="repeats"):
        for name, function in variants.items():
            spent = seconds(function, device)
            if repeat:
                times[name].append(spent)
    return times


def seconds(function, device):
    """Seconds of a call, with all that it has started on the device."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def watched(command, folder, events):
    """Runs a command in a folder; it must succeed. events: {name: function -> whether it has happened}, in their order.

    Returns seconds since the start: {name: when it was seen first}, with the end of the command under "end". An event
    that was only seen afterwards has that time, too.
    """
    began, seen, waiting = time.perf_counter(), {}, list(events)
    with open(folder / "output.txt", "w") as output:
        where = {"cwd": folder, "env": os.environ | {"PYTHONPATH": with_root(os.environ.get("PYTHONPATH"))}}
        process = subprocess.Popen(list(map(str, command)), **where, stdout=output, stderr=subprocess.STDOUT)
        running = True
        while running:
            running = process.poll() is None
            while waiting and events[waiting[0]]():
                seen[waiting.pop(0)] = time.perf_counter() - began
            time.sleep(0.02)
    if process.returncode or waiting:
        raise SystemExit(f"{(folder / 'output.txt').read_text()}\nerror: {command} failed, or never came to {waiting}")
    return seen | {"end": time.perf_counter() - began}


def with_root(path):
    """A PYTHONPATH with the repository in front."""
    return os.pathsep.join([str(ROOT), *([path] if path else [])])


def ratios(slow, fast):
    """Seconds of two variants, repeat by repeat -> how many times as fast the second is: median, lowest, highest."""
    each = [a / b for a, b in zip(slow, fast)]
    return statistics.median(each), min(each), max(each)


def matmul_ceiling(device, size=None):
    """Highest FLOP/s of a large matrix product, of this size if one is given, in the dtype of random_weights."""
    default, dtype = (2048, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    size = size or default
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(in_turn({"": lambda: a @ b}, 10, device)[""])


def copy_ceiling(device):
    """Highest bytes/s of copying 512 MB in memory."""
    source = torch.ones(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2**29 / min(in_turn({"": lambda: target.copy_(source)}, 5, device)[""])


def step_flops(config, rank, tokens, length, heads, backward=2):
    """Floating-point operations of a forward and backward pass with adapters of `rank` on all linears.

    tokens: of the batch; length: of a row; heads: positions with logits. Frozen weights get no gradient, so their
    backward pass costs as much as the forward one; an adapter's twice as much. backward=0: the forward pass only.
    """
    d, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    frozen = layers * (4 * d * d + 3 * d * mlp)
    adapters = layers * rank * (4 * (d + d) + 3 * (d + mlp))
    attention = layers * 2 * length * d  # scores and their product with the values, per token
    once = tokens * (frozen + attention) + heads * d * config.vocab_size
    return 2 * (
        once * (2 if backward else 1) + tokens * adapters * (1 + backward) + tokens * attention * (backward > 1)
    )


def peak_memory_mb():
    """The highest memory of this process so far: of the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is never below that of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def own_process(module, args, **changes):
    """Runs a benchmark with the flags of `args` and `changes`; returns the JSON line it ends with.

    In a process of its own, as memory that was used once counts from then on.
    """
    flags = {key: value for key, value in (vars(args) | changes).items() if value is not None and value is not False}
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_json(args, **results):
    """The line for machines: flags, hardware, versions, results."""
    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    machine = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else cores}
    machine |= {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed", "fastokens")}
    print(json.dumps({"benchmark": sys.argv[0].rpartition("/")[2], **vars(args), **machine, **results}, default=str))
