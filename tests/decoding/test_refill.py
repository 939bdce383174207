"""Decoding with a batch that stays full (refill.py): the answers are those of one prompt at a time."""

import random

import pytest
from test_decode import END, prompts  # noqa: F401

from blockwise.cli import InputError
from blockwise.decoding import decode, refill
from blockwise.decoding.settings import Settings

MANY = 11  # prompts, of which 3 are answered at a time


@pytest.fixture
def many(prompts):  # noqa: F811
    """Prompts of many lengths, in any order."""
    some = [prompt[start:] for start in range(3) for prompt in prompts if len(prompt) > start + 1]
    return random.Random(0).sample(some, MANY)


@pytest.fixture
def ends(model, many):
    """Two tokens that end some answers early, some late and some not at all."""
    exact = decode.decode(model, many, Settings(16, 4, 16))[0]
    tokens, counts = exact[:, :13].unique(return_counts=True)
    found = [int(token) for token in tokens[counts.argsort(descending=True)][2:5]]
    lengths = {decode.length(answer, found) for answer in exact.tolist()}
    assert len(lengths) > 3
    return found


OPTIONS = [
    {},
    {"steps": 8},
    {"threshold": 0.02},
    {"factor": 3.95, "steps": 6},
    {"cfg_scale": 1.0},
    {"suppress_end": True},
    {"remasking": "nearness", "window": 5},
    {"stop_at_end": False, "threshold": 0.02},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_and_passes_are_those_of_one_prompt_at_a_time(model, many, ends, options):
    settings = Settings(**({"gen_length": 16, "block_length": 4, "steps": 16, "stop_at_end": True} | options))
    assert refill.fits(model.config, settings)
    found = {}
    for together in refill.answers(model, many, settings, ends, 3):
        for number, ids, passes in together:
            assert number not in found
            found[number] = ids.tolist(), passes
    for number, prompt in enumerate(many):
        ids, rows = decode.decode(model, [prompt], settings, ends)
        assert found.pop(number) == (ids[0].tolist(), rows)
    assert not found


def test_the_batch_stays_full_while_prompts_wait(model, many, ends, monkeypatch):
    """Exact decoding writes a token of each row in each pass: so only the last answers leave rows empty."""
    sizes, forward, answered = [], model.forward, []

    def watched(*args, input_ids, **kwargs):
        sizes.append((len(input_ids), MANY - len(answered)))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    settings = Settings(16, 4, 16, stop_at_end=True)
    for together in refill.answers(model, many, settings, ends, 3):
        answered += [number for number, _, _ in together]
    assert sizes and all(rows == min(3, left) for rows, left in sizes)
    assert answered != sorted(answered)  # a short answer is there before a long one that began earlier


def test_what_depends_on_the_batch_is_not_refilled(model, many):
    config = model.config
    for options in (
        {"temperature": 1.0}, {"remasking": "random"}, {"suffix": 2}, {"cache": "dual"}, {"steps": 6}, {"steps": 12},
        {"gen_length": 14, "threshold": 0.02}, {"sampler": "conv"},
    ):  # fmt: skip
        assert not refill.fits(config, Settings(**({"gen_length": 16, "block_length": 4, "steps": 16} | options)))
    with pytest.raises(InputError, match="prompt 2 has 9999 tokens"):
        next(refill.answers(model, [many[0], [5] * 9999], Settings(16, 4, 16), END, 2))
