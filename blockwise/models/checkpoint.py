"""From trained weights to a checkpoint like its base: the same tensor names, shards and side files, in SAVE_DTYPE.

LoRA adapters are merged into the base's weights; after full fine-tuning, the trained weights take their place. Each
shard of the base is read and written front to back, some rows of one tensor at a time, so memory stays at a few dozen
MB whatever the model's size. Sums are made in fp32 and rounded once. Adapters are also saved by themselves, in the
folder adapter/ of the checkpoint, in PEFT's format.
"""

import copy
import json
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import masking
from blockwise.cli import InputError
from blockwise.models import base as models
from blockwise.models.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, adapter_files, reason, weight_files
from blockwise.run import files
from blockwise.run.tensors import DTYPES, content_of

warnings.filterwarnings("ignore", category=FutureWarning)  # the pinned packages warn about each other
CHUNK = 2**20  # elements of a tensor in memory at a time: 4 MB in fp32
SAVED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # SAVE_DTYPE -> its name in safetensors files
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"}  # not side files
ADAPTER = "adapter"  # folder in a checkpoint
COMPARED = 4  # samples on which merged and unmerged logits are compared
# what training gives for a weight: A (r, in), B (out, r) and scale of its adapter, which stand for scale * B @ A, or
# the trained weight itself
Update = tuple[Tensor, Tensor, float] | Tensor


def lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yields (name of the weight in the hub's files, LoRA layer) for every adapted layer of a PEFT model."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield models.file_name(model.config, name.removeprefix("base_model.model.") + ".weight"), layer


def without_adapters(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The model inside a PEFT model, with the adapters as layers of it; a model without adapters as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def updates(model: PeftModel | PreTrainedModel) -> dict[str, Update]:
    """{name in the checkpoint's files: what training gives} for every trained weight."""
    if not isinstance(model, PeftModel):
        live = model.named_parameters()
        return dict(part for name, weight in live for part in models.file_tensors(model.config, name, weight.detach()))
    factors = {}
    for name, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a, b = (b.T, a.T) if layer.fan_in_fan_out else (a, b)  # GPT-2 keeps its weights transposed
        factors[name] = (a.detach(), b.detach(), layer.scaling["default"])
    return factors


@dataclass
class Rounding:
    """What rounding to the checkpoint's dtype leaves of the update, over the merged weights."""

    update: float = 0.0  # sum of squares of what training changed
    error: float = 0.0  # sum of squares of what rounding changed
    weights: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(self.update + other.update, self.error + other.error, self.weights + other.weights)

    def sentence(self, dtype: str) -> str:
        """The share of the update that survived: 1 - rms of rounding / rms of the update, at least 0."""
        update, error = (math.sqrt(x / max(self.weights, 1)) for x in (self.update, self.error))
        kept = max(0.0, 1 - error / update) if update else 1.0
        return f"{kept:.0%} of the update survived rounding to {dtype}: rms {update:.1e}, of rounding {error:.1e}"


# ---------------------------------------------------------------- writing


def merge_weights(
    base: Path, out: Path, updates: dict[str, Update], dtype: str = "bfloat16", part: int = 0, parts: int = 1
) -> tuple[dict[str, dict], Rounding]:
    """Writes shards part, part + parts, ... of `base` into the folder `out`, with `updates` merged in.

    updates: see the function of this name; dtype: a SAVE_DTYPE. With several processes, each takes another part. Every
    merged weight is base + scale * B @ A in fp32, rounded once, or the trained weight; if base and dtype agree, the
    other tensors stay the same to the bit. Returns what a manifest says of the files, {name: see files.write}, and the
    Rounding. Raises InputError.
    """

    def write_shard(shard):
        rounding = Rounding()
        return shard.name, files.write(out / shard.name, merged_shard(shard, updates, SAVED[dtype], rounding)), rounding

    with ThreadPoolExecutor(2) as pool:  # one adds while the other waits for the disk
        written = list(pool.map(write_shard, weight_files(base)[part::parts]))
    return {name: entry for name, entry, _ in written}, sum((rounding for *_, rounding in written), Rounding())


def merged_shard(source: Path, updates: dict[str, Update], dtype: str, rounding: Rounding) -> Iterator:
    """Yields the bytes of a safetensors file anew: the same tensors in the same order, with `updates` merged in."""
    with open(source, "rb") as base:
        old = files.read_tensor_header(base)  # leaves `base` at the first tensor's data
        yield files.tensor_header({name: (dtype, tensor["shape"]) for name, tensor in old.items()})
        for name, tensor in old.items():
            for chunk in merged_tensor(base, DTYPES[tensor["dtype"]], tensor["shape"], updates.get(name)):
                yield rounded(chunk, name, DTYPES[dtype], name in updates, rounding)


def merged_tensor(base, dtype: torch.dtype, shape: list[int], update: Update | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads the next tensor of `base`, some rows at a time. Yields them as they are, and as they are trained."""
    rows, width = shape[0], math.prod(shape[1:])
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data = bytearray(base.read((stop - start) * width * dtype.itemsize))
        chunk = merged = torch.frombuffer(data, dtype=dtype).view(stop - start, width)
        if isinstance(update, Tensor):
            chunk, merged = chunk.to(update.device).float(), update[start:stop].float().view(chunk.shape)
        elif update:
            a, b, scale = update
            chunk = chunk.to(a.device).float()
            merged = torch.addmm(chunk, b[start:stop].float(), a.float(), alpha=scale)
        yield chunk, merged


def rounded(chunk: tuple[Tensor, Tensor], name: str, dtype: torch.dtype, trained: bool, rounding: Rounding):
    """The bytes of a merged chunk in the checkpoint's dtype; adds what rounding changed to `rounding`."""
    old, merged = chunk
    result = merged.to(dtype)
    if dtype == torch.float16 and not result.isfinite().equal(merged.isfinite()):
        raise InputError(f"SAVE_DTYPE float16 cannot hold tensor {name}: it has values above 65504; use another.")
    if trained:
        difference = merged - old
        rounding.update += difference.square_().sum(dtype=torch.float64).item()  # in place, for memory
        rounding.error += torch.sub(result, merged, out=difference).square_().sum(dtype=torch.float64).item()
        rounding.weights += merged.numel()
    return result.cpu().view(torch.uint8).numpy()


def copy_side_files(
    base: Path, out: Path, dtype: str = "bfloat16", config: dict | None = None, new: dict[str, bytes] | None = None
) -> dict[str, dict]:
    """Copies what a checkpoint holds besides its weights: config, tokenizer, code, licence. Returns manifest lines.

    config: values for config.json; None where the key may as well be missing. new: files of the training, by name,
    which replace those of the base.
    """
    names = [file.name for file in base.iterdir() if file.is_file() and file.suffix not in WEIGHTS]
    contents = {name: side_file(base, name, dtype, config or {}) for name in names if name != files.MANIFEST}
    return {name: files.write(out / name, [content]) for name, content in (contents | (new or {})).items()}


def side_file(base: Path, name: str, dtype: str, config: dict) -> bytes:
    """The bytes of a side file: as they are, but for what has changed of dtype, size and attention by blocks."""
    data, changes = (base / name).read_bytes(), {}
    if name == "config.json":
        content = json.loads(data)
        changes = dict.fromkeys({"dtype", "torch_dtype"} & content.keys(), dtype)
        changes |= {key: value for key, value in config.items() if content.get(key) != value}
    elif name == INDEX:
        changes = {"metadata": json.loads(data).get("metadata", {}) | {"total_size": data_size(base, dtype)}}
    content = json.loads(data) if changes else {}
    if content == content | changes:
        return data
    return (json.dumps(content | changes, indent=2) + "\n").encode()


def data_size(folder: Path, dtype: str) -> int:
    """Bytes of all tensors of a checkpoint in a dtype."""
    size = 0
    for shard in weight_files(folder):
        with open(shard, "rb") as file:
            shapes = [tensor["shape"] for tensor in files.read_tensor_header(file).values()]
        size += sum(math.prod(shape) for shape in shapes) * files.TENSOR_BYTES[SAVED[dtype]]
    return size


# ---------------------------------------------------------------- the adapters, in PEFT's format


def save_adapter(model: PeftModel, base_name: str, out: Path, new: dict[str, bytes] | None = None) -> None:
    """Writes the adapters into the new folder `out`, as PEFT does, with a manifest. base_name: the base they belong to.

    new: more files, by name. PeftModel.from_pretrained(base, out) reads the adapters, with the base loaded as
    LLaDAForCausalLM.
    """
    out.mkdir()
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode, config.task_type = base_name, True, "CAUSAL_LM"
    config.target_modules = sorted(config.target_modules)  # a set, whose order is another in every process
    config.save_pretrained(out)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = files.write(out / ADAPTER_WEIGHTS, content_of(tensors))
    config = files.existing(out / ADAPTER_CONFIG)
    written = {name: files.write(out / name, [content]) for name, content in (new or {}).items()}
    files.write_manifest(out, {"files": {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: config} | written})
    files.sync(out)


def adapter_config(folder: str | Path) -> LoraConfig:
    """The config of the adapters of a folder in PEFT's format. Raises InputError if there are none."""
    adapter_files(folder)
    try:
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError("it holds no LoRA adapters")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--adapter {folder} cannot be used with this model: {reason(error)}") from error
    return config


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Adds the adapters of a folder in PEFT's format to a base. Raises InputError if they do not belong to it."""
    config = adapter_config(folder)
    config.base_model_name_or_path = None  # PEFT would warn if the base has another name by now
    try:
        tensors = load_file(Path(folder) / ADAPTER_WEIGHTS)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"--adapter {folder} cannot be used with this model: {reason(error)}") from error
    wanted = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise InputError(
            f"--adapter {folder}: its tensors do not fit the layers of this model; give the base it names."
        )
    set_peft_model_state_dict(model, tensors)
    return model


# ---------------------------------------------------------------- merged against unmerged


@torch.no_grad()
def logit_gap(
    model: PeftModel, base: Path, merged: Path, ids: Tensor, prompt_len: Tensor, length: Tensor, mask_id: int
) -> str:
    """How far the logits of the checkpoint in `merged` are from those of base + adapters, where answers are written.

    The merged weights are read from the saved files into the live model one by one, and the base's afterwards, so no
    second model is needed; the model is the same to the bit when this returns. model: PEFT model in evaluation mode;
    ids: (B, L), of which the answers are masked, as decoding first sees them; prompt_len, length: (B,), where answers
    start and end. Returns a sentence.
    """
    whole = ids.shape[1]  # as the block size: one block, the answer
    _, positions, _ = masking.regions(prompt_len, length, torch.zeros_like(length), whole, whole)  # (B, L)
    inputs = ids.masked_fill(positions, mask_id)

    def logits():
        return model(input_ids=inputs, logits_to_keep=positions).logits.float()  # (n, V)

    tuned = logits()
    with model.disable_adapter():
        untuned = logits()
        try:
            load_adapted(model, merged)
            saved = logits()
        finally:
            load_adapted(model, base)
    gap, effect = (saved - tuned).abs(), (tuned - untuned).abs()
    same = (saved.argmax(-1) == tuned.argmax(-1)).float().mean()
    return (
        f"merged against unmerged logits: mean difference {gap.mean():.2g}, largest {gap.max():.2g}, "
        f"same first choice at {same:.1%} of {len(tuned)} positions (the adapters moved them by {effect.mean():.2g})"
    )


def load_adapted(model: PeftModel, folder: Path) -> None:
    """Copies the weights of a checkpoint folder into the adapted layers of a PEFT model, one tensor at a time."""
    layers = dict(lora_layers(model))
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            for name in layers.keys() & set(weights.offset_keys()):
                layers[name].base_layer.weight.copy_(weights.get_tensor(name))
