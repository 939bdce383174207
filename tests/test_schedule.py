"""The order in which samples and blocks are trained, and the learning rate over the steps."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR

import masking
from blockwise import engine
from blockwise.data import derive_seed, schedule


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def some_blocks(samples, most=6, seed=0):
    """Between 1 and `most` blocks per sample, as blocks per answer are. (N,)"""
    return torch.randint(1, most + 1, (samples,), generator=seeded(seed))


def epochs_of(blocks, epochs, seed=0):
    """The schedule, cut where each epoch must end: as many pairs as there are samples with a block left."""
    plan = schedule(blocks, epochs, seed)
    sizes = [int((blocks > epoch).sum()) for epoch in range(epochs)]
    assert plan.shape == (sum(sizes), 2)
    return [part.tolist() for part in plan.split(sizes)]


# ---------------------------------------------------------------- which pairs, and when


@pytest.mark.parametrize("epochs", [1, 2, 4, 6, 50])
@pytest.mark.parametrize("samples, most", [(1, 1), (1, 5), (7, 1), (60, 6), (500, 8)])
def test_pairs(samples, most, epochs):
    blocks = some_blocks(samples, most)
    parts = epochs_of(blocks, epochs)
    pairs = [tuple(pair) for part in parts for pair in part]
    assert len(pairs) == sum(min(n, epochs) for n in blocks.tolist())
    assert len(set(pairs)) == len(pairs)  # none twice
    assert all(0 <= block < blocks[sample] for sample, block in pairs)
    for epoch, part in enumerate(parts):  # each sample that has a block left exactly once, the used-up ones not at all
        assert sorted(sample for sample, _ in part) == [i for i, n in enumerate(blocks.tolist()) if n > epoch]


def test_every_pair_is_used_and_training_stops():
    blocks = some_blocks(40)
    everything = {(sample, block) for sample, n in enumerate(blocks.tolist()) for block in range(n)}
    plan = schedule(blocks, 1000, 0)
    assert len(plan) == len(everything)
    assert {tuple(pair) for pair in plan.tolist()} == everything


def test_every_answer_token_is_active_once():
    """With the trainer's number of blocks, each answer token of the data is active exactly once over enough epochs."""
    prompt_len, length = torch.tensor([3, 0, 5]), torch.tensor([4, 12, 13])
    blocks = masking.num_blocks(length - prompt_len, 4)
    sample, block = schedule(blocks, 10, 0).T
    _, active, _ = masking.regions(prompt_len[sample], length[sample], block, 16, 4)
    for i in range(3):
        expected = [int(prompt_len[i] <= pos < length[i]) for pos in range(16)]
        assert active[sample == i].sum(dim=0).tolist() == expected


# ---------------------------------------------------------------- uniform; all tolerances are 5 standard errors


def uniform(counts, cells, draws):
    """Are these counts of `draws` draws those of `cells` equally likely cells?"""
    expected, standard_error = draws / cells, math.sqrt(draws / cells * (1 - 1 / cells))
    return len(counts) == cells and all(abs(n - expected) < 5 * standard_error for n in counts.values())


def test_blocks_are_drawn_uniformly_from_the_unused_ones():
    samples, n = 30_000, 5
    parts = epochs_of(torch.full((samples,), n), n)
    by_sample = torch.stack([torch.tensor(sorted(part))[:, 1] for part in parts], dim=1).tolist()  # (N, epochs)
    assert uniform(Counter(order[0] for order in by_sample), n, samples)
    assert uniform(
        Counter((order[0], order[1]) for order in by_sample), n * (n - 1), samples
    )  # second: of the other four
    assert uniform(Counter(map(tuple, by_sample)), math.factorial(n), samples)  # so all 120 orders


def test_blocks_are_uniform_among_samples_of_unequal_length():
    blocks = torch.tensor([1, 2, 3, 7] * 4000)
    for n in (2, 3, 7):
        first = Counter(block for sample, block in schedule(blocks, 1, 3).tolist() if blocks[sample] == n)
        assert uniform(first, n, 4000)


def test_uniform_over_seeds():
    """The order and the blocks of three samples, over 3000 seeds."""
    blocks, seeds = torch.tensor([4, 4, 4]), 3000
    firsts = [schedule(blocks, 1, seed).tolist() for seed in range(seeds)]
    assert uniform(Counter(tuple(sample for sample, _ in plan) for plan in firsts), 6, seeds)
    for place in range(3):  # the block depends neither on the sample nor on its place in the epoch
        assert uniform(Counter(tuple(plan[place]) for plan in firsts), 12, seeds)


def test_epochs_have_their_own_order():
    first, second, third = ([sample for sample, _ in part] for part in epochs_of(torch.full((50,), 3), 3))
    assert first != second != third != first
    assert first != sorted(first)


# ---------------------------------------------------------------- from the seed alone


def test_schedule_comes_from_the_seed_alone():
    blocks = some_blocks(100)
    torch.manual_seed(0)
    plan = schedule(blocks, 3, 42)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert plan.equal(schedule(blocks, 3, 42))
    torch.manual_seed(0)
    assert torch.get_rng_state().equal(state)  # the global generator was not used
    for seed in (0, 41, 43, 2**63 - 1):
        other = schedule(blocks, 3, seed)
        assert not plan[:, 0].equal(other[:, 0])
        assert not plan[:, 1].equal(other[:, 1])


def test_both_trainers_see_the_samples_in_the_same_order():
    """While every sample has a block left, their number does not matter: the comparison is of the method."""
    blocks = some_blocks(200) + 1
    blockwise, full = schedule(blocks, 2, 42), schedule(torch.full((200,), 2), 2, 42)
    assert blockwise[:, 0].equal(full[:, 0])
    assert not blockwise[:, 1].equal(full[:, 1])


def test_more_epochs_only_add_pairs():
    blocks = some_blocks(100)
    short, long = schedule(blocks, 1, 42), schedule(blocks, 3, 42)
    assert short.equal(long[: len(short)])


def test_derived_seeds():
    """The same in every process, or runs could not be repeated; each purpose, step and rank has its own."""
    assert derive_seed(42, "masks", 1) == 4854635756216886700
    names = [*itertools.product(("masks", "dropout"), range(100)), *itertools.product(("dropout",), (1, 2), range(9))]
    seeds = {derive_seed(seed, *name) for seed in (0, 1, 42) for name in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------- learning rate


def planned(warmup_ratio, min_ratio, warmup="linear", schedule="cosine", decay=0.1):
    return SimpleNamespace(
        WARMUP_TYPE=warmup, WARMUP_RATIO=warmup_ratio, MIN_LR_RATIO=min_ratio, LR_SCHEDULE=schedule, DECAY_RATIO=decay
    )


def factors(steps, *how, **more):
    return [engine.lr_factor(done, steps, planned(*how, **more)) for done in range(steps)]


def test_lr_by_hand():
    """10 steps, 2 of warm-up, then 8 steps down the cosine from 1 to 0.01."""
    by_hand = [0.5, 1.0, 0.9623203, 0.8550179, 0.6944283, 0.505, 0.3155717, 0.1549821, 0.0476797, 0.01]
    assert factors(10, 0.2, 0.01) == pytest.approx(by_hand, abs=1e-7)
    assert factors(10, 0.2, 0.01, schedule="constant") == [0.5] + 9 * [1.0]
    wsd = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7525, 0.505, 0.2575, 0.01]  # 4 of 10 steps down to 0.01
    assert factors(10, 0.2, 0.01, schedule="wsd", decay=0.4) == pytest.approx(wsd)
    assert factors(10, 0.2, 0.01, schedule="wsd", decay=0.0) == pytest.approx([0.5] + 8 * [1.0] + [0.01])


def test_lr_without_warmup():
    by_hand = [0.01 + 0.99 * 0.75, 0.01 + 0.99 * 0.25, 0.01]  # (1 + cos 60°) / 2, (1 + cos 120°) / 2, 0
    assert factors(3, 0.0, 0.01) == pytest.approx(by_hand, abs=1e-12)


def test_lr_with_warmup_to_the_end():
    """The last step still belongs to the cosine."""
    assert factors(5, 1.0, 0.01) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.01], abs=1e-12)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
def test_lr_of_a_single_step(warmup_ratio):
    assert factors(1, warmup_ratio, 0.01) == [0.01]


@pytest.mark.parametrize("min_ratio", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.25, 0.5, 0.99, 1.0])
def test_lr_rises_then_falls(warmup_ratio, min_ratio):
    for steps in (1, 2, 3, 10, 25, 200, 1001):
        lr, peak = factors(steps, warmup_ratio, min_ratio), engine.warmup_steps(steps, "linear", warmup_ratio)
        assert lr[-1] == min_ratio
        assert all(0 < factor <= 1 for factor in lr)
        assert peak < steps
        if peak:
            assert lr[peak - 1] == 1.0
            assert all(a < b for a, b in itertools.pairwise(lr[:peak]))
        assert all(a > b or min_ratio == 1.0 for a, b in itertools.pairwise(lr[max(peak - 1, 0) :]))


def test_warmup_is_a_tenth_of_the_steps():
    for steps in range(10, 1001, 10):
        assert engine.warmup_steps(steps, "linear", 0.1) == steps // 10
    few = [engine.warmup_steps(steps, "linear", 0.1) for steps in (1, 2, 5, 11)]
    assert few == [0, 1, 1, 2]  # rounded up, but for the last


def in_force(optimizer, scheduler, steps):
    """The learning rate of each optimizer step."""
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_lr_of_a_real_optimizer():
    """Through torch's LambdaLR, as in training: step 1 has the first factor and the last step exactly MIN_LR_RATIO."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: engine.lr_factor(done, 10, planned(0.2, 0.01))
    )
    used = in_force(optimizer, scheduler, 10)
    assert used[0] == pytest.approx(0.5e-5) and used[1] == 1e-5 and used[-1] == 1e-5 * 0.01


@pytest.mark.parametrize("min_ratio", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("steps, warmup_ratio", [
    (1, 0.1), (2, 0.1), (3, 0.5), (10, 0.2), (25, 0.1), (25, 0.0), (40, 1.0), (100, 0.29), (200, 0.1), (1000, 0.03)
])  # fmt: skip
def test_a_log_warmup_is_that_of_deepspeed(steps, warmup_ratio, min_ratio):
    """DeepSpeed's own scheduler, with a real optimizer: LR is 0 in its first two steps."""
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-5) for _ in range(2))
    lambda_lr = torch.optim.lr_scheduler.LambdaLR(
        ours, lambda done: engine.lr_factor(done, steps, planned(warmup_ratio, min_ratio, "log"))
    )
    number = max(1, int(steps * warmup_ratio))  # it refuses 0
    cosine = WarmupCosineLR(theirs, steps, warmup_num_steps=number, cos_min_ratio=min_ratio)
    found, wanted = in_force(ours, lambda_lr, steps), in_force(theirs, cosine, steps)
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-20)
    assert found[:2] == [0.0] * min(steps, 2)
    assert engine.warmup_steps(steps, "log", warmup_ratio) == cosine.warmup_num_steps
