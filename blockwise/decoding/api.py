"""Block-by-block decoding from Python: blockwise.load and blockwise.generate."""

import torch

from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import hub
from blockwise.prompts import PLAIN, PromptFormat, format_of, prompt_ids


def load(name: str, adapter: str | None = None, dtype: str = "auto", device: str | torch.device | None = None):
    """A checkpoint for generate: the model, in evaluation mode, and its tokenizer. Raises InputError.

    name: folder or hub id; adapter: that of LoRA adapters, which run without merging; dtype: `float32`, `bfloat16`, or
    `auto`, the checkpoint's own on a GPU and float32 on a CPU; device: None is a GPU, if there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    adapter = adapter and str(hub.local_folder(adapter))
    model, tokenizer = decode.load(name, dtype, device, adapter)
    model.prompt_format = format_of(name, adapter, None, PLAIN)
    return model, tokenizer


def generate(model, tokenizer, prompt: str | list, *, raw: bool = False, seed: int = 0, **settings) -> str | list[str]:
    """Answers a question, a list of questions, or a conversation that ends with the user's message, block by block.

    model, tokenizer: of load, or of transformers' Auto classes. prompt: a text, a list of texts, or a list of messages
    {"role", "content"}; questions are put as in the training of the checkpoint. raw: without a chat template, the text
    is continued. seed: of temperature and random remasking; settings: see settings.Settings. The prompts of a list are
    answered in one batch. Returns a text for each. Raises InputError.
    """
    several = isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
    if not prompt or not (several or isinstance(prompt, (str, list))):
        raise InputError(f"generate needs a text, a list of texts or a list of messages, not {prompt!r:.100}.")
    found, prompts = format_of_loaded(model), prompt if several else [prompt]
    if raw:
        ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in prompts]
    else:
        chats = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
        ids = [prompt_ids(tokenizer, chat, found) for chat in chats]
    trained = decode.block_diffusion_size(model.config)
    if trained:
        settings = {"block_length": trained} | settings
    try:
        chosen = Settings(**settings)
    except TypeError as error:
        raise InputError(f"generate: {error}; the settings are those of docs/decoding.md.") from error
    ends, generator = decode.end_ids(model, tokenizer), torch.Generator(model.device).manual_seed(seed)
    answers, _ = decode.decode(model, ids, chosen, ends, generator)
    texts = [decode.completion(tokenizer, answer, ends) for answer in answers.tolist()]
    return texts if several else texts[0]


def format_of_loaded(model) -> PromptFormat:
    """How to ask a model: load has noted it; a model of transformers' Auto classes knows the folder that it is from."""
    if hasattr(model, "prompt_format"):
        return model.prompt_format
    return format_of(model.name_or_path, None, None, PLAIN) if model.name_or_path else PLAIN
