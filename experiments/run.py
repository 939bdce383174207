"""The paper's claims on a tiny model, each re-run by one command: real trainers, real decoder, a row of CSV per run.

    python experiments/run.py C1 C2 --seeds 5
    python experiments/report.py

A run is one training (shared by all settings that need the same one) and one decoding of the held-out problems. What is
in the CSV already is not run again, so that an interrupted command continues where it was.
"""

import argparse
import csv
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from cli import InputError, run  # noqa: E402

BASE = ROOT / "demo/base"
STEPS, BATCH, ROWS, HELD_OUT = 100, 32, 16_000, 300  # no training is longer than ROWS, so that no row comes twice
BLOCK, GEN_LENGTH = 4, 16  # an answer has 16 tokens and the one that ends it: 5 blocks in training
KNOBS = {
    "MODEL": BASE, "MASK_ID": 4, "MAX_LEN": 64, "MAX_SAMPLES": 0, "BF16": False, "MICRO_BSIZE": BATCH, "LR": 2e-3,
    "LORA_R": 16, "LORA_ALPHA": 32, "LORA_DROPOUT": 0.0,
}  # fmt: skip
COLUMNS = ["claim", "setting", "seed", "steps", "supervised_tokens", "seconds", "pass_at_1", "token_accuracy", "n"]
BLOCKWISE, FULLSEQ, CAUSAL = "train_blockwise.py", "train_fullseq.py", "experiments/train_causal.py"


@dataclass
class Setting:
    """One line of a claim's table: how to train, and how to decode."""

    name: str
    script: str = BLOCKWISE  # "" = the base as it is
    knobs: dict = field(default_factory=dict)
    longer: int = 1  # times STEPS
    decoding: dict = field(default_factory=dict)


def decoding(block, steps_per_block=None, gen_length=GEN_LENGTH):
    steps = gen_length // block * (steps_per_block or block)
    return {"gen_length": gen_length, "block_length": block, "steps": steps}


BOTH = (("full sequence", FULLSEQ), ("block-wise", BLOCKWISE))
CLAIMS = {
    "C1": [Setting("base", ""), *(Setting(name, script) for name, script in BOTH)],
    "C2": [Setting("full sequence", FULLSEQ), Setting("block-wise, 5 times the steps", longer=5)],
    "C3": [
        Setting(f"training {train}, decoding {block}", knobs={"BLOCK_SIZE": train}, decoding=decoding(block))
        for train in (1, 4, 8, 17)
        for block in (1, 4, 8, 16)
    ],
    "C4": [Setting(f"prefix noise {rate}", knobs={"PREFIX_MASK_RATE": rate}) for rate in (0.0, 0.1, 0.2, 0.5)],
    "C5": [Setting(f"suffix hidden {rate}", knobs={"SUFFIX_MASK_PROB": rate}) for rate in (1.0, 0.5, 0.0)],
    "K1": [Setting("block-wise"), Setting("rest of the answer", CAUSAL)],
    "K2": [Setting("block-wise"), Setting("visible future", knobs={"SUFFIX_MASK_PROB": 0.0})],
    "K3": [
        Setting(f"{name}, {what}", script, {"EOS_TAIL": tail}, decoding=decoding(BLOCK, gen_length=32))
        for name, script in BOTH
        for what, tail in (("answer only", False), ("EOS tail", True))
    ],
    "K4": [
        Setting(f"{name}, {what}", script, {"BOUND_WEIGHTS": bound})
        for name, script in BOTH
        for what, bound in (("masked mean", False), ("1/p", True))
    ],
    "K5": [
        Setting(f"{name}, {steps} steps a block of 8", script, knobs, decoding=decoding(8, steps))
        for name, script, knobs in (("full sequence", FULLSEQ, {}), ("block-wise", BLOCKWISE, {"BLOCK_SIZE": 8}))
        for steps in (8, 4, 2, 1)
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="+", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ...")
    parser.add_argument("--results", default=str(ROOT / "experiments/results.csv"))
    parser.add_argument("--work", default=str(ROOT / "experiments/work"), help="folder of problems and checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few steps and problems, only to see that it runs")
    args = parser.parse_args()
    if unknown := set(args.claims) - CLAIMS.keys():
        raise InputError(f"{', '.join(sorted(unknown))}: no such claim; there are {', '.join(CLAIMS)}.")
    import transformers
    from tqdm import tqdm

    transformers.utils.logging.disable_progress_bar()  # there is one of all runs
    steps, held_out = (4, 20) if args.smoke else (STEPS, HELD_OUT)
    results, work = Path(args.results), Path(args.work).absolute()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # at this size a GPU is no faster
    work.mkdir(parents=True, exist_ok=True)
    rows_file = prepare(work, 1_200 if args.smoke else ROWS)
    todo = [(claim, setting, seed) for seed in range(args.seeds) for claim in args.claims for setting in CLAIMS[claim]]
    done = read(results)
    for claim, setting, seed in tqdm(todo, desc="runs", unit="run"):
        if (claim, setting.name, str(seed)) not in done:
            folder, training = train(setting, seed, steps, rows_file, work)
            score = evaluate(folder, setting.decoding or decoding(BLOCK), held_out)
            append(results, [claim, setting.name, seed, *training, *score, held_out])


def prepare(work, number):
    """Writes the training rows of all runs. Returns their file."""
    output = work / f"train_{number}.pt"
    if not output.exists():
        command("experiments/make_data.py", work, "--output", work / "data", "--rows", number, "--seed", 1)
        files = ("--output", output, "--model", BASE, "--dataset", work / "data")
        command("pt.py", work, *files, "--max_len", KNOBS["MAX_LEN"], "--max_samples", 0)
    return output


def train(setting, seed, steps, rows_file, work):
    """Trains, unless it has been done. Returns the checkpoint's folder, and steps, supervised tokens and seconds."""
    if not setting.script:
        return BASE, (0, 0, 0.0)
    steps *= setting.longer
    knobs = KNOBS | {"PT_FILE": rows_file, "SEED": seed, "TOTAL_TRAIN_STEPS": steps}
    knobs |= {} if setting.script == FULLSEQ else {"BLOCK_SIZE": BLOCK}
    knobs |= setting.knobs
    if steps * BATCH > ROWS:
        raise InputError(f"{setting.name}: {steps} steps of {BATCH} rows are more than ROWS={ROWS}.")
    name = hashlib.sha256(repr((setting.script, sorted(knobs.items()))).encode()).hexdigest()[:12]
    folder = work / f"{name}_step{steps:04d}"
    if not folder.exists():
        for left in work.glob(f"{name}_*"):  # of an interrupted training
            shutil.rmtree(left)
        command(
            setting.script, work, *(f"--{key}={value}" for key, value in (knobs | {"CKPT_DIR": work / name}).items())
        )
    with open(work / f"{name}_logs" / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    tokens = sum(int(row["supervised_tokens"]) for row in metrics)
    seconds = sum(BATCH * KNOBS["MAX_LEN"] / float(row["tokens_per_second"]) for row in metrics)
    return folder, (len(metrics), tokens, f"{seconds:.1f}")


def command(script, work, *flags):
    """Runs a script of the repository in the work folder, trainers with the launcher. Raises InputError."""
    start = [sys.executable]
    if Path(script).name.startswith("train_"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", 1, "--master_port", port]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    whole = [str(part) for part in (*start, ROOT / script, *flags)]
    done = subprocess.run(whole, env=env, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"this command failed: {' '.join(whole)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def evaluate(folder, settings, number):
    """Pass@1 and the share of right tokens of a checkpoint on the held-out problems."""
    import torch

    import decode
    import pt
    import scoring
    from experiments.make_data import problem
    from settings import Settings

    model, tokenizer = decode.load(folder, "float32", torch.device("cpu"))
    ends, rng = decode.end_ids(model, tokenizer), random.Random("held out")
    problems = [problem(rng) for _ in range(number)]
    prompts = [pt.prompt_ids(tokenizer, [pt.user_turn(row["query"])]) for row in problems]
    right = tokens = total = 0
    for start in range(0, number, 100):
        some = problems[start : start + 100]
        ids, _ = decode.decode(model, prompts[start : start + 100], Settings(**settings), ends)
        for answer, row in zip(ids.tolist(), some):
            wanted = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
            right += scoring.same_number(decode.completion(tokenizer, answer, ends), row["response"])
            tokens += sum(a == b for a, b in zip(answer, wanted))
            total += len(wanted)
    return f"{right / number:.4f}", f"{tokens / total:.4f}"


def read(results):
    """The runs that are in the CSV, {(claim, setting, seed)}."""
    if not results.exists():
        return set()
    with open(results, newline="") as file:
        return {(row["claim"], row["setting"], row["seed"]) for row in csv.DictReader(file)}


def append(results, row):
    new = not results.exists()
    with open(results, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)


if __name__ == "__main__":
    run(main)
