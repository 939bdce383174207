"""The order in which rows and blocks are trained, its division among ranks, and the learning rate over the steps."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import deepspeed
import deepspeed.comm as dist
import pytest
import torch

import masking
import sft
from place import Place
from rows import Rows, derive_seed, schedule


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def some_turns(rows, most=6, seed=0):
    """Between 1 and `most` turns per row, as blocks per answer are. (N,)"""
    return torch.randint(1, most + 1, (rows,), generator=seeded(seed))


def epochs_of(turns, epochs, seed=0):
    """The schedule, cut where each epoch must end: as many pairs as there are rows with a turn left."""
    plan = schedule(turns, epochs, seed)
    sizes = [int((turns > epoch).sum()) for epoch in range(epochs)]
    assert plan.shape == (sum(sizes), 2)
    return [part.tolist() for part in plan.split(sizes)]


# ---------------------------------------------------------------- which pairs, and when


@pytest.mark.parametrize("epochs", [1, 2, 4, 6, 50])
@pytest.mark.parametrize("rows, most", [(1, 1), (1, 5), (7, 1), (60, 6), (500, 8)])
def test_pairs(rows, most, epochs):
    turns = some_turns(rows, most)
    parts = epochs_of(turns, epochs)
    pairs = [tuple(pair) for part in parts for pair in part]
    assert len(pairs) == sum(min(n, epochs) for n in turns.tolist())
    assert len(set(pairs)) == len(pairs)  # none twice
    assert all(0 <= turn < turns[row] for row, turn in pairs)
    for epoch, part in enumerate(parts):  # each row that has a turn left exactly once, the used-up ones not at all
        assert sorted(row for row, _ in part) == [row for row, n in enumerate(turns.tolist()) if n > epoch]


def test_every_pair_is_used_and_training_stops():
    turns = some_turns(40)
    everything = {(row, turn) for row, n in enumerate(turns.tolist()) for turn in range(n)}
    plan = schedule(turns, 1000, 0)
    assert len(plan) == len(everything)
    assert {tuple(pair) for pair in plan.tolist()} == everything


def test_blocks_of_the_data_are_turns():
    """With the trainer's turns, each answer token of the data is active exactly once over enough epochs."""
    prompt_len, length = torch.tensor([3, 0, 5]), torch.tensor([4, 12, 13])
    turns = masking.num_blocks(length - prompt_len, 4)
    row, block = schedule(turns, 10, 0).T
    _, active, _ = masking.regions(prompt_len[row], length[row], block, 16, 4)
    for i in range(3):
        expected = [int(prompt_len[i] <= pos < length[i]) for pos in range(16)]
        assert active[row == i].sum(dim=0).tolist() == expected


# ---------------------------------------------------------------- uniform; all tolerances are 5 standard errors


def uniform(counts, cells, draws):
    """Are these counts of `draws` draws those of `cells` equally likely cells?"""
    expected, standard_error = draws / cells, math.sqrt(draws / cells * (1 - 1 / cells))
    return len(counts) == cells and all(abs(n - expected) < 5 * standard_error for n in counts.values())


def test_turns_are_drawn_uniformly_from_the_unused_ones():
    rows, n = 30_000, 5
    parts = epochs_of(torch.full((rows,), n), n)
    by_row = torch.stack([torch.tensor(sorted(part))[:, 1] for part in parts], dim=1).tolist()  # (N, epochs)
    assert uniform(Counter(order[0] for order in by_row), n, rows)
    assert uniform(Counter((order[0], order[1]) for order in by_row), n * (n - 1), rows)  # second: from the other four
    assert uniform(Counter(map(tuple, by_row)), math.factorial(n), rows)  # so all 120 orders


def test_turns_are_uniform_among_rows_of_unequal_length():
    turns = torch.tensor([1, 2, 3, 7] * 4000)
    for n in (2, 3, 7):
        first = Counter(turn for row, turn in schedule(turns, 1, 3).tolist() if turns[row] == n)
        assert uniform(first, n, 4000)


def test_uniform_over_seeds():
    """Row order and turns of three rows, over 3000 seeds."""
    turns, seeds = torch.tensor([4, 4, 4]), 3000
    firsts = [schedule(turns, 1, seed).tolist() for seed in range(seeds)]
    assert uniform(Counter(tuple(row for row, _ in plan) for plan in firsts), 6, seeds)
    for place in range(3):  # the turn depends neither on the row nor on its place in the epoch
        assert uniform(Counter(tuple(plan[place]) for plan in firsts), 12, seeds)


def test_epochs_have_their_own_order():
    first, second, third = ([row for row, _ in part] for part in epochs_of(torch.full((50,), 3), 3))
    assert first != second != third != first
    assert first != sorted(first)


# ---------------------------------------------------------------- from the seed alone


def test_schedule_comes_from_the_seed_alone():
    turns = some_turns(100)
    torch.manual_seed(0)
    plan = schedule(turns, 3, 42)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert plan.equal(schedule(turns, 3, 42))
    torch.manual_seed(0)
    assert torch.get_rng_state().equal(state)  # the global generator was not used
    for seed in (0, 41, 43, 2**63 - 1):
        other = schedule(turns, 3, seed)
        assert not plan[:, 0].equal(other[:, 0])
        assert not plan[:, 1].equal(other[:, 1])


def test_both_trainers_see_the_rows_in_the_same_order():
    """In an epoch in which every row has a turn left, their number does not matter: the comparison is of the method."""
    blocks = some_turns(200) + 1
    blockwise, full = schedule(blocks, 2, 42), schedule(torch.full((200,), 2), 2, 42)
    assert blockwise[:, 0].equal(full[:, 0])
    assert not blockwise[:, 1].equal(full[:, 1])


def test_more_epochs_only_add_pairs():
    turns = some_turns(100)
    short, long = schedule(turns, 1, 42), schedule(turns, 3, 42)
    assert short.equal(long[: len(short)])


def test_derived_seeds():
    """The same in every process, or runs could not be repeated; each purpose, step and rank has its own."""
    assert derive_seed(42, "masks", 1) == 4854635756216886700
    names = [*itertools.product(("masks", "dropout"), range(100)), *itertools.product(("dropout",), (1, 2), range(9))]
    seeds = {derive_seed(seed, *name) for seed in (0, 1, 42) for name in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------- one global batch, any number of ranks

LENGTH, WORDS, MASK, BATCH = 12, 40, 4, 24


class PlainEngine:
    """A tiny model with the arithmetic of DeepSpeed's engine in plain PyTorch, and a list of the inputs it was given.

    The engine divides each micro-batch's loss by GRAD_ACC and adds up the gradients; that it also averages them over
    the ranks is left to the test.
    """

    def __init__(self, acc):
        torch.manual_seed(0)
        self.acc, self.steps, self.inputs, self.seeds = acc, 0, [], set()
        self.embed, self.head = torch.nn.Embedding(WORDS, 8).double(), torch.nn.Linear(8, WORDS).double()

    def __call__(self, input_ids, logits_to_keep):
        self.inputs.append(input_ids)
        self.seeds.add(torch.initial_seed())  # what dropout would draw from
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(x + x.mean(dim=1, keepdim=True))[logits_to_keep])

    def backward(self, loss):
        (loss / self.acc).backward()

    def step(self):
        self.steps += 1

    def was_step_applied(self):
        return True

    def gradients(self):
        return torch.cat([p.grad.flatten() for p in (*self.embed.parameters(), *self.head.parameters())])

    def get_global_grad_norm(self):
        return self.gradients().norm()


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A group of one process: train_step's sum over ranks then leaves each rank's share, and the test adds them up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # else it is compiled first
        store = tmp_path_factory.mktemp("group") / "store"
        dist.init_distributed(
            "gloo", auto_mpi_discovery=False, verbose=False, init_method=f"file://{store}", rank=0, world_size=1
        )
        yield
        dist.destroy_process_group()


def step_of_all_ranks(world, acc, step):
    """Runs one train_step as each of the ranks. Returns their engines, the batch's loss and gradient, and scored."""
    rows, knobs = 80, SimpleNamespace(MICRO_BSIZE=BATCH // world // acc, GRAD_ACC=acc, SEED=42, MASK_ID=MASK)
    ids = torch.randint(5, WORDS, (rows, LENGTH), generator=seeded(1), dtype=torch.int32)
    prompt_len = torch.randint(2, 6, (rows,), generator=seeded(2))
    ids[:, 0], ids[:, 1] = torch.arange(rows) // 8 + 5, torch.arange(rows) % 8 + 5  # the prompt tells the row's number
    length = torch.randint(7, LENGTH + 1, (rows,), generator=seeded(3))
    data = Rows(ids, prompt_len, length, torch.arange(rows), unanswered=0)
    plan = schedule(masking.num_blocks(length - prompt_len, 3), 2, 42)

    def hide(*args, generator):
        rates = {"mask_prob_eps": 1e-3, "prefix_mask_rate": 0.1, "suffix_mask_prob": 0.9}
        hidden, scored, _ = masking.blockwise_masks(*args, LENGTH, block_size=3, generator=generator, **rates)
        return hidden, masking.sample_mean_weights(scored)

    engines, loss, gradient = [], 0.0, 0.0
    for rank in range(world):
        place = Place(rank, world, rank, world, torch.device("cpu"))
        engine = PlainEngine(acc)
        run = SimpleNamespace(engine=engine, knobs=knobs, place=place, rows=data, plan=plan, hide=hide)
        part = sft.train_step(run, step)
        engines.append(engine)
        loss, gradient = loss + part.loss, gradient + engine.gradients() / world
    expected_rows = plan[(step - 1) * BATCH : step * BATCH, 0].tolist()
    return engines, loss, gradient, part.supervised, expected_rows


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("world, acc", [(1, 2), (1, 24), (2, 1), (2, 3), (3, 2), (4, 1), (8, 3)])
def test_global_batch_is_the_same_for_any_number_of_ranks(process_group, world, acc, step):
    """All ranks and micro-batches together train each row of the batch once, with the masks, loss and gradient that a
    single rank with a single micro-batch has."""
    engines, loss, gradient, scored, expected_rows = step_of_all_ranks(world, acc, step)
    for engine in engines:  # a rank with fewer batches than another would wait for ever
        assert [len(ids) for ids in engine.inputs] == [BATCH // world // acc] * acc
        assert engine.steps == acc
    assert len(set.union(*(engine.seeds for engine in engines))) == world  # one dropout stream per rank
    seen = torch.cat([ids for engine in engines for ids in engine.inputs])  # (G, L)
    assert sorted(((seen[:, 0] - 5) * 8 + seen[:, 1] - 5).tolist()) == sorted(expected_rows)

    (single,), whole_loss, whole_gradient, whole_scored, _ = step_of_all_ranks(1, 1, step)
    assert sorted(seen.tolist()) == sorted(single.inputs[0].tolist())  # the same tokens are hidden in the same rows
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-8)
    assert scored == whole_scored > 0


def test_steps_share_no_pairs(process_group):
    """Steps 1, 2 and 3 take one batch each of the schedule, in its order."""
    seen = []
    for step in (1, 2, 3):
        (engine,), *_, expected_rows = step_of_all_ranks(1, 1, step)
        ids = engine.inputs[0]
        seen.append(((ids[:, 0] - 5) * 8 + ids[:, 1] - 5).tolist())
        assert seen[-1] == expected_rows
    assert len({row for rows in seen for row in rows}) == 3 * BATCH  # all in the first epoch


# ---------------------------------------------------------------- learning rate


def factors(steps, warmup_ratio, min_ratio):
    return [sft.lr_factor(done, steps, warmup_ratio, min_ratio) for done in range(steps)]


def test_lr_by_hand():
    """10 steps, 2 of warm-up, then 8 steps down the cosine from 1 to 0.01."""
    by_hand = [0.5, 1.0, 0.9623203, 0.8550179, 0.6944283, 0.505, 0.3155717, 0.1549821, 0.0476797, 0.01]
    assert factors(10, 0.2, 0.01) == pytest.approx(by_hand, abs=1e-7)


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
        lr, peak = factors(steps, warmup_ratio, min_ratio), sft.warmup_steps(steps, warmup_ratio)
        assert lr[-1] == min_ratio
        assert all(0 < factor <= 1 for factor in lr)
        assert peak < steps
        if peak:
            assert lr[peak - 1] == 1.0
            assert all(a < b for a, b in itertools.pairwise(lr[:peak]))
        assert all(a > b or min_ratio == 1.0 for a, b in itertools.pairwise(lr[max(peak - 1, 0) :]))


def test_warmup_is_a_tenth_of_the_steps():
    for steps in range(10, 1001, 10):
        assert sft.warmup_steps(steps, 0.1) == steps // 10
    assert [sft.warmup_steps(steps, 0.1) for steps in (1, 2, 5, 11)] == [0, 1, 1, 2]  # rounded up, but for the last


def test_lr_of_a_real_optimizer():
    """Through torch's LambdaLR, as in training: step 1 has the first factor and the last step exactly MIN_LR_RATIO."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: sft.lr_factor(done, 10, 0.2, 0.01))
    used = []
    for _ in range(10):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used[0] == pytest.approx(0.5e-5) and used[1] == 1e-5 and used[-1] == 1e-5 * 0.01
