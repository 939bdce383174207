"""Makes a base for diffusion from an autoregressive checkpoint: the same weights, attention in both directions, a mask.

    python a2d.py --model Qwen/Qwen3-0.6B --output models/a2d-Qwen3-0.6B

Nothing is trained. The folder that is written works wherever a script here takes a base, and loads with transformers'
own AutoModelForCausalLM (5.2 or newer; older versions would read it as autoregressive, without a word). Until it is
trained to fill in masks, what it writes is of little use: position i predicts token i, not the next one.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

from blockwise.cli import InputError, run_script
from blockwise.run import files

MASK = "<|mask|>"  # the mask token, where the tokenizer has none
ROWS = 64  # embeddings that must grow get a multiple of this number of rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of an autoregressive decoder, or a .gguf file")
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args()
    output = Path(args.output)
    if output.exists():
        raise InputError(f"--output {output} exists; name another folder, or remove it.")
    from blockwise.models import hub  # only now: a mistyped flag is reported without waiting for it

    if args.model.endswith(".gguf"):
        model, tokenizer = load_gguf(Path(args.model))
    else:
        folder = hub.local_folder(args.model)
        model, tokenizer = load(folder), hub.load_tokenizer(folder)
    how = add_mask(model, tokenizer)
    set_ids(model.config, tokenizer)
    unfinished = output.with_name(f"{output.name}.unfinished")
    with files.writing(f"--output {output}"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted conversion
        unfinished.mkdir(parents=True)
        save(model, tokenizer, unfinished)
        unfinished.rename(output)
    config = model.config
    print(f"{output}: {config.model_type}, {model.num_parameters():,} parameters, {model.dtype}")
    print(f"mask token {tokenizer.mask_token!r} = {config.mask_token_id}, {how}")
    print(f"next: pt.py --model {output}, then a trainer with --MODEL_NAME={output} --MASK_ID={config.mask_token_id}")


def load(folder: Path):
    """The model of a folder with attention in both directions and no dropout. Raises InputError."""
    from blockwise.models import base as models

    return load_as(models.read_config(folder), folder, "auto")


def load_gguf(file: Path):
    """The same of a GGUF file, its weights dequantized, in bfloat16; and its tokenizer. Raises InputError."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file}: reading it needs the package gguf; pip install gguf.")
    if not file.is_file():
        raise InputError(f"--model {file} does not exist.")
    how = {"gguf_file": file.name}
    try:
        config, tokenizer = (auto.from_pretrained(file.parent, **how) for auto in (AutoConfig, AutoTokenizer))
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    how["quantization_config"] = GgufConfig(dequantize=True)
    return load_as(config, file.parent, torch.bfloat16, **how), tokenizer


def load_as(config, folder: Path, dtype, **how):
    """The model of a folder, or of a file in it, after the config has been changed. Raises InputError."""
    import transformers
    from safetensors import SafetensorError

    from blockwise.models import base as models
    from blockwise.models import hub

    models.check_supported(config, folder)
    if not sys.stderr.isatty():  # a bar that is redrawn would fill the file
        transformers.utils.logging.disable_progress_bar()
    config.is_causal, config.use_cache = False, False
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    how |= {"config": config, "dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {hub.reason(error)}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise InputError(f"{folder}: tensor {wrong[0]} is missing, or one that no {config.model_type} model has.")
    models.check_both_directions(model.eval(), folder)
    return model


def add_mask(model, tokenizer) -> str:
    """Chooses the mask token, or adds one, and writes it into tokenizer and config. Returns how, in words."""
    import transformers

    from blockwise.models.base import MASK_TRAINED

    config, known = model.config, getattr(model.config, "mask_token_id", None)
    reserved = sorted(
        (number, token) for token, number in tokenizer.get_added_vocab().items() if "reserved" in token.lower()
    )
    if known is not None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(known)
        how = "that of its config"
    elif tokenizer.mask_token is not None:
        how = "that of its tokenizer"
    elif len(tokenizer) < config.vocab_size:
        tokenizer.add_special_tokens({"mask_token": MASK})
        how = "in a row of the embedding that no token had"
    elif reserved:
        tokenizer.mask_token = reserved[0][1]
        how = "a token that was reserved"
    else:
        tokenizer.add_special_tokens({"mask_token": MASK})
        rows = -(-len(tokenizer) // ROWS) * ROWS
        how = f"in a new row: the embedding grew from {config.vocab_size:,} to {rows:,} rows"
        transformers.set_seed(0)  # of the new rows, which are random: the same at each conversion
        model.resize_token_embeddings(rows, mean_resizing=False)
    config.mask_token_id = tokenizer.mask_token_id
    if known is None:
        setattr(config, MASK_TRAINED, False)
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise InputError(
            f"mask token {config.mask_token_id} is outside the vocabulary of {config.vocab_size:,} tokens."
        )
    return how


def set_ids(config, tokenizer) -> None:
    """Writes one end-of-text token and one padding token into the config, as numbers. Raises InputError."""
    end = tokenizer.eos_token_id
    if end is None:
        listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        end = listed[0]
    if end is None:
        raise InputError("neither the tokenizer nor config.json names a token that ends a text (eos_token_id).")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    config.eos_token_id, config.pad_token_id = int(end), int(padding)


def save(model, tokenizer, folder: Path) -> None:
    """Writes model and tokenizer, and reads back whether the scripts here take them as a base. Raises InputError."""
    from blockwise.models import base as models

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models.check_tensors(folder, models.load_config(folder))


if __name__ == "__main__":
    run_script(main)
