"""R2FT: chosen and rejected tokens and the loss against literal loops; the objective on any number of ranks."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_hook import BATCH, LENGTH, MASK, SEED, PlainEngine, plan_of, process_group, samples, step_of_all_ranks  # noqa: F401

import masking
import train_r2ft
from blockwise.data import derive_seed

WEIGHTS = {"beta_w": 0.7, "beta_l": 1.3, "beta_a": 0.2, "gamma": 0.4}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def knobs_of(**changes):
    knobs = {name: value for name, value in vars(train_r2ft).items() if name.isupper()}
    return SimpleNamespace(**knobs | {"MASK_ID": MASK} | changes)


def batch_of(rows, width, blocks=None):
    """Samples (prompt_len, length) whose tokens are all different, from 10 on; padding is 1."""
    ids = torch.full((len(rows), width), 1)
    for i, (_, length) in enumerate(rows):
        ids[i, :length] = 10 + 100 * i + torch.arange(length)
    prompt_len, length = torch.tensor(rows).T
    return masking.Batch(ids, prompt_len, length, torch.tensor(blocks or [0] * len(rows)))


def literal(row, length, cut, end, size, first, number, ending):
    """The rejected tokens of one sample, in a loop."""
    phrase, tokens = row[cut - size : cut], {}
    stop = min(cut + number, end)
    for j in range(cut, stop):
        tokens[j] = phrase[(first + j - cut) % size]
    if stop - cut > 1:
        tokens[cut + ending] = row[length - 1]
    return tokens


def test_the_picture():
    """As in the docstring of masking.repetitions, with numbers that are not drawn."""
    row = [ord(letter) for letter in "abcdefghijke"] + [1, 1, 1]
    tokens = literal(row, 12, 6, 15, 3, 1, 8, 5)
    assert "".join(chr(tokens[j]) for j in range(6, 14)) == "efdefeef"
    assert "position 11" in masking.repetitions.__doc__ and "| e f d e f  e  e  f " in masking.repetitions.__doc__


@pytest.mark.parametrize("phrase, repeat", [((1, 14), (30, 49)), ((3, 3), (2, 2)), ((2, 6), (4, 9))])
def test_repetitions_are_those_of_a_loop(phrase, repeat):
    """Samples of all kinds: with less before the cut than a phrase, cut near MAX_LEN, in a short last block."""
    width = 60
    batch = batch_of([(20, 50), (0, 40), (1, 12), (5, 60), (58, 60), (59, 60), (0, 1), (10, 30)] * 25, width)
    cut = masking.random_cuts(batch.prompt_len, batch.length, seeded(3))
    end = torch.minimum(cut + torch.tensor([60, 60, 60, 60, 60, 60, 60, 4] * 25), torch.tensor(width))
    drawn = torch.rand(4, len(cut), generator=seeded(4)).tolist()  # what the function draws, in its order
    rejected, repeated = masking.repetitions(
        batch.input_ids, batch.length, cut, end, phrase=phrase, repeat=repeat, generator=seeded(4)
    )
    seen = set()
    for i, row in enumerate(batch.input_ids.tolist()):
        start, u = int(cut[i]), [one[i] for one in drawn]
        if start < phrase[0]:
            assert not rejected[i].any()
            continue
        size = phrase[0] + int(u[0] * (min(phrase[1], start) - phrase[0] + 1))
        number = repeat[0] + int(u[2] * (repeat[1] - repeat[0] + 1))
        ending = int(u[3] * (min(start + number, int(end[i])) - start - 1))
        wanted = literal(row, int(batch.length[i]), start, int(end[i]), size, int(u[1] * size), number, ending)
        assert {j: int(repeated[i, j]) for j in rejected[i].nonzero()[:, 0].tolist()} == wanted
        if len(wanted) > 1:  # all tokens of the sample differ: its last one is there once, and never in the last place
            places = [j for j in wanted if wanted[j] == row[batch.length[i] - 1]]
            assert places == [start + ending] and places[0] < max(wanted)
        seen.add((size, len(wanted)))
    assert {size for size, _ in seen} == set(range(phrase[0], phrase[1] + 1))
    numbers = {number for _, number in seen}
    assert max(numbers) == repeat[1] and min(numbers) <= min(4, repeat[0])


def test_cuts_are_anywhere_in_the_answer_but_before_its_last_token():
    lengths = torch.tensor([[7, 12], [7, 8], [0, 3]]).repeat(300, 1)
    cuts = masking.random_cuts(*lengths.T, seeded(0)).view(300, 3)
    assert [sorted(set(column.tolist())) for column in cuts.T] == [[7, 8, 9, 10], [7], [0, 1]]


def test_the_answer_is_cut_and_all_behind_it_is_masked():
    batch = batch_of([(6, 20), (3, 9), (0, 1), (2, 30)] * 10, 64)
    noised = train_r2ft.noise(batch, seeded(5), knobs_of(MAX_LEN=64))
    counts = noised.extra["share"] > 0
    assert counts.tolist()[2::4] == [False] * 10, "nothing is before its cut that could be repeated"
    assert noised.extra["share"][counts].tolist() == pytest.approx([1 / int(counts.sum())] * int(counts.sum()))
    for i in range(len(batch.length)):
        masked = (noised.input_ids[i] == MASK).nonzero()[:, 0]
        cut, start, end = int(masked[0]), int(batch.prompt_len[i]), int(batch.length[i])
        assert start <= cut < end and masked.tolist() == list(range(cut, 64)), "the padding, too"
        assert noised.input_ids[i, :cut].equal(batch.input_ids[i, :cut])
        chosen = noised.weights[i].nonzero()[:, 0].tolist()
        rejected = noised.extra["rejected"][i].nonzero()[:, 0].tolist()
        if counts[i]:
            assert chosen == list(range(cut, end)) and rejected == list(range(cut, min(rejected[-1] + 1, 64)))
            assert 30 <= len(rejected) <= 49 or rejected[-1] == 63
            assert noised.weights[i, cut].item() == pytest.approx(1 / (end - start)), "of the whole answer"
            assert noised.extra["rejected"][i].sum().item() == pytest.approx(1)
        assert noised.supervised[i].nonzero()[:, 0].tolist() == sorted({*chosen, *rejected})


def test_the_variant_for_blocks_stays_within_a_block():
    """The third block is the last, and short: of its 8 tokens, 3 belong to the answer. The other sample is cut at L."""
    batch = batch_of([(6, 25), (6, 25), (6, 25), (20, 31)], 32, blocks=[0, 1, 2, 1])
    noised = train_r2ft.noise(batch, seeded(5), knobs_of(MAX_LEN=32, VARIANT="block", BLOCK_SIZE=8))
    for i, (cut, chosen, end) in enumerate([(6, 14, 14), (14, 22, 22), (22, 25, 30), (28, 31, 32)]):
        assert (noised.input_ids[i] == MASK).nonzero()[:, 0].tolist() == list(range(cut, 32))
        assert noised.weights[i].nonzero()[:, 0].tolist() == list(range(cut, chosen))
        assert noised.weights[i].sum().item() == pytest.approx(1)
        assert noised.extra["rejected"][i].nonzero()[:, 0].tolist() == list(range(cut, end))


def literal_loss(logits, noised, rows, beta_w, beta_l, beta_a, gamma):
    """The loss in loops, from logits (G, L, V); the samples whose phrase is missing do not count."""
    losses = []
    for i, answer_len in rows:
        m_w = m_l = 0.0
        rejected = noised.extra["rejected"][i].nonzero()[:, 0].tolist()
        for j in noised.weights[i].nonzero()[:, 0].tolist():
            m_w = m_w + logits[i, j].log_softmax(0)[noised.targets[i, j]] / answer_len
        for j in rejected:
            m_l = m_l + logits[i, j].log_softmax(0)[noised.extra["repeated"][i, j]] / len(rejected)
        margin = beta_w * m_w - beta_l * m_l - gamma
        losses.append(torch.log(1 + torch.exp(-margin)) - beta_a * m_w)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("variant", ["answer", "block"])
@pytest.mark.parametrize("world, acc", [(1, 1), (2, 3), (1, 24)])
def test_loss_and_gradient_are_those_of_a_loop_on_any_number_of_ranks(samples, world, acc, variant):  # noqa: F811
    """Of a tiny model, in micro-batches of 24, 4 and 1; some samples have fewer tokens before the cut than a phrase."""
    knobs = knobs_of(VARIANT=variant, BLOCK_SIZE=3, MAX_LEN=LENGTH, PHRASE_MIN=4, REPEAT_MIN=3, REPEAT_MAX=6)

    def noise(batch, generator, _):
        return train_r2ft.noise(batch, generator, knobs)

    def loss(logits, part):
        return masking.preference_loss(logits, part, **WEIGHTS)

    _, found, gradient, supervised = step_of_all_ranks(samples, world, acc, 1, noise, loss)
    batch = samples.batch(*plan_of(samples)[:BATCH].T)
    noised = noise(batch, seeded(derive_seed(SEED, "masks", 1)), None)
    rows = [(i, int(n)) for i, n in enumerate(batch.length - batch.prompt_len) if noised.extra["rejected"][i].any()]
    if variant == "block":
        rows = [(i, int((noised.weights[i] > 0).sum())) for i, _ in rows]
    assert 3 < len(rows) < BATCH and supervised == int(noised.supervised.sum())
    model = PlainEngine(1)
    wanted = literal_loss(model.logits(noised.input_ids), noised, rows, **WEIGHTS)
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient, model.gradients(), rtol=1e-4, atol=1e-6)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected():
    """Far behind as well: logsigmoid has a gradient where the logarithm of a sigmoid is infinite."""
    noised = train_r2ft.noise(batch_of([(6, 20)], 64), seeded(1), knobs_of(MAX_LEN=64))
    chosen, rejected = noised.targets[noised.supervised], noised.extra["repeated"][noised.supervised]
    only = (noised.extra["rejected"] > 0)[noised.supervised]
    at = torch.arange(len(chosen))
    for scale in (0.0, 300.0):
        logits = torch.zeros(len(chosen), 200)
        logits[at[only], rejected[only]] = scale
        logits.requires_grad_()
        loss = masking.preference_loss(logits, noised, beta_w=1.0, beta_l=1.0, beta_a=0.0, gamma=0.0)
        loss.backward()
        assert math.isfinite(loss.item()) and logits.grad.isfinite().all()
        assert (logits.grad[at, chosen][noised.weights[noised.supervised] > 0] < 0).all()
        if not scale:
            assert (logits.grad[at, rejected][only & (chosen != rejected)] > 0).all()
    logits = torch.randn(len(chosen), 200, generator=seeded(2)).requires_grad_()  # with no rejected part: plain SFT
    masking.preference_loss(logits, noised, beta_w=0.0, beta_l=0.0, beta_a=1.0, gamma=0.0).backward()
    found, logits.grad = logits.grad, None
    masking.weighted_nll(logits, noised).backward()
    torch.testing.assert_close(found, logits.grad)


def test_knobs_that_cannot_be_are_refused(tmp_path, monkeypatch):
    assert not {"MASK_PROB_EPS", "BOUND_WEIGHTS", "LOSS_MEAN", "RANDOM_LENGTH"} & vars(train_r2ft).keys()
    from blockwise import trainer
    from blockwise.cli import InputError

    before = dict(vars(train_r2ft))
    monkeypatch.setattr(trainer, "train", lambda *_: None)  # it would not come so far
    for flags, said in (
        (["--PHRASE_MIN=15"], "PHRASE_MIN=15 must not be above PHRASE_MAX=14"),
        (["--REPEAT_MAX=29"], "REPEAT_MIN=30 must not be above REPEAT_MAX=29"),
        (["--REPEAT_MIN=1"], "REPEAT_MIN=1 is out of range: it must be at least 2"),
        (["--BETA_A=-0.1"], "BETA_A=-0.1 is out of range"),
        (["--VARIANT=word"], "VARIANT='word' must be 'answer' or 'block'"),
        (["--LOSS_MEAN=token"], "--LOSS_MEAN=token is not a knob of this script"),
    ):
        monkeypatch.setattr("sys.argv", ["train_r2ft.py", *flags])
        with pytest.raises(InputError, match=said.replace("(", r"\(")):
            train_r2ft.main()
        vars(train_r2ft).update(before)


def test_it_trains_on_one_and_two_ranks(forked, pt_file, tmp_path):
    """With dropout off, losses agree; so does the validation loss. The card says what the training was."""
    knobs = {"script": "train_r2ft.py", "VAL_PT": pt_file, "LORA_DROPOUT": 0.0, "TOTAL_TRAIN_STEPS": 2, "GRAD_ACC": 1}
    knobs |= {"SAVE_EVERY": 0, "RESUME_EVERY": 0, "GAMMA": 0.5}
    lines = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        done = forked(folder, ranks, **knobs, MICRO_BSIZE=4 // ranks)
        assert not any(done.codes), done.output
        rows = (folder / "out/run ö_logs/metrics.csv").read_text().splitlines()
        lines.append([float(rows[1].split(",")[1]), float(rows[2].split(",")[1]), float(rows[2].split(",")[-1])])
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    card = (tmp_path / "1/out/run ö_step0002/README.md").read_text()
    assert "R2FT" in card and "2509.15188" in card and "| `GAMMA` | `0.5` |" in card
