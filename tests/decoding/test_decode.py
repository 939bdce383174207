"""Decoding against a slow literal version of the algorithm: one prompt at a time, full logits, no padding."""

import copy
import itertools
from fractions import Fraction

import pytest
import torch
from transformers import LlamaForCausalLM

from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings

MASK = 4
END = (120, 293)  # tokens that this model likes, instead of those that end an answer


@pytest.fixture(scope="module")
def prompts():
    """16 prompts of 1 to 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 400, (length,), generator=generator).tolist() for length in range(1, 17)]


@torch.no_grad()
def literal(
    model, prompt, gen_length, block_length, steps, cfg_scale=0.0, threshold=0.0, factor=0.0, never=(), last=(),
    suffix=None, suffix_last=False,
):  # fmt: skip
    """The algorithm as it is written down, for one prompt. Returns ids and the number of forward passes.

    never: tokens that are not written; last: tokens that are written when all others of the block are.
    suffix: how many ids behind the block the model is given, with suffix_last also the last id, at its own position.
    """
    canvas, taken, passes = prompt + [MASK] * gen_length, 0, 0
    for start in range(len(prompt), len(canvas), block_length):
        block = range(start, min(start + block_length, len(canvas)))
        per_block = int(steps * Fraction(block.stop - len(prompt), gen_length)) - passes
        passes += per_block
        masks = sum(canvas[i] == MASK for i in block)
        numbers = [masks // per_block + (1 if step < masks % per_block else 0) for step in range(per_block)]
        for number in [1] * len(block) if threshold or factor else numbers:
            open_positions = [i for i in block if canvas[i] == MASK]
            if not open_positions:
                break
            places = [i for i in range(len(canvas)) if suffix is None or i < block.stop + suffix]
            places += [len(canvas) - 1] if suffix_last and len(places) < len(canvas) else []
            position_ids, ids = torch.tensor([places]), [canvas[i] for i in places]
            logits = model(torch.tensor([ids]), position_ids=position_ids).logits[0]
            if cfg_scale:
                blind = [MASK] * len(prompt) + ids[len(prompt) :]
                blind = model(torch.tensor([blind]), position_ids=position_ids).logits[0]
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
            above = best_by_factor([confidence for confidence, _, _ in candidates], factor) if factor else above
            for _, i, token in candidates[: max(number, above)]:
                canvas[i] = token
            taken += 2 if cfg_scale else 1
    return canvas[len(prompt) :], taken


def best_by_factor(confidences, factor):
    """How many of these, sorted, Fast-dLLM's code writes, without its exception for the last one; none below 0."""
    for rank, confidence in enumerate(confidences, start=1):
        if rank > 1 and confidence < max(0, 1 - factor / (rank + 1)):
            return rank - 1
    return len(confidences)


SHAPES = [(16, 16, 16), (16, 4, 16), (16, 8, 4), (24, 8, 9), (16, 1, 16), (16, 4, 4)]
SHAPES += [(10, 4, 10), (10, 4, 5), (13, 8, 7), (3, 8, 2), (16, 4, 7)]  # shorter last blocks, steps that do not divide


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
        ({"factor": 3.95}, {"factor": 3.95}),
        ({"suppress_end": True}, {"last": END}),
        ({"suppress_end": True, "factor": 9.0}, {"last": END, "factor": 9.0}),
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
    assert plain.tolist() != ids.tolist() and (not {"threshold", "factor"} & options.keys() or rows < plain_rows)


def test_the_passes_of_a_block_are_those_of_llada_and_last_blocks_may_be_shorter():
    """Exact values; for all small sizes, the steps are used up and every token is written; what divides is even."""

    def all_passes(gen_length, block_length, steps):
        settings = Settings(gen_length, block_length, steps)
        starts = range(0, gen_length, block_length)
        return [decode.tokens_per_pass(settings, i, min(i + block_length, gen_length)) for i in starts]

    assert all_passes(10, 4, 10) == [[1] * 4, [1] * 4, [1] * 2]
    assert all_passes(10, 4, 5) == [[2, 2], [2, 2], [2]]
    assert all_passes(10, 4, 4) == [[4], [2, 2], [2]]
    assert all_passes(10, 4, 3) == [[4], [4], [2]]
    assert all_passes(24, 8, 9) == [[3, 3, 2]] * 3
    assert all_passes(16, 4, 7) == [[4], [2, 2], [2, 2], [2, 2]]
    for gen_length, block_length in itertools.product(range(1, 14), range(1, 15)):
        blocks = -(-gen_length // block_length)
        for steps in range(blocks, gen_length + 1):
            found = all_passes(gen_length, block_length, steps)
            assert sum(map(len, found)) == steps and min(min(numbers) for numbers in found) >= 1
            sizes = [block_length] * (gen_length // block_length) + [gen_length % block_length or block_length]
            assert [sum(numbers) for numbers in found] == sizes[:blocks]
            assert steps != gen_length or all(number == 1 for numbers in found for number in numbers)
            if gen_length % block_length == steps % blocks == 0:
                each = steps // blocks
                assert found == [[block_length // each + (i < block_length % each) for i in range(each)]] * blocks


def test_the_factor_writes_the_best_that_fast_dllm_would():
    """2505.22618: the largest n with (n + 1) (1 - c_n) <= factor, which is also the number of ranks that pass."""
    confidence = torch.tensor([[0.9, 0.4, 0.7, 0.66], [0.9, -torch.inf, 0.3, 0.2], [1.0, 1.0, -1.5, 1.0]])
    wanted = [[True, False, True, False], [True, False, False, False], [True, True, False, True]]
    assert decode.above_factor(confidence, 1.0).tolist() == wanted
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for factor in (0.1, 0.5, 1.0, 1.9):
        some = 1 - torch.rand(200, 8, generator=generator) * torch.rand(200, 1, generator=generator)  # (200, 8)
        found = decode.above_factor(some, factor)
        for row, chosen in zip(some.tolist(), found.tolist()):
            best = sorted(row, reverse=True)
            passed = [n for n, c in enumerate(best, start=1) if (n + 1) * (1 - c) <= factor]
            assert max(passed, default=0) == len(passed) == sum(chosen)
            assert sorted(c for c, one in zip(row, chosen) if one) == sorted(best[: len(passed)])
            assert max(1, len(passed)) == best_by_factor(best, factor)
            sizes.add(len(passed))
    assert sizes == set(range(9))


WINDOWS = [
    {"suffix": 0}, {"suffix": 3}, {"suffix": 0, "suffix_last": True}, {"suffix": 5, "suffix_last": True},
    {"suffix": 2, "cfg_scale": 1.5, "suffix_last": True}, {"suffix": 2, "threshold": 0.02},
]  # fmt: skip


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_a_suffix_window_gives_the_tokens_of_passes_over_the_ids_before_its_end(model, prompts, options):
    """With a last block that is shorter; alone as in the batch; and it is not what all masks give."""
    prompts, settings = prompts[::4], Settings(18, 4, 18, **options)
    ids, rows = decode.decode(model, prompts, settings)
    wanted = [literal(model, prompt, 18, 4, 18, **options) for prompt in prompts]
    assert ids.tolist() == [answer for answer, _ in wanted] and rows == sum(taken for _, taken in wanted)
    assert decode.decode(model, prompts[1:2], settings)[0].tolist() == [wanted[1][0]]
    whole = {key: value for key, value in options.items() if "suffix" not in key}
    assert ids.tolist() != decode.decode(model, prompts, Settings(18, 4, 18, **whole))[0].tolist()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("last", [False, True])
def test_no_more_columns_go_through_the_model_than_the_suffix_window_has(model, cache, last):
    """2 prompts of 5 and 3 tokens, an answer of 10 in blocks of 4, 2 passes each: widths and positions of each pass."""
    seen = []

    def note(module, args, given):
        seen.append((given["input_ids"].shape[1], given["position_ids"][:, -1].tolist()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    settings = Settings(10, 4, 5, cache=cache, suffix=2, suffix_last=last)
    decode.decode(model, [[10, 11, 12, 13, 14], [20, 21, 22]], settings)
    handle.remove()
    wanted = []
    for start, stop, passes in ((5, 9, 2), (9, 13, 2), (13, 15, 1)):
        columns = [i for i in range(15) if i < stop + 2 or (last and i == 14)]
        for number in range(passes):
            if number and cache == "dual":
                columns = [i for i in columns if start <= i < stop]
            elif number and cache == "prefix":
                columns = [i for i in columns if i >= start]
            wanted.append((len(columns), [columns[-1], columns[-1] - 2]))
    assert seen == wanted


@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"cache": "prefix", "cfg_scale": 1.0}], ids=str)
def test_a_suffix_window_over_the_rest_of_the_answer_changes_no_bit(model, prompts, options):
    def logits(**more):
        found = []
        decode.decode(model, prompts, Settings(16, 8, 4, **options, **more), watch=lambda _, x, *__: found.append(x))
        return torch.stack(found)

    whole = logits()
    assert torch.equal(logits(suffix=8), whole) and torch.equal(logits(suffix=16, suffix_last=True), whole)
    assert not torch.equal(logits(suffix=7), whole)


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
@pytest.mark.parametrize("more", [{}, {"cfg_scale": 1.0}, {"suffix": 2, "suffix_last": True}], ids=str)
@pytest.mark.parametrize("gen_length", [16, 14])
def test_a_cache_is_exact_in_the_first_step_of_each_block(model, prompts, cache, more, gen_length):
    """One step a block leaves nothing to the cache; with more steps it changes few tokens and no shape."""
    exact, cached = Settings(gen_length, 4, 4, **more), Settings(gen_length, 4, 4, cache=cache, **more)
    assert decode.decode(model, prompts, cached)[0].tolist() == decode.decode(model, prompts, exact)[0].tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("window", [{}, {"suffix": 3, "suffix_last": True}], ids=str)
@torch.no_grad()
def test_cached_logits_are_those_of_stale_keys_and_values(model, prompts, cache, window):
    """Nothing has changed since the first pass, so nothing is stale: the second pass must give the same logits."""
    settings = Settings(16, 4, 16, cache=cache, **window)
    canvas = decode.make_canvas(model.config, prompts, 16, "cpu")
    forward = decode.Forward(model, canvas, torch.arange(16), slice(20, 24), settings)
    first = forward.first()
    for _ in range(2):
        torch.testing.assert_close(forward.again(forward.rows, canvas.ids), first, rtol=1e-4, atol=1e-4)
    canvas.ids[:, 20] = 50  # and the new token is seen
    assert (forward.again(forward.rows, canvas.ids) - first).abs().max() > 0.01


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_decoding_writes_everything_and_agrees_mostly(model, prompts, cache):
    ids, rows = decode.decode(model, prompts, Settings(16, 8, 16, cache=cache))
    exact, exact_rows = decode.decode(model, prompts, Settings(16, 8, 16))
    assert (ids != MASK).all() and rows == exact_rows
    assert (ids == exact).float().mean() > 0.3  # random weights are the worst case; the README has real ones


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("more", [{}, {"cfg_scale": 1.0}, {"suffix": 2}], ids=str)
def test_rows_that_are_finished_leave_a_cached_batch(model, prompts, cache, more):
    """With a threshold, blocks take different numbers of passes: each row has its own, as if it were alone."""
    settings = Settings(16, 8, 16, cache=cache, threshold=0.02, **more)
    ids, rows = decode.decode(model, prompts, settings)
    alone = [decode.decode(model, [prompt], settings) for prompt in prompts]
    assert ids.tolist() == [answer[0].tolist() for answer, _ in alone]
    assert rows == sum(passes for _, passes in alone) and len({passes for _, passes in alone}) > 1


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
        ({"block_length": 0}, "gen_length 256 and block_length 0 must be at least 1"),
        ({"gen_length": 0}, "gen_length 0"),
        ({"steps": 7}, "steps 7 must be at least 8, one for each block"),
        ({"gen_length": 257, "steps": 8}, "steps 8 must be at least 9, one for each block"),
        ({"steps": 0}, "steps 0"),
        ({"factor": -0.5}, "and so must factor"),
        ({"factor": float("inf")}, "and so must factor"),
        ({"factor": 1.0, "threshold": 0.9}, "threshold and factor both say"),
        ({"suffix": -2}, "suffix -2 must be at least 0, or -1 for all"),
        ({"suffix_last": True}, "suffix_last needs a suffix"),
        ({"suffix": 4.0}, "suffix 4.0 is not of type int"),
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
