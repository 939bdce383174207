"""LLaDA as a bidirectional Llama of transformers 5: no remote code, the hub's own file format.

LLaDA (arXiv 2502.09992) is a Llama decoder without the causal mask; the hub's files only use other names for its config
keys and tensors (GSAI-ML/LLaDA-8B-Instruct: config.json, modeling_llada.py). Importing this module registers the model
type `llada`, so that `AutoModelForCausalLM.from_pretrained(folder, dtype="auto")` and `AutoTokenizer` work as usual.
"""

import functools
import re
from collections.abc import Callable

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from blockwise.cli import InputError
from blockwise.models import hub
from blockwise.models.llada_moe import LLaDAMoEConfig, is_llada_moe

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError("blockwise needs transformers >= 5: earlier versions ignore is_causal and would stay causal")

# key in the hub's config.json -> Llama's name for it
CONFIG_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "embedding_size": "vocab_size",  # rows of the embedding; the hub's code, too, prefers it over its vocab_size
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
# what the hub's code could do besides, and a Llama cannot: a config that asks for it must not load as something else
SUPPORTED_VALUES = {
    "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms", "activation_type": "silu",
    "hidden_act": "silu", "rope": True, "rope_scaling": None, "alibi": False, "clip_qkv": None, "is_causal": False,
    "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_layer_norm": False,
    "scale_logits": False, "input_emb_norm": False,
}  # fmt: skip
# module in the hub's files -> module of LlamaForCausalLM, {i} being the layer
MODULES = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.blocks.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "model.transformer.blocks.{i}.q_proj": "model.layers.{i}.self_attn.q_proj",
    "model.transformer.blocks.{i}.k_proj": "model.layers.{i}.self_attn.k_proj",
    "model.transformer.blocks.{i}.v_proj": "model.layers.{i}.self_attn.v_proj",
    "model.transformer.blocks.{i}.attn_out": "model.layers.{i}.self_attn.o_proj",
    "model.transformer.blocks.{i}.ff_norm": "model.layers.{i}.post_attention_layernorm",
    "model.transformer.blocks.{i}.ff_proj": "model.layers.{i}.mlp.gate_proj",
    "model.transformer.blocks.{i}.up_proj": "model.layers.{i}.mlp.up_proj",
    "model.transformer.blocks.{i}.ff_out": "model.layers.{i}.mlp.down_proj",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
}


class LLaDAConfig(LlamaConfig):
    """LlamaConfig that reads and writes the hub's LLaDA keys; its models attend in both directions."""

    model_type = "llada"
    mask_token_id: int | None = None
    rms_norm_eps: float = 1e-5
    is_causal: bool = False
    use_cache: bool = False

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if is_llada_moe(config_dict):  # the hub's files of both say model_type llada
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        for key, value in SUPPORTED_VALUES.items():
            if config_dict.get(key, value) != value:
                raise InputError(f"config.json: {key}={config_dict[key]!r} is not supported, only {value!r} is.")
        llama = hub.renamed(config_dict, CONFIG_KEYS)
        for key in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size"):
            hub.check_size(key, llama.get(CONFIG_KEYS.get(key, key)), "LLaDA")
        return super().from_dict(llama, **kwargs)

    def to_dict(self):
        config = super().to_dict()
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        return (
            config
            | {theirs: config.pop(llama) for theirs, llama in CONFIG_KEYS.items()}
            | {"vocab_size": self.vocab_size}
        )


class LLaDAForCausalLM(LlamaForCausalLM):
    """Mask predictor: position i of the logits predicts token i (no shift)."""

    config_class = LLaDAConfig


AutoConfig.register("llada", LLaDAConfig)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAForCausalLM)
register_checkpoint_conversion_mapping(
    "llada",
    [
        WeightRenaming(re.escape(theirs + ".").replace(r"\{i\}", r"(\d+)"), llama.replace("{i}", r"\1") + ".")
        for theirs, llama in MODULES.items()
    ],
)


def refuse_mask_predictors(generate: Callable) -> Callable:
    """transformers' generate, which would silently write one token after another with a model that predicts masks."""

    @functools.wraps(generate)
    def checked(model, *args, **kwargs):
        if getattr(model.config, "is_causal", True) is False:
            raise InputError(
                "this model predicts masks, and model.generate() would sample it autoregressively; decode it block by "
                'block: import blockwise; blockwise.generate(model, tokenizer, "your question").'
            )
        return generate(model, *args, **kwargs)

    return checked


GenerationMixin.generate = refuse_mask_predictors(GenerationMixin.generate)


def hub_name(tensor: str) -> str:
    """The name in the hub's files of a tensor of LLaDAForCausalLM, as `model.layers.3.mlp.up_proj.weight`."""
    module, _, kind = tensor.rpartition(".")
    layer = re.search(r"\.(\d+)\.", module)
    names = {llama: theirs for theirs, llama in MODULES.items()}
    if layer:
        return names[module.replace(layer[0], ".{i}.")].replace("{i}", layer[1]) + "." + kind
    return names[module] + "." + kind
