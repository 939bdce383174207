"""The training that all objectives share: one optimizer step, the loop around it, checkpoints.

An objective is a `noise` and a `loss`, which a script passes to `train`; all else is shared.
Letters in shapes: see masking.py; N samples.
Every random number of a step comes from (SEED, step), dropout's also from the rank. Each rank makes the noise of the
whole global batch and trains on its rows, so masks are the same for any number of ranks.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import deepspeed.comm as dist
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import masking
from blockwise import engine as engines
from blockwise import validation
from blockwise.cli import STOPPED, InputError, progress
from blockwise.data import Samples, derive_seed, make_samples, read_pt, schedule, stored_format
from blockwise.models import base as models
from blockwise.models import card, checkpoint, hub
from blockwise.previews import Previews
from blockwise.prompts import FILE, PromptFormat
from blockwise.rollouts import Rollouts
from blockwise.run import constants, files, resume, signals, trackers
from blockwise.run.logs import SAMPLES, VAL_LOSS, Logs
from blockwise.run.ranks import Ranks, print0
from blockwise.run.run_folder import RunFolder, Status, new_run, run_to_resume
from blockwise.validation import Validation

# ---------------------------------------------------------------- one optimizer step


def train_step(run: "Run", step: int, should_stop: Callable[[], object] = lambda: None) -> "Step":
    """One optimizer step over global batch `step`, from 1. should_stop: whether this rank got a signal."""
    knobs, ranks, engine = run.knobs, run.ranks, run.engine
    samples, noised = global_batch(run, step)
    torch.manual_seed(derive_seed(knobs.SEED, "dropout", step, ranks.rank))
    losses = []
    for micro in range(knobs.GRAD_ACC):
        start = (micro * ranks.world_size + ranks.rank) * knobs.MICRO_BSIZE
        part = noised.rows(slice(start, start + knobs.MICRO_BSIZE))  # this rank's micro-batch
        # (n, V): the language-model head runs only where there is a loss
        logits = engine(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
        loss = run.loss(logits, part)  # this part's share of the global batch's loss
        losses.append(loss.detach().float())
        loss = loss * (1 + 0 * losses[-1])  # a non-finite loss makes the gradient non-finite: the engine skips the step
        engine.backward(loss * ranks.world_size * knobs.GRAD_ACC)  # as it averages over ranks and micro-batches
        engine.step()  # changes the weights at the last micro-batch only
    losses, stop = gather_losses(losses, bool(should_stop()))  # (ranks, GRAD_ACC)
    supervised = int(noised.supervised.sum())
    bad_rows = [] if engine.was_step_applied() else rows_with_nonfinite_loss(losses, samples, run)
    loss = losses.sum().item() if supervised else math.nan
    return Step(loss, float(engine.get_global_grad_norm()), supervised, noised.input_ids.numel(), bad_rows, stop)


@dataclass
class Step:
    """What an optimizer step over the global batch gives."""

    loss: float  # of the global batch; nan if no token was supervised: there is no loss then
    grad_norm: float  # before clipping
    supervised: int  # tokens
    tokens: int  # that went through the model, padding included
    bad_rows: list[int]  # entries of DATA_PT that a NaN or infinity may come from; then the optimizer step was skipped
    stop: bool  # some rank was stopped by a signal


def global_batch(run: "Run", step: int) -> tuple[Tensor, masking.Noised]:
    """The samples of a step, (G,) indices, and their noise, the same on every rank."""
    size, samples = global_batch_size(run.knobs, run.ranks), run.samples
    first = (step - 1) * size % len(run.plan)  # of rollouts, the plan is that of a round
    sample, block = run.plan[first : first + size].T  # (G,), (G,)
    batch = samples.batch(sample, block)
    generator = torch.Generator(run.ranks.device).manual_seed(derive_seed(run.knobs.SEED, "masks", step))
    noised = run.noise(batch, generator, run.knobs)
    if run.rollouts:
        noised.extra |= run.rollouts.before(step)
    return sample, noised


def gather_losses(losses: list[Tensor], stop: bool) -> tuple[Tensor, bool]:
    """The losses of all ranks' micro-batches, (ranks, GRAD_ACC), and whether any rank is to stop."""
    mine = torch.stack([*losses, torch.full_like(losses[0], stop)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    everyone = torch.stack(everyone)
    return everyone[:, :-1], bool(everyone[:, -1].any())


def rows_with_nonfinite_loss(losses: Tensor, sample: Tensor, run: "Run") -> list[int]:
    """Entries of DATA_PT in micro-batches with a non-finite loss; all of the global batch if only a gradient is."""
    bad = ~losses.isfinite().T.flatten()  # (micro-batches of the global batch,), in its order
    bad = (bad | ~bad.any()).repeat_interleave(run.knobs.MICRO_BSIZE)  # (G,)
    return run.samples.number[sample[bad]].tolist()


# ---------------------------------------------------------------- the training

Noise = Callable[[masking.Batch, torch.Generator, SimpleNamespace], masking.Noised]
Loss = Callable[[Tensor, masking.Noised], Tensor]
# Entries of config.json by which checkpoints of block diffusion are decoded: the tokens of a block, and whether blocks
# are counted from the start of the "answer" or of the "sample". Other trainings set them to None: their base may have
# had them, but their models see all blocks.
BLOCK_DIFFUSION = {"block_diffusion_size": None, "block_diffusion_from": None}
SHOWN = 90  # letters of a preview on the screen


def train(
    knobs: SimpleNamespace, noise: Noise, loss: Loss = masking.weighted_nll,
    blocks: Callable[[Tensor], Tensor] | None = None, config: dict[str, object] | None = None,
    rollouts: Rollouts | None = None,
) -> None:  # fmt: skip
    """Fine-tunes adapters or all weights, logs every step, saves checkpoints. Run by the deepspeed launcher.

    knobs: the script's constants. noise(batch, generator, knobs): the global batch as the model sees it; all its random
    numbers come from the generator. loss(logits (n, V), part): the share of a part of that in the loss of the global
    batch. blocks: answer lengths (N,) -> number of blocks of each sample (N,), of which a run trains each at most once;
    None: every sample comes once in each epoch. config: entries for the config.json of the checkpoints, such as those
    of BLOCK_DIFFUSION. rollouts: the samples are these instead of those of DATA_PT.
    Raises InputError before anything is trained or written if the knobs, the samples or the model cannot be used, and
    during the training if a file cannot be written or MAX_BAD_STEPS come in a row. Exits with STOPPED on a signal.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise InputError(f"start this script with the launcher: deepspeed --num_gpus N {sys.argv[0]}")
    signals.end_at_once()
    launchers, began = signals.launchers(), time.perf_counter()
    run = start(knobs, noise, loss, blocks, BLOCK_DIFFUSION | (config or {}), rollouts)
    done, bad_steps = steps_done(run)
    start_tracker(run, done)
    with (
        resume.with_resume_hint(run.folder), closing(run.logs), signals.Watch(run.ranks, launchers) as watch,
    ):  # fmt: skip
        step, stopped = loop(run, watch, done, bad_steps)
    dist.destroy_process_group()
    if stopped:
        reason = watch.stop or "a signal to another rank"
        print0(run.ranks, "stopped", f"by {reason}, after step {step}; the same command with --RESUME=True resumes it")
        sys.exit(STOPPED)
    shown = "reward" if rollouts else "loss"
    values, seconds = run.logs.column(shown), time.perf_counter() - began
    change = f"{shown} {values[0]:.4f} -> {values[-1]:.4f}"
    print0(run.ranks, "done", f"{len(values)} steps, {seconds:.0f} s in this process, {change}")
    print0(run.ranks, "logs", f"{run.folder.path}/train_loss.csv, metrics.csv, {constants.CONSTANTS}")


@dataclass
class Run:
    """What all steps of a training share."""

    knobs: SimpleNamespace  # the script's constants
    ranks: Ranks
    base: Path  # folder of the base model
    samples: Samples | None  # the data, on the rank's device; of rollouts, those of the round
    plan: Tensor | None  # (P, 2): sample and block of each draw, see data.schedule
    noise: Noise
    loss: Loss
    steps: int  # optimizer steps
    folder: RunFolder
    logs: Logs
    model: PeftModel | PreTrainedModel
    engine: deepspeed.DeepSpeedEngine
    previews: Previews | Rollouts | None
    validation: Validation | None
    entries: dict[str, object]  # for the config.json of the checkpoints
    constants: dict  # see constants_of; for the cards of the checkpoints
    new_files: dict[str, bytes]  # that checkpoints and adapters have besides those of the base
    rollouts: Rollouts | None = None


def start(
    knobs: SimpleNamespace, noise: Noise, loss: Loss, blocks: Callable | None, entries: dict[str, object],
    rollouts: Rollouts | None,
) -> Run:  # fmt: skip
    """Checks all that the user gives, then loads model and engine. Raises InputError.

    Exits with 0 if the run to resume is finished.
    """
    trackers.check(knobs.TRACKER)
    ranks = Ranks.from_environment()
    read = None if rollouts else read_files(knobs)  # before the base, which may be a large download
    base = hub.local_folder(knobs.MODEL_NAME)
    config = engines.check_model(base, knobs)
    if entries["block_diffusion_size"] and not models.meta_model(config)._supports_sdpa:
        what = "other attention of transformers adds a boolean mask to the scores, which then masks nothing"
        raise InputError(f"{base}: block diffusion needs a model type with sdpa attention; {what}.")
    if rollouts:
        data = Data(rollouts.prepare(base, config, ranks), rollouts.prompt_format, rollouts)
    config.update(entries)  # previews are decoded as the checkpoints are
    if not rollouts:
        data = data_of(*read, knobs, ranks, base, config, noise, loss, blocks)
    warmup = engines.warmup_steps(data.steps, knobs.WARMUP_TYPE, knobs.WARMUP_RATIO)
    print0(ranks, "warm-up", f"{warmup:,} steps, {knobs.WARMUP_TYPE} (WARMUP_RATIO {knobs.WARMUP_RATIO:g})")
    engines.start_group()
    folder, now = claim_folder(knobs, ranks, data.steps, base, rollouts.derived if rollouts else {})
    if knobs.SAMPLE_EVERY:
        print0(ranks, "previews", f"every {knobs.SAMPLE_EVERY} steps, {data.previews.what}: {folder.path}/{SAMPLES}")
    model = engines.load_model(base, knobs, ranks)
    model.config.update(entries)
    engine = engines.start_engine(model, knobs, data.steps)
    logs = Logs(ranks, folder.path, rollouts.columns if rollouts else (VAL_LOSS,) if data.validation else ())
    # if the data does not say, that of the base stays
    new_files = {FILE: data.prompt_format.to_json()} if data.prompt_format else {}
    return Run(
        knobs, ranks, base, data.samples, data.plan, noise, loss, data.steps, folder, logs, model, engine,
        data.previews if knobs.SAMPLE_EVERY else None, data.validation, entries, now, new_files, rollouts,
    )  # fmt: skip


@dataclass
class Data:
    """What a training is on, once it is checked against the model; see Run."""

    steps: int
    prompt_format: PromptFormat | None  # how the questions were put
    previews: Previews | Rollouts | None
    samples: Samples | None = None
    plan: Tensor | None = None
    validation: Validation | None = None


def read_files(knobs: SimpleNamespace) -> tuple:
    """What DATA_PT and VAL_PT hold, and how the questions were put. Raises InputError."""
    return read_pt(knobs.DATA_PT), validation.read(knobs), stored_format(knobs.DATA_PT)


def data_of(
    samples: list | Tensor, val: list | Tensor | None, prompt_format: PromptFormat | None, knobs: SimpleNamespace,
    ranks: Ranks, base: Path, config, noise: Noise, loss: Loss, blocks: Callable | None,
) -> Data:  # fmt: skip
    """The samples of files, their order, and how many steps that gives. Raises InputError."""
    samples = make_samples(samples, knobs, config)
    previews = Previews(base, config, samples, knobs) if knobs.SAMPLE_EVERY else None
    val = None if val is None else Validation(val, knobs, config, noise, loss, blocks)
    plan = make_plan(knobs, ranks, samples, blocks)
    steps = plan_steps(knobs, ranks, samples, plan)
    return Data(steps, prompt_format, previews, samples.to(ranks.device), plan.to(ranks.device), val)


def claim_folder(
    knobs: SimpleNamespace, ranks: Ranks, steps: int, base: Path, more: dict[str, str]
) -> tuple[RunFolder, dict]:
    """The folder of the run, locked by all ranks, and the constants in force. Raises InputError.

    more: what the run depends on besides. Exits with 0 if the run to resume is finished.
    """
    derived = {"lora_alpha": engines.lora_alpha(knobs)} | more
    now = ranks.on_first_rank(lambda: constants.constants_of(knobs, ranks, steps, hub.fingerprint(base), **derived))
    folder = ranks.on_first_rank(lambda: open_folder(knobs, ranks, steps, now))
    if not folder:
        dist.destroy_process_group()
        sys.exit(0)
    ranks.on_all_ranks(lambda: hold_folder(folder, ranks))
    return folder, now


def open_folder(knobs: SimpleNamespace, ranks: Ranks, steps: int, now: dict) -> RunFolder | None:
    """Finds the folder of the run to resume, or makes that of a new one, and locks it. Raises InputError.

    now: the constants in force. Returns None if the run to resume is finished.
    """
    folder = run_to_resume(knobs.CKPT_DIR) if knobs.RESUME else None
    if folder and folder.status() is Status.FINISHED:  # a job script may start it once too often
        constants.compare(folder, folder.constants(), now, ranks)
        done = f"the run of {folder.path} is finished, {folder.checkpoint(steps)}/ is its checkpoint"
        print0(ranks, "resume", f"{done}; start a new one without --RESUME=True")
        return None
    if knobs.RESUME and not folder:
        print0(ranks, "resume", f"there is no run of {knobs.CKPT_DIR} yet: this one is new")
    folder = folder or new_run(knobs.CKPT_DIR)
    files.lock(folder.path)
    constants.keep_or_compare(folder, now, ranks)
    engines.write_config(knobs, folder.path)
    folder.remove_unfinished()
    files.lock(folder.path, shared=True)
    print0(ranks, "run", f"{folder.path}/, checkpoints {folder.checkpoint(steps)}/")
    return folder


def hold_folder(folder: RunFolder, ranks: Ranks) -> None:
    """Every rank shares the lock of the folder, so that no run starts there while a rank of this one is alive.

    Raises InputError on a machine that does not see the folder.
    """
    try:
        files.lock(folder.path, shared=True)
    except InputError as error:
        more = f"With several machines, CKPT_DIR must be in a folder that all share (rank {ranks.rank})."
        raise InputError(f"{error} {more}") from None


def steps_done(run: Run) -> tuple[int, int]:
    """Restores engine and logs if the run is resumed. Returns the steps done, and bad steps in a row at their end."""
    status = run.ranks.on_first_rank(run.folder.status)
    if status is Status.FINISHED:  # it was killed while it removed its resume points
        return run.steps, 0
    if status is Status.UNFINISHED:
        done, bad_steps, rollouts = resume.load(run.engine, run.ranks, run.folder, run.logs)
        run.ranks.on_first_rank(lambda: constants.update(run.folder, run.knobs))
        if run.rollouts:
            use_round(run, done, rollouts)
        return done, bad_steps
    if run.knobs.RESUME:
        print0(run.ranks, "resume", f"{run.folder.path} has no resume point yet: it starts at step 1")
    run.ranks.on_first_rank(lambda: run.logs.start(None))
    return 0, 0


def loop(run: Run, watch: signals.Watch, done: int, bad_steps: int) -> tuple[int, bool]:
    """Trains the steps after step `done`, to the last one or until a signal stops it. bad_steps: in a row before these.

    Returns the last step, and whether a signal stopped it. Raises InputError after MAX_BAD_STEPS in a row.
    """
    knobs, ranks, step, stopped = run.knobs, run.ranks, done, False
    if validate(run, done, watch):
        return done, True
    if done and every(knobs.SAVE_EVERY, done, run.steps):  # it may have ended between resume point and checkpoint
        save_checkpoint(run, done)
    bar = progress(
        range(done + 1, run.steps + 1), "training", run.steps, initial=done, unit="step", disable=ranks.rank > 0
    )
    for step in bar:
        if run.rollouts and not begin_round(run, step, bad_steps, watch):
            return step - 1, True
        began, lr = time.perf_counter(), run.engine.get_lr()[0]
        with watch.step():
            result = train_step(run, step, lambda: watch.stop)
        speed = result.tokens / (time.perf_counter() - began)
        more = run.rollouts.measures() if run.rollouts else {}
        run.logs.add_step(step, lr, result, speed, complete=not validates_after(run, step), more=more)
        bar.set_postfix(on_bar(result.loss, more), refresh=False)
        bad_steps = bad_steps + 1 if result.bad_rows else 0
        stopped = result.stop or validate(run, step, watch)
        too_bad = bad_steps >= knobs.MAX_BAD_STEPS
        if run.previews and step % knobs.SAMPLE_EVERY == 0:
            ranks.on_first_rank(lambda step=step: preview(run, step))
        save = every(knobs.SAVE_EVERY, step, run.steps)
        if save or stopped or too_bad or every(knobs.RESUME_EVERY, step, run.steps):
            save_point(run, step, bad_steps)
        if too_bad:
            bad = f"{bad_steps} bad steps in a row, see {run.folder.path}/bad_steps.jsonl"
            raise InputError(f"{bad}; a lower LR may help.")
        if stopped:  # a validation and a checkpoint of this step are made when the run is resumed
            return step, True
        if save:
            save_checkpoint(run, step)
    ranks.on_first_rank(lambda: resume.remove(run.folder.resume_points()))  # the run is finished
    return step, False


def on_bar(loss: float, more: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of a step: a policy's loss says nothing, its reward does."""
    return {"reward": f"{more['reward']:.3f}"} if more else {"loss": f"{loss:.3f}"}


def save_point(run: Run, step: int, bad_steps: int) -> None:
    """Writes a resume point."""
    rollouts = run.rollouts.state if run.rollouts else {}
    resume.save(run.engine, run.ranks, run.folder, run.logs, step, bad_steps, rollouts)


# ---------------------------------------------------------------- rounds


def begin_round(run: Run, step: int, bad_steps: int, watch: signals.Watch) -> bool:
    """Before the first step of a round, lets the model answer its problems.

    Returns whether no signal prevented it; else there is a resume point of the steps before.
    """
    if run.rollouts.has(step):
        return True
    state = run.rollouts.make(run.model, run.ranks, step, lambda: watch.stop)
    if state is None:
        if step > 1:
            save_point(run, step - 1, bad_steps)
        return False
    use_round(run, step, state)
    run.rollouts.add_log_probs(run.model, run.ranks, lambda step: global_batch(run, step)[1])
    return True


def use_round(run: Run, step: int, state: dict[str, Tensor]) -> None:
    """The steps of a round train its rollouts; step: one of them."""
    run.samples, run.plan = run.rollouts.use(step, state, run.ranks.device)


# ---------------------------------------------------------------- validation


def validates_after(run: Run, step: int) -> bool:
    """Whether a step, from 1, is to have a validation loss."""
    return run.validation is not None and step > 0 and every(run.knobs.VAL_EVERY, step, run.steps)


def lacks_validation(run: Run, step: int) -> bool:
    """Whether the last step that was trained is still to get its validation loss."""
    return validates_after(run, step) and run.ranks.on_first_rank(lambda: not run.logs.last_row()[VAL_LOSS])


def validate(run: Run, step: int, watch: signals.Watch) -> bool:
    """Adds the validation loss to the line of the last step if it lacks one. Returns whether a signal prevented it."""
    if not lacks_validation(run, step):
        return False
    loss = run.validation.loss(run.model, run.ranks, lambda: watch.stop)
    if loss is None:
        return True
    run.ranks.on_first_rank(lambda: run.logs.add_validation(loss))
    samples = f"{len(run.validation.plan):,} samples"
    print0(run.ranks, "validation", f"loss {loss:.4f} on {samples} after step {step}")
    return False


def start_tracker(run: Run, done: int) -> None:
    """Starts the tracker after step `done`, on rank 0 only. Raises InputError on all ranks."""
    if name := run.knobs.TRACKER:
        first = done + (not lacks_validation(run, done))  # the last line may not be complete yet
        run.ranks.on_first_rank(lambda: run.logs.start_tracker(trackers.start(name, run.folder, first), first))


def preview(run: Run, step: int) -> None:
    """Answers a few training prompts, into samples.jsonl; the screen gets the start of the first answer."""
    rows = run.previews.rows(run.model, step)
    run.logs.append(SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    first = " ".join(rows[0]["completion"].split())
    print0(run.ranks, "preview", f"step {step}: {first[:SHOWN]}{'...' * (len(first) > SHOWN)}")


# ---------------------------------------------------------------- sizes


def global_batch_size(knobs: SimpleNamespace, ranks: Ranks) -> int:
    return knobs.MICRO_BSIZE * knobs.GRAD_ACC * ranks.world_size


def every(number: int, step: int, steps: int) -> bool:
    """Whether what is done every N steps (0: never), and in the last, is done in this one."""
    return step == steps or (number > 0 and step % number == 0)


def make_plan(knobs: SimpleNamespace, ranks: Ranks, samples: Samples, blocks: Callable | None) -> Tensor:
    """The order in which samples and blocks are trained, (P, 2); see data.schedule. Raises InputError."""
    grouped = getattr(knobs, "GROUP_BY_LENGTH", False)  # like PAD_TO, no knob of objectives without padding
    if grouped and samples.end is None:
        raise InputError("GROUP_BY_LENGTH=True saves nothing while samples are padded to MAX_LEN: set PAD_TO=longest.")
    if blocks and knobs.EOS_TAIL and samples.end is not None:
        what = "EOS_TAIL=True gives answers blocks up to MAX_LEN, of which PAD_TO=longest would cut some off"
        raise InputError(f"{what}; leave one of the two at its default.")
    answer_len = samples.length - samples.prompt_len  # (N,)
    number = blocks(answer_len) if blocks else torch.full_like(answer_len, knobs.EPOCHS)
    size = global_batch_size(knobs, ranks)
    return schedule(number, knobs.EPOCHS, knobs.SEED, samples.end if grouped else None, size)


def tokens_per_step(knobs: SimpleNamespace, size: int, samples: Samples, plan: Tensor, steps: int) -> str:
    """How many tokens go through the model in a step, and why."""
    if samples.end is None:
        return f"{size * knobs.MAX_LEN:,} = {size:,} samples x {knobs.MAX_LEN} MAX_LEN"
    padded_to = samples.padded_to(plan[: steps * size, 0].view(steps, size))  # (steps,)
    mean, low, high = size * padded_to.double().mean(), padded_to.min(), padded_to.max()
    return f"{mean:,.0f} on average = {size:,} samples x {low} to {high} of {knobs.MAX_LEN} MAX_LEN (PAD_TO longest)"


def plan_steps(knobs: SimpleNamespace, ranks: Ranks, samples: Samples, plan: Tensor) -> int:
    """The number of optimizer steps. Prints on rank 0 how it and the other sizes come about. Raises InputError."""
    size, n, draws = global_batch_size(knobs, ranks), len(samples.length), len(plan)
    factors = f"{size:,} = {knobs.MICRO_BSIZE} MICRO_BSIZE x {knobs.GRAD_ACC} GRAD_ACC x {ranks.world_size} ranks"
    if n < size:
        raise InputError(
            f"{knobs.DATA_PT}: {n:,} usable samples (MAX_SAMPLES {knobs.MAX_SAMPLES}) are fewer than one global batch "
            f"of {factors}; lower MICRO_BSIZE or GRAD_ACC, or prepare more samples."
        )
    steps = knobs.TOTAL_TRAIN_STEPS or draws // size
    used_up = n * knobs.EPOCHS - draws
    if steps > draws // size:
        passes = f"{draws:,} passes: {n:,} samples x {knobs.EPOCHS} EPOCHS, less {used_up:,} with no block left"
        raise InputError(
            f"TOTAL_TRAIN_STEPS={steps} is more than the {draws // size} steps of a global batch of {factors} "
            f"({passes}); raise MAX_SAMPLES, or EPOCHS while samples have blocks left, or lower TOTAL_TRAIN_STEPS."
        )
    for what, text in (
        ("samples", f"{n:,} of {knobs.DATA_PT} ({samples.unanswered:,} without an answer left out)"),
        ("passes", f"{draws:,} = {n:,} samples x {knobs.EPOCHS} EPOCHS - {used_up:,} with no block left"),
        ("global batch", factors),
        ("steps", f"{steps:,} " + ("= TOTAL_TRAIN_STEPS" if knobs.TOTAL_TRAIN_STEPS else f"= {draws:,} // {size:,}")),
        ("tokens/step", tokens_per_step(knobs, size, samples, plan, steps)),
    ):
        print0(ranks, what, text)
    return steps


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(run: Run, step: int) -> None:
    """Writes {CKPT_DIR}_stepXXXX, the base as it is trained; it has that name only once it is complete."""
    ranks, base, dtype = run.ranks, run.base, run.knobs.SAVE_DTYPE
    began, folder, rounding = time.perf_counter(), run.folder.checkpoint(step), checkpoint.Rounding()
    if ranks.on_first_rank(folder.exists):
        return  # the run had come so far before it was interrupted
    # absolute, so that the adapters find a local base from any folder
    base_name = str(base.absolute()) if Path(run.knobs.MODEL_NAME).is_dir() else run.knobs.MODEL_NAME

    def write_files(unfinished):  # all ranks share the work
        nonlocal rounding
        updates = checkpoint.updates(run.model)
        written, rounding = checkpoint.merge_weights(base, unfinished, updates, dtype, ranks.rank, ranks.world_size)
        if ranks.rank == 0:
            new = run.new_files | {card.README: card.card(run.constants, step, base).encode()}
            written |= checkpoint.copy_side_files(base, unfinished, dtype, config_of(run), new)
            if run.knobs.LORA_RANK:
                new = run.new_files | {card.README: card.card(run.constants, step, base, adapter=True).encode()}
                checkpoint.save_adapter(run.model, base_name, unfinished / checkpoint.ADAPTER, new)
        if not run.knobs.LORA_RANK:  # with BF16, the trained weights are rounded before they are saved
            rounding.error += engines.rounding_of_weights(run.engine)
        return written

    files.publish(ranks, run.folder.path / f"step{step:04d}.unfinished", folder, write_files, content={})
    rounding = sum(ranks.on_all_ranks(lambda: rounding), checkpoint.Rounding())
    print0(ranks, "checkpoint", f"{folder}/ in {time.perf_counter() - began:.1f} s; {rounding.sentence(dtype)}")
    if step == run.steps and run.knobs.LORA_RANK and not run.knobs.BASE_4BIT:  # 4 bits cannot hold merged weights
        ranks.on_first_rank(lambda: print0(ranks, "", gap_on_first_samples(run, folder)))


def config_of(run: Run) -> dict:
    """What the checkpoints' config.json says of the training."""
    trained = models.mask_is_trained(run.model.config) or not run.knobs.LORA_RANK
    return run.entries | {models.MASK_TRAINED: None if trained else False}


def gap_on_first_samples(run: Run, folder: Path) -> str:
    """Compares the checkpoint's logits with those of base + adapters on the first samples; see checkpoint.logit_gap."""
    samples = run.samples
    first = torch.arange(min(checkpoint.COMPARED, len(samples.number)), device=samples.number.device)
    batch = samples.batch(first, torch.zeros_like(first))
    run.model.eval()
    sentence = checkpoint.logit_gap(
        run.model, run.base, folder, batch.input_ids, batch.prompt_len, batch.length, run.knobs.MASK_ID
    )
    run.model.train()
    return sentence
