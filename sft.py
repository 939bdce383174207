"""What both trainers share: LoRA model, DeepSpeed engine, training loop, checkpoints, samples.

A line belongs here only if changing it for one trainer and not for the other would make their comparison unfair.
Letters in shapes: N rows of the data, G rows of a global batch, B rows of a micro-batch, L row length, V vocabulary,
n scored positions.

Every random number of a step comes from (SEED, step), dropout's also from the rank. Each rank draws the masks of the
whole global batch and uses its own rows of them: ranks see different masks, but a batch has the same for any number of
ranks.
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import decode
import files
import llada
import masking
import merge
import resume
import watch
from cli import STOPPED, InputError
from log import Log, checkpoint_folder, say
from place import Place
from rows import Rows, derive_seed, make_rows, read_pt, schedule
from settings import Settings

warnings.filterwarnings("ignore", category=FutureWarning)  # the pinned packages warn about each other
SAMPLES = 4  # rows that SAMPLE_EVERY and the check of a checkpoint look at
LINEARS = sorted(name.rpartition(".")[2] for name in llada.MODULES.values() if name.endswith("_proj"))


def train(knobs, turns, hide):
    """Fine-tunes LoRA adapters, logs every optimizer step, saves merged checkpoints. Run by the deepspeed launcher.

    knobs: the script's constants. turns: answer lengths (N,) -> how often each row can be drawn in the run, (N,).
    hide: (prompt_len (G,), length (G,), turn (G,), generator=) -> hidden, (G, L) bool, and weights of the tokens in the
    loss, (G, L), above 0 where a token is scored (see masking.py).
    Raises InputError before anything is trained or written if something in the knobs, the rows or the model is wrong,
    and during the training if a file cannot be written or MAX_BAD_STEPS come in a row. Exits with STOPPED if asked to.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise InputError(f"start this script with the launcher: deepspeed --num_gpus N {sys.argv[0]}")
    watch.end_at_once()
    launchers = watch.launchers()
    run = start(knobs, turns, hide)
    place, log = run.place, run.log
    done, bad_steps = resume.load(run.engine, place, log)
    with resume.hint(log), watch.Watch(place, launchers) as watched:
        step, stopped = loop(run, watched, done, bad_steps)
    dist.destroy_process_group()
    if stopped:
        say(place, "stopped", f"as asked, after step {step}; the same command with --RESUME=True goes on")
        sys.exit(STOPPED)
    log.close()


@dataclass
class Run:
    """What all steps of a training share."""

    knobs: SimpleNamespace  # the script's constants
    place: Place
    base: Path  # folder of the base model
    rows: Rows  # the data, on the rank's device
    plan: torch.Tensor  # (P, 2): row and turn of each draw, see rows.schedule
    hide: Callable  # see train
    steps: int  # optimizer steps
    log: Log
    model: PeftModel
    engine: deepspeed.DeepSpeedEngine
    samples: "Samples | None"


def start(knobs, turns, hide):
    """Checks all that the user gives, then loads model and engine. Returns the Run. Raises InputError."""
    place = Place.from_environment()
    base, rows, samples = check_input(knobs)
    plan = schedule(turns(rows.length - rows.prompt_len), knobs.EPOCHS, knobs.SEED)  # (P, 2)
    steps = plan_steps(knobs, place, rows, plan)
    start_group()
    log = Log(knobs, place, steps, base, engine_config(knobs))
    model = lora_model(base, knobs, place)
    engine = start_engine(model, knobs, steps)
    rows, plan = rows.to(place.device), plan.to(place.device)
    return Run(knobs, place, base, rows, plan, hide, steps, log, model, engine, samples)


def check_input(knobs):
    """Checks what the user gives. Returns the base's folder, the Rows, and the Samples to be written or None."""
    check_targets(knobs.TARGET_MODS)
    data = read_pt(knobs.PT_FILE)  # before the base, which may be a large download
    base = llada.local_folder(knobs.MODEL)
    config = check_model(base, knobs)
    rows = make_rows(data, knobs, config)
    return base, rows, Samples(base, config, rows, knobs) if knobs.SAMPLE_EVERY else None


def loop(run, watched, done, bad_steps):
    """Trains after step `done` and so many bad steps in a row, to the end or until it is asked to stop.

    Returns the last step, and whether it was asked to stop. Raises InputError after MAX_BAD_STEPS in a row.
    """
    knobs, place, log, step = run.knobs, run.place, run.log, done
    tokens, stopped = global_batch(knobs, place) * knobs.MAX_LEN, False
    if done and is_due(done, knobs.SAVE_EVERY, run.steps):  # it may have ended between resume point and checkpoint
        save_checkpoint(run, done)
    bar = tqdm(range(done + 1, run.steps + 1), "training", run.steps, initial=done, unit="step", disable=place.rank > 0)
    for step in bar:
        began, lr = time.perf_counter(), run.engine.get_lr()[0]
        with watched.step():
            result = train_step(run, step, lambda: watched.stop)
        log.row(step, lr, result, tokens / (time.perf_counter() - began))
        bar.set_postfix(loss=f"{result.loss:.3f}")
        bad_steps, stopped = bad_steps + 1 if result.bad_rows else 0, result.stop
        too_bad = bad_steps >= knobs.MAX_BAD_STEPS
        if run.samples and step % knobs.SAMPLE_EVERY == 0:
            run.samples.write(run.model, log, step)
        save = is_due(step, knobs.SAVE_EVERY, run.steps)
        if save or stopped or too_bad or is_due(step, knobs.RESUME_EVERY, run.steps):
            resume.save(run.engine, place, log, step, bad_steps)
        if too_bad:
            raise InputError(f"{bad_steps} bad steps in a row, see {log.folder}/bad_steps.jsonl; a lower LR may help.")
        if stopped:  # a checkpoint of this step is made when the run goes on
            break
        if save:
            save_checkpoint(run, step)
    else:  # the run is finished
        place.on_first_rank(lambda: resume.remove(resume.points(log.folder)))
    return step, stopped


@dataclass
class Step:
    """What an optimizer step over the global batch gives."""

    loss: float  # mean over its rows; nan if p hid nothing: there is no loss then
    grad_norm: float  # before clipping
    supervised: int  # scored tokens
    bad_rows: list  # rows of PT_FILE that a NaN or an infinity may come from; then the weights did not take the step
    stop: bool  # some rank has been asked to stop


def train_step(run, step, asked=lambda: False):
    """One optimizer step over global batch number `step`, from 1. asked(): whether this rank is to stop. See Step."""
    knobs, place, rows, engine = run.knobs, run.place, run.rows, run.engine
    size = global_batch(knobs, place)
    sample, turn = run.plan[(step - 1) * size : step * size].T  # (G,), (G,)
    generator = torch.Generator(place.device).manual_seed(derive_seed(knobs.SEED, "masks", step))
    hidden, weights = run.hide(rows.prompt_len[sample], rows.length[sample], turn, generator=generator)  # both (G, L)
    scored = weights > 0  # (G, L)
    torch.manual_seed(derive_seed(knobs.SEED, "dropout", step, place.rank))
    losses = []
    for micro in range(knobs.GRAD_ACC):
        start = (micro * place.world + place.rank) * knobs.MICRO_BSIZE
        mine = slice(start, start + knobs.MICRO_BSIZE)
        ids, ask = rows.ids[sample[mine]].long(), scored[mine]  # (B, L), (B, L)
        inputs = ids.masked_fill(hidden[mine], knobs.MASK_ID)
        logits = engine(input_ids=inputs, logits_to_keep=ask).logits  # (n, V): the head only where there is a loss
        loss = masking.loss(logits, ids[ask], weights[mine][ask])  # this micro-batch's part of the global batch's loss
        losses.append(loss.detach().float())
        loss = loss * (1 + 0 * losses[-1])  # no number: no gradient is one either, and the engine skips the step
        engine.backward(loss * place.world * knobs.GRAD_ACC)  # as the engine averages over ranks and micro-batches
        engine.step()  # changes the weights at the last micro-batch only
    losses, stop = share(losses, bool(asked()))  # (ranks, GRAD_ACC)
    supervised = int(scored.sum())
    bad_rows = [] if engine.was_step_applied() else suspects(losses, sample, rows, knobs)
    loss = losses.sum().item() if supervised else math.nan
    return Step(loss, float(engine.get_global_grad_norm()), supervised, bad_rows, stop)


def suspects(losses, sample, rows, knobs):
    """Rows of the micro-batches whose loss is no number; all of the global batch if it is only the gradient."""
    bad = ~losses.isfinite().T.flatten()  # (micro-batches of the global batch,), in its order
    bad = (bad | ~bad.any()).repeat_interleave(knobs.MICRO_BSIZE)  # (G,)
    return rows.number[sample[bad]].tolist()


def share(losses, stop):
    """The losses of all ranks' micro-batches, (ranks, GRAD_ACC), and whether any rank is asked to stop."""
    mine = torch.stack([*losses, torch.full_like(losses[0], stop)])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    everyone = torch.stack(everyone)
    return everyone[:, :-1], bool(everyone[:, -1].any())


# ---------------------------------------------------------------- sizes


def global_batch(knobs, place):
    return knobs.MICRO_BSIZE * knobs.GRAD_ACC * place.world


def is_due(step, every, steps):
    """Whether something that is done every so many steps (0: never), and in the last, is done in this one."""
    return step == steps or (every > 0 and step % every == 0)


def plan_steps(knobs, place, rows, plan):
    """The number of optimizer steps. Prints on rank 0 how it and the other sizes come about. Raises InputError."""
    size, n, draws = global_batch(knobs, place), len(rows.length), len(plan)
    factors = f"{size:,} = {knobs.MICRO_BSIZE} MICRO_BSIZE x {knobs.GRAD_ACC} GRAD_ACC x {place.world} ranks"
    if n < size:
        raise InputError(
            f"{knobs.PT_FILE}: {n:,} usable rows (MAX_SAMPLES {knobs.MAX_SAMPLES}) are fewer than one global batch of "
            f"{factors}; lower MICRO_BSIZE or GRAD_ACC, or prepare more rows."
        )
    steps = knobs.TOTAL_TRAIN_STEPS or draws // size
    if steps > draws // size:
        raise InputError(
            f"TOTAL_TRAIN_STEPS={steps} is more than the {draws // size} steps of {n:,} rows, EPOCHS={knobs.EPOCHS}, "
            f"and a global batch of {factors}; raise EPOCHS or MAX_SAMPLES, or lower TOTAL_TRAIN_STEPS."
        )
    used_up = n * knobs.EPOCHS - draws
    for what, text in (
        ("rows", f"{n:,} of {knobs.PT_FILE} ({rows.unanswered:,} without an answer left out)"),
        ("draws", f"{draws:,} = {n:,} rows x {knobs.EPOCHS} EPOCHS - {used_up:,} with no block left"),
        ("global batch", factors),
        ("steps", f"{steps:,} " + ("= TOTAL_TRAIN_STEPS" if knobs.TOTAL_TRAIN_STEPS else f"= {draws:,} // {size:,}")),
        ("tokens/step", f"{size * knobs.MAX_LEN:,} = {size:,} rows x {knobs.MAX_LEN} MAX_LEN"),
        ("warm-up", f"{warmup_steps(steps, knobs.WARMUP_RATIO):,} steps = {knobs.WARMUP_RATIO:.0%} of {steps:,}"),
    ):
        say(place, what, text)
    return steps


# ---------------------------------------------------------------- model and engine


def check_model(folder, knobs):
    """Checks the base against the knobs, before anything large is read. Returns its config. Raises InputError."""
    config = llada.load_config(folder)
    llada.check_tensors(folder, config)
    if config.mask_token_id not in (None, knobs.MASK_ID):
        raise InputError(f"MASK_ID={knobs.MASK_ID}, but {folder}/config.json has mask_token_id {config.mask_token_id}.")
    if config.vocab_size <= knobs.MASK_ID:
        raise InputError(f"MASK_ID={knobs.MASK_ID} is outside the model's vocabulary of {config.vocab_size:,}.")
    if config.pad_token_id in (None, knobs.MASK_ID) or not 0 <= config.pad_token_id < config.vocab_size:
        raise InputError(f"{folder}/config.json: pad_token_id {config.pad_token_id} is no token to pad the rows with.")
    if config.max_position_embeddings < knobs.MAX_LEN:
        raise InputError(f"MAX_LEN={knobs.MAX_LEN}, but the model has {config.max_position_embeddings} positions.")
    return config


def check_targets(names):
    """Refuses names of layers that no LLaDA has, or that cannot be merged. Raises InputError."""
    for name in names:
        if name not in LINEARS:
            raise InputError(f"TARGET_MODS: {name!r} matches no layer of the model; choose from {', '.join(LINEARS)}.")


def lora_model(folder, knobs, place):
    """The base with LoRA adapters in its own dtype, the same on every rank."""
    if place.rank != 0:
        transformers.utils.logging.disable_progress_bar()
    model = llada.load_model(folder, torch.bfloat16 if knobs.BF16 else torch.float32, place.device)
    if knobs.GRADIENT_CHECKPOINTING:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    transformers.set_seed(knobs.SEED)
    lora = LoraConfig(
        r=knobs.LORA_R, lora_alpha=knobs.LORA_ALPHA, lora_dropout=knobs.LORA_DROPOUT, target_modules=knobs.TARGET_MODS
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if knobs.COMPILE:
        compile_layers(model)
    model.train()  # a loaded model is in evaluation mode, in which gradient checkpointing does nothing
    adapted = sum(layer.weight.numel() for name, layer in merge.lora_layers(model))
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = model.num_parameters() - trainable
    say(place, "adapters", f"{trainable:,} parameters, r {knobs.LORA_R}, on {adapted:,} of the base's {total:,}")
    return model


def compile_layers(model):
    """Lets torch compile each decoder layer at its first call: one graph serves all, and shapes never change."""
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.compile()


def engine_config(knobs):
    """The DeepSpeed configuration. torch_adam: torch's own AdamW, which needs no kernel compiled at the first start."""
    adamw = {"lr": knobs.LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": knobs.WEIGHT_DECAY, "torch_adam": True}
    if get_accelerator().device_name() == "cuda":
        adamw["fused"] = True
    # gradients of many micro-batches are summed in fp32: in bf16 the small ones would be lost
    data_types = {"data_types": {"grad_accum_dtype": "fp32"}} if knobs.BF16 and knobs.GRAD_ACC > 1 else {}
    return data_types | {
        "train_micro_batch_size_per_gpu": knobs.MICRO_BSIZE,
        "gradient_accumulation_steps": knobs.GRAD_ACC,
        "gradient_clipping": knobs.MAX_GRAD_NORM,
        "optimizer": {"type": "AdamW", "params": adamw},
        "bf16": {"enabled": knobs.BF16},
        "zero_optimization": {"stage": 2, "overlap_comm": False},  # adapter gradients are small: overlap gains nothing
    }


def start_group():
    """Lets the ranks talk to each other."""
    if get_accelerator().device_name() == "cpu":  # gloo serves; the shared-memory op would be compiled first, with g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(timeout=timedelta(hours=1))  # saving to a slow disk can take longer than the 10 minutes


def start_engine(model, knobs, steps):
    """The DeepSpeed ZeRO-2 engine, with warm-up and cosine planned for exactly `steps` optimizer steps."""
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=engine_config(knobs),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: lr_factor(done, steps, knobs.WARMUP_RATIO, knobs.MIN_LR_RATIO)
        ),
    )
    return engine


def warmup_steps(steps, ratio):
    return min(steps - 1, math.ceil(steps * ratio - 1e-9))  # 100 * 0.07 is a little more than 7


def lr_factor(done, steps, warmup_ratio, min_ratio):
    """Share of LR in the step after `done` steps: linear up to 1, then a cosine that reaches min_ratio in the last."""
    warmup = warmup_steps(steps, warmup_ratio)
    if done < warmup:
        return (done + 1) / warmup
    progress = (done + 1 - warmup) / (steps - warmup)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


# ---------------------------------------------------------------- checkpoints and samples


def save_checkpoint(run, step):
    """Writes {CKPT_DIR}_stepXXXX, the base with the adapters merged in; it has that name only once it is complete."""
    place, log, base = run.place, run.log, run.base
    began, folder = time.perf_counter(), checkpoint_folder(run.knobs.CKPT_DIR, step, log.suffix)

    def write_files(unfinished):  # all ranks share the work
        written = merge.merge_weights(base, unfinished, merge.lora_factors(run.model), place.rank, place.world)
        return written | (merge.copy_side_files(base, unfinished) if place.rank == 0 else {})

    if log.resumed and place.on_first_rank(folder.exists):
        return  # the run had come so far before it was interrupted
    files.publish(place, log.folder / f"step{step:04d}.unfinished", folder, write_files, content={})
    if place.rank == 0:
        say(place, "checkpoint", f"{folder}/ in {time.perf_counter() - began:.1f} s")
        say(place, "", gap_on_first_rows(run, folder))
    place.on_first_rank(lambda: None)


class Samples:
    """What the model answers to the first prompts of the training rows, decoded exactly; see SAMPLE_EVERY."""

    def __init__(self, base, config, rows, knobs):
        """Raises InputError if the prompts cannot be answered: later it would end the training."""
        self.tokenizer = llada.load_tokenizer(base)
        self.prompts = [ids[:start].tolist() for ids, start in zip(rows.ids[:SAMPLES], rows.prompt_len)]
        block_length = getattr(knobs, "BLOCK_SIZE", Settings.block_length)  # the baseline has no blocks
        longest = int((rows.length - rows.prompt_len)[:SAMPLES].max())
        gen_length = masking.num_blocks(longest, block_length) * block_length
        self.settings = Settings(gen_length, block_length, steps=gen_length)
        try:
            decode.make_canvas(config, self.prompts, gen_length, "cpu")
        except InputError as error:
            raise InputError(f"SAMPLE_EVERY={knobs.SAMPLE_EVERY}: {error} Set it to 0.") from error

    def write(self, model, log, step):
        """Adds them to samples.jsonl, on the first rank; the others wait."""
        log.place.on_first_rank(lambda: log.append("samples.jsonl", self.lines(model, step)))

    def lines(self, model, step):
        model.eval()
        ends = decode.end_ids(model, self.tokenizer)
        answers, _ = decode.decode(model.get_base_model(), self.prompts, self.settings, ends)  # with the adapters
        model.train()
        lines = []
        for prompt, answer in zip(self.prompts, answers.tolist()):
            completion = decode.completion(self.tokenizer, answer, ends)
            row = {"step": step, "prompt": self.tokenizer.decode(prompt), "completion": completion}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        return "".join(lines)


def gap_on_first_rows(run, folder):
    """merge.logit_gap on the first rows, seen as decoding first sees them: all of the answer hidden."""
    rows, model = run.rows, run.model
    ids, prompt_len, length = rows.ids[:SAMPLES].long(), rows.prompt_len[:SAMPLES], rows.length[:SAMPLES]
    whole = ids.shape[1]  # as the block size: one block, the answer
    _, answer, _ = masking.regions(prompt_len, length, torch.zeros_like(length), whole, whole)  # (B, L)
    model.eval()
    sentence = merge.logit_gap(model, run.base, folder, ids.masked_fill(answer, run.knobs.MASK_ID), answer)
    model.train()
    return sentence
