"""The model, with adapters or all weights trained, the DeepSpeed ZeRO-2 engine around it, and its learning rate."""

import json
import math
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from blockwise.cli import InputError
from blockwise.models import base as models
from blockwise.models import checkpoint
from blockwise.run import files
from blockwise.run.ranks import Ranks, join_group, print0

CONFIG_FILE = "ds_zero2.json"


def check_model(folder: Path, knobs: SimpleNamespace) -> PreTrainedConfig:
    """Checks the base against the knobs, before anything large is read. Returns its config. Raises InputError."""
    config = models.load_config(folder)
    models.check_tensors(folder, config)
    linears = models.linear_names(config)
    for name in knobs.TARGET_MODS if knobs.LORA_RANK else []:
        if name not in linears:
            raise InputError(f"TARGET_MODS: {name!r} matches no layer of the model; choose from {', '.join(linears)}.")
    if knobs.BASE_4BIT:
        if not knobs.LORA_RANK:
            raise InputError("BASE_4BIT=True needs adapters: weights of 4 bits cannot be trained; raise LORA_RANK.")
        models.check_four_bit(config)
    mask_id = getattr(config, "mask_token_id", None)
    if mask_id not in (None, knobs.MASK_ID):
        raise InputError(f"MASK_ID={knobs.MASK_ID}, but {folder}/config.json has mask_token_id {mask_id}.")
    if config.vocab_size <= knobs.MASK_ID:
        raise InputError(f"MASK_ID={knobs.MASK_ID} is outside the model's vocabulary of {config.vocab_size:,}.")
    if config.pad_token_id in (None, knobs.MASK_ID) or not 0 <= config.pad_token_id < config.vocab_size:
        raise InputError(f"{folder}/config.json: pad_token_id {config.pad_token_id} is not a token to pad with.")
    if config.max_position_embeddings < knobs.MAX_LEN:
        raise InputError(f"MAX_LEN={knobs.MAX_LEN}, but the model has {config.max_position_embeddings} positions.")
    return config


def lora_alpha(knobs: SimpleNamespace) -> int:
    """LORA_ALPHA, or twice the rank if that is 0."""
    return knobs.LORA_ALPHA or 2 * knobs.LORA_RANK


def load_model(folder: Path, knobs: SimpleNamespace, ranks: Ranks) -> PeftModel | PreTrainedModel:
    """The base in training mode, the same on every rank: with adapters in its own dtype, or all weights trained."""
    if ranks.rank:
        transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if knobs.BF16 else torch.float32
    return prepare_model(models.load_model(folder, dtype, ranks.device, knobs.BASE_4BIT), folder, knobs, ranks)


def prepare_model(
    model: PreTrainedModel, folder: str | Path, knobs: SimpleNamespace, ranks: Ranks
) -> PeftModel | PreTrainedModel:
    """Makes a loaded base ready for training, as load_model says. folder: named in a warning."""
    if getattr(knobs, "ATTENTION", "sdpa") == "flex":  # a knob of block diffusion only
        model.set_attn_implementation("flex_attention")
    if knobs.GRADIENT_CHECKPOINTING:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    transformers.set_seed(knobs.SEED)
    if knobs.LORA_RANK:
        if not models.mask_is_trained(model.config):
            what = "the embedding of its mask token was never trained, and adapters leave it as it is"
            print0(ranks, "warning", f"{folder}: {what}; train the base with --LORA_RANK=0 first.")
        model = add_adapters(model, knobs, ranks)
    else:
        print0(ranks, "weights", f"all {model.num_parameters():,} parameters are trained (LORA_RANK 0)")
    if knobs.COMPILE:
        compile_layers(model)
    return model.train()  # a loaded model is in evaluation mode, in which gradient checkpointing does nothing


def add_adapters(model: PreTrainedModel, knobs: SimpleNamespace, ranks: Ranks) -> PeftModel:
    """The model with LoRA adapters, which alone are trained."""
    lora = LoraConfig(
        r=knobs.LORA_RANK, lora_alpha=lora_alpha(knobs), lora_dropout=knobs.LORA_DROPOUT,
        target_modules=knobs.TARGET_MODS,
    )  # fmt: skip
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    adapted = sum(layer.in_features * layer.out_features for name, layer in checkpoint.lora_layers(model))
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = model.num_parameters() - trainable
    size = f"rank {knobs.LORA_RANK}, alpha {lora_alpha(knobs)}"
    print0(ranks, "adapters", f"{trainable:,} parameters, {size}, on {adapted:,} of the base's {total:,}")
    return model


def compile_layers(model: torch.nn.Module) -> None:
    """Lets torch compile each decoder layer at its first call; previews have other shapes and compile again."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def start_group() -> None:
    """Lets the ranks talk to each other."""
    if get_accelerator().device_name() == "cpu":  # gloo serves; the shared-memory op would be compiled first, with g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # saving to a slow disk can take longer than the 10 minutes that are the default
    join_group(lambda: deepspeed.init_distributed(timeout=timedelta(hours=1)))


def engine_config(knobs: SimpleNamespace) -> dict:
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
        "zero_optimization": {"stage": 2, "overlap_comm": False},  # adapters have small gradients: no gain
    }


def write_config(knobs: SimpleNamespace, folder: Path) -> None:
    """Writes the DeepSpeed configuration in force, for users to read: into a folder, and into the working directory.

    The second is where the reference has it; that it cannot be written does not matter.
    """
    content = json.dumps(engine_config(knobs), indent=2) + "\n"
    with files.writing(folder):
        files.replace(folder / CONFIG_FILE, content)
    with suppress(OSError):
        files.replace(CONFIG_FILE, content)


def start_engine(model: PeftModel | PreTrainedModel, knobs: SimpleNamespace, steps: int) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed ZeRO-2 engine, its learning rate planned for exactly `steps` optimizer steps."""
    import_muon()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=engine_config(knobs),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: lr_factor(done, steps, knobs)
        ),
    )
    return engine


def import_muon() -> None:
    """Imports an optimizer of DeepSpeed that nothing here uses, but every engine imports, in a tenth of the time.

    It has functions that are to be compiled, for which it would import all of torch's compiler. COMPILE and
    flex_attention are not affected.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def rounding_of_weights(engine: deepspeed.DeepSpeedEngine) -> float:
    """Sum of squares of what the model's dtype rounds away of the optimizer's fp32 weights, over this rank's share."""
    zero, rank = engine.optimizer, torch.distributed.get_rank()
    live = [parts[rank] for parts in zero.parallel_partitioned_bit16_groups]
    pairs = zip(zero.single_partition_of_fp32_groups, live, strict=True)
    return sum((fp32.detach() - weights.float()).square().sum(dtype=torch.float64).item() for fp32, weights in pairs)


def warmup_steps(steps: int, warmup_type: str, ratio: float) -> int:
    """Steps of warm-up: rounded up for "linear"; for "log" rounded down, but at least 2, as DeepSpeed has it."""
    if warmup_type == "log":
        return max(2, int(steps * ratio))
    return min(steps - 1, math.ceil(steps * ratio - 1e-9))  # 100 * 0.07 is a little more than 7


def lr_factor(done: int, steps: int, knobs: SimpleNamespace) -> float:
    """Share of LR in the step after `done` steps: warm-up to 1, then LR_SCHEDULE.

    That is a cosine that reaches MIN_LR_RATIO in the last step, or a constant, or "wsd" (warm-up, stable, decay): a
    constant and then, in the last DECAY_RATIO of the steps, a line down to MIN_LR_RATIO. WARMUP_TYPE "log" is
    DeepSpeed's WarmupCosineLR, one step late: LR is 0 in the first two steps, and the last has a little more.
    """
    warmup = warmup_steps(steps, knobs.WARMUP_TYPE, knobs.WARMUP_RATIO)
    if knobs.WARMUP_TYPE == "log":
        done -= 1
        if done < warmup:
            return math.log(done + 1) / math.log(warmup) if done >= 0 else 0.0
    elif done < warmup:
        return (done + 1) / warmup
    if knobs.LR_SCHEDULE == "wsd":
        decay = max(1, math.ceil(steps * knobs.DECAY_RATIO - 1e-9))
        left = max(0.0, min(1.0, (steps - done - 1) / decay))  # 0 in the last step
        return knobs.MIN_LR_RATIO + (1 - knobs.MIN_LR_RATIO) * left
    if knobs.LR_SCHEDULE == "constant":
        return 1.0
    progress = (done + 1 - warmup) / max(1, steps - warmup)
    return knobs.MIN_LR_RATIO + (1 - knobs.MIN_LR_RATIO) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
