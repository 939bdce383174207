"""From LoRA adapters to a checkpoint like its base: the same tensor names, shards and side files, in bf16.

Each shard of the base is read and written front to back, some rows of one tensor at a time, so memory stays at a few
dozen MB whatever the model's size. Sums are made in fp32 and rounded once.
"""

import json
import math
import shutil

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

import llada

CHUNK = 2**23  # elements of a tensor in memory at a time: 32 MB in fp32
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
INDEX = "model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"}  # not side files


def lora_layers(model):
    """Yields (name of the weight in the hub's files, LoRA layer) for every adapted layer of a PEFT model."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield llada.hub_name(name.removeprefix("base_model.model.") + ".weight"), layer


def lora_factors(model):
    """{weight name in the hub's files: (A (r, in), B (out, r), scale)} of a PEFT model."""
    factors = {}
    for name, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors[name] = (a.detach(), b.detach(), layer.scaling["default"])
    return factors


def merge_weights(base, out, factors, part=0, parts=1):
    """Writes shards part, part + parts, ... of `base` into the folder `out`, with `factors` merged in.

    factors: see lora_factors. With several processes, each takes another part. Every merged weight is
    base + scale * B @ A in fp32, rounded once to bf16; a bf16 base's other tensors stay the same to the bit.
    """
    for shard in llada.weight_files(base)[part::parts]:
        merge_shard(shard, out / shard.name, factors)


def read_header(file):
    """Reads the header of an open safetensors file: {tensor: {dtype, shape, data_offsets}}, in the data's order."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def merge_shard(source, target, factors):
    """Writes one safetensors file anew: the same tensors in the same order, as bf16, with `factors` merged in."""
    with open(source, "rb") as base, open(target, "xb") as out:
        old = read_header(base)  # leaves `base` at the first tensor's data
        new, end = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in old.items():
            offsets = [end, end := end + 2 * math.prod(tensor["shape"])]
            new[name] = {"dtype": "BF16", "shape": tensor["shape"], "data_offsets": offsets}
        text = json.dumps(new, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data 8-byte aligned
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in old.items():
            merge_tensor(base, out, DTYPES[tensor["dtype"]], tensor["shape"], factors.get(name))


def merge_tensor(base, out, dtype, shape, factor):
    """Reads the next tensor of `base`, some rows at a time, and appends it to `out`; factor: (A, B, scale) or None."""
    rows, width = shape[0], math.prod(shape[1:])
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data = bytearray(base.read((stop - start) * width * dtype.itemsize))
        chunk = torch.frombuffer(data, dtype=dtype).view(stop - start, width)
        if factor:
            a, b, scale = factor
            chunk = torch.addmm(chunk.to(a.device).float(), b[start:stop].float(), a.float(), alpha=scale)
        out.write(chunk.to("cpu", torch.bfloat16).view(torch.uint8).numpy())


def copy_side_files(base, out):
    """Copies what a checkpoint holds beside its weights: config, tokenizer, code, licence. Needs the shards in `out`.

    They stay the same to the byte, except that a base in another dtype than bf16 gets its dtype and size corrected.
    """
    for file in base.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS:
            shutil.copy(file, out / file.name)
    rewrite(out / "config.json", lambda config: dict.fromkeys({"dtype", "torch_dtype"} & config.keys(), "bfloat16"))
    if (out / INDEX).exists():
        rewrite(out / INDEX, lambda index: {"metadata": index.get("metadata", {}) | {"total_size": data_size(out)}})


def data_size(folder):
    """Bytes of all tensors of a bf16 checkpoint."""
    size = 0
    for shard in llada.weight_files(folder):
        with open(shard, "rb") as file:
            size += sum(2 * math.prod(tensor["shape"]) for tensor in read_header(file).values())
    return size


def rewrite(path, changes):
    """Updates a JSON file with changes(content), and leaves the file alone if that changes nothing."""
    content = json.loads(path.read_text())
    updated = content | changes(content)
    if updated != content:
        path.write_text(json.dumps(updated, indent=2) + "\n")


@torch.no_grad()
def logit_gap(model, base, merged, inputs, positions):
    """How far the logits of the checkpoint in `merged` are from those of base + adapters, on one batch.

    The merged weights are read from the saved files into the live model one by one, and the base's afterwards, so no
    second model is needed; the model is the same to the bit when this returns. model: PEFT model in evaluation mode;
    inputs: (B, L) ids; positions: (B, L) bool, where to compare. Returns a sentence.
    """

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


def load_adapted(model, folder):
    """Copies the weights of a checkpoint folder into the adapted layers of a PEFT model, one tensor at a time."""
    layers = dict(lora_layers(model))
    for file in llada.weight_files(folder):
        with safe_open(file, "pt") as weights:
            for name in layers.keys() & set(weights.offset_keys()):
                layers[name].base_layer.weight.copy_(weights.get_tensor(name))
