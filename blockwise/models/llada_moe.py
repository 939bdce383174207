"""LLaDA-MoE as a bidirectional Qwen3-MoE of transformers 5: no remote code, the hub's own file format.

LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B-Instruct) is a decoder without the causal mask, with a norm of each head's
queries and keys and with experts in most layers, whose weights are not made to sum to 1. The hub's files use
Qwen3-MoE's names for tensors, but other names for some config keys. Their config.json may say model_type `llada`, as
LLaDA's does: llada.py tells the two apart.
"""

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from blockwise.cli import InputError
from blockwise.models import hub

MASK = "<|mask|>"  # in the tokenizer: the hub's config.json has no mask_token_id
# key in the hub's config.json -> Qwen3-MoE's name for it
CONFIG_KEYS = {
    "num_experts": "num_local_experts",
    "expert_intermediate_size": "moe_intermediate_size",
    "dense_intermediate_size": "intermediate_size",
}
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok",
    "expert_intermediate_size", "vocab_size",
)  # fmt: skip
# key -> the values that a Qwen3-MoE can stand for, the usual one first; None is a key that is missing or null
SUPPORTED_VALUES = {
    "qk_layernorm": [True],
    "shared_expert_intermediate_size": [None, 0],
    "moe_router_enable_expert_bias": [None, False],
    "partial_rotary_factor": [1, None],
    "clip_qkv": [None],
    "rope_scaling": [None],
    "hidden_act": ["silu", None],
    "attention_bias": [False, None],
    "is_causal": [False, None],
}


def is_llada_moe(config: dict) -> bool:
    """Whether a config.json of the model type `llada` is that of a LLaDA-MoE."""
    return bool(config.get("num_experts")) or "LLaDAMoEModelLM" in (config.get("architectures") or [])


class LLaDAMoEConfig(Qwen3MoeConfig):
    """Qwen3MoeConfig that reads and writes the hub's LLaDA-MoE keys; its models attend in both directions."""

    model_type = "llada_moe"
    mask_token_id: int | None = None
    rms_norm_eps: float = 1e-5
    is_causal: bool = False
    use_cache: bool = False

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        for key, supported in SUPPORTED_VALUES.items():
            value = config_dict.get(key)
            if value not in supported:
                raise InputError(
                    f"config.json: {key}={value!r} is not supported in a LLaDA-MoE, only {supported[0]!r}."
                )
        for key in SIZES:
            hub.check_size(key, config_dict.get(key), "LLaDA-MoE")
        if not config_dict.get("rope_theta"):
            raise InputError("config.json: rope_theta is missing; a LLaDA-MoE config has it.")
        qwen = hub.renamed(config_dict, CONFIG_KEYS)
        qwen.pop("model_type", None)
        layers, heads = config_dict["num_hidden_layers"], config_dict["num_attention_heads"]
        has_experts = qwen.pop("moe_layer_freq", None) or [1] * layers
        if not isinstance(has_experts, list) or len(has_experts) != layers:
            raise InputError(f"config.json: moe_layer_freq is {has_experts!r}; it is a 0 or 1 for each layer.")
        qwen["num_key_value_heads"] = qwen.get("num_key_value_heads") or heads
        qwen["mlp_only_layers"] = [layer for layer, experts in enumerate(has_experts) if not experts]
        return super().from_dict(qwen | {"norm_topk_prob": False}, **kwargs)  # the hub's code ignores that key

    def to_dict(self):
        config = super().to_dict()
        dense = config.pop("mlp_only_layers")
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["moe_layer_freq"] = [int(layer not in dense) for layer in range(self.num_hidden_layers)]
        fixed = {"qk_layernorm": True, "partial_rotary_factor": 1}
        return config | fixed | {key: config.pop(theirs) for key, theirs in CONFIG_KEYS.items()}


class LLaDAMoEForCausalLM(Qwen3MoeForCausalLM):
    """Mask predictor: position i of the logits predicts token i (no shift)."""

    config_class = LLaDAMoEConfig


AutoConfig.register("llada_moe", LLaDAMoEConfig)
CONFIG_MAPPING.register("lladamoe", LLaDAMoEConfig)  # another name for the same, which AutoConfig would not take
AutoModelForCausalLM.register(LLaDAMoEConfig, LLaDAMoEForCausalLM)
register_checkpoint_conversion_mapping("llada_moe", get_checkpoint_conversion_mapping("qwen3_moe"))
