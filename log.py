"""The folder of a run, {CKPT_DIR}_logs: which one it is, whether it may be continued, and a line per optimizer step."""

import csv
import hashlib
import io
import json
import math
import re
import resource
import shutil
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

import files
import llada
import merge
from cli import InputError

FREE = {"RESUME", "RESUME_EVERY", "MAX_BAD_STEPS"}  # knobs that a resumed run may change
CONSTANTS = "ablation_config.json"
RESUME_POINT = "resume_step"  # and the number of the step
VERSIONS = ("torch", "transformers", "deepspeed", "peft")
SAMPLE = 2**16  # bytes of each tensor of the base that its fingerprint reads


def say(place, what, text):
    """A line of the report, on rank 0 only."""
    if place.rank == 0:
        tqdm.write(f"{what:<13}{text}")


class Log:
    """The run's folder and its files, which rank 0 writes."""

    METRICS = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "tokens_per_second", "peak_memory_gb")
    FILES = ("train_loss.csv", "metrics.csv", "samples.jsonl", "bad_steps.jsonl")

    def __init__(self, knobs, place, steps, base, engine_config):
        """Makes the folder of a new run, or finds that of the run to resume. Raises InputError on all ranks."""
        self.place, self.steps, self.began = place, steps, time.perf_counter()
        self.folder, self.suffix, self.resumed = place.on_first_rank(lambda: self.open(knobs, base, engine_config))
        self.last_checkpoint = checkpoint_folder(knobs.CKPT_DIR, steps, self.suffix)
        place.on_all_ranks(self.hold)

    def open(self, knobs, base, engine_config):
        """Finds or makes the folder and locks it. Returns its path, the run's suffix, and whether it is resumed."""
        found = unfinished_run(knobs.CKPT_DIR) if knobs.RESUME else None
        if knobs.RESUME and not found:
            say(self.place, "resume", f"there is no run of {knobs.CKPT_DIR} yet: this one is new")
        folder, suffix = found or make_log_folder(knobs.CKPT_DIR)
        files.lock(folder)
        constants, path = vars(knobs) | {"derived": derived(knobs, self.place, self.steps, base)}, folder / CONSTANTS
        if path.exists():
            check_same(path, constants, self.place)
        with files.writing("ds_zero2.json"):
            files.replace("ds_zero2.json", json.dumps(engine_config, indent=2) + "\n")
        with files.writing(folder):
            for left in folder.glob("*.unfinished"):  # of a run that was killed while saving
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if not path.exists():
                files.replace(path, json.dumps(constants, indent=2) + "\n")
        files.unlock(folder, first=1)
        return folder, suffix, bool(found)

    def hold(self):
        """Each rank locks its part of the folder, so that no run begins there beside a rank that is left.

        Raises InputError on a machine that does not see the folder.
        """
        try:
            if self.place.rank:
                files.lock(self.folder, first=self.place.rank, parts=1)
        except InputError as error:
            more = f"With several machines, CKPT_DIR must be in a folder that all share (rank {self.place.rank})."
            raise InputError(f"{error} {more}") from None

    def start(self, point):
        """Brings the files to where they were at a resume point; without one, begins them."""
        with files.writing(self.folder):
            for name in self.FILES:
                if point and (point / name).exists():
                    files.replace(self.folder / name, (point / name).read_bytes())
                else:
                    (self.folder / name).unlink(missing_ok=True)
        if not point:
            self.write("train_loss.csv", self.METRICS[:2])
            self.write("metrics.csv", self.METRICS)

    def copy(self, folder):
        """Copies the files into a resume point. Returns what its manifest says of them."""
        there = [name for name in self.FILES if (self.folder / name).exists()]
        for name in there:
            files.sync(self.folder / name)
        return {name: files.write(folder / name, [(self.folder / name).read_bytes()]) for name in there}

    def write(self, name, values):
        """Adds a line to a CSV file."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self.append(name, line.getvalue())

    def append(self, name, text):
        with files.writing(self.folder / name):
            files.append(self.folder / name, text)

    def row(self, step, lr, result, tokens_per_second):
        """Adds the line of a step, result being its sft.Step, and names it if it was bad; all ranks come here."""
        self.place.on_first_rank(lambda: self.write_row(step, lr, result, tokens_per_second))

    def write_row(self, step, lr, result, tokens_per_second):
        short = [step, f"{result.loss:.6f}" if math.isfinite(result.loss) else "nan"]
        rest = [f"{lr:.6e}", f"{result.grad_norm:.6f}", result.supervised, f"{tokens_per_second:.1f}"]
        self.write("train_loss.csv", short)
        self.write("metrics.csv", short + rest + [f"{peak_memory_gb():.3f}"])
        if result.bad_rows:
            bad = {"step": step, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "rows": result.bad_rows}
            self.append("bad_steps.jsonl", json.dumps(bad) + "\n")
            say(self.place, "bad step", f"{json.dumps(bad)}: the weights did not take it")

    def close(self):
        if self.place.rank == 0:
            with open(self.folder / "train_loss.csv", newline="") as file:
                losses = [float(row["loss"]) for row in csv.DictReader(file)]
            seconds = time.perf_counter() - self.began
            loss = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
            say(self.place, "done", f"{len(losses)} steps, {seconds:.0f} s in this process, {loss}")
            say(self.place, "logs", f"{self.folder}/train_loss.csv, metrics.csv, {CONSTANTS}")


def peak_memory_gb():
    """Highest memory of this rank so far: of the GPU if there is one, else of the process."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------- which folder


def make_log_folder(ckpt_dir):
    """Creates the log folder of a run and finds the suffix of all its folders: '', or -v2, -v3, ...

    It is the first for which neither logs nor checkpoints are there already. Returns the folder's Path and the suffix.
    """
    start = Path(ckpt_dir)
    try:
        start.parent.mkdir(parents=True, exist_ok=True)
        there = {folder.name for folder in start.parent.iterdir()}
        for v in count(1):
            suffix = f"-v{v}" if v > 1 else ""
            used = re.compile(re.escape(start.name) + rf"_(logs|step\d+){suffix}")
            if not any(used.fullmatch(name) for name in there):
                folder = start.with_name(f"{start.name}_logs{suffix}")
                with suppress(FileExistsError):  # another run has made it meanwhile
                    folder.mkdir()
                    files.sync(start.parent)
                    return folder, suffix
    except OSError as error:
        raise InputError(f"CKPT_DIR={ckpt_dir}: its folder cannot be written ({error.strerror}).") from error


def unfinished_run(ckpt_dir):
    """The log folder and the suffix of the newest run that can go on; None if there is no run at all.

    Raises InputError if all runs are finished.
    """
    start, runs = Path(ckpt_dir), {}
    for folder in start.parent.glob("*") if start.parent.is_dir() else ():
        if name := re.fullmatch(re.escape(start.name) + r"_logs(-v(\d+))?", folder.name):
            runs[int(name[2] or 1)] = folder, name[1] or ""
    for _, (folder, suffix) in sorted(runs.items(), reverse=True):
        if not finished(start, folder, suffix):
            return folder, suffix
    if runs:
        newest, _ = runs[max(runs)]
        raise InputError(f"--RESUME=True: the run of {newest} is finished; start a new one without --RESUME=True.")
    return None


def finished(start, folder, suffix):
    """Whether a run has made its last checkpoint, and removed its resume points after that."""
    if not (folder / CONSTANTS).exists() or any(folder.glob(f"{RESUME_POINT}*")):
        return False
    last = read_constants(folder / CONSTANTS)["derived"]["total_steps"]
    return checkpoint_folder(start, last, suffix).exists()


def checkpoint_folder(ckpt_dir, step, suffix):
    return Path(f"{ckpt_dir}_step{step:04d}{suffix}")


# ---------------------------------------------------------------- what must be the same when a run goes on


def derived(knobs, place, steps, base):
    """What the run depends on beside its constants."""
    return {
        "script": Path(sys.argv[0]).name,
        "ranks": place.world,
        "total_steps": steps,
        "data": files.sha256(knobs.PT_FILE),
        "model": fingerprint(base),
    } | {name: version(name) for name in VERSIONS}


def fingerprint(base):
    """A digest of the base's config, of all names, shapes and dtypes of its tensors, and of the start of each."""
    seen = hashlib.sha256((base / "config.json").read_bytes())
    for shard in llada.weight_files(base):
        with open(shard, "rb") as file:
            tensors = merge.read_header(file)
            start = file.tell()
            seen.update(json.dumps(tensors).encode())
            for tensor in tensors.values():
                begin, end = tensor["data_offsets"]
                file.seek(start + begin)
                seen.update(file.read(min(end - begin, SAMPLE)))
    return seen.hexdigest()


def read_constants(path):
    try:
        content = json.loads(path.read_text())
        content["derived"]["total_steps"] + 0  # what `finished` needs
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; start a new run without --RESUME=True.") from None
    return content


def check_same(path, constants, place):
    """Compares the constants of the run that is to go on with those of now. Raises InputError that names one."""
    there = read_constants(path)
    was, now = there.pop("derived"), constants["derived"]
    changed = [(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]
    for name, old, new in changed:
        if name in VERSIONS:
            say(place, "warning", f"the run was started with {name} {old}, this is {new}: numbers may differ")
    different = [change for change in changed if change[0] not in VERSIONS]
    for name in constants.keys() - FREE - {"derived"}:
        if there.get(name) != constants[name]:
            different.append((name, there.get(name), constants[name]))
    if different:
        name, old, new = different[0]
        change = f"{name} was {old!r}, now it is {new!r}"
        if name in ("data", "model"):
            change = f"the content of {constants[{'data': 'PT_FILE', 'model': 'MODEL'}[name]]} has changed"
        raise InputError(f"{path.parent} is another run: {change}. Start a new one without --RESUME=True.")
