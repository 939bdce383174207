"""Any decoder of transformers as a mask predictor: its config, the names of its tensors, loading it with all checks.

LLaDA is one (llada.py, llada_moe.py); other decoders are converted by a2d.py, which writes `is_causal: false` into
their config. With that, most decoders of transformers attend in both directions, but some ignore it:
`check_both_directions` finds out.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from blockwise.cli import InputError
from blockwise.models import hub, llada, llada_moe
from blockwise.run.files import TENSOR_BYTES

EXPERTS = {"llada_moe", "qwen3_moe"}  # types whose files hold each expert by itself, while the model holds all in one
MASK_TRAINED = "mask_embedding_trained"  # in config.json, false: a2d.py has added the mask, and nothing was trained


def mask_is_trained(config: PreTrainedConfig) -> bool:
    """Whether the embedding of the mask token was ever trained: always, but for a base that was only converted."""
    return getattr(config, MASK_TRAINED, None) is not False


def file_name(config: PreTrainedConfig, tensor: str) -> str:
    """The name that a tensor of the model has in the checkpoint's files."""
    return llada.hub_name(tensor) if config.model_type == "llada" else tensor


def file_tensors(config: PreTrainedConfig, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name in the checkpoint's files, what it holds) for a tensor of the model: views of it.

    That is the tensor itself, but for experts, E of them: gate_up_proj (E, 2 I, D) is a gate_proj (I, D) and an up_proj
    (I, D) of each, down_proj (E, D, I) a down_proj (D, I).
    """
    experts = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
    if config.model_type not in EXPERTS or not experts:
        yield file_name(config, name), tensor
        return
    parts = ("gate_proj", "up_proj") if experts[2] == "gate_up_proj" else ("down_proj",)
    for number, expert in enumerate(tensor):
        for part, weight in zip(parts, expert.chunk(len(parts))):
            yield f"{experts[1]}.{number}.{part}.weight", weight


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without any memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_names(config: PreTrainedConfig) -> list[str]:
    """The last parts of the names of the linear layers, which can have adapters: all but the language-model head.

    Where layers have experts, only those of the attention: for an MLP, PEFT would also adapt the experts, all in one.
    """
    model = meta_model(config)
    head = model.get_output_embeddings()
    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not head
        and not (config.model_type in EXPERTS and ".mlp." in name)
    }
    return sorted(linears)


def load_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a checkpoint that predicts masks. Raises InputError if it is not one."""
    config = read_config(folder)
    if getattr(config, "is_causal", True) is not False:
        raise InputError(
            f"{folder} is an autoregressive {config.model_type} checkpoint, which sees only what comes before; convert "
            "it with a2d.py first."
        )
    check_supported(config, folder)
    if config.model_type == "llada_moe" and config.mask_token_id is None:
        config.mask_token_id = hub.load_tokenizer(folder).get_vocab().get(llada_moe.MASK)
    return config


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The config of any checkpoint folder, without remote code. Raises InputError.

    dLLM's types a2d-llama, a2d-qwen2 and a2d-qwen3 are those of transformers, read in both directions.
    """
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text())
        model_type = content["model_type"].removeprefix("a2d-")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a model has one.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path} is not a JSON object with a model_type.") from None
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"{path}: model_type {model_type!r} is not one that this version of transformers knows.")
    try:
        if model_type != content["model_type"]:
            content = {key: value for key, value in content.items() if key not in ("model_type", "auto_map")}
            return AutoConfig.for_model(model_type, **content | {"is_causal": False})
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path} has a value that no {model_type} model has: {hub.reason(error)}") from error


def check_supported(config: PreTrainedConfig, folder: str | Path) -> None:
    """Refuses what cannot attend in both directions, or whose weights this package cannot read. Raises InputError."""
    layers = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    problem = None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = "is no decoder"
    elif getattr(config, "quantization_config", None):
        problem = "has quantized weights; use the unquantized checkpoint"
    elif layers:
        problem = f"has layers of the kind {', '.join(sorted(layers))}; only full attention can see both directions"
    elif getattr(config, "sliding_window", None):
        problem = f"has attention with a sliding window of {config.sliding_window} tokens, which cannot see both ends"
    elif config.model_type not in {"llada", *EXPERTS} and get_checkpoint_conversion_mapping(config.model_type):
        problem = "keeps its weights under other names than its model, as many mixtures of experts do"
    if problem:
        raise InputError(f"{folder}: this {config.model_type} model {problem}; it cannot be a base.")


def check_four_bit(config: PreTrainedConfig) -> None:
    """Whether load_model(four_bit=True) can hold a model of this config. Raises InputError."""
    # experts are no linear layers, and Conv1D holds its weight transposed, which merging would not know
    if config.model_type in EXPERTS or any(isinstance(module, Conv1D) for module in meta_model(config).modules()):
        raise InputError(
            f"BASE_4BIT=True: {config.model_type} models hold their weights in a form that it cannot read."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("BASE_4BIT=True needs the package bitsandbytes; pip install -r requirements-4bit.txt.")


def check_tensors(folder: str | Path, config: PreTrainedConfig) -> None:
    """Compares the names and shapes in a checkpoint's files with what the config needs, before anything is loaded.

    A head that is tied to the embedding is not in the files. Raises InputError.
    """
    found = {}
    for file in hub.weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                found |= {name: (tensors.get_slice(name), file.name) for name in tensors.offset_keys()}
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}); fetch the model again.") from error
    live = meta_model(config).named_parameters()
    parts = [part for name, tensor in live for part in file_tensors(config, name, tensor)]
    needed = {name: list(tensor.shape) for name, tensor in parts}
    for name, shape in needed.items():
        if name not in found:
            raise InputError(f"{folder}: tensor {name} is missing from its safetensors files.")
        tensor, file = found[name]
        if tensor.get_shape() != shape:
            raise InputError(f"{folder}/{file}: tensor {name} is {tensor.get_shape()}, its config says {shape}.")
        if tensor.get_dtype() not in TENSOR_BYTES:
            raise InputError(
                f"{folder}/{file}: tensor {name} is {tensor.get_dtype()}; quantized weights cannot be used."
            )
    for name, (_, file) in found.items():
        if name not in needed:
            raise InputError(f"{folder}/{file}: unexpected tensor {name}; a model of this config has none.")


def load_model(
    folder: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", four_bit: bool = False
) -> PreTrainedModel:
    """Loads a checkpoint that predicts masks, every tensor checked by name and shape. Raises InputError.

    four_bit: hold linear layers but the head as bitsandbytes' nf4, and compute with them in dtype.
    """
    config = load_config(folder)
    check_tensors(folder, config)
    if not sys.stderr.isatty():  # a bar that is redrawn would fill the file
        transformers.utils.logging.disable_progress_bar()
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, device_map={"": device}, output_loading_info=True, trust_remote_code=False,
        quantization_config=BitsAndBytesConfig(**how) if four_bit else None,
    )  # fmt: skip
    if info["missing_keys"] or info["unexpected_keys"]:  # transformers would continue, with random weights
        raise RuntimeError(f"this version of transformers did not rename the tensors of {folder}: {info}")
    check_both_directions(model, folder)
    return model


def check_both_directions(model: PreTrainedModel, folder: str | Path) -> None:
    """Whether the first position depends on the last token, and the last on the first. Raises InputError if not.

    Some decoders ignore `is_causal` without a word, and would train and decode without the later tokens. Where nothing
    flows from a token to a position, the gradient is exactly zero.
    """
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size  # (1, 8)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # (1, 8, D)
    with torch.enable_grad():
        scores = model(inputs_embeds=embedded, use_cache=False).logits[0].float().logsumexp(dim=-1).unbind()  # 8 of ()
    for position, token, what in ((0, 7, "later"), (7, 0, "earlier")):
        (gradient,) = torch.autograd.grad(scores[position], embedded, retain_graph=True)  # (1, 8, D)
        if not gradient[0, token].any():
            raise InputError(
                f"{folder}: {model.config.model_type} layers do not see {what} tokens here, though its config says "
                "is_causal false; it cannot be a base with this version of transformers."
            )
