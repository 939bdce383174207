"""B1: block diffusion with blocks of several sizes against full-sequence masking, from scratch, on real text.

    python -m experiments.text
    python -m experiments.report

The text is what Python's own help says about the language (pydoc_data.topics), which every machine has. Every training
has the same tiny random model, rows and number of steps; a row of CSV has its held-out likelihood bound. The learning
rates, of full sequence and of block diffusion in blocks of 4, are chosen on seed 0, and other seeds are reported. What
is in the CSV is not run again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from blockwise.cli import InputError, progress, run_script
from blockwise.run import files
from experiments import run as runner
from experiments.claims import BD3LM, FULLSEQ, Setting, Task

COLUMNS = ["setting", "lr", "seed", "steps", "nats_per_token", "standard_error", "samples"]
RESULTS = runner.ROOT / "experiments/bounds.csv"
LENGTH, STEPS, DRAWS = 64, 400, 8  # tokens of a sample, steps of 16 samples, random masks of each held-out sample
SIZES = (1, 4, 16, LENGTH)  # tokens of a block
LRS = (1e-3, 3e-3, 1e-2)
KNOBS = {"MAX_LEN": LENGTH, "LORA_RANK": 0, "MICRO_BSIZE": 16, "SAVE_DTYPE": "float32", "EPOCHS": 20}
TEXT = Task("text", None, 0, 0, 0, KNOBS)


def name_of(size):
    return f"blocks of {size}"


def blocks(size):
    """Block diffusion with blocks of this size; all sizes have the learning rate that is chosen for blocks of 4."""
    lr = {"lrs": LRS} if size == 4 else {"lr_of": name_of(4)}
    return Setting(name_of(size), BD3LM, {"BLOCK_SIZE": size}, task=TEXT, **lr)


FULL = Setting("full sequence", FULLSEQ, {"BOUND_WEIGHTS": True}, task=TEXT, lrs=LRS)
SETTINGS = [FULL, *(blocks(size) for size in SIZES)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="that are reported")
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument("--work", default=str(runner.ROOT / "experiments/work"), help="folder of data and checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few steps and samples, only to see that it runs")
    args = parser.parse_args()
    if args.smoke and Path(args.results).resolve() == RESULTS:
        raise InputError("--smoke is too small for bounds.csv; name another --results.")
    if args.seeds < 1:
        raise InputError("--seeds must be at least 1.")
    work, results = runner.begin(args.work, args.results, COLUMNS)
    data = {name: pack(name, texts, work) for name, texts in split(topics).items()}
    while todo := missing(args.seeds, runner.read(results, COLUMNS)):  # first what chooses learning rates
        for run in progress(todo, desc="runs", unit="run"):
            runner.append(results, [row_of(run, data, work, *((2, 4) if args.smoke else (STEPS, 0)))])


def split(texts: dict[str, str]) -> dict[str, list[str]]:
    """Texts by name: every eighth, in alphabetical order, is held out."""
    ordered = [texts[name] for name in sorted(texts)]
    return {"train": [text for i, text in enumerate(ordered) if i % 8 < 7], "held_out": ordered[7::8]}


def pack(name: str, texts: list[str], work: Path) -> Path:
    """Writes texts as packed samples with the demo's tokenizer, unless it has been done. Returns the file."""
    path, folder = work / f"text_{name}.pt", work / f"text_{name}"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        files.replace(folder / "train.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
        how = runner.flags({"text": "text", "dataset": folder, "output": path, "model": runner.BASE})
        runner.command(work, "pt.py", *how, f"--max_len={LENGTH}")
    return path


def missing(seeds: int, rows: list[dict[str, str]]) -> list[runner.Run]:
    """The runs that are not among the rows and whose learning rate is known, by seed."""
    done, runs = {tuple(row[column] for column in COLUMNS[:3]) for row in rows}, []
    for setting in SETTINGS:
        lr = chosen_lr(setting, rows)
        runs += [runner.Run("B1", setting, lr, 0) for lr in setting.lrs]
        runs += [runner.Run("B1", setting, lr, seed) for seed in range(1, seeds + 1) if lr]
    return [run for run in sorted(runs, key=lambda run: run.seed) if run.key[1:] not in done]


def chosen_lr(setting: Setting, rows: list[dict[str, str]]) -> float | None:
    """The learning rate with the lowest bound on seed 0; None until all of them have been run."""
    grid = [row for row in rows if (row["setting"], row["seed"]) == (setting.lr_of or setting.name, "0")]
    bounds = {float(row["lr"]): float(row["nats_per_token"]) for row in grid}
    return min(LRS, key=bounds.get) if set(LRS) <= bounds.keys() else None


def row_of(run: runner.Run, data: dict[str, Path], work: Path, steps: int, samples: int) -> list:
    """Trains a random model, unless it has been done, and estimates its held-out bound. Returns a row of the CSV."""
    import torch

    from blockwise.data import read_pt
    from blockwise.decoding import decode
    from experiments import bound

    run = replace(run, setting=replace(run.setting, knobs=run.setting.knobs | {"TOTAL_TRAIN_STEPS": steps}))
    checkpoints, _ = runner.train(run, random_base(run.seed, work), data["train"], work)
    model, _ = decode.load(checkpoints[steps], "float32", torch.device("cpu"))
    batch = bound.held_out(read_pt(data["held_out"]), data["held_out"], model.config, number=samples)
    nats = bound.held_out_bound(model, batch, DRAWS, 32, torch.Generator().manual_seed(0))
    error = (nats.std() / len(nats) ** 0.5).item()
    return [*run.key[1:], steps, f"{nats.mean().item():.4f}", f"{error:.4f}", len(nats)]


def random_base(seed: int, work: Path) -> Path:
    """A tiny LLaDA with random weights and the demo's tokenizer, unless it has been made."""
    import torch

    from blockwise.models import hub, llada
    from experiments.make_base import make_config

    folder, unfinished = work / f"text_base{seed}", work / f"text_base{seed}_unfinished"
    if not folder.exists():
        torch.manual_seed(seed)
        llada.LLaDAForCausalLM(make_config(640, d_model=64, n_layers=3)).save_pretrained(unfinished)
        hub.load_tokenizer(runner.BASE).save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    run_script(main)
