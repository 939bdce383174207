"""GRPO: log-probabilities against literal loops and decoding itself, the loss, and trainings that are resumed."""

import csv
import itertools
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import launch
from faults.outcome import check_finished
from faults.train_vowels import vowels
from safetensors.torch import load_file

import masking
import train_grpo
from blockwise import rewards
from blockwise.cli import InputError
from blockwise.data import derive_seed
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.models import llada
from blockwise.rollouts import Rollouts
from blockwise.run.ranks import Ranks
from experiments.make_base import make_config

MASK, ENDS = 4, (120, 293)  # the second: tokens that this model likes
G = 14  # tokens of an answer: with blocks of 4, the last one is shorter
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions of different lengths, for prompts of different lengths."""
    file = tmp_path_factory.mktemp("rl") / "problems.jsonl"
    rows = [{"question": "How many? " * (1 + 3 * i), "answer": f"#### {i}"} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def more_rewards(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", rewards.REWARDS | {"vowels": vowels})
    monkeypatch.setattr(rewards, "READERS", rewards.READERS | {"vowels": rewards.nothing_of})


def knobs_of(base, data, **changes):
    knobs = {name: value for name, value in vars(train_grpo).items() if name.isupper()}
    small = {
        "MODEL_NAME": str(base), "DATA": str(data), "MASK_ID": MASK, "MAX_LEN": 192, "REWARD": "vowels", "GROUP": 4,
        "PROMPTS": 3, "GEN_LENGTH": 16, "BLOCK_SIZE": 4, "STEPS": 8, "MICRO_BSIZE": 4,
    }  # fmt: skip
    return SimpleNamespace(**knobs | small | changes)


def model_of(base, ends=()):
    model = models.load_model(base, torch.float32)
    model.config.eos_token_id = [1, *ends]  # answers of random weights do not end else
    return model.train()


class Round:
    """A round of rollouts by a model, and the noise of its updates, as the trainer has them."""

    def __init__(self, base, data, ends=ENDS, **changes):
        self.knobs, self.model = knobs_of(base, data, **changes), model_of(base, ends)
        self.rollouts = Rollouts(self.knobs)
        self.rollouts.prepare(base, models.load_config(base), ONE)
        self.state = self.rollouts.make(self.model, ONE, 1, lambda: None)
        self.samples, self.plan = self.rollouts.use(1, self.state, ONE.device)

    def noised(self, update, seed=0):
        size = self.knobs.PROMPTS * self.knobs.GROUP
        batch = self.samples.batch(*self.plan[update * size : (update + 1) * size].T)
        return train_grpo.noise(batch, seeded(seed), self.knobs)

    def log_probs(self, noised):
        with torch.no_grad():
            return self.rollouts.log_probs(self.model.eval(), ONE, noised)

    def parts(self, update):
        """(prompt ids, answer ids, order, answer length, part to train) of each rollout, as lists."""
        size = self.knobs.PROMPTS * self.knobs.GROUP
        prompts = [self.rollouts.prompts[problem] for problem in self.state["problem"].tolist()]
        rest = (self.state[name].tolist() for name in ("answers", "order", "length"))
        return zip(prompts, *rest, self.plan[update * size : (update + 1) * size, 1].tolist(), strict=True)

    @torch.no_grad()
    def literal(self, canvas, token, position):
        """log p of a token, from a pass over one rollout without padding."""
        logits = self.model.eval()(torch.tensor([canvas])).logits[0, position].double() / self.knobs.TEMPERATURE
        logits[MASK] = -math.inf
        return float(logits.log_softmax(dim=0)[token])


@pytest.fixture(scope="module")
def a_round(base, data):
    """One of them for each estimator, made once."""
    rounds = {}

    def make(estimator):
        if estimator not in rounds:
            changes = {"UPDATES": 3, "TEMPERATURE": 0.8, "ESTIMATOR": estimator, "GEN_LENGTH": G}
            changes |= {"P_MASK_PROMPT": 0.3} if estimator == "onestep" else {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(rewards.REWARDS, "vowels", vowels)
                patch.setitem(rewards.READERS, "vowels", rewards.nothing_of)
                rounds[estimator] = Round(base, data, **changes)
        return rounds[estimator]

    return make


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("estimator", ["block", "trace", "onestep"])
def test_log_probabilities_are_those_of_a_loop(a_round, estimator):
    """Prompts have different lengths and answers end early; a loop takes each rollout alone, without padding."""
    one = a_round(estimator)
    lengths = one.state["length"]
    assert len({len(one.rollouts.prompts[i]) for i in one.state["problem"].tolist()}) == 3, "there is padding"
    assert lengths.min() < 8 and lengths.max() == G, "some answers end early"
    tokens = 0
    for update in range(3):
        noised = one.noised(update)
        found = one.log_probs(noised)
        start = found.shape[1] - G
        for row, (prompt, answer, order, length, part) in enumerate(one.parts(update)):
            if estimator == "block":
                canvas = answer[: 4 * part] + [MASK] * (G - 4 * part)
                wanted = range(4 * part, min(4 * part + 4, length))
            elif estimator == "trace":
                canvas = [MASK if order[j] >= part else answer[j] for j in range(G)]
                wanted = [j for j in range(length) if order[j] == part]
            else:
                prompt = noised.input_ids[row, start - len(prompt) : start].tolist()  # some of it is masked
                canvas, wanted = [MASK] * G, range(length)
            assert noised.supervised[row].nonzero()[:, 0].tolist() == [start + j for j in wanted]
            for j in wanted:
                value = one.literal(prompt + canvas, answer[j], len(prompt) + j)
                assert found[row, start + j].item() == pytest.approx(value, abs=2e-4)
            tokens += len(wanted)
        assert (found[~noised.supervised] == 0).all()
        assert noised.weights.sum().item() == pytest.approx(1), "a mean over the tokens of the global batch"
        assert noised.weights[noised.supervised].unique().numel() == 1
    if estimator == "block":  # no block comes twice, and all of an answer with three blocks was trained
        for row, length in enumerate(lengths.tolist()):
            blocks = one.plan[row :: len(lengths), 1].tolist()
            have = -(-length // 4)
            assert len({*blocks}) == 3 and sum(block < have for block in blocks) == min(3, have)
    assert tokens > 40


def test_the_prompt_of_the_published_estimate_is_masked_in_part(a_round, base, data):
    """With the same tokens each time for the same seed, others for another, and never the padding."""
    one = a_round("onestep")
    noised, again, other = one.noised(0), one.noised(0), one.noised(0, seed=1)
    assert noised.input_ids.equal(again.input_ids) and not noised.input_ids.equal(other.input_ids)
    start, seen = noised.input_ids.shape[1] - G, one.samples.extra["seen"]
    masked = noised.input_ids == MASK
    assert masked[:, start:].all() and not masked[~seen].any()
    share = masked[:, :start][seen[:, :start]].float().mean().item()
    assert share == pytest.approx(0.3, abs=0.06)


def test_trace_has_the_probabilities_that_decoding_had(base, data):
    """What decoding says of each of its steps, all of them added up: so the sum over all updates is exact."""
    one = Round(base, data, ends=(), ESTIMATOR="trace", UPDATES=8, PROMPTS=1)
    (number,), steps = one.rollouts.problems_of(0), []

    def watch(start, logits, old, new):
        logits = logits.clone()
        logits[..., MASK] = -torch.inf
        values = logits.log_softmax(dim=-1).gather(-1, new[..., None])[..., 0]
        steps.append(torch.where(old != new, values, 0.0).sum(dim=1))

    seed = derive_seed(one.knobs.SEED, "rollouts", 0, 0)
    prompts = [one.rollouts.prompts[number]] * 4
    answers, _ = decode.decode(one.model.eval(), prompts, one.rollouts.settings, [1], seeded(seed), watch)
    assert answers.equal(one.state["answers"]) and len(steps) == 8
    assert one.state["order"].sort(dim=1).values.tolist() == [[i // 2 for i in range(16)]] * 4, "two tokens a step"
    total = sum(one.log_probs(one.noised(update)).sum(dim=1) for update in range(8))
    torch.testing.assert_close(total, sum(steps), rtol=1e-4, atol=1e-3)


VOCABULARY, BLOCK, ANSWER = 7, 2, 4


@pytest.fixture(scope="module")
def tiny():
    """A model with 7 tokens, of which 6 can be written, and a prompt."""
    torch.manual_seed(3)
    model = llada.LLaDAForCausalLM(make_config(VOCABULARY, 32, 2)).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model, [5, 2, 6]


@torch.no_grad()
def log_probs_of_all(tiny, estimator, temperature):
    """log p of each of the 6^4 answers, by noise and log_probs of the training."""
    model, prompt = tiny
    words = [token for token in range(VOCABULARY) if token != MASK]
    answers = torch.tensor(list(itertools.product(words, repeat=ANSWER)))
    size = len(answers)
    ids = torch.cat([torch.tensor([prompt] * size), answers], dim=1)
    start = torch.full((size,), len(prompt))
    extra = {"seen": torch.ones_like(ids, dtype=torch.bool), "order": torch.full_like(ids, -1), "end": start + ANSWER,
             "advantage": torch.zeros(size)}  # fmt: skip
    knobs = SimpleNamespace(ESTIMATOR=estimator, BLOCK_SIZE=BLOCK, P_MASK_PROMPT=0.0, MASK_ID=MASK)
    total = torch.zeros(size)
    for block in range(ANSWER // BLOCK if estimator == "block" else 1):
        batch = masking.Batch(ids, start, start + ANSWER, torch.full_like(start, block), extra)
        noised = train_grpo.noise(batch, seeded(0), knobs)
        logits = model(noised.input_ids, logits_to_keep=noised.supervised).logits
        total += masking.log_probs(logits, noised, temperature, MASK).view(size, -1).sum(dim=1)
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_probabilities_are_the_frequencies_of_rollouts(tiny, temperature):
    """At one step per block, `block` is exact: chi-square of 20,000 answers; the published estimate is far off."""
    model, prompt = tiny
    settings = Settings(ANSWER, BLOCK, ANSWER // BLOCK, temperature)
    drawn, number = decode.decode(model, [prompt] * 20_000, settings, (), seeded(1))[0], 20_000
    place = torch.tensor([token - (token > MASK) for token in range(VOCABULARY)])
    counts = (place[drawn] * 6 ** torch.arange(ANSWER - 1, -1, -1)).sum(dim=1).bincount(minlength=6**ANSWER)

    def chi_square(estimator):
        log_p = log_probs_of_all(tiny, estimator, temperature)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
        expected = number * log_p.double().exp()
        often = expected >= 5
        statistic = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
        return statistic, int(often.sum())

    statistic, cells = chi_square("block")
    assert cells > 100 and abs(statistic - cells) < 5 * math.sqrt(2 * cells)
    wrong, cells = chi_square("onestep")
    assert wrong > cells + 20 * math.sqrt(2 * cells)


# ---------------------------------------------------------------- the loss


def test_the_first_update_is_that_of_reinforce(a_round):
    """Its gradient is that of the mean of -A log p over the global batch's tokens, by a loop without padding."""
    one = a_round("block")
    noised = one.noised(0)
    reward = one.state["reward"].view(3, 4)
    wanted = (reward - reward.mean(dim=1, keepdim=True)).flatten().float()
    assert noised.extra["advantage"].tolist() == wanted.tolist()
    assert wanted.abs().max() > 0.01

    def gradient(loss):
        one.model.zero_grad()
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in one.model.parameters()])

    arguments = {"temperature": one.knobs.TEMPERATURE, "mask_id": MASK, "epsilon": 0.2, "beta": 0.0}
    logits = one.model(noised.input_ids, logits_to_keep=noised.supervised, **noised.model_args).logits
    loss, measured = masking.policy_loss(logits, noised, **arguments)
    assert measured.keys() == {"clip_share"} and measured["clip_share"] == 0
    found = gradient(loss)
    terms, tokens = [], 0
    for (prompt, answer, _, length, block), advantage in zip(one.parts(0), wanted.tolist()):
        canvas = prompt + answer[: 4 * block] + [MASK] * (G - 4 * block)
        logits = one.model(torch.tensor([canvas])).logits[0] / one.knobs.TEMPERATURE
        for j in range(4 * block, min(4 * block + 4, length)):
            allowed = torch.cat([logits[len(prompt) + j, :MASK], logits[len(prompt) + j, MASK + 1 :]])
            terms.append(advantage * (logits[len(prompt) + j, answer[j]] - allowed.logsumexp(dim=0)))
            tokens += 1
    literal = gradient(-sum(terms) / tokens)
    assert tokens == noised.supervised.sum()
    assert literal.norm() > 1e-3 and (found - literal).norm() < 1e-4 * literal.norm()


def test_the_clip_takes_the_gradient_away_on_one_side_only():
    """Ratios below, within and above the range, for advantages of both signs, against the formula with scalars."""
    cases = list(itertools.product((0.5, 0.9, 1.0, 1.1, 1.6), (1.5, -1.5, 0.0)))
    logits = torch.randn(len(cases), 9, generator=seeded(0)).requires_grad_()
    targets = torch.tensor([[i % 4 for i in range(len(cases))]]).T  # (15, 1): one token each
    ones = torch.ones(len(cases), 1)
    plain = masking.Noised(targets, ones.bool(), targets, ones)
    now = masking.log_probs(logits, plain, 1.0, MASK).detach()
    ratios, advantages = (torch.tensor(column) for column in zip(*cases))
    reference = now + torch.randn(len(cases), generator=seeded(1))
    extra = {"advantage": advantages, "old": (now - ratios.log())[:, None], "reference": reference[:, None]}
    for beta in (0.0, 0.3):
        noised = masking.Noised(targets, ones.bool(), targets, ones / len(cases), extra)
        loss, measured = masking.policy_loss(logits, noised, temperature=1.0, mask_id=MASK, epsilon=0.2, beta=beta)
        wanted, kls, clipped = 0.0, [], []
        for (ratio, advantage), gap in zip(cases, (reference - now).tolist()):
            kls.append(math.exp(gap) - gap - 1)
            wanted += -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) + beta * kls[-1]
            clipped.append((ratio == 1.6 and advantage > 0) or (ratio == 0.5 and advantage < 0))
        assert loss.item() == pytest.approx(wanted / len(cases), abs=1e-5)
        assert measured["clip_share"].item() == pytest.approx(sum(clipped) / len(cases))
        logits.grad = None
        loss.backward()
        moves = logits.grad.abs().sum(dim=1) > 1e-7
        if beta:
            assert measured["kl"].item() == pytest.approx(sum(kls) / len(kls), rel=1e-4) and moves.all()
        else:
            nothing = [c or advantage == 0 for c, (_, advantage) in zip(clipped, cases)]
            assert "kl" not in measured and (~moves).tolist() == nothing


def test_advantages(a_round):
    one = a_round("block").rollouts
    before = one.state
    one.state = {"reward": torch.tensor([0.1] * 4 + [0.0, 0.0, 0.0, 2.0] + [0.7, 0.1, 0.1, 0.1], dtype=torch.float64)}
    assert one.advantages().tolist() == pytest.approx([0] * 4 + [-0.5, -0.5, -0.5, 1.5] + [0.45, -0.15, -0.15, -0.15])
    assert one.advantages()[:4].tolist() == [0.0] * 4, "exactly, though 0.1 is no binary number"
    assert one.varied().tolist() == [False, True, True]
    one.state = before


# ---------------------------------------------------------------- trainings

SCRIPT = "tests/faults/train_vowels.py"
RUN = {
    "REWARD": "vowels", "GROUP": 4, "PROMPTS": 2, "ROUNDS": 3, "UPDATES": 2, "GEN_LENGTH": 16, "STEPS": 8,
    "BLOCK_SIZE": 4, "BETA": 0.1, "LORA_DROPOUT": 0.0, "MICRO_BSIZE": 4, "SAVE_EVERY": 0, "RESUME_EVERY": 0,
    "SAMPLE_EVERY": 2,
}  # fmt: skip
WITHOUT = ("DATA_PT", "GRAD_ACC", "TOTAL_TRAIN_STEPS")  # of conftest.TRAINING


@pytest.fixture(scope="module")
def train(fork, base, data):
    """train(cwd, ranks=1, faults=..., **knobs) runs a training on ranks that are forked; see conftest.fork."""

    def train(cwd, ranks=1, faults=None, **changes):
        return fork(cwd, ranks, SCRIPT, *flags_of(base, data, **changes), faults=faults)

    return train


def flags_of(base, data, **changes):
    from conftest import TRAINING

    knobs = {name: value for name, value in TRAINING.items() if name not in WITHOUT}
    knobs |= {"MODEL_NAME": base, "DATA": data} | RUN | changes
    return [f"--{name}={value}" for name, value in knobs.items()]


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    """An uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    done = train(folder)
    assert done.codes == [0], done.output
    return folder


def metrics(folder):
    with open(folder / "out/run ö_logs/metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_what_a_run_shows(reference):
    rows = metrics(reference)
    more = ["reward", "varied_groups", "answer_length", "rollout_tokens_per_second", "clip_share", "kl"]
    assert list(rows[0])[-6:] == more and len(rows) == 6
    assert rows[0]["clip_share"] == rows[0]["kl"] == 0, "adapters begin as nothing, and the ratio as 1"
    assert all(row["kl"] > 0 for row in rows[1:]) and max(row["clip_share"] for row in rows) > 0
    assert rows[0]["reward"] == rows[1]["reward"] != rows[2]["reward"], "two updates a round"
    samples = [json.loads(line) for line in (reference / "out/run ö_logs/samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["round"]) for row in samples] == [(2 * r, r) for r in (1, 2, 3) for _ in range(4)]
    assert all(row["reward"] == vowels(row["completion"], None) for row in samples)
    assert all("How many?" in row["prompt"] for row in samples)
    card = (reference / "out/run ö_step0006/README.md").read_text()
    assert '"gen_length": 16, "block_length": 4, "steps": 8' in card and "problems.jsonl, sha256" in card
    assert json.loads((reference / "out/run ö_step0006/prompt_format.json").read_text())["wrap"].startswith("Below")


def test_two_ranks_of_the_real_launcher_train_what_one_does(reference, base, data, tmp_path):
    """The same rollouts and losses; weights up to the rounding of sums in another order."""
    done = launch(2, "tests.faults.train_vowels", *flags_of(base, data), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(reference), metrics(tmp_path), strict=True):
        for name in set(one) - {"tokens_per_second", "rollout_tokens_per_second", "peak_memory_gb"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=2e-6), name
    one, two = (
        load_file(folder / "out/run ö_step0006/adapter/adapter_model.safetensors") for folder in (reference, tmp_path)
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


def test_the_split_into_micro_batches_does_not_matter(reference, train, tmp_path):
    done = train(tmp_path / "run", MICRO_BSIZE=1)
    assert done.codes == [0], done.output
    for one, two in zip(metrics(reference), metrics(tmp_path / "run"), strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "clip_share", "supervised_tokens"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=2e-6), name


@pytest.mark.parametrize("event, after", [("stepped 2$", 2), ("step 3$", 3), ("step 4$", 4)])
def test_resuming_to_the_byte(reference, train, tmp_path, event, after):
    """Stopped while the second round's answers are made, within that round, and at its end; with 2 points, or 1."""
    done = train(tmp_path / "run", faults={"at": [event, signal.SIGUSR1]})
    assert done.codes == [75] and f"after step {after};" in done.output, done.output
    (point,) = (tmp_path / "run/out").glob("*_logs/resume_*")
    assert point.name == f"resume_step{after:04d}" and (point / "rollouts.safetensors").exists()
    done = train(tmp_path / "run", RESUME=True)
    assert done.codes == [0], done.output
    check_finished(tmp_path / "run/out", reference / "out")
    columns = [{k: v for k, v in row.items() if "second" not in k and "peak" not in k} for row in metrics(reference)]
    again = [
        {k: v for k, v in row.items() if "second" not in k and "peak" not in k} for row in metrics(tmp_path / "run")
    ]
    assert again == columns
    samples = "out/run ö_logs/samples.jsonl"
    assert (tmp_path / "run" / samples).read_bytes() == (reference / samples).read_bytes()


def test_a_signal_to_one_of_two_ranks(train, tmp_path):
    """It comes to the second while answers are made: both stop with a point of the steps before, and resume."""
    whole = train(tmp_path / "whole", 2)
    stopped = train(tmp_path / "run", 2, faults={"rank": 1, "at": ["stepped 2$", signal.SIGUSR1]})
    assert whole.codes == [0, 0] and stopped.codes == [75, 75] and "after step 2;" in stopped.output, stopped.output
    resumed = train(tmp_path / "run", 2, RESUME=True)
    assert resumed.codes == [0, 0], resumed.output
    check_finished(tmp_path / "run/out", tmp_path / "whole/out")


def test_damaged_rollouts_are_noticed(reference, train, tmp_path):
    done = train(tmp_path / "run", faults={"at": ["step 3$", signal.SIGUSR1]}, RESUME_EVERY=1)
    assert done.codes == [75], done.output
    (file,) = (tmp_path / "run/out").glob("*_logs/resume_step0003/rollouts.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = train(tmp_path / "run", RESUME=True)
    assert done.codes == [0] and "rollouts.safetensors is not what was written" in done.output, done.output
    check_finished(tmp_path / "run/out", reference / "out")


def test_equal_rewards_change_nothing(train, base, tmp_path):
    """Not a bit of the weights, with all of them trained, in two updates of two rounds."""
    done = train(tmp_path / "run", REWARD="same", ROUNDS=2, BETA=0.0, LORA_RANK=0, SAVE_DTYPE="float32", SAVE_EVERY=1)
    assert done.codes == [0], done.output
    steps = [sorted(folder.glob("*.safetensors")) for folder in (tmp_path / "run/out").glob("*_step*")]
    contents = [[shard.read_bytes() for shard in shards] for shards in steps]
    assert len(contents) == 4 and len(contents[0]) > 1 and all(content == contents[0] for content in contents)
    before = {
        name: weight.float()
        for shard in sorted(base.glob("*.safetensors"))
        for name, weight in load_file(shard).items()
    }
    for shard in steps[0]:
        assert all(weight.equal(before[name]) for name, weight in load_file(shard).items())
    assert [row["varied_groups"] for row in metrics(tmp_path / "run")] == [0.0] * 4


def test_a_bad_step_names_the_problems(train, data, tmp_path):
    """An LR with which weights overflow: the lines of the data are named, and the run ends after 3 such steps."""
    done = train(tmp_path / "run", LR=1.0, LORA_ALPHA=10**30, ROUNDS=8)
    assert done.codes == [1] and "3 bad steps in a row" in done.output, done.output
    rows = [json.loads(line) for line in (tmp_path / "run/out/run ö_logs/bad_steps.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(set(row["rows"]) <= set(range(5)) and row["rows"] for row in rows)


# ---------------------------------------------------------------- what is refused


def test_knobs_that_cannot_be_are_refused_on_every_rank(train, tmp_path):
    done = train(tmp_path / "run", ranks=2, MICRO_BSIZE=3)
    said = "the 8 rollouts of a round = 2 PROMPTS x 4 GROUP cannot be shared out as micro-batches of 3 MICRO_BSIZE on 2"
    assert done.codes == [1, 1] and said in done.output and not (tmp_path / "run/out").exists()


REFUSED = [
    ({"LORA_DROPOUT": 0.1}, "LORA_DROPOUT=0.1 must be 0.0"),
    ({"BETA": 0.1, "LORA_RANK": 0}, "BETA=0.1 needs adapters"),
    ({"P_MASK_PROMPT": 0.15}, "P_MASK_PROMPT=0.15 is of ESTIMATOR 'onestep' only"),
    (
        {"UPDATES": 5},
        "UPDATES=5 is more than the 4 parts of an answer: with ESTIMATOR 'block', an update trains one block",
    ),
    ({"UPDATES": 9, "ESTIMATOR": "trace"}, "UPDATES=9 is more than the 8 parts of an answer"),
    ({"STEPS": 3}, "steps 3 must be at least 4, one for each block"),
    ({"REWARD": "gsm9k"}, "'gsm9k' is no reward"),
    ({"REWARD": "code"}, "REWARD='code' runs programs that the model has written"),
    ({"REWARD": "sudoku"}, "problems.jsonl, line 1 needs a text as puzzle"),
    ({"DATA": "missing.jsonl"}, "missing.jsonl cannot be read"),
    ({"MAX_LEN": 70}, "problems.jsonl, line 2: its prompt has"),
    ({"WRAP": "missing.txt"}, "--wrap missing.txt is neither metamath nor none nor a file"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_what_is_refused(base, data, changes, said):
    with pytest.raises(InputError) as error:
        Rollouts(knobs_of(base, data, **changes)).prepare(base, models.load_config(base), ONE)
    assert said in str(error.value)


def test_block_diffusion_is_refused(base, data):
    config = models.load_config(base)
    config.block_diffusion_size = 4
    with pytest.raises(InputError, match="was trained by block diffusion: .* start from another base"):
        Rollouts(knobs_of(base, data)).prepare(base, config, ONE)


def test_an_answer_without_a_finite_reward_ends_the_run(base, data, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "vowels", lambda completion, row: math.nan)
    with pytest.raises(InputError, match=r"problems.jsonl, line \d: the reward of an answer is \[nan"):
        Round(base, data)
