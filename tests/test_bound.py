"""experiments/bound.py against the bound by enumeration of all masks, and against a literal autoregressive loss."""

import itertools

import numpy as np
import pytest
import torch
from conftest import run

import masking
from blockwise import packing
from blockwise.models import base as models
from blockwise.run import files
from experiments import bound

MASK, LENGTH = 4, 5
RATIOS = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * (1 - 1e-3) + 1e-3  # of the mask, for the integral


@pytest.fixture(scope="module")
def model(base):
    return models.load_model(base, torch.float32).eval().requires_grad_(False)


def batch_of(prompt_len, max_len=LENGTH, samples=3):
    ids = torch.randint(8, 400, (samples, max_len), generator=torch.Generator().manual_seed(0))
    start = torch.full((samples,), prompt_len)
    return masking.Batch(ids, start, torch.full_like(start, max_len), torch.zeros_like(start))


def by_enumeration(model, ids, start, size):
    """The bound of one sample: block by block, every mask, its chance and weight integrated over the mask ratio.

    What comes behind a block is cut off, and no position sees a later block. size None: one block that all see.
    """
    total = 0.0
    for first in range(start, len(ids), size or LENGTH):
        end = min(first + (size or LENGTH), len(ids))
        for pattern in itertools.product((False, True), repeat=end - first):
            masked = torch.zeros(end, dtype=torch.bool)
            masked[first:] = torch.tensor(pattern)
            chance = (RATIOS ** (sum(pattern) - 1) * (1 - RATIOS) ** (end - first - sum(pattern))).mean().item()
            block = torch.tensor([0 if i < start or not size else 1 + (i - start) // size for i in range(end)])
            sees = (block[:, None] >= block[None])[None, None]
            logits = model(input_ids=ids[:end].masked_fill(masked, MASK)[None], attention_mask=sees).logits[0].double()
            losses = -logits.log_softmax(dim=-1)[torch.arange(end), ids[:end]]
            total += chance * losses[masked].sum().item()
    return total / (len(ids) - start)


@pytest.mark.parametrize("start, size", [(0, None), (2, None), (0, 1), (0, 2), (1, 2), (0, LENGTH)])
def test_the_mean_over_draws_is_the_bound_by_enumeration(model, start, size):
    """Within four standard errors over 400 copies of a sample, each with 5 draws; in blocks of one token exactly."""
    model.config.block_diffusion_size = size
    for ids in batch_of(start, samples=2).input_ids:
        batch = batch_of(start, samples=400)
        batch.input_ids[:] = ids
        found = bound.held_out_bound(model, batch, 5, 100, torch.Generator().manual_seed(1))
        error, wanted = found.std().item() / 400**0.5, by_enumeration(model, ids, start, size)
        assert found.mean().item() == pytest.approx(wanted, abs=4 * error + 1e-4)
        assert error < 0.05 * wanted and (size != 1 or error < 1e-6)


def test_blocks_of_one_token_are_an_autoregressive_loss(model):
    """Each token is predicted at a mask in its place, from the tokens before it, which see no later ones."""
    model.config.block_diffusion_size = 1
    batch = batch_of(2)
    found = bound.held_out_bound(model, batch, 3, 2, torch.Generator().manual_seed(0))
    block = torch.tensor([0, 0, 1, 2, 3])
    for ids, cost in zip(batch.input_ids, found.tolist()):
        wanted = 0.0
        for place in range(2, LENGTH):
            seen = torch.cat([ids[:place], torch.tensor([MASK])])
            causal = (block[: place + 1, None] >= block[None, : place + 1])[None, None]
            logits = model(input_ids=seen[None], attention_mask=causal).logits[0, place].double()
            wanted -= logits.log_softmax(dim=-1)[ids[place]].item() / (LENGTH - 2)
        assert cost == pytest.approx(wanted, rel=1e-5)


def test_one_block_has_the_full_sequence_bound(model):
    means = []
    for size in (None, LENGTH):
        model.config.block_diffusion_size = size
        means.append(bound.held_out_bound(model, batch_of(0), 10, 3, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(*means, rtol=1e-5, atol=0)  # the same masks, so the same losses


def test_padding_that_fills_a_block_counts_in_the_nats_but_not_in_the_tokens(model):
    """An answer of 3 tokens in a block of 4 is masked as one of 4; the same nats are shared by 3 tokens."""
    weights = {}
    for length in (4, 3):
        batch = batch_of(0, 4)
        batch.length[:] = length
        weights[length] = bound.noise(batch, 4, False, MASK, torch.Generator().manual_seed(0)).weights
    assert weights[4][:, 3].any()
    torch.testing.assert_close(weights[3], weights[4] * 4 / 3)


def test_it_prints_a_line_for_texts_and_for_samples(base, pt_file, tmp_path):
    packing.write(tmp_path / "texts.pt", [np.arange(10, 90, dtype=np.int32)], 16)
    done = run("experiments.bound", "--model", base, "--data", tmp_path / "texts.pt", "--draws", 2, "--samples", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{base}: ") and done.stdout.endswith(" nats per token, 3 samples, 48 tokens\n")
    done = run("experiments.bound", "--model", base, "--data", pt_file, "--draws", 1, "--samples", 1)
    assert done.returncode == 0 and " nats per token, 1 samples, " in done.stdout and "±" not in done.stdout


def test_bad_input_is_one_sentence(base, pt_file, tmp_path):
    files.replace(tmp_path / "torn.pt", "no samples")
    for flags, said in (
        (("--data", tmp_path / "missing.pt"), "missing.pt does not exist"),
        (("--data", tmp_path / "torn.pt"), "torn.pt is truncated, damaged or was not written by pt.py"),
        (("--data", pt_file, "--max_len", 5000), "--max_len 5000: the model has 1024 positions"),
        (("--data", pt_file, "--max_len", 20), "more than MAX_LEN=20"),
        (("--data", pt_file, "--draws", 0), "--draws and --batch_size must be at least 1"),
    ):
        done = run("experiments.bound", "--model", base, *flags)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
