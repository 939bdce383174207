"""Merged checkpoints: the base's files with base + scale * B @ A in them, and nothing else changed."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llada
import merge

TARGETS = ["q_proj", "up_proj", "o_proj"]


def tuned_model(base, dtype=torch.float32):
    """The base with adapters that matter: PEFT starts with B = 0."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=TARGETS)
    model = get_peft_model(llada.load_model(base, dtype), config, autocast_adapter_dtype=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def save(model, base, out, parts=1):
    out.mkdir()
    for part in range(parts):
        merge.merge_weights(base, out, merge.lora_factors(model), part, parts)
    merge.copy_side_files(base, out)


def tensors(folder):
    return {name: weight for file in llada.weight_files(folder) for name, weight in load_file(file).items()}


def expected(model, name, weight):
    """base + (alpha / r) B A in float64 for an adapted tensor, by its name in the hub's files, else None."""
    modules = {"q_proj": "self_attn.q_proj", "up_proj": "mlp.up_proj", "attn_out": "self_attn.o_proj"}
    parts = name.split(".")
    if len(parts) < 5 or parts[4] not in modules:
        return None
    layer = model.base_model.model.model.layers[int(parts[3])].get_submodule(modules[parts[4]])
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return weight.double() + 12 / 4 * b @ a


@pytest.mark.parametrize("parts", [1, 2])
def test_merged_weights_are_rounded_once_and_the_rest_is_untouched(base, tmp_path, parts):
    model = tuned_model(base)
    save(model, base, tmp_path / "merged", parts)
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    adapted = 0
    for name, weight in before.items():
        exact = expected(model, name, weight)
        if exact is None:
            assert torch.equal(weight.view(torch.int16), after[name].view(torch.int16)), name
            continue
        adapted += 1
        # bf16 has 8 significant bits: rounding once errs by at most half of the last one, plus fp32's own error
        half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 8)
        assert ((after[name].double() - exact).abs() <= half_ulp * 1.001).all(), name
        assert not torch.equal(weight, after[name])
    assert adapted == 2 * len(TARGETS)


def test_same_files_layout_and_side_files(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    for name in ("modeling_llada.py", "LICENSE", "special_tokens_map.json", "pytorch_model.bin"):
        (folder / name).write_text("# as it was\n")
    save(tuned_model(folder), folder, tmp_path / "merged")
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names - {"pytorch_model.bin"}
    for name in names - {"pytorch_model.bin"}:
        old, new = (folder / name).read_bytes(), (tmp_path / "merged" / name).read_bytes()
        if name.endswith(".safetensors"):  # the same tensors in the same places
            start = 8 + int.from_bytes(old[:8], "little")
            assert len(new) == len(old) and json.loads(new[8:start]) == json.loads(old[8:start])
        else:
            assert new == old, name


def test_a_base_in_another_dtype_becomes_bf16(base, tmp_path):
    folder = tmp_path / "fp32"
    model = llada.load_model(base, torch.float32)
    model.save_pretrained(folder, max_shard_size="150KB")
    save(tuned_model(folder), folder, tmp_path / "merged")
    merged = tensors(tmp_path / "merged")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert torch.equal(merged["model.transformer.wte.weight"], tensors(base)["model.transformer.wte.weight"])
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(weight.numel() for weight in merged.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_loaded_back_it_computes_what_base_and_adapters_computed(base, tmp_path):
    model = tuned_model(base)
    save(model, base, tmp_path / "merged")
    ids = torch.randint(8, 400, (3, 24), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").float()
    with torch.no_grad():
        tuned, untuned, loaded = (
            model(ids).logits,
            llada.load_model(base, torch.float32)(ids).logits,
            merged(ids).logits,
        )
    rounding = (loaded - tuned).abs().mean()
    assert rounding < 0.02 * (tuned - untuned).abs().mean()  # bf16 keeps 8 bits of the merged weights


def test_logit_gap_measures_the_file_and_leaves_the_model_alone(base, tmp_path):
    model = tuned_model(base)
    save(model, base, tmp_path / "merged")
    ids = torch.randint(8, 400, (2, 16), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sentence = merge.logit_gap(model, base, tmp_path / "merged", ids, torch.ones_like(ids, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = llada.load_model(tmp_path / "merged", torch.float32)
    with torch.no_grad():
        gap = (loaded(ids).logits - model(ids).logits).abs()
    assert f"mean difference {gap.mean():.2g}, largest {gap.max():.2g}" in sentence and "of 32 positions" in sentence
    wrong = merge.logit_gap(
        model, base, base, ids, torch.ones_like(ids, dtype=torch.bool)
    )  # nothing was merged into it
    moved = sentence.partition("moved them by ")[2].rstrip(")")
    assert f"mean difference {moved}" in wrong


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """A 400 MB tensor is merged with less than 200 MB on top of what Python and torch take."""
    save_file({"w": torch.zeros(20_000, 10_000, dtype=torch.bfloat16)}, tmp_path / "big.safetensors")
    code = f"""
import sys, resource
sys.path.insert(0, {str(ROOT)!r})
import torch, merge
from pathlib import Path
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
factors = {{"w": (torch.ones(2, 10_000), torch.ones(20_000, 2), 0.5)}}
before = peak()
merge.merge_shard(Path({str(tmp_path)!r}) / "big.safetensors", Path({str(tmp_path)!r}) / "out.safetensors", factors)
print((peak() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 200
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert (out.get_tensor("w") == 1).all()
