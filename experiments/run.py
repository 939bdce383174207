"""The claims of experiments/claims.py on tiny models: real trainers, real decoder, a row of CSV per run.

    python -m experiments.run C1 C2 --seeds 5
    python -m experiments.report

A run is one training (shared by all settings that need the same one) and one decoding of the held-out problems. A
setting with several learning rates runs all of them on seed 0, which chooses one, and reports other seeds with that.
What is in the CSV already is not run again, so that an interrupted command continues where it was. To run again what is
in the committed CSV, name another --results.
"""

import argparse
import csv
import hashlib
import importlib
import io
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from blockwise.cli import InputError, progress, run_script
from blockwise.run import files
from experiments import make_data
from experiments.claims import (
    BASE_FLAGS,
    BATCH,
    BD3LM,
    BLOCK,
    CLAIMS,
    COMMON,
    FULLSEQ,
    HELD_OUT,
    Setting,
    Task,
    decoding,
)

ROOT = Path(__file__).parent.parent
BASE = ROOT / "demo/base"
COLUMNS = ["claim", "setting", "lr", "seed"]
COLUMNS += ["steps", "supervised_tokens", "seconds", "pass_at_1", "token_accuracy", "n"]


@dataclass(frozen=True)
class Run:
    """A training with a seed and a learning rate, and the decoding of its checkpoint."""

    claim: str
    setting: Setting
    lr: float  # 0 for the base as it is
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """The first columns of its rows in the CSV."""
        return self.claim, self.setting.name, f"{self.lr:g}", str(self.seed)

    @property
    def knobs(self) -> dict:
        """Of its training."""
        size = {} if self.setting.script == FULLSEQ else {"BLOCK_SIZE": BLOCK}
        task = self.setting.task.knobs
        return COMMON | task | size | self.setting.knobs | {"LR": self.lr, "SEED": self.seed}


@dataclass(frozen=True)
class Scale:
    """How large the runs are; smaller only to see that they work."""

    held_out: int = HELD_OUT
    most_rows: int = 10**9  # of the training data
    most_steps: int = 10**9  # of pre-training


SMOKE = Scale(20, 4 * BATCH, 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="+", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=5, help="that are reported")
    parser.add_argument("--results", default=str(ROOT / "experiments/results.csv"))
    parser.add_argument("--work", default=str(ROOT / "experiments/work"), help="folder of problems and checkpoints")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each on one core")
    parser.add_argument("--smoke", action="store_true", help="a few rows and problems, only to see that it runs")
    args = parser.parse_args()
    if unknown := set(args.claims) - CLAIMS.keys():
        raise InputError(f"{', '.join(sorted(unknown))}: no such claim; there are {', '.join(CLAIMS)}.")
    if args.smoke and Path(args.results).resolve() == ROOT / "experiments/results.csv":
        raise InputError("--smoke is too small for results.csv; name another --results.")
    if min(args.seeds, args.jobs) < 1:
        raise InputError("--seeds and --jobs must be at least 1.")
    work, results = begin(args.work, args.results, COLUMNS)
    scale = SMOKE if args.smoke else Scale()
    while todo := missing(args.claims, args.seeds, read(results)):  # first what chooses learning rates
        run_all(todo, args.jobs, work, results, scale)


# ---------------------------------------------------------------- which runs


def missing(claims: list[str], seeds: int, rows: list[dict[str, str]]) -> list[Run]:
    """The runs of these claims that are not among the rows of the CSV and whose learning rate is known."""
    done = {tuple(row[column] for column in COLUMNS[:4]) for row in rows}
    runs = [run for claim in claims for setting in CLAIMS[claim] for run in runs_of(claim, setting, seeds, rows)]
    return [run for run in sorted(runs, key=lambda run: run.seed) if run.key not in done]


def runs_of(claim: str, setting: Setting, seeds: int, rows: list[dict[str, str]]) -> list[Run]:
    """All runs of a setting; as long as its learning rate is not chosen, those that choose it."""
    if not setting.script:  # there is one base of addition, and of the others one for each seed
        return [Run(claim, setting, 0.0, seed) for seed in (range(1, seeds + 1) if setting.task.base_steps else [0])]
    if not setting.lrs and not setting.lr_of:
        return [Run(claim, setting, setting.task.knobs["LR"], seed) for seed in range(seeds)]
    lr = chosen_lr(claim, setting, rows)
    grid = [Run(claim, setting, lr, 0) for lr in setting.lrs]
    return grid + [Run(claim, setting, lr, seed) for seed in range(1, seeds + 1) if lr]


def chosen_lr(claim: str, setting: Setting, rows: list[dict[str, str]]) -> float | None:
    """The learning rate with the best Pass@1 on seed 0, then token accuracy; None until all of them have been run."""
    if setting.lr_of:
        (setting,) = [other for other in CLAIMS[claim] if other.name == setting.lr_of]
    scores = {}
    for row in rows:
        if (row["claim"], row["setting"], row["seed"]) == (claim, setting.name, "0"):
            scores[float(row["lr"])] = float(row["pass_at_1"]), float(row["token_accuracy"])  # of the last step
    return max(setting.lrs, key=scores.get) if set(setting.lrs) <= scores.keys() else None


# ---------------------------------------------------------------- running them


def run_all(todo: list[Run], jobs: int, work: Path, results: Path, scale: Scale) -> None:
    """Trains and decodes, several trainings at a time, and appends the rows to the CSV. Raises InputError."""
    trainings = defaultdict(list)  # runs that share a training go to one process
    for run in todo:
        trainings[run.setting.script, run.setting.task, repr(sorted(run.knobs.items()))].append(run)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    try:
        bases = {base_folder(run.setting.task, run.seed, work, scale): run for run in todo}
        rows = {rows_file(run.setting.task, work, scale): run for run in todo}  # they need the tokenizer of a base
        for what, make, paths in (("bases", make_base, bases), ("problems", make_rows, rows)):
            started = [pool.submit(make, run, path, work, scale) for path, run in paths.items() if not path.exists()]
            for job in progress(as_completed(started), total=len(started), desc=what, unit="file"):
                job.result()
        started = {pool.submit(rows_of, runs, work, scale): len(runs) for runs in trainings.values()}
        with progress(total=len(todo), desc="runs", unit="run") as bar:
            for job in as_completed(started):
                append(results, job.result())
                bar.update(started[job])
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Ctrl-C stops the trainings, which are programs of their own; the workers end when those have."""
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the trainings would inherit
    import transformers

    transformers.utils.logging.disable_progress_bar()  # there is one of all runs


def rows_file(task: Task, work: Path, scale: Scale) -> Path:
    return work / f"{task.name}{'' if task.rule is None else task.rule}_{min(task.rows, scale.most_rows)}.pt"


def base_folder(task: Task, seed: int, work: Path, scale: Scale) -> Path:
    return work / f"{task.name}_base{seed}_{min(task.base_steps, scale.most_steps)}" if task.base_steps else BASE


def make_base(run: Run, folder: Path, work: Path, scale: Scale) -> None:
    """Pre-trains the base of a task and a seed on rule 0."""
    task, steps = run.setting.task, min(run.setting.task.base_steps, scale.most_steps)
    data, unfinished = work / f"{folder.name}_data", work / f"{folder.name}_unfinished"
    rows = {"task": task.name, "rule": 0, "rows": steps * BASE_FLAGS["batch_size"], "seed": 0}
    command(work, "experiments/make_data.py", "--output", data, *flags(rows))
    how = flags(BASE_FLAGS | {"steps": steps, "seed": run.seed})
    command(work, "experiments/make_base.py", "--plain", "--data", data, "--output", unfinished, *how)
    unfinished.rename(folder)


def flags(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def make_rows(run: Run, path: Path, work: Path, scale: Scale) -> None:
    """Writes the training rows of all runs on a task.

    Without the token that ends an answer: it would be a block of its own, which takes a share of the draws like the
    others, but which decoding never reaches.
    """
    from datasets import Dataset

    import pt
    from blockwise import formats, prompts
    from blockwise.encoding import PROBES, Encoder, encode
    from blockwise.models import hub

    task = run.setting.task
    tokenizer = hub.load_tokenizer(base_folder(task, run.seed, work, scale))
    rows = make_data.problems(task.name, task.rule, min(task.rows, scale.most_rows), seed=1)
    if task.rule is None:
        encoder = Encoder(tokenizer, formats.METAMATH, prompts.METAMATH, Dataset.from_list(rows)[:PROBES])
        samples = [(start, ids[:-1]) for start, ids in encode(Dataset.from_list(rows), encoder, max_len=256).samples]
    else:
        from experiments.make_base import plain_sample

        samples = [plain_sample(tokenizer, row) for row in rows]
    pt.save(samples, path, prompts.METAMATH if task.rule is None else prompts.PLAIN)


def rows_of(runs: list[Run], work: Path, scale: Scale) -> list[list]:
    """Trains, unless it has been done, and decodes for each of the runs, which share the training. Rows of the CSV."""
    run, rows = runs[0], []
    base = base_folder(run.setting.task, run.seed, work, scale)
    checkpoints, metrics = train(run, base, rows_file(run.setting.task, work, scale), work)
    for run in runs:
        for step, folder in checkpoints.items() if run.setting.curve else [max(checkpoints.items())]:
            tokens = sum(int(row["supervised_tokens"]) for row in metrics[:step])
            speed = statistics.median([float(row["tokens_per_second"]) for row in metrics] or [1.0])
            tokens_of_step = BATCH * run.knobs["MAX_LEN"] * (2 if run.setting.script == BD3LM else 1)
            seconds = step * tokens_of_step / speed
            score = evaluate(folder, run.setting.decoding or decoding(BLOCK), run.setting.task, scale.held_out)
            rows.append([*run.key, step, tokens, f"{seconds:.1f}", *score, scale.held_out])
    return rows


def train(run: Run, base: Path, data: Path, work: Path) -> tuple[dict[int, Path], list[dict[str, str]]]:
    """Trains, unless it has been done. Returns its checkpoints {step: folder} and its metrics.csv, a row per step."""
    script = run.setting.script
    if not script:
        return {0: base}, []
    defaults = vars(importlib.import_module(script.removesuffix(".py").replace("/", ".")))
    knobs = {name: value for name, value in run.knobs.items() if value != defaults[name]}
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("blockwise/**/*.py"), ROOT / script])
    code = [file.read_bytes() for file in (*sources, base / "model.safetensors", data)]
    name = hashlib.sha256(repr((script, sorted(knobs.items()), code)).encode()).hexdigest()[:12]
    finished = work / f"{name}_finished"
    if not finished.exists():
        for left in work.glob(f"{name}_*"):  # of an interrupted training
            files.lock(left)  # unless it is still running
            shutil.rmtree(left)
        knobs |= {"MODEL_NAME": base, "DATA_PT": data, "CKPT_DIR": work / name}
        command(work, script, *flags(knobs))
        finished.touch()
    with open(work / f"{name}_logs" / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    return {int(folder.name.rpartition("step")[2]): folder for folder in sorted(work.glob(f"{name}_step*"))}, metrics


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


def evaluate(folder: Path, settings: dict, task: Task, number: int) -> tuple[str, str]:
    """Pass@1 of a checkpoint on the held-out problems, and the share of their digits that are right, by position."""
    import torch

    from blockwise import scoring
    from blockwise.decoding import decode
    from blockwise.decoding.settings import Settings
    from blockwise.prompts import METAMATH, question_ids
    from experiments.make_base import plain_sample

    model, tokenizer = decode.load(folder, "float32", torch.device("cpu"))
    ends = decode.end_ids(model, tokenizer)
    problems = make_data.problems(task.name, task.rule, number, seed="held out")
    if task.rule is None:
        prompts = [question_ids(tokenizer, row["query"], METAMATH) for row in problems]
    else:
        prompts = [ids[:start].tolist() for start, ids in (plain_sample(tokenizer, row) for row in problems)]
    right, digits = 0, []
    for start in range(0, number, 100):
        some = problems[start : start + 100]
        ids, _ = decode.decode(model, prompts[start : start + 100], Settings(**settings), ends)
        for answer, row in zip(ids.tolist(), some):
            wanted = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
            text = decode.completion(tokenizer, answer, ends)
            right += scoring.same_number(text, row["response"]) if task.rule is None else text == row["response"]
            digits += [a == b for a, b in zip(answer, wanted)][-task.digits :]
    return f"{right / number:.4f}", f"{sum(digits) / len(digits):.4f}"


# ---------------------------------------------------------------- results.csv


def begin(work: str, results: str, columns: list[str]) -> tuple[Path, Path]:
    """Locks the folder of data and checkpoints, starts the CSV, and chooses one thread. Raises InputError.

    Returns both paths; that of the folder is absolute.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # at this size nothing else is faster
    work, results = Path(work).absolute(), Path(results)
    with files.writing(f"--work {work} or --results {results}"):
        work.mkdir(parents=True, exist_ok=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        files.lock(work)
        start_results(results, columns)
    return work, results


def start_results(path: Path, columns: list[str]) -> None:
    """Makes the CSV, or drops its unfinished last line."""
    whole, end, _ = (path.read_text() if path.exists() else "").rpartition("\n")
    files.replace(path, whole + end or ",".join(columns) + "\n")


def read(path: str | Path, columns: list[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of the CSV. Raises InputError."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows, found = list(reader), reader.fieldnames
    except OSError as error:
        raise InputError(
            f"--results {path} cannot be read: {error.strerror}; write it with experiments/run.py."
        ) from error
    if found != columns:
        raise InputError(f"--results {path} is not a CSV with the columns {', '.join(columns)}.")
    for number, row in enumerate(rows, start=2):
        if None in row.values():
            raise InputError(f"--results {path}, line {number} is not whole; remove it.")
    return rows


def append(results: Path, rows: list[list]) -> None:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    with files.writing(f"--results {results}"):
        files.append(results, lines.getvalue())


if __name__ == "__main__":
    run_script(main)
