"""Filling in gaps: against a literal version, in batches, and by generate.py."""

import pytest
import torch

from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings

MASK = 4
SETTINGS = Settings(gen_length=16, block_length=8, steps=16)


def with_gaps(length, gaps, seed):
    """Random ids with masks at these places."""
    ids = torch.randint(8, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [MASK if place in gaps else token for place, token in enumerate(ids)]


TEXTS = [with_gaps(29, {3, 4, 5, 12, 20, 28}, 0), with_gaps(10, {0, 9}, 1), with_gaps(16, set(range(16)), 2), [MASK]]


@torch.no_grad()
def literal(model, text, per_step):
    """Windows of 8 from the left; in each step, the most confident masks of the window are written."""
    ids = list(text)
    for start in range(0, len(ids), 8):
        while places := [place for place in range(start, min(start + 8, len(ids))) if ids[place] == MASK]:
            logits = model(torch.tensor([ids])).logits[0]
            chances = logits.softmax(dim=-1)
            logits[:, MASK] = -torch.inf
            token = logits.argmax(dim=-1)
            places.sort(key=lambda place: -chances[place, token[place]].item())
            for place in places[:per_step]:
                ids[place] = token[place].item()
    return ids


@pytest.mark.parametrize("steps, per_step", [(16, 1), (8, 2), (2, 8)])
def test_it_is_the_literal_version_for_every_batch(model, steps, per_step):
    settings = Settings(gen_length=16, block_length=8, steps=steps)
    filled = decode.infill(model, TEXTS, settings)
    for text, ids in zip(TEXTS, filled, strict=True):
        assert ids == literal(model, text, per_step) == decode.infill(model, [text], settings)[0]
        assert MASK not in ids and len(ids) == len(text)
        assert all(new == old for new, old in zip(ids, text) if old != MASK)


def test_a_text_without_gaps_stays(model):
    assert decode.infill(model, [[10, 11, 12]], SETTINGS) == [[10, 11, 12]]


def test_what_cannot_be_filled_in_is_refused(model):
    for options in ({"cfg_scale": 1.0}, {"cache": "dual"}, {"suffix": 4}):
        with pytest.raises(InputError, match="neither guidance nor a cache"):
            decode.infill(model, TEXTS, Settings(16, 8, 16, **options))
    with pytest.raises(InputError, match="has 1025 tokens; the model has 1024 positions"):
        decode.infill(model, [[MASK] * 1025], SETTINGS)
    model.config.block_diffusion_size = 8
    try:
        with pytest.raises(InputError, match="trained to see no later block"):
            decode.infill(model, TEXTS, SETTINGS)
    finally:
        del model.config.block_diffusion_size
