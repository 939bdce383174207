"""What gpu.py measures: each function takes a row and yields results, in a process of its own.

All models have random weights but demo/base, with which the GPU is compared with the CPU.
"""

import argparse
import copy
import gc
import importlib
import itertools
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import masking
from benchmarks import bench_train, common
from blockwise import data, prompts
from blockwise import engine as engines
from blockwise import trainer as trainers
from blockwise.decoding import decode as decoding
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.models import llada
from blockwise.run.ranks import DEFAULT_PORT, Ranks

WARM_UP, REPEATS = 2, 5  # steps
SHAPES = {
    "8b": common.LLADA_8B,
    "1b": common.LLADA_8B | {"d_model": 2048, "n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 6144},
    "toy": common.LLADA_8B | {
        "d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 192, "vocab_size": 640,
        "embedding_size": 640, "mask_token_id": 4, "eos_token_id": 1, "pad_token_id": 1,
    },
}  # fmt: skip
# of a prompt, an answer and a block; tokens that a step writes, by the size of the batch
DECODED = {"8b": (128, 256, 32, {1: (1, 4), 64: (8,)}), "toy": (16, 32, 8, {2: (4,)})}
WAYS = {
    "exact": {},
    "cache prefix": {"cache": "prefix"},
    "cache dual": {"cache": "dual"},
    "threshold, all of a block at once": {"threshold": 1e-12},
    "block diffusion": {},
    "exact, prompts of different lengths": {},
}
DEMO = {"LR": 2e-3, "LORA_RANK": 16, "LORA_DROPOUT": 0.0, "MICRO_BSIZE": 4, "MAX_LEN": 64, "BF16": False}


def needs_gpu(row: dict) -> bool:
    """Whether a row cannot be tried on a CPU, or takes too long there."""
    return bool(row.get("COMPILE")) or row.get("ATTENTION") == "flex"


def shrunk(row: dict) -> dict:
    """The same row with a tiny model."""
    small = {"shape": "toy", "MICRO_BSIZE": 2, "batch": 2, "rank": 4, "LORA_RANK": min(row.get("LORA_RANK", 8), 8)}
    asked = {*row, "LORA_RANK"} if "MICRO_BSIZE" in row else {*row}
    return row | {name: value for name, value in small.items() if name in asked}


def config_of(shape: str) -> llada.LLaDAConfig:
    return llada.LLaDAConfig.from_dict(SHAPES[shape])


def only_rank() -> Ranks:
    """This process as the only rank, as the launcher would say."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": DEFAULT_PORT}
    return Ranks.from_environment()


def ceiling(device: torch.device, shape: str) -> float:
    """TFLOP/s of a large matrix product; of a smaller one for --toy, where only the path counts."""
    return common.matmul_ceiling(device, 256 if shape == "toy" else None) / 1e12


def memory_gb(device: torch.device) -> dict:
    """What tensors took at most, and what PyTorch held for them."""
    if device.type == "cpu":
        return {"allocated_gb": common.peak_memory_mb() / 1e3, "reserved_gb": None}
    held = torch.cuda.max_memory_reserved(device)
    return {"allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9, "reserved_gb": held / 1e9}


# ---------------------------------------------------------------- the GPU against the CPU


def check_decoding() -> Iterator[dict]:
    """demo/base in fp32 on the GPU writes the tokens that it writes on the CPU: the share of them, for every way."""
    device, draw = Ranks.from_environment().device, random.Random(0)
    cpu, tokenizer = decoding.load(str(common.ROOT / "demo/base"), "float32", torch.device("cpu"))
    gpu = copy.deepcopy(cpu).to(device)
    questions = [f"{draw.randrange(10**digits)} + {draw.randrange(10**digits)}" for digits in (2, 5, 9, 13)]
    ids = [prompts.question_ids(tokenizer, question, prompts.METAMATH) for question in questions]
    ways = WAYS | {"threshold": {"threshold": 0.9}, "guidance": {"cfg_scale": 1.0}}
    for way, changes in ways.items():
        for model in (cpu, gpu):
            model.config.block_diffusion_size = 8 if way == "block diffusion" else None
        settings = replace(Settings(16, 8, 16), **changes)
        mine, theirs = (decoding.decode(model, ids, settings)[0].cpu() for model in (gpu, cpu))
        yield {"way": way, "same_tokens": (mine == theirs).float().mean().item(), "tokens": mine.numel()}


def check_losses(script: str, steps: int = 6, **knobs) -> Iterator[dict]:
    """Losses of a training of demo/base in fp32 with DeepSpeed, against a loop in plain PyTorch on the CPU.

    Both get the noise that the CPU draws: generators of CPUs and GPUs give other numbers.
    """
    script, ranks = importlib.import_module(script), only_rank()
    base = models.load_model(common.ROOT / "demo/base", torch.float32, ranks.device)
    knobs = knobs_of(script, base.config, **DEMO | knobs)
    noised = []  # the noise of each step, on the CPU

    def noise(batch, generator, knobs):
        batch = masking.Batch(*(part.cpu() for part in (batch.input_ids, batch.prompt_len, batch.length, batch.block)))
        noised.append(script.noise(batch, torch.Generator().manual_seed(generator.initial_seed()), knobs))
        return moved(noised[-1], ranks.device)

    run = make_run(script, base, knobs, ranks, steps, noise)
    found = [trainers.train_step(run, step).loss for step in range(1, steps + 1)]
    wanted = plain_losses(run.adapted, noised, knobs, steps)
    yield {"losses": found, "wanted": wanted, "difference": max(abs(a - b) for a, b in zip(found, wanted))}


def moved(noised: masking.Noised, device: torch.device) -> masking.Noised:
    """The same noise on another device."""
    tensors = [getattr(noised, name).to(device) for name in ("input_ids", "supervised", "targets", "weights")]
    more = [{name: value.to(device) for name, value in some.items()} for some in (noised.extra, noised.model_args)]
    return type(noised)(*tensors, *more)


def plain_losses(model, noised: list[masking.Noised], knobs: SimpleNamespace, steps: int) -> list[float]:
    """The losses of a training on the CPU without DeepSpeed."""
    if getattr(knobs, "ATTENTION", "sdpa") == "flex":  # which CPUs cannot train with
        model.set_attn_implementation("sdpa")
        noised = [masking.TwoStreams(**{one.name: getattr(part, one.name) for one in fields(part)}) for part in noised]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=knobs.WEIGHT_DECAY), []
    for done, whole in enumerate(noised):
        part = whole.rows(slice(None))
        logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
        loss = masking.weighted_nll(logits, part)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, knobs.MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = knobs.LR * engines.lr_factor(done, steps, knobs)
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- training


def knobs_of(script, config, **changes) -> SimpleNamespace:
    """The knobs of a training script, for a model of this config."""
    knobs = {name: value for name, value in vars(script).items() if name.isupper()}
    return SimpleNamespace(**knobs | {"MASK_ID": config.mask_token_id} | changes)


def make_run(script, model, knobs: SimpleNamespace, ranks: Ranks, steps: int, noise=None) -> SimpleNamespace:
    """What trainer.train_step needs: adapters, DeepSpeed's engine and random samples, as trainer.start makes it."""
    generator, number = torch.Generator().manual_seed(0), steps * knobs.MICRO_BSIZE * knobs.GRAD_ACC
    ids = torch.randint(8, model.config.vocab_size, (number, knobs.MAX_LEN), generator=generator)  # (N, L)
    prompt_len = torch.randint(knobs.MAX_LEN // 4, knobs.MAX_LEN // 2, (number,), generator=generator)
    length = torch.full_like(prompt_len, knobs.MAX_LEN)
    samples = data.Samples(ids.int(), prompt_len, length, torch.arange(number), 0)
    by_blocks = script.__name__ == "train_blockwise"
    blocks = masking.num_blocks(length - prompt_len, script.BLOCK_SIZE) if by_blocks else torch.ones_like(length)
    engines.start_group()
    model = engines.prepare_model(model, "random weights", knobs, ranks)
    adapted = copy.deepcopy(model).cpu() if noise else None  # before the first step
    return SimpleNamespace(
        knobs=knobs, ranks=ranks, samples=samples.to(ranks.device), noise=noise or script.noise, rollouts=None,
        plan=data.schedule(blocks, 1, knobs.SEED).to(ranks.device), loss=masking.weighted_nll,
        engine=engines.start_engine(model, knobs, steps), adapted=adapted,
    )  # fmt: skip


def train(script: str, shape: str, **knobs) -> Iterator[dict]:
    """Steps of a training script with DeepSpeed on one rank: seconds, operations, memory."""
    script, config, ranks = importlib.import_module(script), config_of(shape), only_rank()
    device = ranks.device
    knobs = knobs_of(script, config, **{"BF16": device.type == "cuda", **knobs})
    rate = ceiling(device, shape)
    run = make_run(script, common.random_weights(config, device), knobs, ranks, WARM_UP + REPEATS)
    seconds, steps = [], []
    for step in range(1, WARM_UP + REPEATS + 1):
        seconds.append(common.seconds(lambda step=step: steps.append(trainers.train_step(run, step)), device))
    tokens, supervised = steps[0].tokens, statistics.fmean(step.supervised for step in steps)
    length = tokens // (knobs.MICRO_BSIZE * knobs.GRAD_ACC)  # of a row: block diffusion has each sample twice
    yield {
        "seconds": seconds[WARM_UP:], "first_seconds": seconds[0], "tokens": tokens, "supervised": supervised,
        "flops": flops(config, knobs.LORA_RANK, tokens, length, supervised), "matmul_tflops": rate,
        "loss": steps[-1].loss, **memory_gb(device),
    }  # fmt: skip


def flops(config, rank: int, tokens: int, length: int, heads: float) -> float:
    """Operations of a step; with all weights trained, the backward pass costs twice the forward one everywhere."""
    if not rank:
        return 3 * common.step_flops(config, 0, tokens, length, heads, backward=0)
    return common.step_flops(config, rank, tokens, length, heads)


def plain(shape: str, batch: int, rank: int) -> Iterator[dict]:
    """The steps of bench_train.py, without DeepSpeed, in turn."""
    device = Ranks.from_environment().device
    sizes = {"llada_8b": shape == "8b", "vocab_size": 640, "d_model": 64, "n_layers": 2}
    args = argparse.Namespace(**sizes, batch=batch, length=256, rank=rank, seed=0)
    trainer, rate = bench_train.Trainer(args, device), ceiling(device, shape)
    variants = {
        name: step for name, step in bench_train.VARIANTS.items() if not (step.compiled and device.type == "cpu")
    }
    memory, losses = {}, {}
    for name, step in variants.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        losses[name] = trainer.run(step)
        memory[name] = memory_gb(device)
    times = common.in_turn({name: lambda step=step: trainer.run(step) for name, step in variants.items()}, 5, device)
    for name in variants:
        ratio = common.ratios(times[name], times["ours"])
        yield {
            "variant": name, "seconds": times[name], "times_ours": ratio, "loss": losses[name],
            "tokens": batch * args.length, "matmul_tflops": rate, **memory[name],
        }  # fmt: skip


# ---------------------------------------------------------------- decoding


@torch.no_grad()
def decode(shape: str, batch: int) -> Iterator[dict]:
    """Every way of decoding: seconds of all answers, and of each pass. Nothing ends an answer before its last token."""
    device, (prompt, length, block, tokens) = Ranks.from_environment().device, DECODED[shape]
    rate, model = ceiling(device, shape), common.random_weights(config_of(shape), device).eval()
    generator = random.Random(0)
    for per_step, way in itertools.product(tokens[batch], WAYS):
        if "threshold" in way and per_step != tokens[batch][0]:
            continue  # it writes all of a block in one step, whatever the number of steps
        model.config.block_diffusion_size = block if way == "block diffusion" else None
        shortest = prompt // 2 if "different" in way else prompt
        sizes = [prompt, *(generator.randint(shortest, prompt) for _ in range(batch - 1))]
        ids = [[generator.randrange(8, model.config.vocab_size) for _ in range(size)] for size in sizes]
        settings = replace(Settings(length, block, length // per_step), **WAYS[way])
        for _ in itertools.islice(decoding.stream(model, ids, settings), 3):
            pass  # warm-up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs = [passes(model, ids, settings, device) for _ in range(3 if batch == 1 else 2)]
        yield {
            "way": way, "tokens_per_step": per_step, "seconds": [sum(run) for run in runs], "written": batch * length,
            "passes": len(runs[0]), "pass_ms": [1e3 * statistics.median(run) for run in runs],
            "canvas": prompt + length, "matmul_tflops": rate, **memory_gb(device),
        }  # fmt: skip


def passes(model, ids: list[list[int]], settings: Settings, device: torch.device) -> list[float]:
    """Seconds of each step of decoding; what is done between two steps counts to the second."""
    steps, found, each = decoding.stream(model, ids, settings), [True], []
    while found.pop():
        each.append(common.seconds(lambda: found.append(next(steps, None)), device))
    return each[:-2]  # at its end, the stream yields the answers once more


# ---------------------------------------------------------------- start, checkpoint, resume point


def start(shape: str) -> Iterator[dict]:
    """The quickstart's training through the launcher on one GPU, two steps: seconds until, and of, what it does."""
    device, needed = Ranks.from_environment().device, {"8b": 45e9}.get(shape, 10e9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < needed:
            yield {"status": f"not tried: {folder} has less than {needed / 1e9:.0f} GB"}
            return
        config = config_of(shape)
        saving = common.seconds(lambda: write_base(config, folder / "base", device), device)
        size = sum(file.stat().st_size for file in (folder / "base").iterdir())
        samples = [{"prompt_len": 100, "full_ids": torch.randint(8, config.vocab_size, (250,))} for _ in range(64)]
        torch.save(samples, folder / "data.pt")
        yield {"base_gb": size / 1e9, "saving_base_seconds": saving, **launched(folder, config, device, shape)}


def write_base(config, folder: Path, device: torch.device) -> None:
    """Writes a base with random weights, and leaves the GPU to the process that is started next."""
    common.random_weights(config, device).to(torch.bfloat16).save_pretrained(folder, max_shard_size="5GB")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def launched(folder: Path, config, device: torch.device, shape: str) -> dict:
    """Runs the training; what happened when."""
    log, run = folder / "run/c_logs/train_loss.csv", folder / "run"
    knobs = {"MODEL_NAME": folder / "base", "DATA_PT": folder / "data.pt", "MASK_ID": config.mask_token_id}
    knobs |= {"BF16": device.type == "cuda", "TOTAL_TRAIN_STEPS": 2, "CKPT_DIR": "run/c", "GRAD_ACC": 2}
    knobs |= {"MICRO_BSIZE": 2 if shape == "toy" else 16}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", 1]
    command = [*launcher, common.ROOT / "train_blockwise.py", *(f"--{name}={value}" for name, value in knobs.items())]
    seen = common.watched(
        command,
        folder,
        {
            "first step": lambda: log.exists() and log.read_text().count("\n") > 1,
            "last step": lambda: log.read_text().count("\n") > 2,
            "resume point": lambda: (run / "c_logs/resume_step0002").exists() or (run / "c_step0002").exists(),
            "checkpoint": (run / "c_step0002").exists,
        },
    )
    metrics = (run / "c_logs/metrics.csv").read_text().splitlines()
    said = (folder / "output.txt").read_text()
    return {
        "seen": seen,
        "resume_seconds": seen["resume point"] - seen["last step"],
        "checkpoint_seconds": float(re.search(r"c_step0002/ in ([\d.]+) s", said)[1]),
        "metrics": dict(zip(metrics[0].split(","), map(float, metrics[-1].split(",")))),
        "said": [line for line in said.splitlines() if line.startswith(("checkpoint", "merged", " "))],
    }
