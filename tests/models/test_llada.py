"""llada.py: the hub's LLaDA files as a bidirectional Llama, against a literal forward pass; damaged files."""

import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from blockwise.cli import InputError
from blockwise.models import base as models
from blockwise.models import hub, llada

# config.json of GSAI-ML/LLaDA-8B-Instruct, with what its modelling code reads
HUB_8B = {
    "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "include_bias": False,
    "include_qkv_bias": False, "init_device": "meta", "input_emb_norm": False, "layer_norm_type": "rms",
    "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288, "model_type": "llada",
    "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081, "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "torch_dtype": "bfloat16", "use_cache": False, "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
TINY = HUB_8B | {
    "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 96, "vocab_size": 120,
    "embedding_size": 120, "max_sequence_length": 128, "mask_token_id": 4, "eos_token_id": 1, "pad_token_id": 1,
    "torch_dtype": "float32",
}  # fmt: skip
VARIANTS = {
    "multi-head": {},
    "grouped-query": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "grouped-query and tied": {"n_kv_heads": 1, "weight_tying": True},
    "another theta and eps": {"rope_theta": 10000.0, "rms_norm_eps": 1e-2},
}


def random_model(**changes):
    """A model of random weights, the norms' too: with ones, a swap of two norms would not show."""
    torch.manual_seed(1)
    model = llada.LLaDAForCausalLM(llada.LLaDAConfig.from_dict(TINY | changes))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.5 if "embed" in name else 0.15)
    return model.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """What a checkpoint's config has in another way than TINY."""
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def folder(variant, tmp_path_factory):
    """An fp32 checkpoint in several shards that save_pretrained made."""
    folder = tmp_path_factory.mktemp("model")
    random_model(**variant).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def damaged(base, tmp_path):
    """A copy of the base checkpoint, to be damaged."""
    return shutil.copytree(base, tmp_path / "damaged")


def hub_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def token_ids(vocab_size, length=24, seed=0):
    return torch.randint(5, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the forward pass, written out


def rms_norm(x, weight, eps):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x, theta):
    """RoPE with Llama's half-rotation: dimension j pairs with j + D/2. x: (L, heads, D)."""
    length, _, width = x.shape
    frequency = 1 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)  # (D/2,)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency  # (L, D/2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q, k, v):
    """Every position sees every position. q: (L, heads, D); k, v: (L, kv heads, D), shared by neighbouring heads."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        key, value = k[:, head // group], v[:, head // group]
        scores = q[:, head] @ key.T / key.shape[-1] ** 0.5  # (L, L)
        heads.append(scores.softmax(-1) @ value)
    return torch.cat(heads, dim=-1)


def literal_logits(folder, ids):
    """LLaDA from the hub's tensor names and config keys alone. ids: (L,) -> (L, V)."""
    w, c = hub_tensors(folder), json.loads((folder / "config.json").read_text())
    length, width, eps = len(ids), c["d_model"] // c["n_heads"], c["rms_norm_eps"]
    x = w["model.transformer.wte.weight"][ids]
    for i in range(c["n_layers"]):
        block = {name: w[f"model.transformer.blocks.{i}.{name}.weight"] for name in (
            "attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"
        )}  # fmt: skip
        y = rms_norm(x, block["attn_norm"], eps)
        q = rotate((y @ block["q_proj"].T).view(length, c["n_heads"], width), c["rope_theta"])
        k = rotate((y @ block["k_proj"].T).view(length, c["n_kv_heads"], width), c["rope_theta"])
        v = (y @ block["v_proj"].T).view(length, c["n_kv_heads"], width)
        x = x + attention(q, k, v) @ block["attn_out"].T
        y = rms_norm(x, block["ff_norm"], eps)
        gate = y @ block["ff_proj"].T
        x = x + (gate * torch.sigmoid(gate) * (y @ block["up_proj"].T)) @ block["ff_out"].T
    x = rms_norm(x, w["model.transformer.ln_f.weight"], eps)
    head = "wte" if c["weight_tying"] else "ff_out"
    return x @ w[f"model.transformer.{head}.weight"].T


@torch.no_grad()
def test_logits_equal_a_literal_forward_pass(folder):
    ids = token_ids(120)
    logits = models.load_model(folder, dtype=torch.float32)(input_ids=ids).logits[0]
    assert logits.std() > 0.5  # logits near zero would be near each other, too
    torch.testing.assert_close(logits, literal_logits(folder, ids[0]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_comparison_above_can_fail(tmp_path):
    """Gate and up projection, or the two norms of a block, swapped in the files: the logits are far off."""
    random_model().save_pretrained(tmp_path / "right")
    ids, right = token_ids(120), tmp_path / "right"
    logits = literal_logits(right, ids[0])
    for one, other in [("ff_proj", "up_proj"), ("attn_norm", "ff_norm"), ("q_proj", "k_proj")]:
        wrong = tmp_path / one
        shutil.copytree(right, wrong)
        tensors = load_file(wrong / "model.safetensors")
        one, other = (f"model.transformer.blocks.0.{name}.weight" for name in (one, other))
        tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
        assert (literal_logits(wrong, ids[0]) - logits).abs().max() > 0.1


@torch.no_grad()
def test_bf16_base_in_fp32(base):
    """The session's checkpoint of several shards, which other tests train on, is the same function."""
    ids = token_ids(400)
    exact = {name: tensor.float() for name, tensor in hub_tensors(base).items()}
    logits = models.load_model(base, dtype=torch.float32)(input_ids=ids).logits[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "hub_tensors", lambda folder: exact)
        torch.testing.assert_close(logits, literal_logits(base, ids[0]), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- both directions


@torch.no_grad()
def leak(model, length=24):
    """How much the last token changes the logits at position 0."""
    ids = token_ids(model.config.vocab_size, length)
    changed = ids.clone()
    changed[0, -1] = 5 + (changed[0, -1] - 4) % (model.config.vocab_size - 5)
    assert (ids != changed).sum() == 1
    return (model(input_ids=ids).logits[0, 0] - model(input_ids=changed).logits[0, 0]).abs().max().item()


def test_last_token_reaches_the_first_position(base):
    assert leak(models.load_model(base)) > 0.01
    assert leak(models.load_model(base, dtype=torch.float32)) > 0.01


def test_auto_class_is_bidirectional_too(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert leak(model) > 0.01


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_attention_implementation_is_causal(base, attention):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention)
    assert leak(model) > 0.01


def test_a_causal_llama_of_the_same_weights_does_not_leak(base):
    """The control: the probe can fail."""
    model = models.load_model(base, dtype=torch.float32)
    c = model.config
    causal = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
        )
    )  # fmt: skip
    causal.load_state_dict(model.state_dict())
    assert leak(causal.eval()) == 0.0
    one = torch.tensor([[7]])  # where there is nothing to look at, before or after, the two are the same
    with torch.no_grad():
        assert torch.equal(causal(input_ids=one).logits, model(input_ids=one).logits)


def test_lora_and_gradient_checkpointing_stay_bidirectional(base):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = models.load_model(base, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config).train()
    assert model.base_model.model.model.gradient_checkpointing
    assert leak(model) > 0.01

    # and backwards: the recomputed pass, too, must see the last token from position 0
    embedded = model.get_input_embeddings()(token_ids(400)).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, 0].square().sum().backward()
    assert embedded.grad[0].abs().amax(-1).min() > 0  # every position


def test_sdpa_gets_no_mask(base, monkeypatch):
    """A mask that is all true gives the same numbers, but keeps the fast kernels away."""
    calls = []
    sdpa = F.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        calls.append((attn_mask, dropout_p, is_causal))
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    model = models.load_model(base)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    ids = token_ids(400).repeat(3, 1)
    ids[1:, 10:] = 1  # padding
    model.train()(input_ids=ids, logits_to_keep=ids == 4)
    assert calls == [(None, 0.0, False)] * 2  # one a layer


# ---------------------------------------------------------------- names, sizes, config


def test_real_8b_has_the_hubs_tensors():
    with torch.device("meta"):
        model = llada.LLaDAForCausalLM(llada.LLaDAConfig.from_dict(HUB_8B))
    shapes = {llada.hub_name(name): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    d, ff, v = 4096, 12288, 126464
    expected = {
        "model.transformer.wte.weight": (v, d),
        "model.transformer.ln_f.weight": (d,),
        "model.transformer.ff_out.weight": (v, d),
    }
    for i in range(32):
        expected |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in {
            "attn_norm": (d,), "q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "attn_out": (d, d),
            "ff_norm": (d,), "ff_proj": (ff, d), "up_proj": (ff, d), "ff_out": (d, ff),
        }.items()}  # fmt: skip
    assert shapes == expected
    assert len(shapes) == 291
    assert sum(tensor.numel() for tensor in model.parameters()) == 8_015_581_184


@pytest.mark.parametrize(
    "llama, hub",
    [
        ("model.embed_tokens.weight", "model.transformer.wte.weight"),
        ("model.layers.0.input_layernorm.weight", "model.transformer.blocks.0.attn_norm.weight"),
        ("model.layers.11.self_attn.q_proj.weight", "model.transformer.blocks.11.q_proj.weight"),
        ("model.layers.3.self_attn.k_proj.weight", "model.transformer.blocks.3.k_proj.weight"),
        ("model.layers.3.self_attn.v_proj.weight", "model.transformer.blocks.3.v_proj.weight"),
        ("model.layers.31.self_attn.o_proj.weight", "model.transformer.blocks.31.attn_out.weight"),
        ("model.layers.10.post_attention_layernorm.weight", "model.transformer.blocks.10.ff_norm.weight"),
        ("model.layers.1.mlp.gate_proj.weight", "model.transformer.blocks.1.ff_proj.weight"),
        ("model.layers.1.mlp.up_proj.weight", "model.transformer.blocks.1.up_proj.weight"),
        ("model.layers.1.mlp.down_proj.weight", "model.transformer.blocks.1.ff_out.weight"),
        ("model.norm.weight", "model.transformer.ln_f.weight"),
        ("lm_head.weight", "model.transformer.ff_out.weight"),
    ],
)
def test_hub_name(llama, hub):
    assert llada.hub_name(llama) == hub


def test_files_hold_the_hubs_names(folder):
    """Also: a tied model's files have no second copy of the embedding."""
    tied = json.loads((folder / "config.json").read_text())["weight_tying"]
    names = set(hub_tensors(folder))
    assert ("model.transformer.ff_out.weight" in names) == (not tied)
    assert len(names) == 2 * 9 + 2 + (not tied)
    assert all(name.startswith("model.transformer.") for name in names)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == names


def test_config_is_written_with_the_hubs_keys(folder, variant, tmp_path):
    models.load_model(folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = TINY | variant
    for key in set(TINY) - {"architectures", "torch_dtype"}:  # also what only the hub's code reads
        assert written[key] == expected[key], key
    llama = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "max_position_embeddings", "tie_word_embeddings", "rope_parameters"}  # fmt: skip
    assert not llama & set(written)


@torch.no_grad()
def test_round_trip_is_exact(folder, tmp_path):
    """Saved and loaded again: the same tensors and logits, bit for bit."""
    model = models.load_model(folder)
    model.save_pretrained(tmp_path)
    again = models.load_model(tmp_path)
    ids = token_ids(120)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    before, after = hub_tensors(folder), hub_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_config_of_the_hub_is_understood():
    config = llada.LLaDAConfig.from_dict(HUB_8B)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (4096, 32, 12288)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 32, 128)
    assert (config.vocab_size, config.max_position_embeddings) == (126464, 4096)
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.rms_norm_eps == 1e-5
    assert not config.tie_word_embeddings
    assert not config.is_causal
    assert not config.use_cache
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (126336, 126081, 126081)
    again = llada.LLaDAConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_optional_keys_of_the_hub():
    """As the hub's code has it: without n_kv_heads as many as n_heads, without embedding_size vocab_size rows."""
    for empty in ({}, {"n_kv_heads": None, "embedding_size": None}):
        values = {key: value for key, value in TINY.items() if key not in ("n_kv_heads", "embedding_size")}
        config = llada.LLaDAConfig.from_dict(values | empty)
        assert config.num_key_value_heads == 4
        assert config.vocab_size == 120
    assert llada.LLaDAConfig.from_dict(TINY).mask_token_id == 4
    unknown = {key: value for key, value in TINY.items() if key != "mask_token_id"}
    assert llada.LLaDAConfig.from_dict(unknown).mask_token_id is None  # not another model's
    padded = llada.LLaDAConfig.from_dict(TINY | {"embedding_size": 128})  # the embedding has rows without a token
    assert padded.vocab_size == 128


def test_rope_stays_fp32_in_a_bf16_model(base):
    model = models.load_model(base)
    assert model.dtype == torch.bfloat16
    frequency = model.model.rotary_emb.inv_freq
    assert frequency.dtype == torch.float32
    torch.testing.assert_close(frequency, 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32), rtol=1e-6, atol=0)
    assert not torch.equal(frequency, frequency.bfloat16().float())  # bf16 would have rounded them


def test_dtype(base):
    assert models.load_model(base, dtype=torch.float32).dtype == torch.float32
    assert all(tensor.dtype == torch.bfloat16 for tensor in models.load_model(base).parameters())


# ---------------------------------------------------------------- damaged files


def refusal(folder):
    """The sentence that a damaged checkpoint is refused with."""
    with pytest.raises(InputError) as error:
        models.load_model(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(folder, **changes):
    """Changes keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_shard(folder, tensor, edit):
    """Rewrites the shard that holds a tensor after edit(its tensors). Returns the file's name."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return file


UP = "model.transformer.blocks.1.up_proj.weight"


def test_missing_tensor(damaged):
    edit_shard(damaged, UP, lambda tensors: tensors.pop(UP))
    assert f"{UP} is missing" in refusal(damaged)


def test_missing_head_is_not_taken_for_tied(damaged):
    """Without this transformers would continue with a random head."""
    head = "model.transformer.ff_out.weight"
    edit_shard(damaged, head, lambda tensors: tensors.pop(head))
    assert f"{head} is missing" in refusal(damaged)


def test_head_in_a_tied_checkpoint(damaged):
    edit_config(damaged, weight_tying=True)
    assert "unexpected tensor model.transformer.ff_out.weight" in refusal(damaged)


@pytest.mark.parametrize("name", ["model.transformer.blocks.1.q_proj.bias", "model.norm.weight", "lm_head.weight"])
def test_unexpected_tensor(damaged, name):
    """Llama's own names, too: they would be a second copy of a tensor."""
    file = edit_shard(damaged, UP, lambda tensors: tensors.update({name: torch.zeros(64)}))
    message = refusal(damaged)
    assert name in message and file in message


def test_more_layers_in_the_files_than_in_the_config(damaged):
    edit_config(damaged, n_layers=1)
    assert "unexpected tensor model.transformer.blocks.1." in refusal(damaged)


def test_more_layers_in_the_config_than_in_the_files(damaged):
    edit_config(damaged, n_layers=3)
    assert re.search(r"tensor model\.transformer\.blocks\.2\.\w+\.weight is missing", refusal(damaged))


@pytest.mark.parametrize("shape", [(192, 63), (64, 192), (1, 192, 64)])
def test_wrong_shape(damaged, shape):
    zeros = torch.zeros(shape, dtype=torch.bfloat16)
    file = edit_shard(damaged, UP, lambda tensors: tensors.update({UP: zeros}))
    message = refusal(damaged)
    assert UP in message and file in message
    assert str(list(shape)) in message and "[192, 64]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_tensor(damaged, dtype):
    file = edit_shard(damaged, UP, lambda tensors: tensors.update({UP: torch.zeros(192, 64).to(dtype)}))
    message = refusal(damaged)
    assert UP in message and file in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_dtypes_load(damaged, dtype):
    """A checkpoint in which one tensor has another float type loads as a whole in the type that is asked for."""
    tensor = hub_tensors(damaged)[UP].to(dtype)
    edit_shard(damaged, UP, lambda tensors: tensors.update({UP: tensor}))
    model = models.load_model(damaged, dtype=torch.float32)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tensor.float())


@pytest.mark.parametrize("size", [0, 5, 200, -1, -1000])
def test_truncated_shard(damaged, size):
    """A download that broke off. size: bytes that are left, or minus those that are lost."""
    file = damaged / "model-00003-of-00005.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    assert str(file) in refusal(damaged)


def test_missing_shard(damaged):
    (damaged / "model-00003-of-00005.safetensors").unlink()
    assert "model-00003-of-00005.safetensors" in refusal(damaged)


def test_no_weights_at_all(damaged):
    for file in damaged.glob("model*"):
        file.unlink()
    message = refusal(damaged)
    assert str(damaged) in message and "model.safetensors" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 3}}'])
def test_damaged_index(damaged, text):
    (damaged / "model.safetensors.index.json").write_text(text)
    assert str(damaged / "model.safetensors.index.json") in refusal(damaged)


def test_index_without_sizes(damaged):
    """Its metadata (a total size) says nothing about the weights; some tools leave it out."""
    file = damaged / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": json.loads(file.read_text())["weight_map"]}))
    try:
        models.load_model(damaged)
    except InputError as error:
        assert str(file) in str(error)


def test_a_single_file_besides_the_shards_is_not_loaded_unseen(damaged):
    """Of two sets of weights in a folder, the one that was checked is the one that is loaded; or both are refused."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in hub_tensors(damaged).items()}
    weight = hub_tensors(damaged)[UP]
    save_file(zeros, damaged / "model.safetensors", metadata={"format": "pt"})
    try:
        model = models.load_model(damaged)
    except InputError as error:
        assert "model.safetensors" in str(error)
    else:
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, weight)


def test_no_config(damaged):
    (damaged / "config.json").unlink()
    assert str(damaged / "config.json") in refusal(damaged)


@pytest.mark.parametrize("content", [b"", b"{ not json", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"d_model": 64}'])
def test_damaged_config(damaged, content):
    (damaged / "config.json").write_bytes(content)
    message = refusal(damaged)
    assert str(damaged / "config.json") in message and "JSON" in message


def test_another_model_type(damaged):
    edit_config(damaged, model_type="llama")
    assert "tensor model.embed_tokens.weight is missing" in refusal(damaged)
    edit_config(damaged, model_type="no such type")
    message = refusal(damaged)
    assert "'no such type' is not one that this version of transformers knows" in message
    assert str(damaged / "config.json") in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("alibi", True),
        ("rope", False),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("layer_norm_type", "default"),
        ("activation_type", "gelu"),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("bias_for_layer_norm", True),
        ("attention_layer_norm", True),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("is_causal", True),  # what save_pretrained writes as false: a causal LLaDA would train without a word
    ],
)
def test_unsupported_feature(damaged, key, value):
    edit_config(damaged, **{key: value})
    message = refusal(damaged)
    assert "config.json" in message and f"{key}={value!r}" in message


@pytest.mark.parametrize("key", ["d_model", "n_layers", "n_heads", "mlp_hidden_size"])
def test_missing_size(damaged, key):
    """The message has the name that the file has, not Llama's for it."""
    edit_config(damaged, **{key: None})
    message = refusal(damaged)
    assert "config.json" in message and re.search(rf"\b{key}\b", message)


def test_missing_vocabulary_size(damaged):
    edit_config(damaged, vocab_size=None, embedding_size=None)
    assert "vocab_size" in refusal(damaged)


@pytest.mark.parametrize("key, value", [("d_model", "64"), ("n_layers", 2.5), ("n_heads", 0)])
def test_impossible_size(damaged, key, value):
    edit_config(damaged, **{key: value})
    assert "config.json" in refusal(damaged)


# ---------------------------------------------------------------- remote code, the hub

# Everything that a user does with a checkpoint. It must not ask: its input is closed, and a question would be an error.
LOAD_ALL = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from blockwise.models import base as models
from blockwise.models import hub, llada

for folder in sys.argv[1:]:
    print(type(AutoConfig.from_pretrained(folder)).__name__)
    print(len(AutoTokenizer.from_pretrained(folder)), len(hub.load_tokenizer(folder)))
    print(type(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).__name__)
    print(type(models.load_model(folder)).__name__)
print(*[name for name in sys.modules if "_llada" in name])
"""


def test_remote_code_is_neither_needed_nor_run(base, tmp_path):
    """The hub's config names two .py files. In one folder they are not there, in the other they are hostile."""
    absent, hostile = tmp_path / "absent", tmp_path / "hostile"
    for folder in (absent, hostile):
        shutil.copytree(base, folder)
        edit_config(folder, auto_map=HUB_8B["auto_map"], architectures=["LLaDAModelLM"])
    for module in ("configuration_llada", "modeling_llada"):
        text = f"import pathlib\npathlib.Path({str(tmp_path / 'it ran')!r}).touch()\n"
        (hostile / f"{module}.py").write_text(text)
    command = [sys.executable, "-c", LOAD_ALL, str(absent), str(hostile)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["LLaDAConfig", "400 400", "LLaDAForCausalLM", "LLaDAForCausalLM"] * 2 + ["", ""]
    for question in ("trust_remote_code", "custom code", "[y/N]"):
        assert question not in done.stderr
    assert not (tmp_path / "it ran").exists()
    assert not list((tmp_path / "modules").rglob("*_llada.py"))


def test_load_tokenizer_takes_any_model_type_and_no_code(damaged, tmp_path, monkeypatch):
    """A folder of another model, whose config and tokenizer both ask for code, before a user who says yes to all."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    text = f"import pathlib\npathlib.Path({str(tmp_path / 'it ran')!r}).touch()\n"
    for module in ("configuration_other", "tokenization_other"):
        (damaged / f"{module}.py").write_text(text)
    edit_config(damaged, model_type="other", auto_map={"AutoConfig": "configuration_other.OtherConfig"})
    assert len(hub.load_tokenizer(damaged)) == 400

    file = damaged / "tokenizer_config.json"
    asks = {
        "tokenizer_class": "OtherTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_other.OtherTokenizer"] * 2},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | asks))
    with pytest.raises(InputError, match="damaged"):
        hub.load_tokenizer(damaged)
    assert not questions
    assert not (tmp_path / "it ran").exists()


def test_registered_for_the_auto_classes(base):
    assert type(AutoConfig.from_pretrained(base)) is llada.LLaDAConfig
    assert type(models.load_config(base)) is llada.LLaDAConfig


def test_local_folder_is_used_as_it_is(base):
    assert hub.local_folder(str(base)) == base
    assert hub.local_folder(base) == base


@pytest.mark.parametrize(
    "name", ["no/such/folder/here", "/no/such/folder", "./no", "~/no", "nobody/no-such-model", "two words", "a..b"]
)
def test_neither_folder_nor_hub_model(name, monkeypatch):
    """What looks like a path is no name on the hub, whose reason would only confuse."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (hub.local_folder, hub.load_tokenizer):
        with pytest.raises(InputError) as error:
            load(name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        path = name.count("/") > 1 or name[0] in "/.~"
        what = (
            "; give that of a model, or a hub id such as GSAI-ML/LLaDA-8B-Instruct." if path else ", and the hub does"
        )
        assert str(error.value).startswith(f"{name} is not a local folder{what}")


def test_a_file_is_no_model_folder(base):
    with pytest.raises(InputError, match=r"config\.json is not a local folder; give that of a model"):
        hub.local_folder(str(base / "config.json"))


def test_weight_files_are_in_the_order_of_their_names(base):
    names = [file.name for file in hub.weight_files(base)]
    assert names == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    with safe_open(hub.weight_files(base)[0], "pt") as tensors:
        assert all(name.startswith("model.transformer.") for name in tensors.keys())  # noqa: SIM118
