"""R1: GRPO on the demo's base, by estimator, against SFT on the base's own right answers.

    python -m experiments.rl --seeds 3 --jobs 2

Each training has the same rounds, rollouts and optimizer steps; the baseline (rejection sampling) draws as many answers
and takes as many steps on the right ones. Every checkpoint answers 200 held-out problems, greedily, as demo.sh does,
with the paired test of eval.py against the base. Seed 0 chooses the learning rate of each, and is not reported. What is
in the CSV is not run again.
"""

import argparse
import csv
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

from blockwise import scoring
from blockwise.cli import InputError, progress, read_jsonl, run_script
from blockwise.run import files
from experiments import run as runner

GRPO, SFT, BASE = "experiments/train_digits.py", "train_blockwise.py", "base"
RESULTS = runner.ROOT / "experiments/rl.csv"
COLUMNS = ["setting", "lr", "seed", "round", "reward", "pass_at_1", "only_tuned", "only_base", "p"]
COMMON = {"MODEL_NAME": runner.BASE, "MASK_ID": 4, "MAX_LEN": 64, "BF16": False, "LORA_RANK": 16, "LORA_DROPOUT": 0.0,
          "MICRO_BSIZE": 64, "BLOCK_SIZE": 4}  # fmt: skip
ROUNDS, EVERY, PROMPTS, GROUP, UPDATES = 12, 6, 8, 16, 4  # EVERY: rounds between checkpoints
ROLLOUTS = {"REWARD": "digits", "PROMPTS": PROMPTS, "GROUP": GROUP, "GEN_LENGTH": 16, "STEPS": 16, "UPDATES": UPDATES}
OWN = "SFT on own right answers"
SETTINGS = {
    "block": {"ESTIMATOR": "block"},
    "trace": {"ESTIMATOR": "trace"},
    "onestep": {"ESTIMATOR": "onestep"},
    "onestep, 15 % of the prompt masked": {"ESTIMATOR": "onestep", "P_MASK_PROMPT": 0.15},
    OWN: {"WARMUP_RATIO": 0.0, "LR_SCHEDULE": "constant"},
}
LRS = (1e-4, 3e-4, 1e-3)
DECODING = ("--gen_length", 16, "--block_length", 4, "--steps", 16, "--batch_size", 50)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="that are reported")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each on one core")
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument("--figure", default=str(runner.ROOT / "experiments/figures/R1.png"))
    parser.add_argument("--work", default=str(runner.ROOT / "experiments/work"), help="folder of data and checkpoints")
    parser.add_argument("--smoke", action="store_true", help="two rounds and few problems, only to see that it runs")
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise InputError("--seeds and --jobs must be at least 1.")
    if args.smoke and Path(args.results).resolve() == RESULTS:
        raise InputError("--smoke is too small for rl.csv; name another --results.")
    work, results = runner.begin(args.work, args.results, COLUMNS)
    run_all(work, results, args)
    rows = runner.read(results, COLUMNS)
    print(table(rows))
    figure(rows, Path(args.figure))


def run_all(work: Path, results: Path, args: argparse.Namespace) -> None:
    """Runs what is missing, and appends its rows. First what chooses learning rates."""
    for name, number, seed in (("train", 6400, 1), ("held_out", 20 if args.smoke else 200, 2)):
        runner.command(
            work, "experiments/make_data.py", "--output", work / f"rl_{name}", "--rows", number, "--seed", seed
        )
    share = fmean(solved(runner.BASE, work))  # before several processes want it at a time
    if not any(row["setting"] == BASE for row in runner.read(results, COLUMNS)):
        runner.append(results, [[BASE, 0, 0, 0, "", f"{share:.4f}", "", "", ""]])
    while todo := missing(args.seeds, runner.read(results, COLUMNS)):
        pool = ThreadPoolExecutor(args.jobs)
        try:
            started = [pool.submit(rows_of, *run, work, 2 if args.smoke else ROUNDS) for run in todo]
            for job in progress(as_completed(started), total=len(started), desc="runs", unit="run"):
                runner.append(results, job.result())
        finally:
            pool.shutdown(cancel_futures=True)


def missing(seeds: int, rows: list[dict[str, str]]) -> list[tuple[str, float, int]]:
    """The trainings (setting, learning rate, seed) that are not among the rows and whose learning rate is known."""
    done = {(row["setting"], row["lr"], row["seed"]) for row in rows}
    runs = [(setting, lr, 0) for setting in SETTINGS for lr in LRS]
    chosen = {setting: lr for setting in SETTINGS if (lr := chosen_lr(setting, rows))}
    runs += [(setting, lr, seed) for seed in range(1, seeds + 1) for setting, lr in chosen.items()]
    return [run for run in runs if (run[0], f"{run[1]:g}", str(run[2])) not in done]


def chosen_lr(setting: str, rows: list[dict[str, str]]) -> float | None:
    """The learning rate with the best Pass@1 after the last round on seed 0; None until all of them have been run."""
    last = {
        float(row["lr"]): float(row["pass_at_1"]) for row in rows if (row["setting"], row["seed"]) == (setting, "0")
    }
    return max(LRS, key=last.get) if set(LRS) <= last.keys() else None


def rows_of(setting: str, lr: float, seed: int, work: Path, rounds: int) -> list[list]:
    """Trains, unless it has been done, and scores each checkpoint: rows of the CSV."""
    name = f"rl_{list(SETTINGS).index(setting)}_{lr:g}_{seed}_{rounds}"
    train(name, setting, lr, seed, work, rounds)
    with open(work / f"{name}_logs/metrics.csv", newline="") as file:
        rewards = [float(row.get("reward", "nan")) for row in csv.DictReader(file)]
    base, rows = solved(runner.BASE, work), []
    for folder in sorted(work.glob(f"{name}_step*")):
        step = int(folder.name.rpartition("step")[2])
        tuned = solved(folder, work)
        gained, lost, _, p = scoring.paired(base, tuned)
        reward = fmean(rewards[max(0, step - EVERY * UPDATES) : step])  # since the checkpoint before
        scores = [f"{reward:.4f}", f"{fmean(tuned):.4f}", gained, lost, f"{p:.2g}"]
        rows.append([setting, f"{lr:g}", seed, step // UPDATES, *scores])
    return rows


def train(name: str, setting: str, lr: float, seed: int, work: Path, rounds: int) -> None:
    """Runs a training, unless it is finished."""
    if (work / f"{name}_finished").exists():
        return
    for left in work.glob(f"{name}_*"):
        shutil.rmtree(left)
    knobs = COMMON | SETTINGS[setting] | {"LR": lr, "SEED": seed, "CKPT_DIR": work / name}
    knobs |= {"SAVE_EVERY": EVERY * UPDATES}
    if setting == OWN:
        data = own_answers(seed, work, rounds)
        steps = {"TOTAL_TRAIN_STEPS": rounds * UPDATES, "MAX_SAMPLES": 0, "GRAD_ACC": PROMPTS * GROUP // 64}
        runner.command(work, SFT, *runner.flags(knobs | steps | {"DATA_PT": data}))
    else:
        data = work / "rl_train/train.jsonl"
        runner.command(work, GRPO, *runner.flags(knobs | ROLLOUTS | {"ROUNDS": rounds, "DATA": data}))
    (work / f"{name}_finished").touch()


def own_answers(seed: int, work: Path, rounds: int) -> Path:
    """As many answers of the base as there are rollouts: the right ones as a .pt file, repeated for all steps."""
    lines = (work / "rl_train/train.jsonl").read_text().splitlines(keepends=True)[: rounds * PROMPTS]
    folder = work / f"rl_own_{seed}_{rounds}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "problems.jsonl").write_text("".join(lines * GROUP))
    data = ("--data", folder / "problems.jsonl", "--output", folder, "--right_answers", folder / "right.jsonl")
    runner.command(work, "eval.py", "--model", runner.BASE, *data, "--temperature", 1.0, "--seed", seed, *DECODING)
    right = (folder / "right.jsonl").read_text()
    times = -(-len(lines) * GROUP * UPDATES // len(right.splitlines()))
    (folder / "right.jsonl").write_text(right * times)
    what = ("--model", runner.BASE, "--dataset", folder / "right.jsonl", "--wrap", "metamath", "--max_len", 64)
    runner.command(work, "pt.py", *what, "--max_samples", 0, "--output", folder / "own.pt")
    return folder / "own.pt"


def solved(folder: Path, work: Path) -> list[bool]:
    """Whether a checkpoint solves each of the held-out problems, by eval.py."""
    output = work / "rl_results"
    data = ("--data", work / "rl_held_out/train.jsonl", "--output", output)
    runner.command(work, "eval.py", "--model", folder, *data, *DECODING)
    return [row["correct"] for _, row in read_jsonl(output / f"{Path(folder).name}-gsm8k/answers.jsonl")]


# ---------------------------------------------------------------- what is shown


def table(rows: list[dict[str, str]]) -> str:
    """Pass@1 of the base, and of each setting after its last round: the seeds, their mean, and the paired tests."""
    base = next(float(row["pass_at_1"]) for row in rows if row["setting"] == BASE)
    lines = [f"{'':36}{'lr':>8}{'Pass@1':>9}   each seed: Pass@1 (solved by it only, by the base only; p)"]
    lines.append(f"{BASE:44}{base:>9.1%}")
    for setting in SETTINGS:
        some = [row for row in rows if row["setting"] == setting and row["seed"] != "0"]
        last = max((int(row["round"]) for row in some), default=0)
        some = [row for row in some if int(row["round"]) == last]
        if some:
            mean = fmean(float(row["pass_at_1"]) for row in some)
            each = ", ".join("{:.1%} ({only_tuned}, {only_base}; {p})".format(float(r["pass_at_1"]), **r) for r in some)
            lines.append(f"{setting:36}{some[0]['lr']:>8}{mean:>9.1%}   {each}")
    return "\n".join(lines)


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Reward and Pass@1 over rounds: the mean of each setting, and its seeds as thin lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    base = next(float(row["pass_at_1"]) for row in rows if row["setting"] == BASE)
    for number, setting in enumerate(SETTINGS):
        for axis, column in zip(axes, ("reward", "pass_at_1")):
            some = [row for row in rows if row["setting"] == setting and row["seed"] != "0" and row[column] != "nan"]
            start, curves = [(0, base)] if column == "pass_at_1" else [], {}
            for row in some:
                curves.setdefault(row["seed"], list(start)).append((int(row["round"]), float(row[column])))
            for curve in curves.values():
                axis.plot(*zip(*curve), color=f"C{number}", alpha=0.3, linewidth=1)
            if curves:
                means = [(points[0][0], fmean(value for _, value in points)) for points in zip(*curves.values())]
                axis.plot(*zip(*means), color=f"C{number}", label=setting)
    for axis, what in zip(axes, ("reward of the rollouts: share of right digits", "Pass@1 on 200 held-out problems")):
        axis.set(xlabel="round of 128 answers", title=what)
    axes[1].legend()
    with files.writing(f"--figure {path}"):
        picture.savefig(path, dpi=100)


if __name__ == "__main__":
    run_script(main)
