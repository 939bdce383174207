"""From LoRA adapters to a checkpoint like its base: the same tensor names, shards and side files, in bf16.

Each shard of the base is read and written front to back, some rows of one tensor at a time, so memory stays at a few
dozen MB whatever the model's size. Sums are made in fp32 and rounded once.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

import files
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
    Returns what a manifest says of the files, {name: see files.write}.
    """
    shards = llada.weight_files(base)[part::parts]
    with ThreadPoolExecutor(2) as pool:  # one adds while the other waits for the disk
        written = pool.map(lambda shard: merge_shard(shard, out / shard.name, factors), shards)
        return {shard.name: entry for shard, entry in zip(shards, written)}


def merge_shard(source, target, factors):
    """Writes one safetensors file anew: the same tensors in the same order, as bf16, with `factors` merged in."""
    return files.write(target, merged_shard(source, factors))


def merged_shard(source, factors):
    """Yields the bytes of that file."""
    with open(source, "rb") as base:
        old = read_header(base)  # leaves `base` at the first tensor's data
        yield header({name: ("BF16", tensor["shape"]) for name, tensor in old.items()})
        for name, tensor in old.items():
            yield from merged_tensor(base, DTYPES[tensor["dtype"]], tensor["shape"], factors.get(name))


def merged_tensor(base, dtype, shape, factor):
    """Reads the next tensor of `base`, some rows at a time, and yields it merged; factor: (A, B, scale) or None."""
    rows, width = shape[0], math.prod(shape[1:])
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        data = bytearray(base.read((stop - start) * width * dtype.itemsize))
        chunk = torch.frombuffer(data, dtype=dtype).view(stop - start, width)
        if factor:
            a, b, scale = factor
            chunk = torch.addmm(chunk.to(a.device).float(), b[start:stop].float(), a.float(), alpha=scale)
        yield chunk.to("cpu", torch.bfloat16).view(torch.uint8).numpy()


def read_header(file):
    """Reads the header of an open safetensors file: {tensor: {dtype, shape, data_offsets}}, in the data's order."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def header(tensors):
    """The first bytes of a safetensors file of {tensor: (dtype, shape)}, whose data follow in that order."""
    content, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        offsets = [end, end := end + DTYPES[dtype].itemsize * math.prod(shape)]
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data 8-byte aligned
    return len(text).to_bytes(8, "little") + text


def copy_side_files(base, out):
    """Copies what a checkpoint holds beside its weights: config, tokenizer, code, licence. Returns as merge_weights."""
    names = [file.name for file in base.iterdir() if file.is_file() and file.suffix not in WEIGHTS]
    return {name: files.write(out / name, [side_file(base, name)]) for name in names if name != files.MANIFEST}


def side_file(base, name):
    """The bytes of a side file: as they are, except that a base in another dtype gets its dtype and size corrected."""
    data, changes = (base / name).read_bytes(), {}
    if name == "config.json":
        changes = dict.fromkeys({"dtype", "torch_dtype"} & json.loads(data).keys(), "bfloat16")
    elif name == INDEX:
        changes = {"metadata": json.loads(data).get("metadata", {}) | {"total_size": data_size(base)}}
    content = json.loads(data) if changes else {}
    if content == content | changes:
        return data
    return (json.dumps(content | changes, indent=2) + "\n").encode()


def data_size(folder):
    """Bytes of all tensors of a checkpoint, in bf16."""
    size = 0
    for shard in llada.weight_files(folder):
        with open(shard, "rb") as file:
            size += sum(2 * math.prod(tensor["shape"]) for tensor in read_header(file).values())
    return size


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
