"""LLaDA-MoE as a bidirectional Qwen3-MoE of transformers: the same tensors, of which only the config has other names.

From the hub's code (inclusionAI/LLaDA-MoE-7B-A1B-Base: configuration_lladamoe.py, modeling_lladamoe.py): a decoder with
RMSNorm of queries and keys per head, and experts, the top few of which are added with their probabilities as they are.
Its config says model_type `llada`, like LLaDA's, or `lladamoe`; it is told by its experts.
"""

import json
from pathlib import Path

from transformers import Qwen3MoeConfig

from blockwise.cli import InputError

MASK = "<|mask|>"  # its config does not name the mask
NAMES = {"dense_intermediate_size": "intermediate_size", "expert_intermediate_size": "moe_intermediate_size"}
# what the hub's code could do besides, and a Qwen3-MoE cannot; the router's weights are never normalized there
SUPPORTED_VALUES = {
    "qk_layernorm": (True,), "shared_expert_intermediate_size": (None, 0), "partial_rotary_factor": (None, 1, 1.0),
    "moe_router_enable_expert_bias": (None, False), "moe_router_score_function": (None, "softmax"),
    "clip_qkv": (None,), "rope_scaling": (None,), "hidden_act": ("silu",),
}  # fmt: skip


def is_llada_moe(content: dict) -> bool:
    """Whether what a config.json holds is that of a LLaDA-MoE."""
    return content.get("model_type") in ("llada", "lladamoe", "llada_moe") and "num_experts" in content


def read_config(folder: str | Path, content: dict) -> Qwen3MoeConfig:
    """The config of a LLaDA-MoE in a folder, with what its config.json holds. Raises InputError."""
    for key, values in SUPPORTED_VALUES.items():
        if content.get(key, values[0]) not in values:
            raise InputError(f"config.json: {key}={content[key]!r} is not supported, only {values[0]!r} is.")
    names = {NAMES.get(key, key): value for key, value in content.items() if key not in ("model_type", "auto_map")}
    if names.get("mask_token_id") is None:
        names["mask_token_id"] = mask_of_tokenizer(Path(folder) / "tokenizer.json")
    layers = range(content["num_hidden_layers"])
    sparse = content.get("moe_layer_freq") or [1] * len(layers)
    head_dim = content["hidden_size"] // content["num_attention_heads"]
    fixed = {"norm_topk_prob": False, "is_causal": False, "use_cache": False, "decoder_sparse_step": 1}
    dense = [layer for layer in layers if not sparse[layer]]
    return Qwen3MoeConfig(**names | fixed | {"mlp_only_layers": dense, "head_dim": names.get("head_dim", head_dim)})


def mask_of_tokenizer(path: Path) -> int:
    """The id of the mask token in a tokenizer.json. Raises InputError."""
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        return next(token["id"] for token in tokens if token["content"] == MASK)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise InputError(f"{path} names no token {MASK}; write its number as mask_token_id into config.json.") from None
