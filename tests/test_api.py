"""blockwise.load and blockwise.generate; and model.generate(), which must not sample autoregressively."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import blockwise
from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.prompts import FILE, PromptFormat

SHORT = {"gen_length": 16, "block_length": 8, "steps": 16}
FORMAT = PromptFormat("Question: {query}", "Be brief.", {})


@pytest.fixture(scope="module")
def told(base, tmp_path_factory):
    """The base with a prompt format."""
    folder = tmp_path_factory.mktemp("told") / "model"
    shutil.copytree(base, folder)
    (folder / FILE).write_bytes(FORMAT.to_json())
    return folder


def literal(model, tokenizer, text):
    """The answer to a prompt that is written out, by decode."""
    ids, _ = decode.decode(model, [tokenizer(text)["input_ids"]], Settings(**SHORT), decode.end_ids(model, tokenizer))
    ids = ids[0].tolist()
    stop = next((i for i, token in enumerate(ids) if token in decode.end_ids(model, tokenizer)), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=True)


def turn(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("auto", [False, True], ids=["blockwise.load", "transformers"])
def test_answers_are_those_to_prompts_written_out(told, auto):
    if auto:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(told, dtype="float32").eval(), None
        tokenizer = AutoTokenizer.from_pretrained(told)
    else:
        model, tokenizer = blockwise.load(str(told), device="cpu")
    start = "<|startoftext|>" + turn("system", "Be brief.")
    wanted = [literal(model, tokenizer, start + turn("user", f"Question: {q}") + HEADER) for q in ("Ada?", "3 + 4 = ?")]
    assert wanted[0] != wanted[1]
    assert blockwise.generate(model, tokenizer, "Ada?", **SHORT) == wanted[0]
    assert blockwise.generate(model, tokenizer, ["Ada?", "3 + 4 = ?"], **SHORT) == wanted
    turns = turn("user", "Question: Ada?") + turn("assistant", "Yes.") + turn("user", "Question: Eva?")
    messages = [{"role": r, "content": t} for r, t in (("user", "Ada?"), ("assistant", "Yes."), ("user", "Eva?"))]
    assert blockwise.generate(model, tokenizer, messages, **SHORT) == literal(model, tokenizer, start + turns + HEADER)
    assert blockwise.generate(model, tokenizer, "Ada has", raw=True, **SHORT) == literal(model, tokenizer, "Ada has")
    warm = [blockwise.generate(model, tokenizer, "Ada?", seed=s, temperature=2.0, **SHORT) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_adapters_are_asked_as_they_were_trained(base, adapter, adapted, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / FILE).write_bytes(FORMAT.to_json())
    model, tokenizer = blockwise.load(str(base), adapter=str(tmp_path / "adapter"), device="cpu")
    prompt = "<|startoftext|>" + turn("system", "Be brief.") + turn("user", "Question: Ada?") + HEADER
    assert blockwise.generate(model, tokenizer, "Ada?", **SHORT) == literal(adapted, tokenizer, prompt)


def test_bad_arguments(told):
    model, tokenizer = blockwise.load(str(told), device="cpu")
    for prompt, settings, part in (
        ("a", {"gen_lenght": 8}, "gen_lenght"),
        ("a", {"gen_length": 0}, "at least 1"),
        (3, {}, "a text"),
        ([], {}, "a text"),
    ):
        with pytest.raises(InputError, match=part):
            blockwise.generate(model, tokenizer, prompt, **settings)
    with pytest.raises(InputError, match="no/such/folder"):
        blockwise.load("/no/such/folder")
    with pytest.raises(AttributeError, match="decode_all"):
        _ = blockwise.decode_all


def test_generate_of_a_model_that_predicts_masks_says_what_to_call(told):
    for model in (blockwise.load(str(told), device="cpu")[0], AutoModelForCausalLM.from_pretrained(told)):
        with pytest.raises(InputError, match=r"blockwise\.generate\(model, tokenizer"):
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)


def test_other_models_generate_as_ever():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[5, 6, 7]])
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids.tolist()


def test_importing_blockwise_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'blockwise.decoding.api'}"
    code = f"import sys, blockwise; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
