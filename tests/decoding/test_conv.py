"""Conv decoding against the algorithm as it is written down, in plain Python: one prompt at a time, no padding."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import problems

from blockwise.cli import InputError
from blockwise.decoding import conv, decode, film
from blockwise.decoding.settings import Settings

SCRIPT = "eval"
MASK, VOCABULARY = 4, 400


@pytest.fixture(scope="module")
def prompts():
    """4 prompts of 3 to 23 tokens; the last one is long enough that tanh of its length is exactly 1."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 7, 12, 23)]


def settings(gen_length=16, steps=16, window=9, **others):
    return Settings(gen_length=gen_length, steps=steps, sampler="conv", window=window, **others)


def uniforms(seed, gen_length, k):
    """A function that gives the next numbers of a prompt that is the first one of a generator: [position][rank]."""
    first = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(seed)).item()
    own = torch.Generator().manual_seed(first)
    return lambda: torch.rand((gen_length, k + 1), generator=own, dtype=torch.float64).tolist()


@torch.no_grad()
def literal(model, prompt, gen_length, steps, window, k, draws, never=(), ends=None, cfg_scale=0.0):
    """The 14 steps. Returns the answer, the number of passes, and that of tokens that the last one wrote."""
    x = [*prompt, *[MASK] * gen_length]  # 1
    length, half, dt = len(x), (window + (window % 2 == 0) - 1) // 2, (1 - 1e-5) / steps
    passes = 0

    def chances():
        logits = model(torch.tensor([x])).logits[0]
        if cfg_scale:
            blind = model(torch.tensor([[MASK] * len(prompt) + x[len(prompt) :]])).logits[0]
            logits = blind + (cfg_scale + 1) * (logits - blind)
        logits[:, [MASK, *never]] = -torch.inf
        return logits.softmax(dim=-1).tolist()

    for i in range(steps):
        t = 1 - i * dt  # 2
        s = t - dt
        open_ = [a for a in range(length) if x[a] == MASK]
        if not open_:
            break
        p, passes = chances(), passes + 1  # 3
        seen = [sum(x[b] != MASK for b in range(max(a - half, 0), min(a + half + 1, length))) for a in range(length)]
        near = [math.tanh(number) for number in seen]  # 4, 5
        best = {a: sorted(range(VOCABULARY), key=lambda v, a=a: -p[a][v])[:k] for a in open_}  # 6
        total = sum(near[a] * sum(p[a][v] for v in best[a]) for a in open_)  # 7
        norm, u, new = len(open_) / (total + 1e-12), draws(), {}  # 8
        for a in open_:
            weights = [norm * near[a] * p[a][v] * (t - s) for v in best[a]] + [s]  # 9
            noise = [1e-10 - math.log(value + 1e-10) for value in u[a - len(prompt)]]
            j = max(range(k + 1), key=lambda j, w=weights, e=noise: w[j] / e[j])  # 10
            if j < k:
                new[a] = best[a][j]  # 11
        for a, token in new.items():
            x[a] = token
        if ends is not None:  # 12, if no mask is in front of the end
            first = next((a for a in range(len(prompt), length) if x[a] in (MASK, *ends)), None)
            if first is not None and x[first] != MASK:
                x[first:] = [model.config.eos_token_id if token == MASK else token for token in x[first:]]
    left = [a for a in range(length) if x[a] == MASK]
    if left:  # 13
        p, passes = chances(), passes + 1
        for a in left:
            x[a] = p[a].index(max(p[a]))
    return x[len(prompt) :], passes, len(left)


CASES = {
    "narrow": ({"window": 5, "steps": 16}, {}),
    "even window, few steps": ({"window": 16, "steps": 5}, {}),
    "top 3": ({"window": 9, "steps": 8, "top_k": 3}, {}),
    "guidance": ({"window": 9, "steps": 8, "cfg_scale": 1.0}, {"cfg_scale": 1.0}),
    "never": ({"window": 9, "steps": 8, "suppress_tokens": [120, 293]}, {"never": (120, 293)}),
    "leftovers": ({"window": 3, "steps": 32}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_and_its_prompts_one_by_one_give_what_the_literal_version_gives(model, prompts, name, caplog):
    """With left padding, and with one generator for all: each prompt has the next draw from it as its seed."""
    options, more = CASES[name]
    chosen = settings(**options)
    together, rows = decode.decode(model, prompts, chosen, generator=torch.Generator().manual_seed(5))
    counted = [record.args[1] for record in caplog.records]
    one, generator = [], torch.Generator().manual_seed(5)
    for prompt in prompts:
        one += decode.decode(model, [prompt], chosen, generator=generator)[0].tolist()
    assert together.tolist() == one and not (together == MASK).any()

    seeds, wanted = torch.Generator().manual_seed(5), []
    for prompt in prompts:
        own = torch.Generator().manual_seed(torch.randint(2**63 - 1, (1,), generator=seeds).item())
        shape = (16, chosen.top_k + 1)
        wanted.append(
            literal(model, prompt, 16, chosen.steps, chosen.window, chosen.top_k,
                    lambda own=own, shape=shape: torch.rand(shape, generator=own, dtype=torch.float64).tolist(), **more)
        )  # fmt: skip
    assert together.tolist() == [answer for answer, *_ in wanted]
    assert rows == sum(passes for _, passes, _ in wanted) * (2 if chosen.cfg_scale else 1)
    left = sum(number for *_, number in wanted)
    assert counted == [left] * (left > 0) and (left > 0 or name != "leftovers")


@torch.no_grad()
def ancestral(model, prompt, gen_length, steps, draws):
    """Ancestral sampling of a masked diffusion model: no window, all tokens, in the order of their probability."""
    x, dt = [*prompt, *[MASK] * gen_length], (1 - 1e-5) / steps
    for i in range(steps):
        t, u = 1 - i * dt, draws()
        logits = model(torch.tensor([x])).logits[0]
        logits[:, MASK] = -torch.inf
        p, order = logits.softmax(dim=-1).double().sort(dim=-1, descending=True)
        for a in [a for a in range(len(x)) if x[a] == MASK]:
            q = torch.cat([p[a, : VOCABULARY - 1] / p[a].sum() * dt / t, torch.tensor([1 - dt / t])])
            j = int((q / -torch.tensor(u[a - len(prompt)], dtype=torch.float64).log()).argmax())
            x[a] = MASK if j == VOCABULARY - 1 else order[a, j].item()
    return x[len(prompt) :]


def test_a_window_over_all_with_all_tokens_is_ancestral_sampling(model, prompts):
    chosen = settings(12, 6, window=101, top_k=VOCABULARY - 1)
    answers = []
    for seed in range(4):
        ids, _ = decode.decode(model, prompts[-1:], chosen, generator=torch.Generator().manual_seed(seed))
        assert ids[0].tolist() == ancestral(model, prompts[-1], 12, 6, uniforms(seed, 12, VOCABULARY - 1))
        answers.append(ids[0].tolist())
    assert len(set(map(tuple, answers))) == 4


def test_each_token_is_near_what_was_visible_and_stays(model, prompts):
    """Within half a window of it, also in a batch with padding; the prompt is as it was, and no mask is left."""
    half, canvases = 2, []
    passes = lambda start, logits, old, new: canvases.append((start, old.clone(), new.clone()))  # noqa: E731
    decode.decode(model, prompts[:1], settings(16, 32, window=4), generator=torch.Generator().manual_seed(1),
                  watch=passes)  # fmt: skip
    for number, (start, old, new) in enumerate(canvases):
        assert start == 3 and (number == 0 or torch.equal(old, canvases[number - 1][2]))
        before = [True] * start + (old[0] != MASK).tolist()
        assert torch.equal(new[old != MASK], old[old != MASK])
        for place in (new != old)[0].nonzero()[:, 0].tolist():
            assert any(before[max(start + place - half, 0) : start + place + half + 1])
    assert not (canvases[-1][2] == MASK).any() and len(canvases) > 4


def test_nearness_counts_in_the_window_and_not_the_padding():
    visible = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    wanted = torch.tensor([[3, 4, 5, 4, 3, 2, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]).double().tanh()
    for window in (4, 5):
        assert torch.equal(conv.nearness(visible, window), wanted)
    canvas = decode.make_canvas(SimpleNamespace(mask_token_id=MASK, pad_token_id=0, eos_token_id=1, vocab_size=400,
                                                max_position_embeddings=64), [[9], [9] * 6], 4, "cpu")  # fmt: skip
    near = conv.nearness(canvas.visible(torch.arange(2), MASK), 5)[:, canvas.start :]
    assert near[0, 0] == math.tanh(1) and near[1, 0] == math.tanh(2) and near[0, 2] == 0


@pytest.mark.parametrize("k", [1, 7])
def test_the_chances_of_a_row_add_up_to_its_masks(k):
    generator = torch.Generator().manual_seed(0)
    logits, near = torch.randn(3, 10, 50, generator=generator), torch.rand(3, 10, generator=generator).double()
    masked = torch.rand(3, 10, generator=generator) < torch.tensor([[0.2], [0.5], [0.9]])
    tokens, weight = conv.weights(logits, near, masked, 0.7, 0.6, k)
    total = weight[..., :k].sum(dim=(1, 2)) / (0.7 - 0.6)
    torch.testing.assert_close(total, masked.sum(dim=1).double(), rtol=1e-9, atol=0)
    assert (weight[..., k] == 0.6).all() and torch.equal(tokens, logits.topk(k).indices)


def test_masks_wane_in_proportion_to_time(model):
    """With a window over all and all tokens, a position is masked after step i with probability ts[i + 1]."""
    chosen, rows, counts = settings(16, 8, window=101, top_k=VOCABULARY - 1), 64, []
    for ids, _ in decode.stream(model, [[9] * 24] * rows, chosen, generator=torch.Generator().manual_seed(0)):
        counts.append((ids == MASK).sum().item())
    for i, number in enumerate(counts[:7]):
        share = 1 - (i + 1) * (1 - 1e-5) / 8
        n = 16 * rows
        assert abs(number - n * share) < 3 * (n * share * (1 - share)) ** 0.5, (i, number, n * share)
    assert counts[-1] == 0


def test_what_is_behind_the_end_is_filled_once_nothing_is_masked_in_front_of_it(model, prompts):
    """The text up to the end is the same, for fewer passes; tokens that are written behind it stay."""
    prompt, saved = prompts[2], 0
    for seed in range(3):
        plain, rows = decode.decode(model, [prompt], settings(), generator=torch.Generator().manual_seed(seed))
        ends = plain[0, 4:6].tolist()  # tokens that do occur
        ids, fewer = decode.decode(model, [prompt], settings(stop_at_end=True), ends,
                                   torch.Generator().manual_seed(seed))  # fmt: skip
        wanted, passes, _ = literal(model, prompt, 16, 16, 9, 1, uniforms(seed, 16, 1), ends=ends)
        assert (ids[0].tolist(), fewer) == (wanted, passes)
        length = decode.length(wanted, ends)
        assert wanted[:length] == plain[0, :length].tolist() and length <= 6
        saved += rows - fewer
    assert saved > 0


def test_masks_before_an_end_keep_those_behind_it():
    answers = torch.tensor([[9, 7, MASK, 8, MASK], [9, MASK, 7, MASK, 8], [9, 8, 8, MASK, 8], [7, MASK, 7, 7, 7]])
    found = conv.after_end(answers, MASK, torch.tensor([1, 7]))
    assert found.nonzero().tolist() == [[0, 2], [0, 4], [3, 1]]
    assert not conv.after_end(answers, MASK, torch.tensor([], dtype=torch.long)).any()


@torch.no_grad()
def quota(model, prompt, gen_length, block_length, steps, window):
    """The published variant with a fixed number of tokens a step: confidence x nearness, then from the left."""
    x, half = [*prompt, *[MASK] * gen_length], window // 2
    per_block = steps * block_length // gen_length
    for start in range(len(prompt), len(x), block_length):
        for step in range(per_block):
            number = block_length // per_block + (step < block_length % per_block)
            logits = model(torch.tensor([x])).logits[0]
            p = logits.softmax(dim=-1)
            logits[:, MASK] = -torch.inf
            ranked = []
            for a in (a for a in range(start, start + block_length) if x[a] == MASK):
                near = math.tanh(sum(x[b] != MASK for b in range(max(a - half, 0), min(a + half + 1, len(x)))))
                token = logits[a].argmax().item()
                ranked.append((near > 0, near * p[a, token].item(), -a, token))
            for _, _, place, token in sorted(ranked, reverse=True)[:number]:
                x[-place] = token
    return x[len(prompt) :]


@pytest.mark.parametrize("block_length, steps, window", [(16, 16, 9), (16, 3, 5), (8, 4, 2), (16, 16, 3)])
def test_remasking_by_nearness_is_the_quota_variant(model, prompts, block_length, steps, window):
    chosen = Settings(16, block_length, steps, remasking="nearness", window=window)
    ids, _ = decode.decode(model, prompts, chosen)
    assert ids.tolist() == [quota(model, prompt, 16, block_length, steps, window) for prompt in prompts]
    assert ids.tolist() != decode.decode(model, prompts, Settings(16, block_length, steps))[0].tolist()


def test_tokens_to_be_written_last_are_behind_those_that_are_near_nothing():
    """The first position is near, but likes a token that is to be written last; the others are near nothing."""
    logits = torch.zeros(1, 4, 8)
    logits[0, 0, 5] = logits[0, 1:, 6] = 9.0
    chosen, near = Settings(8, 4, 8, remasking="nearness", window=2), torch.tensor([[0.9, 0, 0, 0]]).double()
    block = torch.full((1, 4), MASK)
    for wanted in ([MASK, 6, MASK, MASK], [MASK, 6, 6, MASK], [MASK, 6, 6, 6], [5, 6, 6, 6]):
        block = decode.commit(logits, block, MASK, 1, chosen, [5], near=near)
        assert block[0].tolist() == wanted


def test_a_film_shows_all_steps_and_changes_no_token(model, prompts):
    chosen, seed = settings(top_k=3), torch.Generator().manual_seed
    ids, passes = decode.decode(model, prompts[:1], chosen, generator=seed(3))
    answer = film.record(model, prompts[0], chosen, generator=seed(3))
    assert [token.id for token in answer.tokens] == ids[0].tolist() and answer.steps <= passes
    assert all(token.step and 0 < token.confidence <= 1 for token in answer.tokens)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"sampler": "slide"}, "sampler 'slide' is neither 'blocks' nor 'conv'"),
        ({"window": 1}, "window must be at least 2"),
        ({"top_k": 0}, "top_k at least 1"),
        ({"sampler": "blocks", "top_k": 2}, "top_k is of sampler 'conv'"),
        ({"sampler": "blocks", "window": 64}, "window of that and of remasking 'nearness'"),
        ({"temperature": 1.0}, "takes no temperature 1.0; leave it at 0.0"),
        ({"remasking": "nearness"}, "takes no remasking 'nearness'"),
        ({"threshold": 0.9}, "takes no threshold 0.9"),
        ({"cache": "dual"}, "takes no cache 'dual'; leave it at 'none'"),
        ({"suppress_end": True}, "takes no suppress_end True"),
        ({"begin_suppress_tokens": [5]}, r"takes no begin_suppress_tokens \[5\]; leave it at \[\]"),
        ({"steps": 7, "window": 9}, r"gen_length 16: steps x \(window // 2\) must be at least 32"),
        ({"steps": 0}, "steps 0"),
        ({"gen_length": 0}, "gen_length 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Settings(**{"gen_length": 16, "steps": 16, "block_length": 16, "sampler": "conv"} | options)
    assert settings(17, 9, window=9).block_length == 17  # and steps need not divide anything: 36 reaches 34


def test_what_the_model_cannot_do_is_refused(model, prompts):
    with pytest.raises(InputError, match="prompt 2 is empty; sampler 'conv' only writes near text"):
        decode.decode(model, [[9], []], settings())
    with pytest.raises(InputError, match="top_k 400: give less than the model's 400 tokens"):
        decode.decode(model, prompts, settings(top_k=400))
    with pytest.raises(InputError, match="leave sampler at 'blocks'"):
        decode.infill(model, [[9, MASK]], settings())
    config = SimpleNamespace(vocab_size=400, block_diffusion_size=16)
    with pytest.raises(InputError, match="trained to write blocks from left to right; leave sampler at 'blocks'"):
        decode.check_settings(config, settings())


def test_eval_answers_with_it_and_continues_folders_that_are_older_than_it(base, tmp_path, call):
    """A batch of another size has the same prompts in another order, so other draws; the same one the same answers."""
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in problems(4, 3)))
    flags = ["--model", base, "--data", data, "--gen_length", 8, "--batch_size", 2]
    near = ["--sampler", "conv", "--window", 8, "--steps", 4]
    for folder in ("one", "two"):
        code, out, err = call(*flags, *near, "--output", tmp_path / folder)
        assert code == 0 and "sampler conv, window 8, top_k 1" in out, err
    text = ["".join(json.loads(line)["completion"] for line in path.read_text().splitlines())
            for path in sorted(tmp_path.glob("*/*/answers.jsonl"))]  # fmt: skip
    assert len(text) == 2 and text[0] == text[1] != ""

    blocks = [*flags, "--block_length", 8, "--steps", 8, "--output", tmp_path / "old"]
    assert call(*blocks)[0] == 0
    (file,) = tmp_path.glob("old/*/settings.json")
    known = json.loads(file.read_text())
    assert [known.pop(name) for name in ("sampler", "window", "top_k")] == ["blocks", 128, 1]
    file.write_text(json.dumps(known))
    answers = shutil.copy(file.with_name("answers.jsonl"), tmp_path / "answers")
    assert call(*blocks)[0] == 0 and file.with_name("answers.jsonl").read_text() == answers.read_text()
    code, _, err = call(*blocks, "--sampler", "conv")
    assert code == 1 and "sampler was 'blocks', now it is 'conv'" in err
