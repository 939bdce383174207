"""masking.py against the picture in its docstring, slow literal versions, and the statistics that it promises."""

import itertools
import math
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import masking

# The sample of the docstring's picture: p prompt, e earlier blocks (prefix), a active, l later blocks (suffix),
# - padding.
REGIONS = "pppppp eeee aaaa lll ---".replace(" ", "")
INPUT = "...... .... ???? ### ...".replace(" ", "")  # . visible, # masked, ? with the ratio p, and supervised
SAMPLE = {"prompt_len": 6, "length": 17, "block": 1, "max_len": 20, "block_size": 4}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def column(*values):
    return torch.tensor(values, dtype=torch.long)


def region_string(prompt_len, length, block, max_len, block_size):
    """One sample's regions as letters; a position in two regions shows as X."""
    parts = masking.regions(column(prompt_len), column(length), column(block), max_len, block_size)
    letters = []
    for pos in range(max_len):
        found = [letter for letter, part in zip("eal", parts) if part[0, pos]]
        letters.append("X" if len(found) > 1 else found[0] if found else "p" if pos < prompt_len else "-")
    return "".join(letters)


def blockwise(samples, max_len, block_size, seed, eps=1e-3, prefix=0.0, suffix=1.0):
    """blockwise_masks for a list of samples (prompt_len, length, block), all options short."""
    return masking.blockwise_masks(
        *column(*samples).T, max_len, block_size=block_size, mask_prob_eps=eps,
        prefix_mask_rate=prefix, suffix_mask_prob=suffix, generator=seeded(seed),
    )[:2]  # fmt: skip


# ---------------------------------------------------------------- the picture


def test_picture_regions():
    assert region_string(**SAMPLE) == REGIONS


def test_picture_input():
    """Over 200 draws, what is always visible, always masked, or now and then, is what the picture says."""
    masked, supervised = blockwise([(6, 17, 1)] * 200, 20, 4, seed=0)
    picture = "".join(
        "." if not hid.any() else "?" if sc.equal(hid) and not hid.all() else "#" if hid.all() and not sc.any() else "X"
        for hid, sc in zip(masked.T, supervised.T)
    )
    assert picture == INPUT


def test_picture_is_the_one_in_the_docstring():
    line = next(line for line in masking.__doc__.splitlines() if line.split()[:1] == ["input"])
    assert re.sub(r"input|[ |]", "", line) == INPUT
    numbers = next(line for line in masking.__doc__.splitlines() if line.split()[:1] == ["position"])
    assert [int(n) for n in re.findall(r"\d+", numbers)] == list(range(SAMPLE["max_len"]))
    supervised = next(text for text in masking.__doc__.splitlines() if text.split()[:1] == ["supervised"])
    assert supervised.index("the masked ones") == line.index("?")


# ---------------------------------------------------------------- regions


@pytest.mark.parametrize(
    "prompt_len, length, block, block_size, expected",
    [
        (3, 11, 0, 3, "pppaaalllll---"),  # first block
        (3, 11, 2, 3, "pppeeeeeeaa---"),  # last block, short
        (3, 12, 2, 3, "pppeeeeeeaaa--"),  # answer an exact multiple: the last block is full
        (3, 9, 3, 2, "pppeeeeee-----"),  # a block after the last one is empty
        (3, 8, 2, 1, "pppeeall------"),  # block size 1
        (3, 8, 0, 50, "pppaaaaa------"),  # block size larger than the answer, and than the row
        (0, 6, 1, 2, "eeaall--------"),  # no prompt
        (14, 14, 0, 4, "pppppppppppppp"),  # the prompt fills the row
        (5, 5, 0, 4, "ppppp---------"),  # no answer, padding
        (3, 14, 1, 4, "pppeeeeaaaalll"),  # no padding
        (10, 14, 0, 4, "ppppppppppaaaa"),  # the active block ends with the row
        (13, 14, 0, 4, "pppppppppppppa"),  # an answer of one token
    ],
)
def test_regions_by_hand(prompt_len, length, block, block_size, expected):
    assert region_string(prompt_len, length, block, 14, block_size) == expected


@pytest.mark.parametrize("answer_len, block_size, expected", [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (3, 1, 3)])
def test_num_blocks(answer_len, block_size, expected):
    assert masking.num_blocks(answer_len, block_size) == expected
    assert masking.num_blocks(column(answer_len), block_size).equal(column(expected))


def test_blocks_tile_the_answer():
    """The active blocks 0 .. num_blocks - 1 share out the answer: each of its tokens is active for one of them."""
    for block_size, answer_len in itertools.product((1, 2, 3, 4, 7, 30), range(1, 14)):
        n = masking.num_blocks(answer_len, block_size)
        many = torch.ones(n, dtype=torch.long)
        _, active, _ = masking.regions(many * 2, many * (2 + answer_len), torch.arange(n), 16, block_size)
        assert active.sum(dim=0).tolist() == [0] * 2 + [1] * answer_len + [0] * (14 - answer_len)
        assert active.any(dim=1).all()  # no block is empty
        assert (active[:-1].sum(dim=1) == block_size).all()  # only the last may be short


# ---------------------------------------------------------------- masks against a literal version


def literal_masks(samples, max_len, block_size, prefix_rate, suffix_prob, p, u):
    """The method's table, one position at a time. p: a number per sample; u: one in [0, 1) per sample and position."""
    masked = [[False] * max_len for _ in samples]
    supervised = [[False] * max_len for _ in samples]
    for i, (prompt_len, length, active) in enumerate(samples):
        for pos in range(max_len):
            if pos < prompt_len or pos >= length:
                continue  # prompt and padding
            block = (pos - prompt_len) // block_size
            if block < active:
                masked[i][pos] = u[i][pos] < prefix_rate
            elif block > active:
                masked[i][pos] = u[i][pos] < suffix_prob
            else:
                masked[i][pos] = supervised[i][pos] = u[i][pos] < p[i]
    return masked, supervised


def same_draws(samples, max_len, seed, eps):
    """The uniform numbers that the masks of this seed are made of: first one per sample, then one per token."""
    generator = seeded(seed)
    p = eps + (1 - eps) * torch.rand(len(samples), 1, generator=generator)
    return p[:, 0].tolist(), torch.rand(len(samples), max_len, generator=generator).tolist()


@st.composite
def batches(draw):
    """Any batch: (samples of (prompt_len, length, block), max_len, block_size)."""
    max_len, block_size = draw(st.integers(1, 24)), draw(st.integers(1, 26))
    samples = []
    for _ in range(draw(st.integers(1, 6))):
        prompt_len = draw(st.integers(0, max_len))
        length = draw(st.integers(prompt_len, max_len))
        samples.append((prompt_len, length, draw(st.integers(0, max(0, -(-(length - prompt_len) // block_size) - 1)))))
    return samples, max_len, block_size


RATE = st.sampled_from([0.0, 0.2, 0.5, 1.0])
repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=300)


@repeatable
@given(batches(), st.integers(0, 2**32), st.sampled_from([0.0, 1e-3, 0.4, 1.0]), RATE, RATE)
def test_blockwise_masks_equal_the_literal_version(batch, seed, eps, prefix, suffix):
    samples, max_len, block_size = batch
    masked, supervised = blockwise(samples, max_len, block_size, seed, eps, prefix, suffix)
    expected = literal_masks(samples, max_len, block_size, prefix, suffix, *same_draws(samples, max_len, seed, eps))
    assert (masked.tolist(), supervised.tolist()) == expected
    assert masked.dtype == supervised.dtype == torch.bool


@repeatable
@given(batches(), st.integers(0, 2**32), st.sampled_from([0.0, 1e-3, 0.4, 1.0]))
def test_full_sequence_masks_equal_the_literal_version(batch, seed, eps):
    samples, max_len, _ = batch
    prompt_len, length, _ = column(*samples).T
    masked, supervised, _ = masking.full_sequence_masks(
        prompt_len, length, max_len, mask_prob_eps=eps, generator=seeded(seed)
    )
    one_block = [(prompt, end, 0) for prompt, end, _ in samples]
    expected, _ = literal_masks(one_block, max_len, max_len, 0.0, 0.0, *same_draws(samples, max_len, seed, eps))
    assert masked.tolist() == supervised.tolist() == expected


@repeatable
@given(batches(), st.integers(0, 2**32), RATE, RATE)
def test_masks_stay_in_their_regions(batch, seed, prefix, suffix):
    samples, max_len, block_size = batch
    masked, supervised = blockwise(samples, max_len, block_size, seed, 1e-3, prefix, suffix)
    earlier, active, later = masking.regions(*column(*samples).T, max_len, block_size)
    assert supervised.equal(masked & active)
    for i, (prompt_len, length, _) in enumerate(samples):
        assert not masked[i, :prompt_len].any()
        assert not masked[i, length:].any()
    for region, rate in ((earlier, prefix), (later, suffix)):
        assert rate != 0.0 or not (masked & region).any()
        assert rate != 1.0 or (masked | ~region).all()


@pytest.mark.parametrize("block, prefix, suffix", [(4095, 0.0, 1.0), (0, 1.0, 0.0)], ids=["prefix", "suffix"])
def test_rate_zero_masks_nothing_even_where_the_draw_is_zero(block, prefix, suffix):
    """torch.rand returns exactly 0.0 once in 2^24 draws, those of a few hundred steps: `<=` would mask that token."""
    side, samples = 4096, [(0, 4096, block)] * 4096
    earlier, _, later = masking.regions(*column(*samples).T, side, 1)
    for seed in range(50):
        generator = seeded(seed)
        torch.rand(side, 1, generator=generator)
        zeros = torch.rand(side, side, generator=generator) == 0.0
        if (zeros & (earlier | later)).any():
            break
    assert (zeros & (earlier | later)).any()
    masked, _ = blockwise(samples, side, 1, seed, prefix=prefix, suffix=suffix)
    assert not (masked & (earlier | later)).any()


def test_ratio_one_masks_the_whole_active_block():
    _, supervised = blockwise([(6, 17, 1)] * 100, 20, 4, seed=0, eps=1.0)
    assert supervised.tolist() == [[letter == "a" for letter in REGIONS]] * 100


# ---------------------------------------------------------------- statistics; all tolerances are 5 standard errors

N, LONG, EPS = 4000, 1000, 0.2


def shares(masks, start, end):
    """Each sample's share of masked tokens in [start, end), as (N,) doubles."""
    return masks[:, start:end].double().mean(dim=1)


def near(value, expected, standard_error):
    return abs(float(value) - expected) < 5 * standard_error


@pytest.fixture(scope="module", params=["blockwise", "full sequence"])
def ratio_shares(request):
    """Share of masked tokens, per sample, in active blocks so long that it is nearly the sample's p. (N,)"""
    if request.param == "blockwise":
        _, supervised = blockwise([(0, LONG, 0)] * N, LONG, LONG, seed=1, eps=EPS)
    else:
        zeros = torch.zeros(N, dtype=torch.long)
        _, supervised, _ = masking.full_sequence_masks(
            zeros, zeros + LONG, LONG, mask_prob_eps=EPS, generator=seeded(1)
        )
    return shares(supervised, 0, LONG)


def test_ratio_is_uniform(ratio_shares):
    """Kolmogorov-Smirnov at the 0.1 % level; the share's own noise, at most 0.016 per sample, is far below it."""
    uniform = ((ratio_shares.sort().values - EPS) / (1 - EPS)).clamp(0, 1)
    ranks = torch.arange(1, N + 1) / N
    distance = torch.maximum(ranks - uniform, uniform - ranks + 1 / N).max()
    assert distance < 1.95 / math.sqrt(N)


def test_ratio_is_one_per_sample(ratio_shares):
    """With a p per token all shares would be near the mean; with one per sample they have the variance of a uniform."""
    width = 1 - EPS
    variance = width**2 / 12
    assert near(ratio_shares.mean(), (1 + EPS) / 2, math.sqrt(variance / N))
    standard_error = width**2 * math.sqrt((1 / 80 - 1 / 144) / N)  # from the fourth moment of a uniform
    assert abs(ratio_shares.var() - variance) < 5 * standard_error + 0.25 / LONG  # room for the shares' own noise


def test_samples_have_different_ratios(ratio_shares):
    """Neighbours in a batch are not correlated."""
    centred = ratio_shares - ratio_shares.mean()
    correlation = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert near(correlation, 0.0, 1 / math.sqrt(N))


def test_prefix_and_suffix_rates():
    """Prefix 20 %, suffix 50 %: the overall shares, and a count per sample that varies as independent tokens do."""
    masked, _ = blockwise([(10, 910, 4)] * N, 920, 100, seed=2, prefix=0.2, suffix=0.5)  # 400 prefix, 400 suffix tokens
    for start, end, rate in ((10, 410, 0.2), (510, 910, 0.5)):
        share, variance = shares(masked, start, end), rate * (1 - rate) / (end - start)
        assert near(share.mean(), rate, math.sqrt(variance / N))
        assert near(share.var(), variance, variance * math.sqrt(2 / N))
        by_position = masked[:, start:end].double().mean(dim=0)
        assert all(near(x, rate, math.sqrt(rate * (1 - rate) / N)) for x in by_position)


# ---------------------------------------------------------------- randomness and speed


def test_masks_come_from_the_generator_alone():
    samples = [(3, 30, 1), (0, 25, 0), (7, 32, 2)]
    torch.manual_seed(0)
    first = blockwise(samples, 32, 8, seed=5, prefix=0.2, suffix=0.5)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = blockwise(samples, 32, 8, seed=5, prefix=0.2, suffix=0.5)
    other = blockwise(samples, 32, 8, seed=6, prefix=0.2, suffix=0.5)
    assert first[0].equal(again[0]) and first[1].equal(again[1])
    assert not first[0].equal(other[0]) and not first[1].equal(other[1])
    torch.manual_seed(0)
    assert torch.get_rng_state().equal(state)  # the global generator was not used


class CountOperations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_samples():
    """As many tensor operations for 400 samples as for 4, and the masks of 4096 samples in less than a second."""
    numbers = []
    for size in (4, 400):
        with CountOperations() as counter:
            _, supervised = blockwise([(3, 30, 1)] * size, 32, 8, seed=0)
            masking.sample_mean_weights(supervised)
        numbers.append(counter.number)
    assert numbers[0] == numbers[1]

    samples, times = [(60, 250, 2)] * 4096, []
    for _ in range(3):
        began = time.perf_counter()
        blockwise(samples, 256, 32, seed=0)
        times.append(time.perf_counter() - began)
    assert min(times) < 1


# ---------------------------------------------------------------- weights and loss

SUPERVISED = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def test_weights_by_hand():
    third = 1 / 3  # three of the four samples have something to predict
    expected = [
        [0, third / 3, third / 3, 0, third / 3],
        [0, 0, 0, 0, 0],
        [0, 0, third, 0, 0],
        [third / 5] * 5,
    ]
    torch.testing.assert_close(masking.sample_mean_weights(SUPERVISED), torch.tensor(expected))
    torch.testing.assert_close(masking.token_mean_weights(SUPERVISED), SUPERVISED / 9)  # nine tokens in all


def test_weights_of_random_samples():
    supervised = torch.rand(500, 40, generator=seeded(0)) < torch.rand(500, 1, generator=seeded(1)) * 0.1
    weights, some = masking.sample_mean_weights(supervised), supervised.any(dim=1)
    assert 0 < some.sum() < 500
    torch.testing.assert_close(weights.sum(dim=1), some / some.sum())
    assert not weights[~supervised].any()
    assert (weights[supervised] > 0).all()
    sample_max = weights.max(dim=1, keepdim=True).values.expand_as(weights)
    assert weights[supervised].equal(sample_max[supervised])  # all tokens of a sample count alike


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 5)])
def test_weights_of_nothing_are_zero(shape):
    weights = masking.sample_mean_weights(torch.zeros(shape, dtype=torch.bool))
    assert weights.shape == shape and weights.is_floating_point()
    assert not weights.any() and not weights.isnan().any()
    assert torch.equal(masking.token_mean_weights(torch.zeros(shape, dtype=torch.bool)), torch.zeros(shape))


def loss_of(logits, targets, supervised):
    """masking.weighted_nll with the weights of the masked mean. logits: (n, V); targets, supervised: (B, L)."""
    weights = masking.sample_mean_weights(supervised)
    return masking.weighted_nll(logits, masking.Noised(targets, supervised, targets, weights))


def literal_loss(logits, targets, supervised):
    """Mean over samples of the mean over tokens of -log softmax, and its gradient, in loops. logits: (B, L, V)."""
    counted = [i for i, sample in enumerate(supervised) if any(sample)]
    total, gradient = 0.0, [[[0.0] * len(token) for token in sample] for sample in logits]
    for i in counted:
        tokens = [pos for pos, asked in enumerate(supervised[i]) if asked]
        sample_total = 0.0
        for pos in tokens:
            top = max(logits[i][pos])
            partition = sum(math.exp(x - top) for x in logits[i][pos])
            sample_total -= logits[i][pos][targets[i][pos]] - top - math.log(partition)
            for v, x in enumerate(logits[i][pos]):
                error = math.exp(x - top) / partition - (v == targets[i][pos])
                gradient[i][pos][v] = error / len(tokens) / len(counted)
        total += sample_total / len(tokens)
    return total / len(counted), gradient


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "supervised", [SUPERVISED, SUPERVISED[2:3], ~SUPERVISED], ids=["ragged", "one token", "complement"]
)
def test_loss_and_gradient_equal_the_literal_version(supervised, seed):
    """The loss is computed as in training, from the supervised positions only."""
    logits = (5 * torch.randn(*supervised.shape, 11, generator=seeded(seed))).requires_grad_()  # (B, L, V)
    targets = torch.randint(11, supervised.shape, generator=seeded(seed))
    loss = loss_of(logits[supervised], targets, supervised)
    loss.backward()
    expected, gradient = literal_loss(logits.tolist(), targets.tolist(), supervised.tolist())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient), rtol=1e-4, atol=1e-7)


def test_loss_of_nothing_is_zero_with_zero_gradients():
    """A step in which no sample has a masked token must leave the weights as they are, not make them NaN."""
    head, supervised = torch.nn.Linear(4, 11), torch.zeros(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, 4, generator=seeded(0)).requires_grad_()
    loss = loss_of(head(x[supervised]), torch.zeros(2, 3, dtype=torch.long), supervised)
    loss.backward()
    assert loss.item() == 0.0
    for grad in (x.grad, head.weight.grad, head.bias.grad):
        assert grad is not None and not grad.any() and not grad.isnan().any()


def test_loss_of_bf16_logits_is_computed_in_fp32():
    """bf16 has 8 bits: a log-sum over 5000 words in it would be off by about 1 %."""
    supervised = torch.ones(4, 16, dtype=torch.bool)
    logits = (3 * torch.randn(4, 16, 5000, generator=seeded(0))).bfloat16().requires_grad_()
    targets = torch.randint(5000, (4, 16), generator=seeded(1))
    loss = loss_of(logits[supervised], targets, supervised)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = -logits.detach().double().log_softmax(dim=-1).gather(2, targets[..., None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.isfinite().all()


def test_a_share_of_answers_gets_a_random_length():
    """Uniform from 1 to the answer's own length; a cut sample does not see what is behind its end, others see all."""
    number, start, end = 40_000, 3, 11
    ones = torch.ones(number, dtype=torch.long)
    batch = masking.Batch(torch.zeros(number, 12, dtype=torch.long), start * ones, end * ones, ones)
    length, seen = masking.random_lengths(batch, 0.4, seeded(0))
    cut = ~seen.all(dim=1)
    assert torch.equal(seen[cut], torch.arange(12) < length[cut, None]) and (length[~cut] == end).all()
    assert cut.float().mean() == pytest.approx(0.4, abs=5 * math.sqrt(0.4 * 0.6 / number))
    found = torch.bincount(length[cut] - start, minlength=9)
    assert found[0] == 0 and len(found) == 9
    wanted = int(cut.sum()) / 8
    assert ((found[1:] - wanted).abs() < 5 * math.sqrt(wanted)).all()
