"""Any decoder as a base: what a2d.py writes, and what it refuses, on tiny models of several types.

tests/models/test_kinds.py trains them.
"""

import json
import sys

import pytest
import torch
from conftest import run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from blockwise.cli import InputError
from blockwise.models import base as models
from blockwise.models import hub

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1, "bos_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0], "head_dim": 8,
    "norm_topk_prob": True,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 1, "bos_token_id": 0}
KINDS = {
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, **SIZES | {"eos_token_id": [1, 7]}),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, **SIZES),
    "qwen3, tied head": lambda vocab: Qwen3Config(vocab_size=vocab, head_dim=8, tie_word_embeddings=True, **SIZES),
    "mistral": lambda vocab: MistralConfig(vocab_size=vocab, sliding_window=None, **SIZES),
    "qwen3_moe": lambda vocab: Qwen3MoeConfig(vocab_size=vocab, **EXPERTS, **SIZES),
    "gpt2": lambda vocab: GPT2Config(vocab_size=vocab, initializer_range=0.2, **GPT2),
}


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory, tokenizer):
    """autoregressive(kind, vocab, **changes of the config) -> the folder of such a checkpoint, with random weights."""

    def make(kind, vocab=448, **changes):
        folder = tmp_path_factory.mktemp("autoregressive")
        torch.manual_seed(0)
        config = KINDS[kind](vocab) if isinstance(kind, str) else kind
        for name, value in changes.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
        tokenizer.save_pretrained(folder)
        return folder

    return make


def convert(monkeypatch, folder, output):
    import a2d

    monkeypatch.setattr("sys.argv", ["a2d.py", "--model", str(folder), "--output", str(output)])
    a2d.main()
    return output


def weights(folder):
    return {name: tensor for file in hub.weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_decoder_has_the_same_weights_and_sees_both_directions(autoregressive, tmp_path, monkeypatch, kind):
    before = autoregressive(kind)
    after = convert(monkeypatch, before, tmp_path / "base")
    config = json.loads((after / "config.json").read_text())
    wanted = {"is_causal": False, "mask_token_id": 400, "eos_token_id": 1, "pad_token_id": 1}
    assert {name: config[name] for name in wanted} == wanted
    assert not any(value for name, value in config.items() if "dropout" in name or name.endswith("_pdrop"))
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert hub.load_tokenizer(after).mask_token_id == 400
    ids = torch.randint(8, 400, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = 5
    with torch.no_grad():
        causal = AutoModelForCausalLM.from_pretrained(before).eval()
        assert torch.equal(causal(ids).logits[0, 0], causal(changed).logits[0, 0])
        stock, ours = AutoModelForCausalLM.from_pretrained(after).eval(), models.load_model(after)
        assert torch.equal(stock(ids).logits, ours(ids).logits)
        assert (ours(ids).logits[0, 0] - ours(changed).logits[0, 0]).abs().max() > 1e-3


def test_full_fine_tuning_of_a_tied_head_writes_it_once(autoregressive, forked, tmp_path, monkeypatch):
    folder = convert(monkeypatch, autoregressive("qwen3, tied head"), tmp_path / "base")
    done = forked(
        tmp_path / "run",
        ranks=2,
        MODEL_NAME=folder,
        MASK_ID=400,
        LORA_RANK=0,
        LORA_DROPOUT=0.0,
        LR=1e-2,
        CKPT_DIR="out/run",
    )
    assert not any(done.codes), done.output
    assert "was never trained" not in done.output
    assert not models.mask_is_trained(models.load_config(folder))
    assert models.mask_is_trained(models.load_config(tmp_path / "run/out/run_step0004"))
    before, after = weights(folder), weights(tmp_path / "run/out/run_step0004")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert not [name for name in before if torch.equal(before[name].float(), after[name].float())]
    model = models.load_model(tmp_path / "run/out/run_step0004", torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind, rows", [("llama", 448), ("qwen3, tied head", 448), ("gpt2", 448)])
def test_without_a_free_row_the_embedding_grows(autoregressive, tmp_path, monkeypatch, capsys, kind, rows):
    before = autoregressive(kind, vocab=400)
    after = convert(monkeypatch, before, tmp_path / "base")
    assert "grew from 400 to 448 rows" in capsys.readouterr().out
    old, new = weights(before), weights(after)
    for name in old:
        assert torch.equal(new[name][:400] if old[name].shape[0] == 400 else new[name], old[name])
    model = models.load_model(after)
    assert model.config.vocab_size == rows == model.get_input_embeddings().weight.shape[0]
    assert model.config.mask_token_id == 400
    torch.manual_seed(1)  # whatever the state of the generator is
    again = weights(convert(monkeypatch, before, tmp_path / "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(tmp_path / "base").items())


def test_the_order_in_which_a_mask_is_chosen(autoregressive, tokenizer, tmp_path, monkeypatch, capsys):
    """The config's, the tokenizer's, a free row, a reserved token, a new row (the last: see above)."""
    folder = autoregressive("llama", vocab=448, mask_token_id=9)
    assert models.load_config(convert(monkeypatch, folder, tmp_path / "1")).mask_token_id == 9
    folder = autoregressive("llama", vocab=448)
    own = hub.load_tokenizer(folder)
    own.mask_token = "[gMASK]"
    own.save_pretrained(folder)
    assert models.load_config(convert(monkeypatch, folder, tmp_path / "2")).mask_token_id == 3
    folder = autoregressive("llama", vocab=402)
    own = hub.load_tokenizer(folder)
    own.add_special_tokens(
        {"additional_special_tokens": ["<|reserved_special_token_1|>", "<|reserved_special_token_0|>"]}
    )
    own.save_pretrained(folder)
    assert models.load_config(convert(monkeypatch, folder, tmp_path / "3")).mask_token_id == 400
    assert "a token that was reserved" in capsys.readouterr().out


def test_checkpoints_of_dllm_are_converted_by_their_config(autoregressive, tmp_path, monkeypatch):
    folder = autoregressive("qwen3, tied head")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "a2d-qwen3", "auto_map": {"AutoModelForMaskedLM": "modeling.A2DQwen3LMHeadModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert models.load_config(folder).model_type == "qwen3"  # as a base at once, if it has ids of mask and padding
    after = convert(monkeypatch, folder, tmp_path / "base")
    config = json.loads((after / "config.json").read_text())
    assert config["model_type"] == "qwen3" and "auto_map" not in config and config["is_causal"] is False


def test_what_cannot_become_a_base_is_one_sentence(autoregressive, base, tmp_path, monkeypatch):
    sizes = {"vocab_size": 448} | SIZES
    kinds = {
        "layers do not see later tokens": autoregressive(StableLmConfig(**sizes | {"num_key_value_heads": 4})),
        "under other names than its model": autoregressive(MixtralConfig(num_local_experts=2, **sizes)),
        "sliding window of 8 tokens": autoregressive("mistral", sliding_window=8),
    }
    layers = autoregressive("qwen2")
    content = json.loads((layers / "config.json").read_text())
    (layers / "config.json").write_text(json.dumps(content | {"layer_types": ["full_attention", "linear_attention"]}))
    kinds["layers of the kind linear_attention"] = layers
    quantized = autoregressive("qwen2")
    (quantized / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "fp8"}}))
    kinds["quantized weights"] = quantized
    partial = autoregressive("gpt2")
    next(iter(partial.glob("*.safetensors"))).unlink()
    kinds["cannot be loaded"] = partial
    for said, folder in kinds.items():
        with pytest.raises(InputError, match=said):
            convert(monkeypatch, folder, tmp_path / "base")
        assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="exists; name another folder"):
        convert(monkeypatch, base, tmp_path)
    with pytest.raises(InputError, match="autoregressive llama checkpoint.*convert it with a2d.py"):
        models.load_config(autoregressive("llama"))


def test_a_gguf_file_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="model.gguf: reading it needs the package gguf; pip install gguf"):
        convert(monkeypatch, tmp_path / "model.gguf", tmp_path / "base")


def test_the_command(autoregressive, tmp_path):
    folder = autoregressive("qwen2")
    done = run("a2d.py", "--model", folder, "--output", tmp_path / "base")
    assert done.returncode == 0, done.stderr
    assert "mask token '<|mask|>' = 400, in a row of the embedding that no token had" in done.stdout
    assert "--MASK_ID=400" in done.stdout
    done = run("a2d.py", "--model", tmp_path / "nothing", "--output", tmp_path / "other")
    assert done.returncode == 1 and "is not a local folder" in done.stderr and "Traceback" not in done.stderr
