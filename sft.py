"""What both trainers share: rows, block schedule, LoRA model, DeepSpeed engine, training loop, logs, checkpoints.

A line belongs here only if changing it for one trainer and not for the other would make their comparison unfair.
Letters in shapes: N rows of the data, G rows of a global batch, B rows of a micro-batch, L row length, V vocabulary,
n scored positions.

Every random number of a step comes from (SEED, step), dropout's also from the rank. Each rank draws the masks of the
whole global batch and uses its own rows of them: ranks see different masks, but a batch has the same for any number of
ranks.
"""

import csv
import json
import math
import os
import pickle
import random
import re
import resource
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from itertools import count
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
import torch.nn.functional as F
import transformers
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import decode
import llada
import masking
import merge
from cli import InputError
from place import Place
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
    and during the training if the loss or the gradient is not finite.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise InputError(f"start this script with the launcher: deepspeed --num_gpus N {sys.argv[0]}")
    place = Place.from_environment()
    check_targets(knobs.TARGET_MODS)
    data = read_pt(knobs.PT_FILE)  # before the base, which may be a large download
    base = llada.local_folder(knobs.MODEL)
    config = check_model(base, knobs)
    rows = make_rows(data, knobs, config)
    samples = Samples(base, config, rows, knobs) if knobs.SAMPLE_EVERY else None
    plan = schedule(turns(rows.length - rows.prompt_len), knobs.EPOCHS, knobs.SEED)  # (P, 2)
    steps = plan_steps(knobs, place, rows, plan)
    model = lora_model(base, knobs, place)
    engine = start_engine(model, knobs, steps)
    rows, plan = rows.to(place.device), plan.to(place.device)
    log = Log(knobs, place, steps)

    bar = tqdm(range(1, steps + 1), desc="training", unit="step", disable=place.rank != 0)
    for step in bar:
        began, lr = time.perf_counter(), engine.get_lr()[0]
        loss, grad_norm, supervised = train_step(engine, knobs, place, rows, plan, hide, step)
        tokens_per_second = global_batch(knobs, place) * knobs.MAX_LEN / (time.perf_counter() - began)
        log.row(step, loss, lr, grad_norm, supervised, tokens_per_second)
        bar.set_postfix(loss=f"{loss:.3f}")
        if samples and step % knobs.SAMPLE_EVERY == 0 and place.rank == 0:  # the others wait in their next step
            samples.write(model, log.folder, step)
        if step == steps or (knobs.SAVE_EVERY and step % knobs.SAVE_EVERY == 0):
            save_checkpoint(model, base, knobs, place, log, rows, step)
    log.close()
    dist.destroy_process_group()


def train_step(engine, knobs, place, rows, plan, hide, step):
    """One optimizer step over the global batch number `step`, from 1. Returns loss, gradient norm, scored tokens."""
    size = global_batch(knobs, place)
    sample, turn = plan[(step - 1) * size : step * size].T  # (G,), (G,)
    generator = torch.Generator(place.device).manual_seed(derive_seed(knobs.SEED, "masks", step))
    hidden, weights = hide(rows.prompt_len[sample], rows.length[sample], turn, generator=generator)  # (G, L), (G, L)
    scored = weights > 0  # (G, L)
    torch.manual_seed(derive_seed(knobs.SEED, "dropout", step, place.rank))
    total = torch.zeros((), device=place.device)
    for micro in range(knobs.GRAD_ACC):
        start = (micro * place.world + place.rank) * knobs.MICRO_BSIZE
        mine = slice(start, start + knobs.MICRO_BSIZE)
        ids, ask = rows.ids[sample[mine]].long(), scored[mine]  # (B, L), (B, L)
        inputs = ids.masked_fill(hidden[mine], knobs.MASK_ID)
        logits = engine(input_ids=inputs, logits_to_keep=ask).logits  # (n, V): the head only where there is a loss
        loss = masking.loss(logits, ids[ask], weights[mine][ask])  # this micro-batch's part of the global batch's loss
        engine.backward(loss * place.world * knobs.GRAD_ACC)  # as the engine averages over ranks and micro-batches
        total += loss.detach()
        if micro == knobs.GRAD_ACC - 1:
            dist.all_reduce(total)
            stop_if_not_finite(total.item(), "loss", step)
        engine.step()  # changes the weights at the last micro-batch only
    grad_norm = float(engine.get_global_grad_norm())
    stop_if_not_finite(grad_norm, "gradient norm", step)
    supervised = int(scored.sum())
    return (total.item() if supervised else math.nan), grad_norm, supervised  # nan: p hid nothing, there is no loss


def stop_if_not_finite(value, what, step):
    if not math.isfinite(value):
        raise InputError(f"the {what} of step {step} is {value}; nothing of it was saved. Try a lower LR.")


# ---------------------------------------------------------------- random numbers, sizes


def derive_seed(seed, *names):
    """An independent 63-bit seed for each purpose, the same on every machine."""
    return random.Random(repr((seed, *names))).getrandbits(63)


def global_batch(knobs, place):
    return knobs.MICRO_BSIZE * knobs.GRAD_ACC * place.world


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


def say(place, what, text):
    """A line of the report, on rank 0 only."""
    if place.rank == 0:
        tqdm.write(f"{what:<13}{text}")


# ---------------------------------------------------------------- rows and their order


@dataclass
class Rows:
    """The training rows as tensors."""

    ids: torch.Tensor  # (N, L) int32, right-padded
    prompt_len: torch.Tensor  # (N,) where the answer starts
    length: torch.Tensor  # (N,) where it ends
    unanswered: int  # rows that were left out because there is nothing after their prompt

    def to(self, device):
        return Rows(self.ids.to(device), self.prompt_len.to(device), self.length.to(device), self.unanswered)


def make_rows(data, knobs, config):
    """Checks the rows of PT_FILE against the model's config and the knobs, pads them to MAX_LEN. Raises InputError."""
    path = knobs.PT_FILE
    for i, row in enumerate(data):
        if problem := row_problem(row, knobs.MAX_LEN):
            raise InputError(f"{path}: row {i} {problem}")
    full_ids = [row["full_ids"] for row in data]
    ids = pad_sequence(full_ids, batch_first=True, padding_value=config.pad_token_id)  # (all rows, longest)
    check_ids(path, ids, config.vocab_size, knobs.MASK_ID)
    prompt_len = torch.tensor([row["prompt_len"] for row in data])
    length = torch.tensor([len(row) for row in full_ids])
    answered = (prompt_len < length).nonzero()[:, 0]
    used = answered[: knobs.MAX_SAMPLES or None]
    if not len(used):
        raise InputError(
            f"{path}: no usable row; none of its {len(data)} rows has an answer. Write it anew with pt.py."
        )
    ids = F.pad(ids[used].int(), (0, knobs.MAX_LEN - ids.shape[1]), value=config.pad_token_id)  # (N, L)
    if knobs.EOS_TAIL:
        length = torch.full_like(length, knobs.MAX_LEN)
    return Rows(ids, prompt_len[used], length[used], unanswered=len(data) - len(answered))


# what a damaged zip, or a good zip with a bad pickle, makes zipfile and torch.load raise
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, ValueError)


def read_pt(path):
    """The list in a .pt file, read without running any code from it. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; write it with pt.py, or name another with --PT_FILE=...")
    damaged = f"{path} is truncated, damaged or was not written by pt.py; write it anew."
    try:
        with zipfile.ZipFile(path) as file:  # torch.save writes a zip, but torch.load does not look at its checksums
            if file.testzip():
                raise InputError(damaged)
        rows = torch.load(path, weights_only=True)
    except UNREADABLE as error:
        raise InputError(damaged) from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} does not hold a list of rows; write it anew with pt.py.")
    return rows


def row_problem(row, max_len):
    """What is wrong with the form of one row of a .pt file, or None."""
    if not isinstance(row, dict) or not {"prompt_len", "full_ids"} <= row.keys():
        return "lacks the keys prompt_len and full_ids; write the file anew with pt.py."
    ids, prompt_len = row["full_ids"], row["prompt_len"]
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.long or ids.dim() != 1:
        return "has full_ids that are not a 1-D LongTensor; write the file anew with pt.py."
    if type(prompt_len) is not int or not 0 <= prompt_len <= len(ids):
        return f"has prompt_len {prompt_len}, outside its {len(ids)} tokens; write the file anew with pt.py."
    if len(ids) > max_len:
        return f"has {len(ids)} tokens, more than MAX_LEN={max_len}; raise that, or run pt.py with --max_len {max_len}."
    return None


def check_ids(path, ids, vocab_size, mask_id):
    """Refuses ids (N, any) that are outside the vocabulary or are the mask itself. Raises InputError."""
    outside = (ids < 0) | (ids >= vocab_size)
    for bad, why in (
        (outside, f"outside the model's vocabulary of {vocab_size:,}; prepare the file with the tokenizer of MODEL."),
        (ids == mask_id, "which is MASK_ID; rows hold no masks, so MASK_ID or the tokenizer is not the model's."),
    ):
        if bad.any():
            row, column = (int(x) for x in bad.nonzero()[0])
            raise InputError(f"{path}: row {row} contains the id {int(ids[row, column])}, {why}")


def schedule(turns, epochs, seed):
    """The order of training: (P, 2) pairs (row, turn), from the seed alone, the same for every number of ranks.

    turns: (N,) how often each row can be drawn at all; in Blockwise SFT, its number of blocks. In every epoch each row
    that has a turn left is drawn once, in random order, and takes one of its unused turns, uniformly: so each pair
    comes at most once, and rows that are used up drop out. Step s trains the pairs from (s - 1) * G on.
    """

    def generator(*purpose):
        return torch.Generator().manual_seed(derive_seed(seed, *purpose))

    most = int(turns.max())
    keys = torch.rand(len(turns), most, generator=generator("turns"))
    keys[torch.arange(most) >= turns[:, None]] = 2.0  # turns that the row does not have come last
    order = keys.argsort(dim=1)  # (N, most): the row's turns in the order of their use
    pairs = []
    for epoch in range(min(epochs, most)):
        left = (turns > epoch).nonzero()[:, 0]
        left = left[torch.randperm(len(left), generator=generator("rows", epoch))]
        pairs.append(torch.stack([left, order[left, epoch]], dim=1))
    return torch.cat(pairs)


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


def start_engine(model, knobs, steps):
    """The DeepSpeed ZeRO-2 engine, with warm-up and cosine planned for exactly `steps` optimizer steps."""
    if get_accelerator().device_name() == "cpu":  # gloo serves; the shared-memory op would be compiled first, with g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(timeout=timedelta(hours=1))  # saving to a slow disk can take longer than the 10 minutes
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


# ---------------------------------------------------------------- logs and checkpoints


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
                    return folder, suffix
    except OSError as error:
        raise InputError(f"CKPT_DIR={ckpt_dir}: its folder cannot be written ({error.strerror}).") from error


class Log:
    """The run's folder {CKPT_DIR}_logs: the constants in force, and a line per optimizer step. Written by rank 0."""

    METRICS = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "tokens_per_second", "peak_memory_gb")

    def __init__(self, knobs, place, steps):
        self.place, self.began, self.losses = place, time.perf_counter(), []
        made = [make_log_folder(knobs.CKPT_DIR) if place.rank == 0 else None]
        dist.broadcast_object_list(made, src=0)
        self.folder, self.suffix = made[0]
        if place.rank == 0:
            derived = {"script": Path(sys.argv[0]).name, "ranks": place.world, "total_steps": steps}
            versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}
            write_json(self.folder / "ablation_config.json", vars(knobs) | {"derived": derived | versions})
            write_json("ds_zero2.json", engine_config(knobs))
            self.write("train_loss.csv", self.METRICS[:2])
            self.write("metrics.csv", self.METRICS)

    def write(self, name, values):
        with open(self.folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)

    def row(self, step, loss, lr, grad_norm, supervised, tokens_per_second):
        if self.place.rank == 0:
            self.losses.append(loss)
            short = [step, f"{loss:.6f}"]
            rest = [f"{lr:.6e}", f"{grad_norm:.6f}", supervised, f"{tokens_per_second:.1f}", f"{peak_memory_gb():.3f}"]
            self.write("train_loss.csv", short)
            self.write("metrics.csv", short + rest)

    def close(self):
        if self.place.rank == 0:
            seconds = time.perf_counter() - self.began
            loss = f"loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}"
            say(self.place, "done", f"{len(self.losses)} steps in {seconds:.0f} s, {loss}")
            say(self.place, "logs", f"{self.folder}/train_loss.csv, metrics.csv, ablation_config.json")


def write_json(path, content):
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def peak_memory_gb():
    """Highest memory of this rank so far: of the GPU if there is one, else of the process."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def save_checkpoint(model, base, knobs, place, log, rows, step):
    """Writes {CKPT_DIR}_stepXXXX, the base with the adapters merged in; it has that name only once it is complete."""
    began, unfinished = time.perf_counter(), log.folder / f"step{step:04d}.unfinished"
    if place.rank == 0:
        unfinished.mkdir()
    dist.barrier()
    if place.rank < place.local_world:  # the ranks of the first machine share the work; others may not see its disk
        merge.merge_weights(base, unfinished, merge.lora_factors(model), place.rank, place.local_world)
    dist.barrier()
    if place.rank == 0:
        merge.copy_side_files(base, unfinished)
        folder = Path(f"{knobs.CKPT_DIR}_step{step:04d}{log.suffix}")
        unfinished.rename(folder)  # fails if another run has made that folder meanwhile
        say(place, "checkpoint", f"{folder}/ in {time.perf_counter() - began:.1f} s")
        say(place, "", gap_on_first_rows(model, base, folder, rows, knobs.MASK_ID))
    dist.barrier()


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

    def write(self, model, folder, step):
        """Adds them to samples.jsonl."""
        model.eval()
        ends = decode.end_ids(model, self.tokenizer)
        answers, _ = decode.decode(model.get_base_model(), self.prompts, self.settings, ends)  # with the adapters
        model.train()
        with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for prompt, answer in zip(self.prompts, answers.tolist()):
                completion = decode.completion(self.tokenizer, answer, ends)
                row = {"step": step, "prompt": self.tokenizer.decode(prompt), "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def gap_on_first_rows(model, base, folder, rows, mask_id):
    """merge.logit_gap on the first rows, seen as decoding first sees them: all of the answer hidden."""
    ids, prompt_len, length = rows.ids[:SAMPLES].long(), rows.prompt_len[:SAMPLES], rows.length[:SAMPLES]
    whole = ids.shape[1]  # as the block size: one block, the answer
    _, answer, _ = masking.regions(prompt_len, length, torch.zeros_like(length), whole, whole)  # (B, L)
    model.eval()
    sentence = merge.logit_gap(model, base, folder, ids.masked_fill(answer, mask_id), answer)
    model.train()
    return sentence
