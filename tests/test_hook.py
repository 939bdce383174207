"""The hook between the engine and an objective: one global batch on any number of ranks, whatever the objective is.

trainer.train_step runs here on a tiny model in float64, as each of the ranks in turn; the test adds up their shares.
"""

import math
from types import SimpleNamespace

import deepspeed
import deepspeed.comm as dist
import pytest
import torch

import masking
from blockwise import trainer
from blockwise.data import Samples, derive_seed, schedule
from blockwise.run.ranks import Ranks

SAMPLES, LENGTH, WORDS, MASK, BATCH, SEED = 80, 12, 40, 4, 24, 42


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class PlainEngine:
    """A tiny model with the arithmetic of DeepSpeed's engine in plain PyTorch, and a list of the inputs it was given.

    The engine divides each micro-batch's loss by GRAD_ACC and adds up the gradients; that it also averages them over
    the ranks is left to the test. With an attention_mask (B, L, L) a position sees the mean of those it allows, without
    one that of all; position_ids (B, L) are added as waves.
    """

    def __init__(self, acc):
        torch.manual_seed(0)
        self.acc, self.steps, self.calls, self.seeds = acc, 0, [], set()
        self.embed, self.head = torch.nn.Embedding(WORDS, 8).double(), torch.nn.Linear(8, WORDS).double()

    def __call__(self, **inputs):
        self.calls.append(inputs)
        self.seeds.add(torch.initial_seed())  # what dropout would draw from
        logits = self.logits(**{name: value for name, value in inputs.items() if name != "logits_to_keep"})
        return SimpleNamespace(logits=logits[inputs["logits_to_keep"]])

    def logits(self, input_ids, attention_mask=None, position_ids=None):
        """At all positions: (B, L, V)."""
        x = self.embed(input_ids)
        if position_ids is not None:
            x = x + (position_ids[..., None] * torch.linspace(0.1, 0.8, 8).double()).sin()
        seen = x.mean(dim=1, keepdim=True)
        if attention_mask is not None:
            seen = attention_mask.double() @ x / attention_mask.sum(dim=-1, keepdim=True)
        return self.head(x + seen)

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


@pytest.fixture(scope="module", autouse=True)
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


@pytest.fixture(scope="module")
def samples():
    """Samples whose first two tokens tell their number."""
    ids = torch.randint(5, WORDS, (SAMPLES, LENGTH), generator=seeded(1), dtype=torch.int32)
    ids[:, 0], ids[:, 1] = torch.arange(SAMPLES) // 8 + 5, torch.arange(SAMPLES) % 8 + 5
    prompt_len = torch.randint(2, 6, (SAMPLES,), generator=seeded(2))
    length = torch.randint(7, LENGTH + 1, (SAMPLES,), generator=seeded(3))
    return Samples(ids, prompt_len, length, torch.arange(SAMPLES), unanswered=0)


def numbers(ids):
    """Which samples these rows are. (B, L) -> list."""
    return ((ids[:, 0] - 5) * 8 + ids[:, 1] - 5).tolist()


def plan_of(samples):
    return schedule(masking.num_blocks(samples.length - samples.prompt_len, 3), 2, SEED)


def step_of_all_ranks(samples, world, acc, step, noise, loss=masking.weighted_nll):
    """Runs one train_step as each of the ranks.

    Returns their engines, the global batch's loss and gradient, and its number of supervised tokens.
    """
    knobs = SimpleNamespace(MICRO_BSIZE=BATCH // world // acc, GRAD_ACC=acc, SEED=SEED, MASK_ID=MASK)
    engines, total, gradient = [], 0.0, 0.0
    for rank in range(world):
        ranks, engine = Ranks(rank, world, rank, world, torch.device("cpu")), PlainEngine(acc)
        run = trainer.Run(
            knobs, ranks, base=None, samples=samples, plan=plan_of(samples), noise=noise, loss=loss, steps=3,
            folder=None, logs=None, model=None, engine=engine, previews=None, validation=None, entries={},
            constants={}, new_files={},
        )  # fmt: skip
        part = trainer.train_step(run, step)
        engines.append(engine)
        total, gradient = total + part.loss, gradient + engine.gradients() / world
    return engines, total, gradient, part.supervised


# ---------------------------------------------------------------- the trainers' own objective


def blockwise(batch, generator, knobs):
    rates = {"mask_prob_eps": 1e-3, "prefix_mask_rate": 0.1, "suffix_mask_prob": 0.9}
    masked, supervised, _ = masking.blockwise_masks(
        batch.prompt_len, batch.length, batch.block, LENGTH, block_size=3, generator=generator, **rates
    )
    weights = masking.sample_mean_weights(supervised)
    return masking.Noised(batch.input_ids.masked_fill(masked, knobs.MASK_ID), supervised, batch.input_ids, weights)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("world, acc", [(1, 2), (1, 24), (2, 1), (2, 3), (3, 2), (4, 1), (8, 3)])
def test_global_batch_is_the_same_for_any_number_of_ranks(samples, world, acc, step):
    """All ranks and micro-batches together train each sample of the batch once, with the masks, loss and gradient that
    a single rank with a single micro-batch has."""
    engines, loss, gradient, supervised = step_of_all_ranks(samples, world, acc, step, blockwise)
    for engine in engines:  # a rank with fewer batches than another would wait forever
        assert [len(call["input_ids"]) for call in engine.calls] == [BATCH // world // acc] * acc
        assert engine.steps == acc
    assert len(set.union(*(engine.seeds for engine in engines))) == world  # one dropout stream per rank
    seen = torch.cat([call["input_ids"] for engine in engines for call in engine.calls])  # (G, L)
    assert sorted(numbers(seen)) == sorted(plan_of(samples)[(step - 1) * BATCH : step * BATCH, 0].tolist())

    (single,), whole_loss, whole_gradient, whole_supervised = step_of_all_ranks(samples, 1, 1, step, blockwise)
    whole = single.calls[0]["input_ids"]
    assert sorted(seen.tolist()) == sorted(whole.tolist())  # the same tokens are masked in the same samples
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-8)
    assert supervised == whole_supervised > 0


def test_steps_share_no_pairs(samples):
    """Steps 1, 2 and 3 take one batch each of the schedule, in its order."""
    seen = []
    for step in (1, 2, 3):
        (engine,), *_ = step_of_all_ranks(samples, 1, 1, step, blockwise)
        seen.append(numbers(engine.calls[0]["input_ids"]))
        assert seen[-1] == plan_of(samples)[(step - 1) * BATCH : step * BATCH, 0].tolist()
    assert len({number for some in seen for number in some}) == 3 * BATCH  # all in the first epoch


# ---------------------------------------------------------------- any other objective


class Signed:
    """An objective that uses all that the hook offers: policy-gradient-like, on a noised and a clean copy of a sample.

    The sequence is twice as long, its weights have both signs and depend on the whole global batch, the loss needs
    what the model cannot know, and the model gets an attention mask and positions of its own.
    """

    def __init__(self):
        self.losses = []

    def noise(self, batch, generator, knobs):
        size = len(batch.input_ids)
        masked, supervised, p = masking.full_sequence_masks(
            batch.prompt_len, batch.length, LENGTH, mask_prob_eps=0.1, generator=generator
        )
        ids = torch.cat([batch.input_ids.masked_fill(masked, knobs.MASK_ID), batch.input_ids], dim=1)  # (G, 2L)
        clean = torch.rand(size, LENGTH, generator=generator) < 0.1
        supervised = torch.cat([supervised, clean], dim=1)
        supervised[batch.block == 1] = False  # so that some micro-batches have nothing to predict
        advantage = torch.randn(size, 1, generator=generator, dtype=torch.float64)
        advantage = (advantage - advantage.mean()) / p
        attention = torch.rand(size, 2 * LENGTH, 2 * LENGTH, generator=generator) < 0.7
        attention |= torch.eye(2 * LENGTH, dtype=torch.bool)
        positions = torch.arange(LENGTH).repeat(2) + batch.length[:, None]
        return masking.Noised(
            ids, supervised, targets=batch.input_ids.repeat(1, 2), weights=(supervised * advantage).double(),
            extra={"before": 4 * torch.rand(size, 2 * LENGTH, generator=generator, dtype=torch.float64),
                   "limit": 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)},
            model_args={"attention_mask": attention, "position_ids": positions},
        )  # fmt: skip

    def loss(self, logits, part):
        """The sum of -weight * min(ratio of likelihoods, the sample's limit)."""
        likelihood = logits.log_softmax(dim=-1).gather(1, part.targets[part.supervised][:, None])[:, 0]  # (n,)
        ratio = (likelihood + part.extra["before"][part.supervised]).exp()
        limit = part.extra["limit"][:, None].expand_as(part.supervised)[part.supervised]
        loss = -(part.weights[part.supervised] * ratio.minimum(limit)).sum()
        self.losses.append(loss.item())
        return loss


def plain_pass(samples, step):
    """The loss of the global batch from logits at all its positions, term by term, and its gradient: no hook, no ranks.

    Returns the noised batch, too.
    """
    sample, block = plan_of(samples)[(step - 1) * BATCH : step * BATCH].T
    batch = masking.Batch(samples.ids[sample].long(), samples.prompt_len[sample], samples.length[sample], block)
    generator = torch.Generator().manual_seed(derive_seed(SEED, "masks", step))
    noised = Signed().noise(batch, generator, SimpleNamespace(MASK_ID=MASK))
    model, loss, terms = PlainEngine(1), 0.0, 0
    logits = model.logits(noised.input_ids, **noised.model_args)  # (G, 2L, V)
    for i in range(BATCH):
        for pos in range(2 * LENGTH):
            if noised.supervised[i, pos]:
                target = noised.targets[i, pos]
                likelihood = logits[i, pos, target] - torch.logsumexp(logits[i, pos], dim=0)
                ratio = torch.exp(likelihood + noised.extra["before"][i, pos])
                loss = loss - noised.weights[i, pos] * torch.min(ratio, noised.extra["limit"][i])
                terms += 1
    loss.backward()
    assert noised.weights.min() < 0 < noised.weights.max()
    return noised, loss.item(), model.gradients(), terms


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("world, acc", [(1, 1), (2, 3), (4, 1), (1, 12), (3, 2), (8, 3), (1, 24)])
def test_the_hook_carries_any_objective(samples, world, acc, step):
    """For every way to divide the global batch, loss and gradient are those of one plain pass over it."""
    objective = Signed()
    engines, loss, gradient, supervised = step_of_all_ranks(samples, world, acc, step, objective.noise, objective.loss)
    noised, wanted_loss, wanted_gradient, terms = plain_pass(samples, step)
    assert supervised == terms > 50 and abs(wanted_loss) > 0.1
    assert math.fsum(objective.losses) == pytest.approx(wanted_loss, rel=1e-12, abs=1e-13)
    assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-5)  # what is logged is fp32
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-12 * float(wanted_gradient.abs().max()))

    rows = {number: i for i, number in enumerate(numbers(noised.input_ids))}
    calls = [call for engine in engines for call in engine.calls]
    assert sorted(i for call in calls for i in numbers(call["input_ids"])) == sorted(rows)
    for call in calls:  # what a row of the model's input comes with is its own
        some = [rows[number] for number in numbers(call["input_ids"])]
        assert call["input_ids"].equal(noised.input_ids[some]) and call["input_ids"].shape[1] == 2 * LENGTH
        assert call["logits_to_keep"].equal(noised.supervised[some])
        assert call["attention_mask"].equal(noised.model_args["attention_mask"][some])
        assert call["position_ids"].equal(noised.model_args["position_ids"][some])
        assert call.keys() == {"input_ids", "logits_to_keep", "attention_mask", "position_ids"}


@pytest.mark.parametrize("without", ["weights", "before", "limit", "attention_mask", "position_ids"])
def test_the_comparison_above_can_fail(samples, without):
    """If any one tensor came with the rows of other samples, the loss would be another."""
    objective = Signed()

    def noise(*args):
        noised = objective.noise(*args)
        for tensors in (noised.extra, noised.model_args, vars(noised)):
            if without in tensors:
                tensors[without] = tensors[without].roll(1, dims=0)
        return noised

    _, _, gradient, _ = step_of_all_ranks(samples, 2, 3, 1, noise, objective.loss)
    _, wanted_loss, wanted_gradient, _ = plain_pass(samples, 1)
    assert abs(math.fsum(objective.losses) - wanted_loss) > 1e-3
    assert (gradient - wanted_gradient).abs().max() > 1e-3 * wanted_gradient.abs().max()
