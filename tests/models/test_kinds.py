"""LLaDA-MoE against a literal forward pass; it, LLaDA with a tied head, and Qwen3-MoE through training and decoding.

Other decoders: tests/test_a2d.py.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import pt
from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.models import hub, llada

VOCAB, D, HEADS, KV, HEAD, EXPERTS, TOP, INNER = 448, 32, 4, 2, 8, 6, 2, 16
MOE = {  # a config.json with the hub's names; layer 0 is dense
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "vocab_size": VOCAB, "hidden_size": D,
    "dense_intermediate_size": 48, "expert_intermediate_size": INNER, "shared_expert_intermediate_size": None,
    "num_hidden_layers": 3, "num_attention_heads": HEADS, "num_key_value_heads": KV, "hidden_act": "silu",
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": None,
    "num_experts": EXPERTS, "num_experts_per_tok": TOP, "norm_topk_prob": None, "qk_layernorm": True,
    "moe_layer_freq": [0, 1, 1], "partial_rotary_factor": 1, "clip_qkv": None, "tie_word_embeddings": False,
    "moe_router_enable_expert_bias": False, "pad_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save(folder, config, tokenizer):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


def llada_moe(folder, tokenizer):
    """Random weights; transformers writes Qwen3-MoE's files with the names that the hub's LLaDA-MoE has."""
    from tokenizers import AddedToken

    sizes = {"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 48, "moe_intermediate_size": INNER}
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=3, num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HEAD,
        num_experts=EXPERTS, num_experts_per_tok=TOP, mlp_only_layers=[0], initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken("<|mask|>", special=True)])  # 400, instead of LLaDA-MoE's 156895
    save(folder, config, tokenizer)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(MOE))
    return folder


def illada(folder, tokenizer):
    """As iLLaDA: fewer heads for keys and values, a tied head, mask 5."""
    config = llada.LLaDAConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, mask_token_id=5, pad_token_id=1,
        eos_token_id=[1, 7], initializer_range=0.2,
    )  # fmt: skip
    return save(folder, config, tokenizer)


def qwen3_moe(folder, tokenizer):
    """As a2d.py writes it; its router normalizes the weights of the experts."""
    llada_moe(folder, tokenizer)
    config = models.load_config(folder)
    config.norm_topk_prob = True
    config.save_pretrained(folder)
    return folder


KINDS = {"llada_moe": (llada_moe, 400), "illada": (illada, 5), "qwen3_moe": (qwen3_moe, 400)}


@pytest.fixture
def make(tmp_path, base):
    return lambda kind: KINDS[kind][0](tmp_path / "base", hub.load_tokenizer(base))


def norm(x, weight):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def rotated(x):
    """(T, heads, HEAD) with rotary position embeddings: the halves of a head are the two coordinates."""
    angle = torch.arange(len(x))[:, None] / 50000.0 ** (torch.arange(0, HEAD, 2) / HEAD)  # (T, HEAD / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def literal(weights, ids):
    """LLaDA-MoE for one text, position by position and expert by expert, from the tensors of its files. (T,) ids"""

    def swiglu(x, name):
        gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (F.silu(gate @ x) * (up @ x))

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(3):
        name = f"model.layers.{layer}"
        h = norm(x, weights[f"{name}.input_layernorm.weight"])
        q, k, v = (
            (h @ weights[f"{name}.self_attn.{part}_proj.weight"].T).view(len(ids), -1, HEAD) for part in ("q", "k", "v")
        )
        q = rotated(norm(q, weights[f"{name}.self_attn.q_norm.weight"]))
        k = rotated(norm(k, weights[f"{name}.self_attn.k_norm.weight"]))
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV)
            scores = q[:, head] @ k[:, group].T / HEAD**0.5  # no causal mask
            heads.append(scores.softmax(dim=-1) @ v[:, group])
        x = x + torch.cat(heads, dim=-1) @ weights[f"{name}.self_attn.o_proj.weight"].T
        h = norm(x, weights[f"{name}.post_attention_layernorm.weight"])
        for t in range(len(ids)):
            if MOE["moe_layer_freq"][layer] == 0:
                x[t] = x[t] + swiglu(h[t], f"{name}.mlp")
                continue
            chances = (weights[f"{name}.mlp.gate.weight"] @ h[t]).softmax(dim=0)
            for expert in chances.argsort(descending=True)[:TOP].tolist():
                x[t] = x[t] + chances[expert] * swiglu(h[t], f"{name}.mlp.experts.{expert}")
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def weights_of(folder):
    return {name: tensor for file in hub.weight_files(folder) for name, tensor in load_file(file).items()}


def test_llada_moe_is_its_literal_forward_pass(make):
    folder = make("llada_moe")
    model, weights = models.load_model(folder, torch.float32), weights_of(folder)
    assert model.config.mask_token_id == 400 and f"model.layers.2.mlp.experts.{EXPERTS - 1}.up_proj.weight" in weights
    ids = torch.randint(8, 400, (11,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], literal(weights, ids), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_merges_loads_and_decodes(make, forked, tmp_path, kind, rank):
    folder, mask = make(kind), KINDS[kind][1]
    knobs = {"MODEL_NAME": folder, "MASK_ID": mask, "TARGET_MODS": LINEARS, "LORA_RANK": rank, "LORA_DROPOUT": 0.0}
    knobs |= {
        "SAVE_DTYPE": "float32",
        "SAVE_EVERY": 0,
        "RESUME_EVERY": 0,
        "TOTAL_TRAIN_STEPS": 2,
        "CKPT_DIR": "out/run",
    }
    samples = torch.randint(8, 400, (40, 64), generator=torch.Generator().manual_seed(0))  # no masks of these models
    pt.save([(5, row.numpy()) for row in samples], tmp_path / "samples.pt")
    done = forked(tmp_path / "run", DATA_PT=tmp_path / "samples.pt", **knobs)
    assert not any(done.codes), done.output
    merged, device = tmp_path / "run/out/run_step0002", torch.device("cpu")
    old, new = weights_of(folder), weights_of(merged)
    assert (
        old.keys() == new.keys()
        and json.loads((merged / "config.json").read_text()).keys()
        >= json.loads((folder / "config.json").read_text()).keys()
    )
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    model, _ = decode.load(str(merged), "float32", device)
    ids = torch.randint(8, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    if rank:
        assert changed == {name for name in old if any(f"{part}." in name for part in (*LINEARS, "attn_out"))}
        adapted, _ = decode.load(str(folder), "float32", device, str(merged / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    else:
        assert {name for name in old if "up_proj" in name and "experts" not in name} <= changed
        assert kind == "illada" or any(".experts." in name for name in changed)
    prompts, settings = [[10, 11, 12, 13, 14], [15, 16]], Settings(gen_length=16, block_length=8, steps=16)
    both, _ = decode.decode(model, prompts, settings)
    assert not (both == mask).any() and int(both.min()) >= 0 and int(both.max()) < VOCAB
    for row, prompt in zip(both, prompts):
        assert torch.equal(row, decode.decode(model, [prompt], settings)[0][0])


def test_trained_experts_are_written_as_they_are(make):
    """Every tensor of the files is the part of the live model from which transformers, too, reads it back."""
    folder = make("llada_moe")
    model, weights = models.load_model(folder, torch.float32), weights_of(folder)
    live = {
        name: part
        for whole, tensor in model.named_parameters()
        for name, part in models.in_files(model.config, whole, tensor.detach())
    }
    assert live.keys() == weights.keys() and all(torch.equal(live[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size=32 is not supported"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only None is"),
        ({"qk_layernorm": False}, "qk_layernorm=False is not supported, only True is"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ({"expert_intermediate_size": 24}, "its config says"),
    ],
)
def test_what_a_qwen3_moe_cannot_do_is_refused(make, change, said):
    folder = make("llada_moe")
    (folder / "config.json").write_text(json.dumps(MOE | change))
    with pytest.raises(InputError, match=said):
        models.load_model(folder)


def test_a_tokenizer_without_the_mask_is_refused(make):
    folder = make("llada_moe")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json names no token <\|mask\|>"):
        models.load_config(folder)
