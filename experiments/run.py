"""The paper's claims on a tiny model, each re-run by one command: real trainers, real decoder, a row of CSV per run.

    python -m experiments.run C1 C2 --seeds 5
    python -m experiments.report

A run is one training (shared by all settings that need the same one) and one decoding of the held-out problems. What is
in the CSV already is not run again, so that an interrupted command continues where it was. To run again what is in the
committed CSV, name another --results.
"""

import argparse
import csv
import hashlib
import importlib
import io
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from blockwise.cli import InputError, progress, run_script
from blockwise.run import files
from experiments.make_data import DIGITS

ROOT = Path(__file__).parent.parent
BASE = ROOT / "demo/base"
ROWS, BATCH, HELD_OUT = 1_600, 32, 300  # every training has the same rows; an epoch is 50 steps
BLOCK, GEN_LENGTH = 4, 16  # an answer has 16 tokens, the last 13 of them digits
KNOBS = {
    "MASK_ID": 4, "MAX_LEN": 52, "MAX_SAMPLES": 0, "BF16": False, "MICRO_BSIZE": BATCH, "LR": 2e-3,
    "LORA_RANK": 16, "LORA_DROPOUT": 0.0,
}  # fmt: skip
COLUMNS = ["claim", "setting", "seed", "steps", "supervised_tokens", "seconds", "pass_at_1", "token_accuracy", "n"]
BLOCKWISE, FULLSEQ, CAUSAL = "train_blockwise.py", "train_fullseq.py", "experiments/train_causal.py"


@dataclass
class Setting:
    """One line of a claim's table: how to train, and how to decode."""

    name: str
    script: str = BLOCKWISE  # "" = the base as it is
    knobs: dict = field(default_factory=dict)
    decoding: dict = field(default_factory=dict)


def decoding(block, steps_per_block=None, gen_length=GEN_LENGTH):
    steps = gen_length // block * (steps_per_block or block)
    return {"gen_length": gen_length, "block_length": block, "steps": steps}


BOTH = (("full sequence", FULLSEQ), ("block-wise", BLOCKWISE))
CLAIMS = {
    "C1": [Setting("base", ""), *(Setting(name, script) for name, script in BOTH)],
    "C2": [  # in 4 epochs, every row trains each of its 4 blocks once
        Setting("full sequence, 1 epoch", FULLSEQ),
        Setting("block-wise, 4 epochs", knobs={"EPOCHS": 4}),
        Setting("full sequence, 4 epochs", FULLSEQ, {"EPOCHS": 4}),
    ],
    "C3": [
        Setting(f"training {train}, decoding {block}", knobs={"BLOCK_SIZE": train}, decoding=decoding(block))
        for train in (1, 4, 8, 16)
        for block in (1, 4, 8, 16)
    ],
    "C4": [Setting(f"prefix noise {rate}", knobs={"PREFIX_MASK_RATE": rate}) for rate in (0.0, 0.1, 0.2, 0.5)],
    "C5": [Setting(f"suffix masked {rate}", knobs={"SUFFIX_MASK_PROB": rate}) for rate in (1.0, 0.5, 0.0)],
    "K1": [Setting("block-wise"), Setting("rest of the answer", CAUSAL)],
    "K2": [Setting("block-wise"), Setting("visible future", knobs={"SUFFIX_MASK_PROB": 0.0})],
    "K3": [  # 12 tokens of padding behind the answer
        Setting(f"{name}, {what}", script, {"EOS_TAIL": tail, "MAX_LEN": 64}, decoding(BLOCK, gen_length=28))
        for name, script in BOTH
        for what, tail in (("answer only", False), ("EOS tail", True))
    ],
    "K4": [
        Setting(f"{name}, {what}", script, {"BOUND_WEIGHTS": bound})
        for name, script in BOTH
        for what, bound in (("masked mean", False), ("1/p", True))
    ],
    "K5": [
        Setting(f"{name}, {steps} steps a block of 8", script, knobs, decoding(8, steps))
        for name, script, knobs in (("full sequence", FULLSEQ, {}), ("block-wise", BLOCKWISE, {"BLOCK_SIZE": 8}))
        for steps in (8, 4, 2, 1)
    ],
    "K6": [
        Setting(f"{name}, dropout {rate}", script, {"LORA_DROPOUT": rate})
        for name, script in BOTH
        for rate in (0.0, 0.05)
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="+", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ...")
    parser.add_argument("--results", default=str(ROOT / "experiments/results.csv"))
    parser.add_argument("--work", default=str(ROOT / "experiments/work"), help="folder of problems and checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few rows and problems, only to see that it runs")
    args = parser.parse_args()
    if unknown := set(args.claims) - CLAIMS.keys():
        raise InputError(f"{', '.join(sorted(unknown))}: no such claim; there are {', '.join(CLAIMS)}.")
    if args.smoke and Path(args.results).resolve() == ROOT / "experiments/results.csv":
        raise InputError("--smoke is too small for results.csv; name another --results.")
    import transformers

    transformers.utils.logging.disable_progress_bar()  # there is one of all runs
    rows, held_out = (4 * BATCH, 20) if args.smoke else (ROWS, HELD_OUT)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # at this size a GPU is no faster
    work, results = Path(args.work).absolute(), Path(args.results)
    try:
        work.mkdir(parents=True, exist_ok=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        files.lock(work)
        done = start_results(results)
    except OSError as error:
        raise InputError(f"--work {work} or --results {results} cannot be written: {error}") from error
    rows_file = prepare(work, rows)
    todo = [(claim, setting, seed) for seed in range(args.seeds) for claim in args.claims for setting in CLAIMS[claim]]
    for claim, setting, seed in progress(todo, desc="runs", unit="run"):
        once = not setting.script and seed  # there are no seeds in the base
        if not once and (claim, setting.name, str(seed)) not in done:
            folder, training = train(setting, seed, rows_file, work)
            score = evaluate(folder, setting.decoding or decoding(BLOCK), held_out)
            append(results, [claim, setting.name, seed, *training, *score, held_out])


def prepare(work, number):
    """Writes the training rows of all runs. Returns their file.

    Without the token that ends an answer: it would be a block of its own, which takes a share of the draws like the
    others, but which decoding never reaches.
    """
    output = work / f"train_{number}.pt"
    if not output.exists():
        command(work, "experiments/make_data.py", "--output", work / "data", "--rows", number, "--seed", 1)
        flags = ("--output", work / "whole.pt", "--model", BASE, "--dataset", work / "data", "--max_samples", 0)
        command(work, "pt.py", *flags)
        import torch

        import pt

        samples = torch.load(work / "whole.pt")
        pt.save([(sample["prompt_len"], sample["full_ids"][:-1].numpy()) for sample in samples], output)
    return output


def train(setting, seed, rows_file, work):
    """Trains, unless it has been done. Returns the checkpoint's folder, and steps, supervised tokens and seconds."""
    if not setting.script:
        return BASE, (0, 0, 0.0)
    defaults = vars(importlib.import_module(setting.script.removesuffix(".py").replace("/", ".")))
    knobs = KNOBS | {"SEED": seed} | ({} if setting.script == FULLSEQ else {"BLOCK_SIZE": BLOCK}) | setting.knobs
    knobs = {name: value for name, value in knobs.items() if value != defaults[name]}
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("blockwise/**/*.py"), ROOT / setting.script])
    code = [file.read_bytes() for file in (*sources, BASE / "model.safetensors", rows_file)]
    name = hashlib.sha256(repr((setting.script, sorted(knobs.items()), code)).encode()).hexdigest()[:12]
    folder = next(iter(work.glob(f"{name}_step*")), None)
    if not folder:
        for left in work.glob(f"{name}_*"):  # of an interrupted training
            files.lock(left)  # unless it is still running
            shutil.rmtree(left)
        knobs |= {"MODEL_NAME": BASE, "DATA_PT": rows_file, "CKPT_DIR": work / name}
        command(work, setting.script, *(f"--{key}={value}" for key, value in knobs.items()))
        (folder,) = work.glob(f"{name}_step*")
    with open(work / f"{name}_logs" / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    tokens = sum(int(row["supervised_tokens"]) for row in metrics)
    speed = statistics.median(float(row["tokens_per_second"]) for row in metrics)
    seconds = len(metrics) * BATCH * knobs.get("MAX_LEN", defaults["MAX_LEN"]) / speed
    return folder, (len(metrics), tokens, f"{seconds:.1f}")


def command(work, script, *flags):
    """Runs a script of the repository in the work folder, a trainer as its only rank. Raises InputError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    what = [ROOT / script] if "/" not in script else ["-m", script.removesuffix(".py").replace("/", ".")]
    whole = [str(part) for part in (sys.executable, *what, *flags)]
    done = subprocess.run(
        whole, env=os.environ | rank | {"PYTHONPATH": str(ROOT)}, cwd=work, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"this command failed: {' '.join(whole)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def evaluate(folder, settings, number):
    """Pass@1 of a checkpoint on the held-out problems, and the share of their digits that are right, by position."""
    import torch

    from blockwise import scoring
    from blockwise.decoding import decode
    from blockwise.decoding.settings import Settings
    from blockwise.prompts import prompt_ids, user_message
    from experiments.make_data import problem

    model, tokenizer = decode.load(folder, "float32", torch.device("cpu"))
    ends, rng = decode.end_ids(model, tokenizer), random.Random("held out")
    problems = [problem(rng) for _ in range(number)]
    prompts = [prompt_ids(tokenizer, [user_message(row["query"])]) for row in problems]
    right, digits = 0, []
    for start in range(0, number, 100):
        some = problems[start : start + 100]
        ids, _ = decode.decode(model, prompts[start : start + 100], Settings(**settings), ends)
        for answer, row in zip(ids.tolist(), some):
            wanted = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
            right += scoring.same_number(decode.completion(tokenizer, answer, ends), row["response"])
            digits += [a == b for a, b in zip(answer, wanted)][-DIGITS - 1 :]  # a sum has one more
    return f"{right / number:.4f}", f"{sum(digits) / len(digits):.4f}"


# ---------------------------------------------------------------- results.csv


def start_results(path):
    """Makes the CSV, or drops its unfinished last line. Returns the runs in it, {(claim, setting, seed)}."""
    whole, end, _ = (path.read_text() if path.exists() else "").rpartition("\n")
    files.replace(path, whole + end or ",".join(COLUMNS) + "\n")
    with open(path, newline="") as file:
        return {(row["claim"], row["setting"], row["seed"]) for row in csv.DictReader(file)}


def append(results, row):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row)
    with files.writing(f"--results {results}"):
        files.append(results, line.getvalue())


if __name__ == "__main__":
    run_script(main)
