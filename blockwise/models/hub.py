"""Model folders, from the hub or local: their files, tokenizer and fingerprint. No code of a model is ever run."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blockwise.cli import InputError
from blockwise.run import files

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
EXAMPLE = "GSAI-ML/LLaDA-8B-Instruct"  # of a hub id
FINGERPRINT_BYTES = 2**16  # of each tensor


def local_folder(name: str | Path, patterns: list[str] | None = None) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's model of that name, downloaded if need be.

    patterns: download only files whose names match one of these. Raises InputError.
    """
    if Path(name).is_dir():
        return Path(name)
    if str(name).startswith(("/", ".", "~")) or str(name).count("/") > 1 or Path(name).exists():  # no name on the hub
        raise InputError(f"{name} is not a local folder; give that of a model, or a hub id such as {EXAMPLE}.")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise InputError(f"{name} is not a local folder, and the hub does not give it: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def renamed(config: dict, names: dict[str, str]) -> dict:
    """What a config.json holds, with other names for some keys. A key that is null keeps its name."""
    changed = dict(config)
    for theirs, ours in names.items():
        if changed.get(theirs) is not None:
            changed[ours] = changed.pop(theirs)
    return changed


def check_size(key: str, size: object, kind: str) -> None:
    """Refuses what is no positive integer as a size in the config.json of a kind of model. Raises InputError."""
    if type(size) is not int or size < 1:
        what = "missing" if size is None else repr(size)
        raise InputError(f"config.json: {key} is {what}; in a {kind} config it is a positive integer.")


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub model, of any model type; never runs or asks for remote code."""
    folder = local_folder(name, ["*.json", "*.jinja", "*.txt", "*.model"])
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, LookupError) as error:
        if not (folder / "config.json").exists():
            raise InputError(
                f"{name} is not the folder of a model: it has neither config.json nor a tokenizer."
            ) from error
        raise InputError(f"{name}: no tokenizer can be loaded from it: {reason(error)}") from error


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in the order of their names. Raises InputError."""
    folder = Path(folder)
    index = folder / INDEX
    names = {"model.safetensors"}
    if index.exists():
        if (folder / "model.safetensors").exists():
            raise InputError(
                f"{folder} has model.safetensors and also {index.name}; remove the one that is not wanted."
            )
        try:
            content = json.loads(index.read_text())
            names = set(content["weight_map"].values())
            known = content["metadata"] is not None and all(isinstance(name, str) for name in names)
        except (ValueError, TypeError, KeyError, AttributeError):
            known = False
        if not known:
            raise InputError(f"{index} is not a safetensors index; fetch the model again.")
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no weights: {name} is missing; fetch the model again.")
    return [folder / name for name in sorted(names)]


def adapter_files(folder: str | Path) -> list[Path]:
    """The two files of LoRA adapters in PEFT's format. Raises InputError if one is missing."""
    paths = [Path(folder) / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    for path in paths:
        if not path.is_file():
            raise InputError(f"--adapter {folder}: {path.name} is missing; give the folder adapter/ of a checkpoint.")
    return paths


def fingerprint(folder: Path) -> str:
    """A digest of a model's config, of all names, shapes and dtypes of its tensors, and of the start of each."""
    seen = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in weight_files(folder):
        with open(shard, "rb") as file:
            tensors = files.read_tensor_header(file)
            start = file.tell()
            seen.update(json.dumps(tensors).encode())
            for tensor in tensors.values():
                begin, end = tensor["data_offsets"]
                file.seek(start + begin)
                seen.update(file.read(min(end - begin, FINGERPRINT_BYTES)))
    return seen.hexdigest()
