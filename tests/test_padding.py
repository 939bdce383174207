"""PAD_TO and GROUP_BY_LENGTH: what they leave as it is, and which samples come together."""

import csv
import importlib
import json
import random
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINING, problems
from faults.outcome import check_finished
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

import masking
from benchmarks import bench_padding
from blockwise import trainer
from blockwise.cli import InputError
from blockwise.data import derive_seed, make_samples, read_pt, schedule
from blockwise.models import base as models
from blockwise.run.ranks import Ranks

PAD, MASK, MAX_LEN = 1, 4, 128
SHORTER = {"PAD_TO": "longest", "GROUP_BY_LENGTH": True}


def samples_of(lengths, block_diffusion=None, **knobs):
    """Samples with these (prompt_len, length), of random ids."""
    rng, config = random.Random(0), SimpleNamespace(pad_token_id=PAD, vocab_size=400)
    config.block_diffusion_size, config.block_diffusion_from = block_diffusion or (None, None)
    data = [
        {"prompt_len": start, "full_ids": torch.tensor([rng.randrange(8, 400) for _ in range(length)])}
        for start, length in lengths
    ]
    knobs = {"DATA_PT": "", "MAX_LEN": MAX_LEN, "MAX_SAMPLES": 0, "MASK_ID": MASK, "EOS_TAIL": False} | knobs
    return make_samples(data, SimpleNamespace(**knobs), config)


def noised_both(name, lengths, **changes):
    """The same samples and draws with PAD_TO longest and max_len, as a script masks them."""
    script = importlib.import_module(name)
    knobs = {key: value for key, value in vars(script).items() if key.isupper()}
    knobs = SimpleNamespace(**knobs | {"MAX_LEN": MAX_LEN, "MASK_ID": MASK, "BLOCK_SIZE": 24} | changes)
    blocks, found = (24, knobs.BLOCKS_FROM) if name == "train_bd3lm" else None, []
    for pad_to in ("longest", "max_len"):
        samples = samples_of(lengths, blocks, PAD_TO=pad_to, EOS_TAIL=knobs.EOS_TAIL)
        some = torch.arange(len(lengths))
        batch = samples.batch(some, some % 2)
        found.append(script.noise(batch, torch.Generator().manual_seed(0), knobs))
    return found


def loss_of(model, noised):
    part = noised.rows(slice(0, None))
    logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
    return masking.weighted_nll(logits, part).item()


@pytest.mark.parametrize("script, more, longest, width", [
    ("train_blockwise", {}, 61, 64),
    ("train_blockwise", {"BOUND_WEIGHTS": True}, 65, 96),
    ("train_fullseq", {"RANDOM_LENGTH": 0.6, "LOSS_MEAN": "token"}, 64, 64),
    ("train_fullseq", {"BOUND_WEIGHTS": True}, 96, 96),
    ("experiments.train_causal", {}, 33, 64),
    ("train_bd3lm", {}, 61, 96),  # 12 + 3 * 24 = 84, where the last block of the longest sample ends
    ("train_bd3lm", {"BLOCKS_FROM": "sample", "MASK_RATIO": "sample"}, 61, 96),  # 72
])  # fmt: skip
def test_only_padding_is_left_out(base, script, more, longest, width):
    """The samples, masks and weights of max_len, and its loss if the model cannot see what is left out.

    Block diffusion does not see it anyway; the others do, so that their losses differ.
    """
    short, long = noised_both(script, [(12, longest), (5, 31), (2, 20), (9, 30)], **more)
    streams = 2 if script == "train_bd3lm" else 1
    assert short.input_ids.shape == (4, streams * width) and long.input_ids.shape == (4, streams * MAX_LEN)
    for name in ("input_ids", "supervised", "targets", "weights"):
        some, every = ([*getattr(noised, name).chunk(streams, dim=1)] for noised in (short, long))
        for a, b in zip(some, every):
            assert a.equal(b[:, :width])
            assert (b[:, width:] == (PAD if name in ("input_ids", "targets") else 0)).all()
    model = models.load_model(base, torch.float32).eval().requires_grad_(False)
    found, visible = loss_of(model, short), loss_of(model, long)
    if streams == 1:
        seen = (torch.arange(MAX_LEN) < width).expand(4, -1)
        long.model_args["attention_mask"] = long.model_args.get("attention_mask", True) & seen
        assert abs(found - visible) > 1e-4
    assert found == pytest.approx(loss_of(model, long), rel=1e-5) and found > 0.1


@pytest.mark.parametrize("script, longest", [("train_fullseq", 61), ("train_bd3lm", 61), ("train_bd3lm", 64)])
def test_an_eos_tail_ends_where_the_batch_does(script, longest):
    """As LLaDA's own SFT has it: what is behind a sample, up to the longest one, is trained."""
    more = {"MASK_LOW": 0.999} if script == "train_bd3lm" else {"MASK_PROB_EPS": 0.999}
    short, _ = noised_both(script, [(12, longest), (5, 31)], EOS_TAIL=True, BOUND_WEIGHTS=True, **more)
    width = 64 if script == "train_fullseq" else 96
    supervised, weights = short.supervised[:, :width], short.weights[:, :width]
    assert [row.nonzero()[:, 0].tolist() for row in supervised] == [[*range(12, width)], [*range(5, width)]]
    assert weights.sum() == pytest.approx(1.0, abs=2e-3)  # the mean over samples of the mean over these tokens


def test_texts_are_padded_to_their_own_length():
    ids = torch.randint(8, 400, (5, 40)).int()
    knobs = {"DATA_PT": "", "MAX_LEN": 128, "MAX_SAMPLES": 0, "MASK_ID": MASK, "EOS_TAIL": False, "PAD_TO": "longest"}
    config = SimpleNamespace(pad_token_id=PAD, vocab_size=400, block_diffusion_size=None)
    batch = make_samples(ids, SimpleNamespace(**knobs), config).batch(torch.tensor([3, 1]), torch.zeros(2))
    assert batch.input_ids[:, :40].equal(ids[[3, 1]].long()) and batch.input_ids[:, 40:].eq(PAD).all()
    assert batch.input_ids.shape == (2, 64) and batch.length.tolist() == [40, 40]


# ---------------------------------------------------------------- which samples come together


@st.composite
def plans(draw):
    """Lengths, numbers of blocks, epochs, global batch, seed."""
    number = draw(st.integers(1, 120))
    lengths = draw(st.lists(st.integers(1, 60), min_size=number, max_size=number))
    blocks = draw(st.lists(st.integers(1, 4), min_size=number, max_size=number))
    epochs, size, seed = (draw(st.integers(low, high)) for low, high in ((1, 5), (1, 13), (0, 9)))
    return torch.tensor(lengths), torch.tensor(blocks), epochs, size, seed


@given(plans())
def test_an_epoch_trains_the_same_pairs_in_shorter_batches(plan):
    lengths, blocks, epochs, size, seed = plan
    plain, grouped = schedule(blocks, epochs, seed), schedule(blocks, epochs, seed, lengths, size)
    assert grouped.equal(schedule(blocks, epochs, seed, lengths, size))
    sizes = [int((blocks > epoch).sum()) for epoch in range(min(epochs, int(blocks.max())))]
    for some, others in zip(grouped.split(sizes), plain.split(sizes)):
        assert sorted(some.tolist()) == sorted(others.tolist())
    padded = [sum(lengths[part[:, 0]].max() * size for part in pairs.split(size)) for pairs in (grouped, plain)]
    assert padded[0] <= padded[1]
    if whole := len(lengths) // size * size:  # what needs most memory comes first
        assert lengths[grouped[:size, 0]].max() == lengths[grouped[:whole, 0]].max()


@pytest.mark.parametrize("number, size", [(24, 24), (96, 8), (4096, 8), (6400, 64)])
def test_batches_are_those_of_transformers(number, size):
    """But for the longest sample, which that puts into the first batch in exchange for another."""
    lengths = torch.randint(20, 400, (number,), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(derive_seed(42, "rows", 0))
    theirs = torch.tensor(get_length_grouped_indices(lengths.tolist(), size, generator=generator))
    grouped = schedule(torch.ones_like(lengths), 1, 42, lengths, size)[:, 0]
    ours, theirs = ([frozenset(part) for part in order.view(-1, size).tolist()] for order in (grouped, theirs))
    assert len(set(ours) & set(theirs)) >= number // size - 2 and number // size - len(set(ours) - set(theirs)) > 0


def test_length_says_nothing_of_when_a_batch_comes():
    lengths = torch.randint(20, 400, (6400,), generator=torch.Generator().manual_seed(1))
    order = schedule(torch.ones_like(lengths), 1, 42, lengths, 64)[:, 0]
    means = lengths[order].view(-1, 64).double().mean(dim=1)
    spread = lengths[order].view(-1, 64).double().std(dim=1).mean()
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(100)]))[0, 1]) < 0.3
    assert spread < 0.2 * lengths.double().std() < means.std()


# ---------------------------------------------------------------- trainings


def rows_of(folder):
    with open(folder / "out/run ö_logs/metrics.csv", newline="") as lines:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(lines)]


def test_a_training_is_the_same_on_two_ranks_and_resumed(uninterrupted, forked, pt_file, tmp_path):
    """Losses and checkpoints to the byte after a stop; up to rounding on two ranks. With validation."""
    knobs = SHORTER | {"VAL_PT": pt_file, "EPOCHS": 2, "LORA_DROPOUT": 0.0}
    whole = uninterrupted(ranks=1, **knobs)
    said = whole.with_name(f"{whole.name}.output").read_text()
    lengths = torch.tensor([len(sample["full_ids"]) for sample in read_pt(pt_file)])
    answers = lengths - torch.tensor([sample["prompt_len"] for sample in read_pt(pt_file)])
    plan = schedule(masking.num_blocks(answers, TRAINING["BLOCK_SIZE"]), 2, 42, lengths, 4)
    widths = [min(192, 32 * -(-int(lengths[part[:, 0]].max()) // 32)) for part in plan.split(4)][:4]
    mean = f"{sum(widths):,} on average = 4 samples x {min(widths)} to {max(widths)} of 192 MAX_LEN (PAD_TO longest)"
    assert f"tokens/step  {mean}\n" in said and min(widths) < max(widths)

    stopped = forked(tmp_path / "run", **knobs, faults={"at": ["step 2$", signal.SIGTERM]})
    assert stopped.codes == [75], stopped.output
    resumed = forked(tmp_path / "run", RESUME=True, **knobs)
    assert resumed.codes == [0], resumed.output
    check_finished(tmp_path / "run/out", whole / "out")

    two = forked(tmp_path / "two", 2, GRAD_ACC=1, **knobs)
    assert two.codes == [0, 0], two.output
    for one, other in zip(rows_of(whole), rows_of(tmp_path / "two"), strict=True):
        assert one["supervised_tokens"] == other["supervised_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("changes, blocks, said", [
    ({"GROUP_BY_LENGTH": True}, False, "GROUP_BY_LENGTH=True saves nothing"),
    ({"PAD_TO": "longest", "EOS_TAIL": True}, True, "EOS_TAIL=True gives answers blocks up to MAX_LEN"),
])  # fmt: skip
def test_values_without_a_meaning_are_refused(changes, blocks, said):
    knobs = SimpleNamespace(**{"EOS_TAIL": False, "MICRO_BSIZE": 1, "GRAD_ACC": 1, "EPOCHS": 1, "SEED": 0} | changes)
    samples, ranks = samples_of([(1, 5), (1, 9)], **changes), Ranks(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(InputError, match=said):
        trainer.make_plan(knobs, ranks, samples, (lambda length: length) if blocks else None)
    for name in ("PAD_TO", "GROUP_BY_LENGTH"):  # nothing is padding there
        assert not hasattr(importlib.import_module("train_r2ft"), name)


def test_the_benchmark(monkeypatch, capsys, tmp_path):
    """On a few problems: what is printed and measured of each setting."""
    lines = [json.dumps({"question": row["query"], "answer": row["response"]}) for row in problems(80, 3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    flags = {"data": tmp_path / "data.jsonl", "heldout": tmp_path / "data.jsonl", "max_len": 192, "d_model": 32}
    flags |= {"n_layers": 1, "batch": 4, "steps": 3, "repeats": 1}
    monkeypatch.setattr(sys, "argv", ["bench_padding.py", *(f"--{name}={value}" for name, value in flags.items())])
    bench_padding.main()
    out = capsys.readouterr().out.splitlines()
    (found,) = json.loads(out[-1])["seeds"]
    assert list(found) == list(bench_padding.SETTINGS) and out[0].startswith("80 samples, lengths in tokens: ")
    shares = [int(line.split("%")[0].split()[-1]) for line in out if line.startswith("global batch   8")]
    assert 0 < shares[1] <= shares[0] < 100
    for row in found.values():
        assert row["seconds"] > 0 and all(0 < row[key] < 20 for key in ("loss", "max_len", "longest"))
    assert found["default"]["tokens"] == 4 * 192 > found["PAD_TO longest"]["tokens"]
