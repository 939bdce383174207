"""Resume points: all that the next optimizer step needs beside the base model.

{CKPT_DIR}_logs/resume_step0040/ holds, from each rank, its share of the fp32 adapters and of AdamW's moments
(rank0.safetensors, ...), the logs as they were, and manifest.json: the scheduler, and the size and sha256 of each file.
Random numbers are not in it, as those of a step come from (SEED, step). A point has its name only once it is whole.
"""

import shutil
from contextlib import contextmanager

import torch
from safetensors.torch import load_file

import files
import merge
from cli import InputError
from log import RESUME_POINT, Log, say

KEPT = 2  # resume points: the newest, and the one before in case that one is damaged


def points(folder):
    """The resume points of a log folder, newest first."""
    there = [path for path in folder.glob(f"{RESUME_POINT}*") if path.name.removeprefix(RESUME_POINT).isdecimal()]
    return sorted(there, key=step_of, reverse=True)


def step_of(point):
    return int(point.name.removeprefix(RESUME_POINT))


@contextmanager
def hint(log):
    """Adds to an InputError from where the run can go on."""
    try:
        yield
    except InputError as error:
        step = next(map(step_of, points(log.folder)), 0)
        where = f"goes on after step {step}" if step else "begins it again"
        raise InputError(f"{error} The same command with --RESUME=True {where}.") from error


# ---------------------------------------------------------------- saving


def save(engine, place, log, step, bad_steps):
    """Writes the resume point after a step, then removes all older ones but one. Raises InputError on all ranks."""

    def write_files(folder):
        written = {file_of(place): files.write(folder / file_of(place), content_of(state(engine)))}
        return written | (log.copy(folder) if place.rank == 0 else {})

    folder = log.folder / f"{RESUME_POINT}{step:04d}"
    content = {"step": step, "bad_steps": bad_steps, "scheduler": engine.lr_scheduler.state_dict()}
    files.publish(place, folder.with_name(f"{folder.name}.unfinished"), folder, write_files, content)
    place.on_first_rank(lambda: remove(points(log.folder)[KEPT:]))


def file_of(place):
    return f"rank{place.rank}.safetensors"


def state(engine):
    """This rank's share of the fp32 adapters and of AdamW's state: {name: fp32 tensor}, the live ones."""
    zero, tensors = engine.optimizer, {}
    for i, adapters in enumerate(zero.single_partition_of_fp32_groups):
        tensors[f"{i}.adapters"] = adapters.detach()
        adam = zero.optimizer.state.get(adapters, {})  # empty before the first step that was applied
        tensors |= {f"{i}.{name}": tensor for name, tensor in adam.items()}
    return tensors


def content_of(tensors):
    """Yields the bytes of a safetensors file of fp32 tensors."""
    yield merge.header({name: ("F32", list(tensor.shape)) for name, tensor in tensors.items()})
    for tensor in tensors.values():
        yield tensor.cpu().reshape(-1).view(torch.uint8).numpy()


def remove(some):
    """Removes resume points, the oldest first. What is removed in part no longer has the name of one."""
    for point in reversed(some):
        with files.writing(point):
            unfinished = point.rename(point.with_name(f"{point.name}.unfinished"))
            files.sync(point.parent)
            shutil.rmtree(unfinished)


# ---------------------------------------------------------------- loading


def load(engine, place, log):
    """Brings engine and logs to the newest undamaged resume point. Returns its step and its bad steps in a row.

    Without any resume point the run begins: 0, 0. Raises InputError on all ranks if there are some, but all damaged.
    """
    there = place.on_first_rank(lambda: points(log.folder))
    for i, point in enumerate(there):
        problems = list(filter(None, place.on_all_ranks(lambda point=point: problem(point, place, engine))))
        if not problems:
            content = files.read_manifest(point)
            restore(engine, load_file(point / file_of(place)), content["scheduler"])
            place.on_first_rank(lambda point=point: log.start(point))
            place.on_first_rank(lambda i=i: remove(there[:i]))
            say(place, "resume", f"{log.folder} goes on after step {content['step']}")
            return content["step"], content["bad_steps"]
        say(place, "warning", f"{point} is damaged: {problems[0]}." + " The one before is used." * (i + 1 < len(there)))
    if there:
        raise InputError(f"no resume point of {log.folder} is undamaged; start a new run without --RESUME=True.")
    if log.resumed and place.on_first_rank(log.last_checkpoint.exists):  # it was killed while it removed its points
        return log.steps, 0
    if log.resumed:
        say(place, "resume", f"{log.folder} has no resume point yet: it begins at step 1")
    place.on_first_rank(lambda: log.start(None))
    return 0, 0


def problem(point, place, engine):
    """What is wrong with this rank's part of a resume point, or None."""
    try:
        manifest = files.read_manifest(point)
        if manifest["step"] != step_of(point):
            raise ValueError(f"its manifest is that of step {manifest['step']}")
        logs = [name for name in Log.FILES if name in manifest["files"]] if place.rank == 0 else []
        for name in [file_of(place), *logs]:
            files.check(point, name, manifest)
        with open(point / file_of(place), "rb") as file:
            sizes = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in merge.read_header(file).items()}
        for i, adapters in enumerate(engine.optimizer.single_partition_of_fp32_groups):
            if sizes.get(f"{i}.adapters") != ("F32", list(adapters.shape)):
                raise ValueError(f"{file_of(place)} does not hold the adapters of this run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)


def restore(engine, tensors, scheduler):
    """Puts the tensors of `state` back into the engine, its parameters included, and the scheduler's state."""
    zero = engine.optimizer
    adam = zero.optimizer.state_dict()
    for i, adapters in enumerate(zero.single_partition_of_fp32_groups):
        mine = {name.removeprefix(f"{i}."): value for name, value in tensors.items() if name.startswith(f"{i}.")}
        adapters.data.copy_(mine.pop("adapters"))
        adam["state"][i] = mine
    zero.optimizer.load_state_dict(adam)
    zero.update_lp_params()  # the parameters are the adapters of all ranks, in the model's dtype
    engine.lr_scheduler.load_state_dict(scheduler)
    for group, lr in zip(zero.param_groups, engine.lr_scheduler.get_last_lr()):
        group["lr"] = lr
