"""The steps of others in benchmarks/bench_peers.py: their losses against formulas, and against the trainers here."""

import argparse
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import masking
from benchmarks import bench_peers, common
from blockwise.models import base as models

ARGS = SimpleNamespace(max_len=64, batch=4)
MASK = 4


@pytest.fixture(scope="module")
def model(base):
    return models.load_model(base, torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data():
    """Four samples, the longest of exactly 64 tokens."""
    some = bench_peers.make_data(4, 64, 400)
    some[2]["full_ids"] = torch.cat([some[2]["full_ids"], torch.arange(8, 72)])[:64]
    return some


def nlls(model, inputs, targets):
    """-log p of each target, written out. (B, L)"""
    logits = model(input_ids=inputs).logits
    return -(logits.gather(2, targets[..., None])[..., 0] - logits.exp().sum(dim=-1).log())


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_masks_and_averages_as_it_says(model, data, seed):
    """The masks are those of a block; the mean is over all samples, that here over those with a masked token."""
    random.seed(seed)
    torch.manual_seed(seed)
    dataset = bench_peers.ReferenceData(data, 64, 32)
    rows = [dataset[i] for i in range(4)]
    rows[seed]["asked"][:] = False  # as if nothing had been masked in it
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ids, masked, asked = batch["input_ids"], batch["noisy_ids"] == MASK, batch["asked"]
    for i, sample in enumerate(data):
        start, end = sample["prompt_len"], len(sample["full_ids"])
        every = set(range(math.ceil((end - start) / 32)))
        (block,) = every - dataset.unused[i]
        _, active, suffix = masking.regions(torch.tensor([start]), torch.tensor([end]), torch.tensor([block]), 64, 32)
        assert ids[i].tolist() == sample["full_ids"].tolist() + [1] * (64 - end)
        assert (masked[i] & ~active[0]).equal(suffix[0]) and (i == seed or asked[i].equal(masked[i] & active[0]))
    found = bench_peers.reference_loss(model, batch)
    nll = nlls(model, batch["noisy_ids"], ids)
    means = [nll[i][asked[i]].mean().item() if asked[i].any() else 0.0 for i in range(4)]
    assert found.item() == pytest.approx(sum(means) / 4, rel=1e-5) and found > 0.1
    weights = masking.sample_mean_weights(asked)
    ours = bench_peers.our_loss(model, masking.Noised(batch["noisy_ids"], asked, ids, weights)).item()
    assert found.item() == pytest.approx(ours * sum(bool(row.any()) for row in asked) / 4, rel=1e-5)


def test_a_sample_of_the_reference_without_a_block_left_comes_unmasked(data):
    dataset = bench_peers.ReferenceData(data, 64, 8)
    for left in range(len(dataset.unused[2]) - 1, -1, -1):
        dataset[2]
        assert len(dataset.unused[2]) == left
    assert dataset[2]["noisy_ids"].equal(dataset[2]["input_ids"]) and not dataset[2]["asked"].any()


@pytest.mark.parametrize("seed", range(4))
def test_dllm_has_the_loss_of_the_trainer_here(model, data, seed):
    """The same draws mask the same tokens there; and the sum of nll / (t + 1e-6), written out."""
    (batch,) = bench_peers.dllm_loader(data, ARGS)
    order = [
        next(i for i, sample in enumerate(data) if sample["full_ids"][:9].equal(row[:9])) for row in batch["input_ids"]
    ]
    torch.manual_seed(seed)
    found = bench_peers.dllm_loss(model, batch).item()
    ids, starts = batch["input_ids"], torch.tensor([data[i]["prompt_len"] for i in order])
    script, changes = bench_peers.OURS["dLLM"]
    knobs = {name: value for name, value in vars(script).items() if name.isupper()} | changes
    every = torch.full_like(starts, 64)
    noised = script.noise(
        masking.Batch(ids, starts, every, torch.zeros_like(starts)), torch.Generator().manual_seed(seed),
        SimpleNamespace(**knobs | {"MAX_LEN": 64, "MASK_ID": MASK}),
    )  # fmt: skip
    ours = bench_peers.our_loss(model, noised).item()
    t = 1e-3 + (1 - 1e-3) * torch.rand(4, 1, generator=torch.Generator().manual_seed(seed))
    nll = nlls(model, noised.input_ids, ids)
    wanted = sum((nll[i][noised.supervised[i]] / (t[i] + 1e-6)).sum() for i in range(4)) / int((64 - starts).sum())
    assert found == pytest.approx(wanted.item(), rel=1e-5) and found > 0.1
    torch.manual_seed(seed)
    assert bench_peers.dllm_loss(model, batch, by_rows=True).item() == pytest.approx(found, rel=1e-5)
    assert found == pytest.approx(ours, rel=1e-3)  # 1e-6 next to t, which is 1e-3 at least


def test_the_trainers_here_have_the_same_samples(base, data):
    """One batch of all four: a block of 32 tokens of each, or tokens anywhere up to the end of the longest sample."""
    config = models.load_config(base)
    for name, least, most in (("reference", 0, 32), ("dLLM", 1, 64)):
        (noised,) = bench_peers.our_batches(data, config, ARGS, name)
        order = [next(i for i, s in enumerate(data) if s["full_ids"][:9].equal(row[:9])) for row in noised.targets]
        assert sorted(order) == [0, 1, 2, 3] and noised.targets.shape == (4, 64)
        for row, i in zip(noised.supervised, order):
            places = row.nonzero()[:, 0].tolist() or [data[i]["prompt_len"]]
            assert data[i]["prompt_len"] <= places[0] and places[-1] - places[0] < most and row.sum() >= least


def test_main(monkeypatch, capsys):
    """Every step once, in this process."""
    flags = ["--vocab_size", "300", "--n_layers", "1", "--max_len", "32", "--batch", "2", "--steps", "1"]
    monkeypatch.setattr(bench_peers, "WIDTHS", (64,))

    def own_process(module, args, **changes):
        seconds, losses = bench_peers.measure(argparse.Namespace(**vars(args) | changes))
        return {"seconds": seconds, "losses": losses, "mb": 1.0}

    monkeypatch.setattr(common, "own_process", own_process)
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *flags, "--repeats", "2"])
    bench_peers.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["widths"]
    assert [row["name"] for row in found] == list(bench_peers.NAMES)
    for row in found:
        assert all(len(run["seconds"]) == 1 and len(run["losses"]) == 2 for run in row["runs"])
        assert all(0 <= loss < 1000 for run in row["runs"] for loss in run["losses"])
