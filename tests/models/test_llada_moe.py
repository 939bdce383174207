"""llada_moe.py: the hub's LLaDA-MoE files as a bidirectional Qwen3-MoE, against a literal forward pass; refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llada import attention, rms_norm, rotate
from transformers import AutoConfig, AutoModelForCausalLM

from blockwise import engine
from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.models import base as models
from blockwise.models import llada_moe

# the keys of a config.json of inclusionAI/LLaDA-MoE-7B-A1B, with small sizes; the first layer has no experts
TINY = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAMoEConfig"},
    "clip_qkv": None, "dense_intermediate_size": 96, "expert_intermediate_size": 40, "eos_token_id": 1,
    "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "max_position_embeddings": 256,
    "moe_layer_freq": [0, 1, 1], "moe_router_enable_expert_bias": False, "norm_topk_prob": None,
    "num_attention_heads": 4, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "output_router_logits": False, "pad_token_id": 1, "partial_rotary_factor": 1,
    "qk_layernorm": True, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000,
    "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "torch_dtype": "float32",
    "use_cache": False, "vocab_size": 448,
}  # fmt: skip


def random_tensors(config, seed=1):
    """Tensors with the hub's names, large enough to matter; norms that are not all ones."""
    generator, c = torch.Generator().manual_seed(seed), config
    d, width = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    shapes = {"model.embed_tokens": (c["vocab_size"], d), "model.norm": (d,), "lm_head": (c["vocab_size"], d)}
    for i, experts in enumerate(c["moe_layer_freq"]):
        layer = f"model.layers.{i}"
        q, kv = c["num_attention_heads"] * width, c["num_key_value_heads"] * width
        for name, shape in {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}.items():
            shapes[f"{layer}.self_attn.{name}_proj"] = shape
        shapes |= {f"{layer}.self_attn.{name}_norm": (width,) for name in "qk"}
        shapes |= {f"{layer}.{name}_layernorm": (d,) for name in ("input", "post_attention")}
        mlps = {f"{layer}.mlp": c["dense_intermediate_size"]}
        if experts:
            shapes[f"{layer}.mlp.gate"] = (c["num_experts"], d)
            names = [f"{layer}.mlp.experts.{number}" for number in range(c["num_experts"])]
            mlps = dict.fromkeys(names, c["expert_intermediate_size"])
        for mlp, size in mlps.items():
            shapes |= {f"{mlp}.gate_proj": (size, d), f"{mlp}.up_proj": (size, d), f"{mlp}.down_proj": (d, size)}
    return {
        f"{name}.weight": 0.15 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def write(folder, tokenizer, tensors=None, **changes):
    """A LLaDA-MoE checkpoint in two shards, as the hub has it; its tokenizer knows `<|mask|>`, its config does not."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TINY | changes
    tensors = tensors or random_tensors(config)
    names, shards = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shards |= dict.fromkeys(part, f"model-{number:05d}-of-00002.safetensors")
        file = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    own = type(tokenizer).from_pretrained(folder)
    own.add_special_tokens({"additional_special_tokens": ["<|mask|>", "<|role_end|>"]})
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("llada_moe"), tokenizer)


def swiglu(x, weights, mlp):
    gate = x @ weights[f"{mlp}.gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ weights[f"{mlp}.up_proj.weight"].T)) @ weights[
        f"{mlp}.down_proj.weight"
    ].T


def literal_logits(folder, ids):
    """LLaDA-MoE from the hub's tensor names and config keys alone, token by token. ids: (L,) -> (L, V)."""
    w = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    c = json.loads((folder / "config.json").read_text())
    length, width, eps = len(ids), c["hidden_size"] // c["num_attention_heads"], c["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = ((y @ w[f"{layer}.self_attn.{name}_proj.weight"].T).view(length, -1, width) for name in "qkv")
        q = rotate(rms_norm(q, w[f"{layer}.self_attn.q_norm.weight"], eps), c["rope_theta"])
        k = rotate(rms_norm(k, w[f"{layer}.self_attn.k_norm.weight"], eps), c["rope_theta"])
        x = x + attention(q, k, v) @ w[f"{layer}.self_attn.o_proj.weight"].T
        y = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        if not c["moe_layer_freq"][i]:
            x = x + swiglu(y, w, f"{layer}.mlp")
            continue
        for position in range(length):
            p = (w[f"{layer}.mlp.gate.weight"] @ y[position]).softmax(0)
            for expert in p.argsort(descending=True)[: c["num_experts_per_tok"]].tolist():
                x[position] += p[expert] * swiglu(y[position], w, f"{layer}.mlp.experts.{expert}")
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def token_ids(length=24, vocab_size=448):
    return torch.randint(8, vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "lladamoe"},
        {"model_type": "llada_moe", "num_key_value_heads": 4},
        {"architectures": None},
        {"moe_layer_freq": [1, 1, 1], "dense_intermediate_size": None, "rope_theta": 10000, "rms_norm_eps": 1e-2},
        {"norm_topk_prob": True, "num_experts_per_tok": 3},  # a key that the hub's code does not look at
    ],
    ids=str,
)
def test_logits_equal_a_literal_forward_pass(tmp_path, tokenizer, changes):
    folder, ids = write(tmp_path, tokenizer, **changes), token_ids()
    wanted = literal_logits(folder, ids[0])
    assert wanted.std() > 0.5  # logits near zero would be near each other, too
    torch.testing.assert_close(models.load_model(folder, torch.float32)(ids).logits[0], wanted, atol=2e-5, rtol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(stock(ids).logits[0], wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_comparison_above_can_fail(folder, tmp_path, tokenizer):
    """Two tensors swapped in the files, and the logits are far off."""
    ids, right, tensors = token_ids(), literal_logits(folder, token_ids()[0]), random_tensors(TINY)
    for number, (one, other) in enumerate(
        [
            ("self_attn.q_norm", "self_attn.k_norm"),
            ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"),
            ("mlp.experts.0.down_proj", "mlp.experts.5.down_proj"),
        ]
    ):
        one, other = (f"model.layers.1.{name}.weight" for name in (one, other))
        wrong = write(tmp_path / str(number), tokenizer, tensors | {one: tensors[other], other: tensors[one]})
        assert (models.load_model(wrong)(ids).logits[0] - right).abs().max() > 0.05


def test_the_mask_is_that_of_the_config_or_of_the_tokenizer(folder, tmp_path, tokenizer):
    config = models.load_config(folder)
    assert type(config) is llada_moe.LLaDAMoEConfig and config.mask_token_id == 400
    assert models.load_config(write(tmp_path, tokenizer, mask_token_id=7)).mask_token_id == 7
    model, own = decode.load(str(folder), "float32", torch.device("cpu"))
    assert model.config.mask_token_id == 400 and decode.end_ids(model, own) == [1, 7, 401]  # end of turn: 7 and 401


def test_saved_by_transformers_it_is_the_same_model(folder, tmp_path):
    model = models.load_model(folder)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    kept = TINY.keys() - {"architectures", "auto_map", "model_type", "norm_topk_prob", "torch_dtype"}
    assert {key: content.get(key) for key in kept} == {key: TINY[key] for key in kept}
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path)(token_ids()).logits, model(token_ids()).logits
        )


@pytest.mark.parametrize(
    "key, value",
    [
        ("shared_expert_intermediate_size", 64), ("moe_router_enable_expert_bias", True), ("clip_qkv", 8.0),
        ("partial_rotary_factor", 0.5), ("qk_layernorm", False), ("qk_layernorm", None), ("attention_bias", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}), ("hidden_act", "gelu"), ("is_causal", True),
        ("num_experts", "six"), ("hidden_size", 0), ("num_experts_per_tok", None), ("moe_layer_freq", [1, 1]),
        ("moe_layer_freq", 1), ("rope_theta", None),
    ],
)  # fmt: skip
def test_what_a_qwen3_moe_cannot_be_is_refused(folder, tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {key: value}))
    with pytest.raises(InputError, match=f"{tmp_path}.*: config.json: {key}.* is .*") as error:
        models.load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_names_and_shapes_in_the_files_are_checked(tmp_path, tokenizer):
    tensors, expert = random_tensors(TINY), "model.layers.2.mlp.experts.5.up_proj.weight"
    changed = {
        f"tensor {expert} is missing": {name: tensor for name, tensor in tensors.items() if name != expert},
        f"tensor {expert} is \\[39, 64\\], its config says \\[40, 64\\]": tensors | {expert: torch.zeros(39, 64)},
        "unexpected tensor model.layers.1.mlp.experts.6.up_proj.weight": tensors
        | {"model.layers.1.mlp.experts.6.up_proj.weight": torch.zeros(40, 64)},
        "unexpected tensor model.layers.1.mlp.gate.expert_bias": tensors
        | {"model.layers.1.mlp.gate.expert_bias": torch.zeros(6)},
    }
    for number, (said, tensors) in enumerate(changed.items()):
        with pytest.raises(InputError, match=said):
            models.load_model(write(tmp_path / str(number), tokenizer, tensors))


def test_the_real_one_has_7_billion_parameters():
    """The published sizes, and a tensor of each kind under its name in the files."""
    real = TINY | {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "vocab_size": 157184,
        "moe_layer_freq": [1] * 16,
    }  # fmt: skip
    config = AutoConfig.for_model("llada_moe").from_dict(real)
    parts = [models.file_tensors(config, *named) for named in models.meta_model(config).named_parameters()]
    shapes = {name: tuple(tensor.shape) for part in parts for name, tensor in part}
    assert len(shapes) == 3 + 16 * (4 + 2 + 2 + 1 + 64 * 3)
    assert shapes["model.layers.15.mlp.experts.63.gate_proj.weight"] == (1024, 2048)
    assert shapes["model.layers.15.mlp.experts.63.down_proj.weight"] == (2048, 1024)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(7.36e9, rel=0.01)


def test_adapters_go_on_the_attention_only(folder):
    """Else PEFT would adapt the experts of Qwen3-MoE, all in one tensor, which is not how the files have them."""
    knobs = {"LORA_RANK": 4, "MASK_ID": 400, "MAX_LEN": 64, "TARGET_MODS": ["q_proj", "o_proj", "gate_proj"]}
    knobs["BASE_4BIT"] = False
    with pytest.raises(InputError, match="'gate_proj' matches no layer .* choose from k_proj, o_proj, q_proj, v_proj"):
        engine.check_model(folder, SimpleNamespace(**knobs))
    assert engine.check_model(folder, SimpleNamespace(**knobs | {"TARGET_MODS": ["q_proj"]})).mask_token_id == 400
