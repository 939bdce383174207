"""Decoding against a slow literal version of the algorithm: one prompt at a time, full logits, no padding."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models

MASK = 4
END = (120, 293)  # tokens that this model likes, instead of those that end an answer


@pytest.fixture(scope="module")
def model(base):
    return models.load_model(base, torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    """16 prompts of 1 to 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 400, (length,), generator=generator).tolist() for length in range(1, 17)]


@torch.no_grad()
def literal(model, prompt, gen_length, block_length, steps, cfg_scale=0.0, threshold=0.0, never=(), last=()):
    """The algorithm as it is written down, for one prompt. Returns ids and the number of forward passes.

    never: tokens that are not written; last: tokens that are written when all others of the block are.
    """
    canvas = prompt + [MASK] * gen_length
    per_block, taken = steps // (gen_length // block_length), 0
    for start in range(len(prompt), len(canvas), block_length):
        block = range(start, start + block_length)
        masks = sum(canvas[i] == MASK for i in block)
        numbers = [masks // per_block + (1 if step < masks % per_block else 0) for step in range(per_block)]
        for number in [1] * block_length if threshold else numbers:
            open_positions = [i for i in block if canvas[i] == MASK]
            if not open_positions:
                break
            logits = model(torch.tensor([canvas])).logits[0]
            if cfg_scale:
                blind = model(torch.tensor([[MASK] * len(prompt) + canvas[len(prompt) :]])).logits[0]
                logits = blind + (cfg_scale + 1) * (logits - blind)
            candidates = []
            for i in open_positions:
                possible = logits[i].clone()
                possible[list(never)] = -torch.inf
                token = int(possible.argmax())
                if token in last:
                    confidence = float(torch.softmax(possible, dim=0)[token]) - 2.0
                else:
                    possible[list(last)] = -torch.inf
                    confidence = float(torch.softmax(possible, dim=0)[token])
                candidates.append((confidence, i, token))
            candidates.sort(key=lambda candidate: -candidate[0])
            above = sum(confidence > threshold for confidence, _, _ in candidates) if threshold else 0
            for _, i, token in candidates[: max(number, above)]:
                canvas[i] = token
            taken += 2 if cfg_scale else 1
    return canvas[len(prompt) :], taken


SHAPES = [(16, 16, 16), (16, 4, 16), (16, 8, 4), (24, 8, 9), (16, 1, 16), (16, 4, 4)]


@pytest.mark.parametrize("gen_length, block_length, steps", SHAPES)
def test_a_ragged_batch_gives_the_tokens_of_the_literal_version(model, prompts, gen_length, block_length, steps):
    settings = Settings(gen_length, block_length, steps)
    ids, rows = decode.decode(model, prompts, settings)
    wanted = [literal(model, prompt, gen_length, block_length, steps) for prompt in prompts]
    assert ids.tolist() == [answer for answer, _ in wanted]
    assert rows == sum(taken for _, taken in wanted)
    for prompt, (answer, _) in zip(prompts[:3], wanted):
        assert decode.decode(model, [prompt], settings)[0].tolist() == [answer]


@pytest.mark.parametrize(
    "options, meaning",
    [
        ({"cfg_scale": 1.5}, {"cfg_scale": 1.5}),
        ({"threshold": 0.02}, {"threshold": 0.02}),
        ({"suppress_end": True}, {"last": END}),
        ({"begin_suppress_tokens": [293, 5]}, {"last": (293, 5)}),
        ({"suppress_end": True, "begin_suppress_tokens": [5, 8], "threshold": 0.02},
         {"last": (*END, 5, 8), "threshold": 0.02}),
        ({"suppress_tokens": [120], "begin_suppress_tokens": [293]}, {"never": (120,), "last": (293,)}),
    ],
)  # fmt: skip
def test_options_against_the_literal_version(model, prompts, options, meaning):
    ids, rows = decode.decode(model, prompts, Settings(16, 8, 16, **options), END)
    wanted = [literal(model, prompt, 16, 8, 16, **meaning) for prompt in prompts]
    assert ids.tolist() == [answer for answer, _ in wanted] and rows == sum(taken for _, taken in wanted)
    plain, plain_rows = decode.decode(model, prompts, Settings(16, 8, 16), END)
    assert plain.tolist() != ids.tolist() and ("threshold" not in options or rows < plain_rows)


def test_suppressed_tokens_are_never_written(model, prompts):
    """Not even with random remasking, at a temperature, or in gaps; those that are written last still occur."""
    plain, _ = decode.decode(model, prompts, Settings(16, 8, 16))
    assert all((plain == token).any() for token in END)
    for options in ({}, {"remasking": "random", "temperature": 0.5}):
        ids, _ = decode.decode(model, prompts, Settings(16, 8, 16, suppress_tokens=list(END), **options))
        assert not torch.isin(ids, torch.tensor(END)).any() and not (ids == MASK).any()
    ids, _ = decode.decode(model, prompts, Settings(16, 8, 16, begin_suppress_tokens=list(END)))
    assert torch.isin(ids, torch.tensor(END)).any()
    texts, settings = [prompt + [MASK] * 8 for prompt in prompts], Settings(16, 8, 16)
    filled = decode.infill(model, texts, settings)
    settings.suppress_tokens = [token for token in END if any(token in text for text in filled)]
    assert settings.suppress_tokens
    assert not any(token in text[-8:] for text in decode.infill(model, texts, settings) for token in END)


def test_a_causal_model_would_decode_otherwise(model, prompts):
    """The test above can fail: the order of the tokens depends on seeing the masks behind them."""
    causal = LlamaForCausalLM(model.config).eval()
    causal.load_state_dict(model.state_dict())
    causal.config.is_causal = True
    ids, _ = decode.decode(causal, prompts, Settings(16, 8, 16))
    causal.config.is_causal = False
    assert ids.tolist() != decode.decode(model, prompts, Settings(16, 8, 16))[0].tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_cache_is_exact_in_the_first_step_of_each_block(model, prompts, cache, cfg_scale):
    """One step a block leaves nothing to the cache; with more steps it changes few tokens and no shape."""
    exact = Settings(16, 4, 4, cfg_scale=cfg_scale)
    cached = Settings(16, 4, 4, cfg_scale=cfg_scale, cache=cache)
    assert decode.decode(model, prompts, cached)[0].tolist() == decode.decode(model, prompts, exact)[0].tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@torch.no_grad()
def test_cached_logits_are_those_of_stale_keys_and_values(model, prompts, cache):
    """Nothing has changed since the first pass, so nothing is stale: the second pass must give the same logits."""
    settings = Settings(16, 4, 16, cache=cache)
    canvas = decode.make_canvas(model.config, prompts, 16, "cpu")
    forward = decode.Forward(model, canvas, torch.arange(16), slice(20, 24), settings)
    first = forward.first()
    for _ in range(2):
        torch.testing.assert_close(forward.again(canvas.ids), first, rtol=1e-4, atol=1e-4)
    canvas.ids[:, 20] = 50  # and the new token is seen
    assert (forward.again(canvas.ids) - first).abs().max() > 0.01


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_decoding_writes_everything_and_agrees_mostly(model, prompts, cache):
    ids, rows = decode.decode(model, prompts, Settings(16, 8, 16, cache=cache))
    exact, exact_rows = decode.decode(model, prompts, Settings(16, 8, 16))
    assert (ids != MASK).all() and rows == exact_rows
    assert (ids == exact).float().mean() > 0.3  # random weights are the worst case; the README has real ones


def test_stop_at_end_skips_the_blocks_behind_it(model, prompts):
    """The text up to the end is that of the exact way, what follows is end of text, and no pass is spent on it."""
    exact, rows = decode.decode(model, prompts, Settings(32, 4, 32))
    ends = (int(exact[3, 6]), int(exact[5, 1]))  # tokens that do occur
    stopped, fewer = decode.decode(model, prompts, Settings(32, 4, 32, stop_at_end=True), ends)
    assert fewer < rows
    saved = 0
    for row, full in zip(stopped.tolist(), exact.tolist()):
        first = next((i for i, token in enumerate(full) if token in ends), len(full))
        block_end = min(32, (first // 4 + 1) * 4)
        assert row == full[:block_end] + [model.config.eos_token_id] * (32 - block_end)
        saved += 32 - block_end
    assert rows - fewer == saved


def test_temperature_draws_from_the_softmax():
    """The Gumbel trick at temperature T draws from softmax(logits / T): frequencies within 5 standard errors."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator, number = torch.Generator().manual_seed(0), 40_000
    drawn = torch.bincount(decode.sample(logits.expand(1, number, 4), 0.7, generator)[0], minlength=4) / number
    wanted = (logits / 0.7).softmax(dim=0)
    assert ((drawn - wanted).abs() < 5 * (wanted * (1 - wanted) / number).sqrt()).all()


def test_sampling_and_random_remasking_come_from_the_generator(model, prompts):
    for options in ({"temperature": 1.0}, {"remasking": "random"}):
        settings = Settings(16, 8, 16, **options)

        def draw(seed, settings=settings):
            return decode.decode(model, prompts, settings, generator=torch.Generator().manual_seed(seed))[0].tolist()

        assert draw(1) == draw(1) != draw(2)


def test_stream_shows_each_step_and_committed_tokens_stay(model, prompts):
    settings, shown = Settings(16, 4, 16), []
    for answer, _ in decode.stream(model, prompts[:2], settings):
        shown.append(answer.clone())
    assert [int((ids != MASK).sum()) for ids in shown] == [*range(2, 34, 2), 32]
    for before, after in zip(shown, shown[1:]):
        assert (after[before != MASK] == before[before != MASK]).all()
    assert (shown[3][:, :4] != MASK).all() and (shown[3][:, 4:] == MASK).all()  # block by block


def test_the_head_is_computed_for_the_block_only(model, prompts):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    decode.decode(model, prompts, Settings(16, 4, 4))
    handle.remove()
    assert set(shapes) == {(16, 4, 400)}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gen_length": 30}, "gen_length 30 is not a multiple of block_length 32"),
        ({"block_length": 0}, "not a multiple of block_length 0"),
        ({"gen_length": 0}, "gen_length 0"),
        ({"steps": 100}, "steps 100 is not a multiple of the 8 blocks"),
        ({"steps": 0}, "steps 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"threshold": 1.0}, "threshold"),
        ({"remasking": "high"}, "remasking 'high'"),
        ({"cache": "all"}, "cache 'all'"),
        ({"threshold": "high"}, "threshold 'high' is not of type float"),
        ({"steps": 256.0}, "steps 256.0 is not of type int"),
        (
            {"suppress_tokens": "[1;2]"},
            r"suppress_tokens '\[1;2\]' is not a list of token ids, such as \[126081,126348",
        ),
        ({"suppress_tokens": 7}, "suppress_tokens 7 is not a list of token ids"),
        ({"begin_suppress_tokens": [-1]}, r"begin_suppress_tokens \[-1\] is not a list of token ids"),
        ({"begin_suppress_tokens": [1.0]}, r"begin_suppress_tokens \[1.0\] is not a list of token ids"),
        ({"temperature": float("inf")}, "temperature and cfg_scale must be"),
        ({"cfg_scale": float("nan")}, "temperature and cfg_scale must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Settings(**options)


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens"])
def test_tokens_that_the_model_does_not_have_cannot_be_suppressed(model, name):
    with pytest.raises(InputError, match="token 400 cannot be suppressed: the model has 400 tokens"):
        decode.decode(model, [[5]], Settings(8, 8, 8, **{name: [399, 400]}))


def test_an_empty_prompt_lets_the_model_begin(model):
    """Alone, and in a batch with another; not all are masks in this test, as there would be ties."""
    for prompts in ([[]], [[], [10, 11, 12]]):
        canvas = decode.make_canvas(model.config, prompts, 8, "cpu")
        canvas.ids[0, canvas.start : canvas.start + 3] = torch.tensor([20, 21, 22])
        block = slice(canvas.start, canvas.start + 4)
        with torch.no_grad():
            logits = decode.Forward(model, canvas, torch.tensor([0]), block, Settings(8, 4, 8)).first()[0]
            wanted = model(torch.tensor([[20, 21, 22, *[MASK] * 5]])).logits[0, :4]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert not (decode.decode(model, [[], [10]], Settings(8, 4, 8))[0] == MASK).any()


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(InputError, match="prompt 3 has 1009 tokens; with gen_length 16 that is more than the model's"):
        decode.decode(model, [[5], [5] * 1008, [5] * 1009], Settings(16, 4, 4))


@pytest.mark.parametrize("key", ["mask_token_id", "pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [None, -1, 400])
def test_a_config_without_the_tokens_of_decoding_is_refused(model, key, value):
    config = copy.deepcopy(model.config)
    setattr(config, key, value)
    with pytest.raises(InputError, match=f"config.json has {key} {value}"):
        decode.make_canvas(config, [[5]], 16, "cpu")
