"""All kinds of bases through the trainer: adapters or all weights trained, checkpoint, loading, decoding."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_a2d import KINDS, convert
from test_llada import TINY
from test_llada_moe import write as write_llada_moe
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3MoeConfig

from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.models import hub, llada

LLADA = TINY | {"vocab_size": 448, "embedding_size": 448, "max_sequence_length": 256, "initializer_range": 0.2}
LLADAS = {
    "LLaDA-1.5": {"eos_token_id": [1, 9]},  # LLaDA-8B's config, but for the list
    "iLLaDA": {"n_kv_heads": 1, "weight_tying": True, "mask_token_id": 5, "mlp_hidden_size": 224},
}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
LINEARS = {"gpt2": ["c_attn", "c_fc", "c_proj"], "qwen3_moe": ATTENTION, "LLaDA-MoE": ATTENTION}
LLAMAS = sorted([*ATTENTION, "gate_proj", "up_proj", "down_proj"])


def make_base(kind, folder, tokenizer):
    """A base of random weights in fp32, in several shards, that the trainers take. Returns its folder."""
    torch.manual_seed(0)
    if kind == "LLaDA-MoE":
        return write_llada_moe(folder / "base", tokenizer, eos_token_id=[1, 9])
    if kind in LLADAS:
        model = llada.LLaDAForCausalLM(llada.LLaDAConfig.from_dict(LLADA | LLADAS[kind]))
    else:
        model = AutoModelForCausalLM.from_config(KINDS[kind](448))
    for weight in model.parameters():
        if weight.dim() == 1:  # with norms of ones, a swap of two would not show
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    tokenizer.save_pretrained(folder / "base")
    if kind in LLADAS:
        return folder / "base"
    with pytest.MonkeyPatch.context() as patch:
        return convert(patch, folder / "base", folder / "converted")


@pytest.fixture(scope="module", params=[*KINDS, *LLADAS, "LLaDA-MoE"])
def kind(request, tmp_path_factory, tokenizer, pt_file):
    """A kind of base: its name, folder, config, and samples without its mask token."""
    folder = tmp_path_factory.mktemp("kind")
    base = make_base(request.param, folder, tokenizer)
    config, rows = models.load_config(base), torch.load(pt_file)
    for row in rows:
        ids = torch.as_tensor(row["full_ids"])
        row["full_ids"] = ids.masked_fill(ids == config.mask_token_id, 4)  # iLLaDA's is a token of other tokenizers
    torch.save(rows, folder / "train.pt")
    return SimpleNamespace(name=request.param, base=base, config=config, data=folder / "train.pt")


@pytest.fixture(scope="module", params=[4, 0], ids=["adapters", "all weights"])
def trained(request, kind, forked, tmp_path_factory):
    """That kind after two steps: also rank, checkpoint, output, and ids with the logits of the live model."""
    folder = tmp_path_factory.mktemp("run")
    done = forked(
        folder / "run", script="tests/models/keep_logits.py", MODEL_NAME=kind.base, DATA_PT=kind.data,
        MASK_ID=kind.config.mask_token_id, TARGET_MODS=models.linear_names(kind.config), LORA_RANK=request.param,
        TOTAL_TRAIN_STEPS=2, GRAD_ACC=1, SAVE_DTYPE="float32", CKPT_DIR="out/run", SAVE_EVERY=0, RESUME_EVERY=0,
    )  # fmt: skip
    assert not any(done.codes), done.output
    ids, live = torch.load(folder / "run/logits.pt")
    checkpoint = folder / "run/out/run_step0002"
    return SimpleNamespace(
        **vars(kind), rank=request.param, checkpoint=checkpoint, output=done.output, ids=ids, live=live
    )


def weights(folder):
    return {name: tensor for file in hub.weight_files(folder) for name, tensor in load_file(file).items()}


def test_layers_that_can_have_adapters(kind):
    assert models.linear_names(kind.config) == LINEARS.get(kind.name, LLAMAS)


@torch.no_grad()
def test_the_checkpoint_computes_what_the_live_model_computed(trained):
    """To the bit where all weights were trained; merged adapters are another sum. Far from what the base computes."""
    loaded, tolerance = models.load_model(trained.checkpoint)(trained.ids).logits, 1e-4 if trained.rank else 0
    torch.testing.assert_close(loaded, trained.live, rtol=tolerance, atol=tolerance)
    assert (loaded - models.load_model(trained.base)(trained.ids).logits).abs().max() > 0.02
    if trained.rank:
        adapter = str(trained.checkpoint / "adapter")
        adapted, _ = decode.load(str(trained.base), "float32", torch.device("cpu"), adapter)
        assert torch.equal(adapted(trained.ids).logits, trained.live)


def test_the_checkpoint_has_the_files_of_its_base(trained):
    """The same tensors in the same places; config.json, too, but for what it says of an untrained mask."""
    said = {models.MASK_TRAINED: None}
    for file in trained.base.iterdir():
        old, new = file.read_bytes(), (trained.checkpoint / file.name).read_bytes()
        if file.suffix == ".safetensors":
            start = 8 + int.from_bytes(old[:8], "little")
            assert len(new) == len(old) and json.loads(new[8:start]) == json.loads(old[8:start])
        elif file.name == "config.json":
            assert json.loads(new) | said == json.loads(old) | said
        else:
            assert new == old, file.name
    before, after = weights(trained.base), weights(trained.checkpoint)
    same = [name for name in before if torch.equal(before[name], after[name])]
    if trained.rank:
        assert any("embed" in name or "wte" in name for name in same) and len(same) < len(before)
    else:
        assert all(".experts." in name for name in same) and len(same) <= 3  # an expert that no token has come to


def test_whether_the_mask_was_trained(trained):
    """A converted decoder's was not, until all weights are trained."""
    converted = trained.name in KINDS
    assert models.mask_is_trained(trained.config) is not converted
    assert models.mask_is_trained(models.load_config(trained.checkpoint)) is not (converted and trained.rank > 0)
    said = "the embedding of its mask token was never trained" in trained.output
    assert said is (converted and trained.rank > 0)


def test_it_decodes(trained):
    """A batch gives what its prompts give alone, ids of the vocabulary, never the mask; all ends of a list end it."""
    model, tokenizer = decode.load(str(trained.checkpoint), "float32", torch.device("cpu"))
    prompts, settings = [[10, 11, 12, 13, 14], [15, 16]], Settings(gen_length=8, block_length=4, steps=4)
    both, _ = decode.decode(model, prompts, settings)
    assert ((both >= 0) & (both < 448) & (both != trained.config.mask_token_id)).all()
    for row, prompt in zip(both, prompts):
        assert torch.equal(row, decode.decode(model, [prompt], settings)[0][0])
    with pytest.raises(InputError, match=r"blockwise\.generate"):  # it would be sampled autoregressively
        model.generate(torch.tensor(prompts[:1]))
    ends = decode.end_ids(model, tokenizer)
    assert (9 in ends) is (trained.name in ("LLaDA-1.5", "LLaDA-MoE"))
    first = both[0, 0].item()
    stopped, _ = decode.decode(model, prompts[:1], Settings(8, 4, 4, stop_at_end=True), [first])
    assert stopped[0].tolist() == both[0, :4].tolist() + [1] * 4


@pytest.mark.parametrize("config", [GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8), Qwen3MoeConfig()])
def test_kinds_of_which_4_bits_are_refused(config):
    with pytest.raises(InputError, match=f"BASE_4BIT=True: {config.model_type} models hold their weights in a form"):
        models.check_four_bit(config)


@pytest.mark.parametrize("kind", ["gpt2", "LLaDA-MoE"], indirect=True)
def test_it_learns_from_its_own_answers(kind, fork, dataset_folder, tmp_path):
    """A model with learned positions, and one with experts: in the first update nothing has changed, so KL is 0."""
    knobs = {
        "MODEL_NAME": kind.base, "DATA": dataset_folder / "train.jsonl", "MASK_ID": kind.config.mask_token_id,
        "TARGET_MODS": models.linear_names(kind.config), "LORA_RANK": 4, "BF16": False, "MAX_LEN": 192, "LR": 1e-2,
        "REWARD": "vowels", "GROUP": 2, "PROMPTS": 2, "MICRO_BSIZE": 4, "ROUNDS": 1, "UPDATES": 2, "GEN_LENGTH": 8,
        "BLOCK_SIZE": 4, "STEPS": 2, "BETA": 0.1, "CKPT_DIR": "out/run",
    }  # fmt: skip
    done = fork(
        tmp_path / "run", 1, "tests/faults/train_vowels.py", *(f"--{name}={value}" for name, value in knobs.items())
    )
    assert done.codes == [0], done.output
    lines = (tmp_path / "run/out/run_logs/metrics.csv").read_text().splitlines()
    first, second = (dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:])
    assert float(first["varied_groups"]) > 0 and float(first["grad_norm"]) > 0
    assert float(first["kl"]) == 0 < float(second["kl"])
