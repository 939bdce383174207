"""Theorem 3.3, checked numerically: with bound_weights one block and one mask ratio stand for all of them.

The bound of a sample is written out in full, over every block and every set of masked tokens; the average over many
draws of what the trainers do must have its gradient. The masked mean has another one, which is written out as well.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import masking
from blockwise.models import llada

IDS = torch.tensor([5, 9, 17, 8, 20, 11, 6, 23, 14])  # one sample: 3 tokens of prompt, answer blocks of 4 and 2
MASK, LENGTH, PROMPT, ANSWER, BLOCK = 4, 9, 3, 6, 4
DRAWS, BATCH = 8000, 200


@pytest.fixture(scope="module")
def model():
    from experiments.make_base import make_config

    torch.manual_seed(0)
    return llada.LLaDAForCausalLM(make_config(24, 64, 1))


def gradient(model, value):
    """The gradient of a scalar as one vector."""
    parts = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def beta(a, b):
    """The integral of p^(a-1) (1-p)^(b-1) from 0 to 1."""
    return math.gamma(a) * math.gamma(b) / math.gamma(a + b)


def exact_gradient(model, ids, weight, block_size):
    """Of the sum over blocks and over sets S of masked tokens of weight(|S|, block's length) x cross-entropies of S.

    Earlier blocks are visible, later ones masked.
    """
    total = 0.0
    for start in range(PROMPT, LENGTH, block_size):
        block = range(start, min(start + block_size, LENGTH))
        for number in range(1, len(block) + 1):
            for places in itertools.combinations(block, number):
                inputs = ids.clone()
                inputs[[*places, *range(block.stop, LENGTH)]] = MASK
                logits = model(inputs[None]).logits[0]
                total = total + weight(number, len(block)) * F.cross_entropy(
                    logits[list(places)], ids[list(places)], reduction="sum"
                )
    return gradient(model, total)


def drawn_gradients(model, weights, block_size):
    """Gradients of the trainers' loss, (DRAWS / BATCH, parameters), each over a batch of draws for the one sample."""
    generator, found = torch.Generator().manual_seed(1), []
    ones = torch.ones(BATCH, dtype=torch.long)
    blocks = int(masking.num_blocks(LENGTH - PROMPT, block_size))
    for _ in range(DRAWS // BATCH):
        block = torch.randint(blocks, (BATCH,), generator=generator)
        masked, supervised, p = masking.blockwise_masks(
            ones * PROMPT, ones * LENGTH, block, LENGTH, block_size=block_size, mask_prob_eps=1e-3,
            prefix_mask_rate=0.0, suffix_mask_prob=1.0, generator=generator,
        )  # fmt: skip
        batch = IDS.expand(BATCH, -1)
        noised = masking.Noised(batch.masked_fill(masked, MASK), supervised, batch, weights(supervised, p))
        logits = model(input_ids=noised.input_ids, logits_to_keep=supervised).logits
        found.append(gradient(model, masking.weighted_nll(logits, noised)))
    return torch.stack(found)


def bound(number, size):
    """1/p, averaged over p: the integral of p^number (1-p)^(size-number) / p."""
    return beta(number, size - number + 1) / ANSWER


def masked_mean(number, size, blocks):
    """The probability of a set over its size; draws in which nothing is masked, 1 of size + 1, do not count."""
    counted = sum(1 - 1 / (length + 1) for length in blocks) / len(blocks)
    return beta(number + 1, size - number + 1) / number / len(blocks) / counted


def standard_errors(draws, exact, direction):
    """How far the mean of the draws is from the exact gradient along a direction, in standard errors."""
    along = draws @ direction
    return float(abs(along.mean() - exact @ direction) / (along.std() / len(along) ** 0.5))


def test_bound_weights_give_the_gradient_of_the_bound_and_the_masked_mean_another(model):
    answer_len = torch.tensor([ANSWER] * BATCH)
    wanted = exact_gradient(model, IDS, bound, BLOCK)
    other = exact_gradient(model, IDS, lambda number, size: masked_mean(number, size, [4, 2]), BLOCK)
    draws = drawn_gradients(model, lambda supervised, p: masking.bound_weights(supervised, p, 2, answer_len), BLOCK)
    masked = drawn_gradients(model, lambda supervised, p: masking.sample_mean_weights(supervised), BLOCK)
    for direction in (wanted, other - wanted, *draws[:2]):
        assert standard_errors(draws, wanted, direction) < 4.5 and standard_errors(masked, other, direction) < 4.5
    assert standard_errors(masked, wanted, other - wanted) > 10
    mean = draws.mean(dim=0)
    assert (mean - wanted).norm() < 0.15 * wanted.norm() < (masked.mean(dim=0) - wanted).norm()


def test_with_blocks_of_one_length_the_masked_mean_is_the_bound(model):
    """So the two weights differ in expectation only through short last blocks and answers of different lengths."""
    for block_size, blocks in ((3, [3, 3]), (ANSWER, [ANSWER])):
        wanted = exact_gradient(model, IDS, bound, block_size)
        other = exact_gradient(model, IDS, lambda number, size: masked_mean(number, size, blocks), block_size)  # noqa: B023
        assert torch.allclose(wanted, other, atol=1e-6)


def test_weights_by_hand():
    supervised = torch.tensor([[False, True, True, False], [False, False, False, True], [False] * 4])
    weights = masking.bound_weights(
        supervised, torch.tensor([[0.5], [0.1], [0.2]]), torch.tensor([3, 1, 2]), torch.tensor([6, 2, 4])
    )
    wanted = torch.tensor([[0, 1 / 3, 1 / 3, 0], [0, 0, 0, 5 / 3], [0, 0, 0, 0]])
    assert torch.allclose(weights, wanted)
    ratios, blocks, answer_len = torch.tensor([[0.5], [0.1], [0.2]]), torch.tensor([3, 1, 2]), torch.tensor([6, 2, 4])
    weights = masking.bound_weights(supervised, ratios, blocks, answer_len, per_token=True)
    wanted = torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0, 10 / 12], [0, 0, 0, 0]])  # of 12 tokens in all
    assert torch.allclose(weights, wanted)
    zero = masking.bound_weights(torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 1), 1, torch.tensor([4]))
    assert torch.equal(zero, torch.zeros(1, 4)), "p can be drawn as exactly 0"
