"""Merged checkpoints: the base's files with base + scale * B @ A in them, and nothing else changed; saved adapters."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.models import base as models
from blockwise.models import checkpoint, llada
from blockwise.models.hub import weight_files
from blockwise.run import files

TARGETS = ["q_proj", "up_proj", "o_proj"]
SCALE = 12 / 4
UP = "model.transformer.blocks.1.up_proj.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def tuned_model(base, dtype=torch.float32, std=0.05):
    """The base with adapters that matter: PEFT starts with B = 0."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=TARGETS)
    model = get_peft_model(models.load_model(base, dtype), config, autocast_adapter_dtype=False)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return model.eval()


def save(model, base, out, dtype="bfloat16", parts=1):
    """Writes a checkpoint in parts; returns the Rounding of all."""
    out.mkdir()
    factors, rounding, shards = checkpoint.updates(model), checkpoint.Rounding(), []
    for part in range(parts):
        written, more = checkpoint.merge_weights(base, out, factors, dtype, part, parts)
        rounding += more
        shards += written
    assert sorted(shards) == [file.name for file in weight_files(base)]
    checkpoint.copy_side_files(base, out, dtype)
    return rounding


def tensors(folder):
    return {name: weight for file in weight_files(folder) for name, weight in load_file(file).items()}


def update(model, name, change=lambda factor: factor):
    """(alpha / r) B A in float64 for an adapted tensor, by its name in the hub's files, else None.

    change: what to do with A and B before.
    """
    modules = {"q_proj": "self_attn.q_proj", "up_proj": "mlp.up_proj", "attn_out": "self_attn.o_proj"}
    parts = name.split(".")
    if len(parts) < 5 or parts[4] not in modules:
        return None
    layer = model.base_model.model.model.layers[int(parts[3])].get_submodule(modules[parts[4]])
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return (SCALE * change(b) @ change(a)).detach()


def expected(model, name, weight):
    """base + (alpha / r) B A in float64 for an adapted tensor, else None."""
    change = update(model, name)
    return None if change is None else weight.double() + change


def token_ids(*shape):
    return torch.randint(8, 400, shape, generator=torch.Generator().manual_seed(0))


def child(code, *args, **env):
    """Runs Python code in another process with the repository as its PYTHONPATH. Returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("parts", [1, 2])
def test_merged_weights_are_rounded_once_and_the_rest_is_untouched(base, tmp_path, parts):
    model = tuned_model(base)
    save(model, base, tmp_path / "merged", parts=parts)
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


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype, bits", [("float16", 11), ("float32", 24)])
def test_other_save_dtypes_are_rounded_once_too(base, tmp_path, dtype, bits, parts):
    """The base is bf16: config.json and the index follow the checkpoint, as does what transformers loads."""
    model, out = tuned_model(base), tmp_path / "merged"
    save(model, base, out, dtype, parts)
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys() and {weight.dtype for weight in after.values()} == {DTYPES[dtype]}
    for name, weight in before.items():
        exact = expected(model, name, weight)
        if exact is None:
            assert torch.equal(after[name], weight.to(DTYPES[dtype])), name
            continue
        half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - bits)
        half_ulp = half_ulp.clamp(min=2.0**-25 if dtype == "float16" else 0.0)  # fp16's smallest numbers
        fp32 = 2.0**-22 * (weight.double().abs() + update(model, name, torch.abs))  # a sum of five terms
        assert ((after[name].double() - exact).abs() <= half_ulp + fp32).all(), name
        assert not torch.equal(weight, after[name])
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    index = json.loads((out / "model.safetensors.index.json").read_text())
    size = sum(weight.numel() * weight.element_size() for weight in after.values())
    assert index["metadata"]["total_size"] == size
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == DTYPES[dtype]


@pytest.mark.parametrize("name", [UP, "model.transformer.ln_f.weight"], ids=["adapted", "not adapted"])
def test_float16_refuses_what_it_cannot_hold(base, tmp_path, name):
    """bf16 and fp32 hold 70,000, fp16 ends at 65,504; an infinity of the base itself stays one."""
    folder = tmp_path / "large"
    shutil.copytree(base, folder)
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    content = load_file(file)
    for value, refused in ((65_000.0, False), (70_000.0, True), (-70_000.0, True), (float("inf"), False)):
        content[name].view(-1)[-1] = value
        save_file(content, file, metadata={"format": "pt"})
        for dtype in DTYPES:
            out = tmp_path / f"{dtype} {value}"
            if refused and dtype == "float16":
                with pytest.raises(InputError, match=f"SAVE_DTYPE float16 cannot hold tensor {name}: .* use another"):
                    save(tuned_model(folder), folder, out, dtype)
            else:
                save(tuned_model(folder), folder, out, dtype)
                assert tensors(out)[name].view(-1)[-1].item() == pytest.approx(value, rel=0.01)


def test_float16_refuses_a_sum_that_it_cannot_hold(base, tmp_path):
    """The base's own weights would fit."""
    model = tuned_model(base, std=1e6)
    with pytest.raises(InputError, match=r"float16 cannot hold tensor model\.transformer\.blocks\.\d\.\w+\.weight"):
        save(model, base, tmp_path / "float16", "float16")
    save(model, base, tmp_path / "bfloat16")


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
    model = models.load_model(base, torch.float32)
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
    ids = token_ids(3, 24)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").float()
    with torch.no_grad():
        tuned, untuned, loaded = (
            model(ids).logits,
            models.load_model(base, torch.float32)(ids).logits,
            merged(ids).logits,
        )
    rounding = (loaded - tuned).abs().mean()
    assert rounding < 0.02 * (tuned - untuned).abs().mean()  # bf16 keeps 8 bits of the merged weights


# ---------------------------------------------------------------- what the rounding and the merge are worth


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.05, 3e-4, 1e-6, 0.0])
def test_the_share_of_the_update_that_survives_rounding(base, tmp_path, std, dtype, parts):
    """From the written files, in float64: 1 - rms of what rounding changed / rms of the update, and never below 0."""
    model, out = tuned_model(base, std=std), tmp_path / "merged"
    rounding = save(model, base, out, dtype, parts)
    before, after = tensors(base), tensors(out)
    changes = {name: change for name in before if (change := update(model, name)) is not None}
    errors = [after[name].double() - expected(model, name, before[name]) for name in changes]
    rms_update = torch.cat([change.flatten() for change in changes.values()]).square().mean().sqrt().item()
    rms_error = torch.cat([error.flatten() for error in errors]).square().mean().sqrt().item()
    assert rounding.weights == sum(change.numel() for change in changes.values())
    assert (rounding.update / rounding.weights) ** 0.5 == pytest.approx(rms_update, rel=0.01, abs=1e-12)
    if dtype != "float32":  # there it counts fp32's own error as none
        assert (rounding.error / rounding.weights) ** 0.5 == pytest.approx(rms_error, rel=0.01, abs=1e-12)
    share = max(0.0, 1 - rms_error / rms_update) if std else 1.0
    said = rounding.sentence(dtype)
    assert f" of the update survived rounding to {dtype}: rms " in said
    assert int(said.partition("%")[0]) == pytest.approx(100 * share, abs=1.01)
    if (std, dtype) == (3e-4, "bfloat16"):
        assert 10 < 100 * share < 90
    if (std, dtype) == (1e-6, "bfloat16"):
        assert said.startswith("0% of the update survived")


def test_logit_gap_measures_the_file_and_leaves_the_model_alone(base, tmp_path):
    model = tuned_model(base)
    save(model, base, tmp_path / "merged")
    ids, prompt_len, length = token_ids(2, 16), torch.tensor([3, 5]), torch.tensor([16, 12])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sentence = checkpoint.logit_gap(model, base, tmp_path / "merged", ids, prompt_len, length, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded, inputs = models.load_model(tmp_path / "merged", torch.float32), ids.clone()
    inputs[0, 3:16] = inputs[1, 5:12] = 4  # as decoding first sees them: the answers masked
    with torch.no_grad():
        gap = (loaded(inputs).logits - model(inputs).logits).abs()
    gap = torch.cat([gap[0, 3:16], gap[1, 5:12]])
    assert f"mean difference {gap.mean():.2g}, largest {gap.max():.2g}" in sentence and "of 20 positions" in sentence
    wrong = checkpoint.logit_gap(model, base, base, ids, prompt_len, length, 4)  # nothing was merged into it
    moved = sentence.partition("moved them by ")[2].rstrip(")")
    assert f"mean difference {moved}" in wrong


# ---------------------------------------------------------------- its cost

BIG = """
import sys, torch
from pathlib import Path
from blockwise.models import checkpoint
base, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
factors = {"w": (torch.ones(2, 10_000), torch.ones(20_000, 2), 0.5)}
def now(file, key):
    return int(next(line for line in open(file) if line.startswith(key)).split()[1])
"""


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """A 400 MB tensor is merged with less than 200 MB on top of what Python and torch take.

    VmHWM is this process's own; ru_maxrss is never below that of the process that started it.
    """
    (tmp_path / "base").mkdir()
    save_file({"w": torch.zeros(20_000, 10_000, dtype=torch.bfloat16)}, tmp_path / "base/model.safetensors")
    code = """
before = now("/proc/self/status", "VmHWM")
checkpoint.merge_weights(base, out, factors)
print((now("/proc/self/status", "VmHWM") - before) // 1024)
"""
    assert int(child(BIG + code, tmp_path / "base", tmp_path / "out")) < 200
    with safe_open(tmp_path / "out/model.safetensors", "pt") as out:
        assert (out.get_tensor("w") == 1).all()


def test_each_byte_is_read_once_and_written_once(base, tmp_path):
    """Writing a checkpoint of N bytes moves fewer than 2.3 N: nothing is copied first, or read again for its hash."""
    folder = shutil.copytree(base, tmp_path / "base")
    for file in weight_files(folder):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    zeros = {"w": torch.zeros(20_000, 1_000, dtype=torch.bfloat16)}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in folder.iterdir())
    code = """
factors = {"w": (torch.ones(2, 1_000), torch.ones(20_000, 2), 0.5)}
before = now("/proc/self/io", "rchar") + now("/proc/self/io", "wchar")
checkpoint.merge_weights(base, out, factors)
checkpoint.copy_side_files(base, out)
print(now("/proc/self/io", "rchar") + now("/proc/self/io", "wchar") - before)
"""
    moved = int(child(BIG + code, folder, tmp_path / "out"))
    assert 2 * size <= moved < 2.3 * size
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) == size


# ---------------------------------------------------------------- saved adapters


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The adapters of tuned_model(base), saved."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    checkpoint.save_adapter(tuned_model(base), str(base), folder)
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_peft_itself_loads_saved_adapters(base, adapter):
    """On the base that transformers' Auto class loads, with what PEFT does by default."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = token_ids(2, 16)
    untuned, wanted = logits(plain, ids), logits(tuned_model(base), ids)
    found = logits(PeftModel.from_pretrained(plain, adapter).eval(), ids)
    assert found.equal(wanted) and (found - untuned).abs().max() > 0.1


def test_saved_adapters_name_their_base_and_have_a_manifest(base, adapter):
    names = {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert {file.name for file in adapter.iterdir()} == names
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 12, sorted(TARGETS))
    manifest = files.read_manifest(adapter)
    assert manifest["files"].keys() == names - {"manifest.json"}
    for name in manifest["files"]:
        files.check(adapter, name, manifest)


SAVE_ADAPTER = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from blockwise.models import base as models
from blockwise.models import checkpoint, llada
model = models.load_model(sys.argv[1], torch.float32)
torch.manual_seed(0)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=4, target_modules=targets), autocast_adapter_dtype=False)
checkpoint.save_adapter(model, "the base", Path(sys.argv[2]))
"""


def test_the_bytes_of_saved_adapters_do_not_depend_on_the_process(base, tmp_path):
    """PEFT keeps the names of the adapted layers as a set, whose order is another for each PYTHONHASHSEED."""
    for seed in (1, 2):
        child(SAVE_ADAPTER, base, tmp_path / str(seed), PYTHONHASHSEED=str(seed))
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes(), file.name


def test_decoding_loads_base_and_adapters(base, adapter):
    model, _ = decode.load(str(base), "float32", torch.device("cpu"), adapter=str(adapter))
    plain, _ = decode.load(str(base), "float32", torch.device("cpu"))
    ids = token_ids(2, 16)
    assert logits(model, ids).equal(logits(tuned_model(base), ids))
    assert (logits(model, ids) - logits(plain, ids)).abs().max() > 0.1
    assert type(model) is llada.LLaDAForCausalLM and not model.training


def edited(adapter, folder, **changes):
    """A copy of saved adapters with other values in adapter_config.json; None removes one."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refusal(model, folder):
    """The sentence that an adapter is refused with."""
    with pytest.raises(InputError) as error:
        checkpoint.load_adapter(model, folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and message.startswith("--adapter") and len(message) < 700
    return message


@pytest.mark.parametrize("change", [{"n_layers": 1}, {"mlp_hidden_size": 128}, {"n_layers": 3}], ids=str)
def test_adapters_of_another_base_are_refused(base, adapter, change):
    config = copy.deepcopy(models.load_config(base)).to_dict() | change
    model = llada.LLaDAForCausalLM(llada.LLaDAConfig.from_dict(config))
    assert "give the base it names" in refusal(model, adapter)


def test_adapters_of_another_rank_or_other_layers_are_refused(base, adapter, tmp_path):
    model = models.load_model(base)
    for number, change in enumerate(
        ({"r": 8}, {"target_modules": ["q_proj"]}, {"target_modules": [*TARGETS, "v_proj"]})
    ):
        message = refusal(copy.deepcopy(model), edited(adapter, tmp_path / str(number), **change))
        assert "its tensors do not fit the layers of this model" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_adapters_is_refused(base, adapter, tmp_path, name):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / name).unlink()
    model = models.load_model(base)
    assert f"{name} is missing; give the folder adapter/ of a checkpoint" in refusal(model, folder)
    assert "adapter_config.json is missing" in refusal(model, tmp_path / "nothing")
    assert "adapter_config.json is missing" in refusal(model, base)


BAD_CONFIGS = ["", "{", "[]", "null", "3", '"text"', "{}", '{"peft_type": "LORA"}', '{"peft_type": "NONE"}',
               '{"peft_type": "LORA", "r": "four"}', '{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}',
               '{"peft_type": "LORA", "target_modules": ["nothing"]}', '{"peft_type": "LORA", "target_modules": 3}',
               '{"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}',
               '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}', b"\xff\xfe"]  # fmt: skip


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_a_damaged_adapter_config_is_refused(base, adapter, tmp_path, content):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(models.load_model(base), folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_adapters_are_refused(base, adapter, tmp_path, size):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:size])
    refusal(models.load_model(base), folder)
