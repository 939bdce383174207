"""Resume points: all that the next optimizer step needs besides the base model.

{CKPT_DIR}_logs/resume_step0040/ holds, from each rank, its share of the fp32 weights that are trained and of AdamW's
moments (rank0.safetensors, ...), the logs as they were, and manifest.json: the scheduler, and the size and sha256 of
each file. Of a training on the model's own answers, rollouts.safetensors has those of the round. Random numbers are not
in it, as those of a step come from (SEED, step). A point has its name only once it is whole.
"""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes

from blockwise.cli import InputError
from blockwise.run import files, logs
from blockwise.run.logs import Logs
from blockwise.run.ranks import Ranks, print0
from blockwise.run.run_folder import RESUME_POINT, RunFolder, step_of
from blockwise.run.tensors import content_of

ROLLOUTS = "rollouts.safetensors"
KEPT = 2  # resume points: the newest, and the one before in case that one is damaged


@contextmanager
def with_resume_hint(folder: RunFolder):
    """Adds to an InputError where the run can be resumed."""
    try:
        yield
    except InputError as error:
        step = next(map(step_of, folder.resume_points()), 0)
        where = f"resumes after step {step}" if step else "restarts it"
        raise InputError(f"{error} The same command with --RESUME=True {where}.") from error


# ---------------------------------------------------------------- saving


def save(
    engine, ranks: Ranks, folder: RunFolder, log: Logs, step: int, bad_steps: int,
    rollouts: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes the resume point after a step, then removes all older ones but one. Raises InputError on all ranks.

    rollouts: the state of Rollouts, the same on all ranks. A point that exists is left as it is: a signal may come
    behind it, but before the next step.
    """

    def write_files(unfinished):
        written = {file_of(ranks): files.write(unfinished / file_of(ranks), content_of(state(engine)))}
        if ranks.rank:
            return written
        if rollouts:
            written[ROLLOUTS] = files.write(unfinished / ROLLOUTS, [tensor_bytes(rollouts)])
        return written | log.copy(unfinished)

    point = folder.path / f"{RESUME_POINT}{step:04d}"
    if ranks.on_first_rank(point.exists):
        return
    content = {"step": step, "bad_steps": bad_steps, "scheduler": engine.lr_scheduler.state_dict()}
    files.publish(ranks, point.with_name(f"{point.name}.unfinished"), point, write_files, content)
    ranks.on_first_rank(lambda: remove(folder.resume_points()[KEPT:]))


def file_of(ranks: Ranks) -> str:
    return f"rank{ranks.rank}.safetensors"


def state(engine) -> dict[str, torch.Tensor]:
    """This rank's share of what is trained, in fp32, and of AdamW's state: {name: fp32 tensor}, the live ones."""
    zero, tensors = engine.optimizer, {}
    for i, weights in enumerate(zero.single_partition_of_fp32_groups):
        tensors[f"{i}.adapters"] = weights.detach()  # or all weights; the name is that of older resume points
        adam = zero.optimizer.state.get(weights, {})  # empty before the first step that was applied
        tensors |= {f"{i}.{name}": tensor for name, tensor in adam.items()}
    return tensors


def remove(points: list[Path]) -> None:
    """Removes resume points, the oldest first. What is removed in part no longer has the name of one."""
    for point in reversed(points):
        with files.writing(point):
            unfinished = point.rename(point.with_name(f"{point.name}.unfinished"))
            files.sync(point.parent)
            shutil.rmtree(unfinished)


# ---------------------------------------------------------------- loading


def load(engine, ranks: Ranks, folder: RunFolder, log: Logs) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Brings engine and logs to the newest undamaged resume point.

    Returns its step, its bad steps in a row, and its rollouts, empty for a training without. Raises InputError on all
    ranks if all resume points are damaged.
    """
    points = ranks.on_first_rank(folder.resume_points)
    for i, point in enumerate(points):
        problems = list(filter(None, ranks.on_all_ranks(lambda point=point: problem(point, ranks, engine))))
        if not problems:
            content = files.read_manifest(point)
            restore(engine, load_file(point / file_of(ranks)), content["scheduler"])
            ranks.on_first_rank(lambda point=point: log.start(point))
            ranks.on_first_rank(lambda i=i: remove(points[:i]))
            print0(ranks, "resume", f"{folder.path} resumes after step {content['step']}")
            rollouts = load_file(point / ROLLOUTS) if ROLLOUTS in content["files"] else {}
            return content["step"], content["bad_steps"], rollouts
        instead = " The one before is used." if i + 1 < len(points) else ""
        print0(ranks, "warning", f"{point} is damaged: {problems[0]}.{instead}")
    raise InputError(f"no resume point of {folder.path} is undamaged; start a new run without --RESUME=True.")


def problem(point: Path, ranks: Ranks, engine) -> str | None:
    """What is wrong with this rank's part of a resume point, or None."""
    try:
        manifest = files.read_manifest(point)
        if manifest["step"] != step_of(point):
            raise ValueError(f"its manifest is that of step {manifest['step']}")
        log_files = [name for name in logs.FILES if name in manifest["files"]] if ranks.rank == 0 else []
        shared = [name for name in (ROLLOUTS,) if name in manifest["files"]]
        for name in [file_of(ranks), *shared, *log_files]:
            files.check(point, name, manifest)
        with open(point / file_of(ranks), "rb") as file:
            sizes = {
                name: (tensor["dtype"], tensor["shape"]) for name, tensor in files.read_tensor_header(file).items()
            }
        for i, weights in enumerate(engine.optimizer.single_partition_of_fp32_groups):
            if sizes.get(f"{i}.adapters") != ("F32", list(weights.shape)):
                raise ValueError(f"{file_of(ranks)} does not hold the trained weights of this run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)


def restore(engine, tensors: dict[str, torch.Tensor], scheduler: dict) -> None:
    """Puts the tensors of `state` back into the engine, its parameters included, and the scheduler's state."""
    zero = engine.optimizer
    adam = zero.optimizer.state_dict()
    for i, weights in enumerate(zero.single_partition_of_fp32_groups):
        mine = {name.removeprefix(f"{i}."): value for name, value in tensors.items() if name.startswith(f"{i}.")}
        weights.data.copy_(mine.pop("adapters"))
        adam["state"][i] = mine
    zero.optimizer.load_state_dict(adam)
    zero.update_lp_params()  # the parameters are the weights of all ranks, in the model's dtype
    engine.lr_scheduler.load_state_dict(scheduler)
    for group, lr in zip(zero.param_groups, engine.lr_scheduler.get_last_lr()):
        group["lr"] = lr
