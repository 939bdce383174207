"""Block diffusion: masks, attention and decoding against literal versions, two streams against passes by blocks."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, run
from test_a2d import KINDS
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM, GPTJConfig

import masking
import train_bd3lm
from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models

MASK, END = 4, 1


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["llada", *KINDS])
def model(request, base):
    """LLaDA and converted decoders, in fp32."""
    if request.param == "llada":
        loaded = models.load_model(base, torch.float32)
    else:
        torch.manual_seed(0)
        config = KINDS[request.param](400)
        config.is_causal, config.mask_token_id, config.pad_token_id = False, MASK, END
        loaded = AutoModelForCausalLM.from_config(config)
    return loaded.eval().requires_grad_(False)


def batch_of(lengths, max_len):
    """Samples with these (prompt_len, length), of random ids."""
    ids = torch.randint(8, 400, (len(lengths), max_len), generator=seeded(0))
    start, length = torch.tensor(lengths).T
    ids[torch.arange(max_len) >= length[:, None]] = END
    return masking.Batch(ids, start, length, torch.zeros_like(start))


def test_blocks_and_attention_are_those_of_the_picture():
    block = masking.block_numbers(torch.tensor([6]), 16, 4)
    assert block.tolist() == [[0] * 6 + [1] * 4 + [2] * 4 + [3] * 2]
    sees = masking.two_stream_attention(block)[0, 0, 10]  # the first masked position of block 2
    assert sees.nonzero()[:, 0].tolist() == [10, 11, 12, 13, *range(16, 16 + 10)]


@pytest.mark.parametrize("start, size", [(0, 1), (0, 4), (3, 4), (5, 16), (0, 16)])
def test_attention_is_the_index_formula(start, size):
    """2503.09573: within a stream and block; masked sees clean of earlier blocks; clean sees clean up to its own."""
    length = 14
    block = [0 if i < start else 1 + (i - start) // size for i in range(length)]
    sees = masking.two_stream_attention(masking.block_numbers(torch.tensor([start]), length, size))[0, 0]
    for q, k in itertools.product(range(2 * length), repeat=2):
        (q_clean, q_pos), (k_clean, k_pos) = divmod(q, length), divmod(k, length)
        if q_clean:
            wanted = k_clean and block[k_pos] <= block[q_pos]
        else:
            wanted = block[k_pos] < block[q_pos] if k_clean else block[k_pos] == block[q_pos]
        assert bool(sees[q, k]) == bool(wanted)
    flex = masking.FlexTwoStreams.attention(masking.block_numbers(torch.tensor([start]), length, size))
    assert torch.equal(create_mask(flex.mask_mod, 1, None, 2 * length, 2 * length, device="cpu")[0, 0], sees)


def causal_by_blocks(block):
    """(B, L) -> (B, 1, L, L): a position sees its own and earlier blocks."""
    return (block[:, :, None] >= block[:, None, :])[:, None]


@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_two_streams_are_block_by_block_passes(model, size):
    """Logits of every block as from a pass over the clean sample before it and the masked block, for ragged samples."""
    batch = batch_of([(5, 17), (0, 16), (3, 9)], 18)
    length = masking.fill_blocks(batch.prompt_len, batch.length, 18, size)
    block = masking.block_numbers(batch.prompt_len, 18, size)
    masked, _ = masking.block_diffusion_masks(
        batch.prompt_len, length, block, low=0.3, high=0.9, per_block=True, generator=seeded(1)
    )
    noised = masking.two_streams(batch, masked, masked.float(), MASK, block)
    part = noised.rows(slice(0, 3))
    logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
    row, column = masked.nonzero().T
    for number, (i, j) in enumerate(zip(row.tolist(), column.tolist())):
        inside = block[i] == block[i, j]
        end = int(inside.nonzero().max()) + 1
        ids = torch.where(inside & masked[i], MASK, batch.input_ids[i])[None, :end]
        wanted = model(input_ids=ids, attention_mask=causal_by_blocks(block[i : i + 1, :end])).logits[0, j]
        torch.testing.assert_close(logits[number], wanted, atol=2e-5, rtol=2e-4)


def test_flex_attention_gives_the_logits_of_sdpa(base):
    """Forward only: PyTorch has no backward pass of it on CPUs."""
    model, batch = models.load_model(base, torch.float32).eval().requires_grad_(False), batch_of([(5, 17), (0, 16)], 18)
    block = masking.block_numbers(batch.prompt_len, 18, 4)
    masked, found = torch.rand(2, 18, generator=seeded(2)) < 0.5, []
    for name, flex in (("sdpa", False), ("flex_attention", True)):
        model.set_attn_implementation(name)
        part = masking.two_streams(batch, masked, masked.float(), MASK, block, flex).rows(slice(0, 2))
        found.append(model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_one_block_without_a_prompt_is_a_full_sequence_pass(model):
    batch = batch_of([(0, 16)], 16)
    block = masking.block_numbers(batch.prompt_len, 16, 16)
    masked = torch.rand(1, 16, generator=seeded(2)) < 0.5
    part = masking.two_streams(batch, masked, masked.float(), MASK, block).rows(slice(0, 1))
    logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
    wanted = model(input_ids=batch.input_ids.masked_fill(masked, MASK)).logits[masked]
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=2e-4)


def test_later_blocks_have_no_influence(model):
    """The gradient of a block's loss is zero at the clean tokens of its own and of later blocks."""
    batch = batch_of([(4, 16)], 16)
    block = masking.block_numbers(batch.prompt_len, 16, 4)
    masked = block > 0
    part = masking.two_streams(batch, masked, masked.float(), MASK, block).rows(slice(0, 1))
    embedded = model.get_input_embeddings()(part.input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **part.model_args).logits[0, :16]
    logits[block[0] == 2].square().sum().backward()
    moved = embedded.grad[0].abs().amax(dim=-1) > 0  # (2 L,)
    assert moved.nonzero()[:, 0].tolist() == [8, 9, 10, 11, *range(16, 16 + 8)]


def test_each_mask_ratio_comes_from_a_share_of_its_own():
    batch = batch_of([(2, 14), (0, 9), (5, 6), (1, 20)], 20)
    block = masking.block_numbers(batch.prompt_len, 20, 4)
    _, p = masking.block_diffusion_masks(
        batch.prompt_len, batch.length, block, low=0.2, high=0.7, per_block=True, generator=seeded(0)
    )
    ratios = {}
    for i, (start, end) in enumerate(zip(batch.prompt_len.tolist(), batch.length.tolist())):
        for j in range(start, end):
            assert ratios.setdefault((i, int(block[i, j])), p[i, j].item()) == p[i, j].item()
    assert len(ratios) == 3 + 3 + 1 + 5
    shares = sorted(int((ratio - 0.2) / 0.5 * len(ratios)) for ratio in ratios.values())
    assert shares == list(range(len(ratios)))
    _, p = masking.block_diffusion_masks(
        batch.prompt_len, batch.length, block, low=0.2, high=0.7, per_block=False, generator=seeded(0)
    )
    assert (p == p[:, :1]).all() and len(set(p[:, 0].tolist())) == 4


def test_tokens_are_masked_with_their_ratio_and_only_in_the_answer():
    batch = batch_of([(3, 15)] * 4000, 16)
    block = masking.block_numbers(batch.prompt_len, 16, 4)
    masked, p = masking.block_diffusion_masks(
        batch.prompt_len, batch.length, block, low=0.1, high=0.9, per_block=True, generator=seeded(0)
    )
    assert not masked[:, :3].any() and not masked[:, 15:].any()
    for low in (0.1, 0.3, 0.5, 0.7):
        some = (p >= low) & (p < low + 0.2) & (torch.arange(16) >= 3) & (torch.arange(16) < 15)
        assert masked[some].float().mean() == pytest.approx(low + 0.1, abs=5 * 0.5 / math.sqrt(int(some.sum())))


def test_the_loss_is_the_bound_on_average():
    """Over all masks of a block, weighted by their probability, and a grid of ratios: (1/L) E[1/p sum of nll]."""
    nll = {
        mask: torch.rand(2, generator=seeded(number)) for number, mask in enumerate(itertools.product((0, 1), repeat=2))
    }
    length, wanted, found, ratios = torch.tensor([4]), 0.0, 0.0, (torch.arange(400) + 0.5) / 400
    for first, second in itertools.product(nll, repeat=2):
        mask = torch.tensor([first + second], dtype=torch.bool)
        losses = torch.cat([nll[first], nll[second]])  # each block's loss depends on its own mask alone
        for p in ratios[::20]:
            chance = math.prod(p.item() if bit else 1 - p.item() for bit in first + second)
            weights = masking.bound_weights(mask, p.expand(1, 4), 1, length)
            found += chance * (weights[0] * losses).sum().item() / 20
    for block in nll:  # the bound of one block, by hand
        for p in ratios[::20]:
            chance = math.prod(p.item() if bit else 1 - p.item() for bit in block)
            wanted += 2 * chance * sum(x.item() for x, bit in zip(nll[block], block) if bit) / p.item() / 4 / 20
    assert found == pytest.approx(wanted, rel=1e-4)


def test_answers_are_filled_up_to_whole_blocks():
    knobs = {name: value for name, value in vars(train_bd3lm).items() if name.isupper()}
    knobs = SimpleNamespace(
        **knobs | {"MAX_LEN": 20, "BLOCK_SIZE": 4, "MASK_ID": MASK, "MASK_LOW": 0.999, "MASK_HIGH": 1.0}
    )
    noised = train_bd3lm.noise(batch_of([(2, 11), (2, 20), (1, 9)], 20), seeded(0), knobs)
    ends = [int(row.nonzero().max()) + 1 for row in noised.supervised[:, :20]]
    assert ends == [14, 20, 9]  # the second has no room for the last token of its block
    assert (noised.targets[0, 11:14] == END).all() and noised.weights.sum() == pytest.approx(1.0, abs=2e-3)
    assert not noised.supervised[:, 20:].any() and (noised.model_args["position_ids"][0, 20:] == torch.arange(20)).all()


def decode_without_cache(model, prompt, settings, size, first):
    """Block by block with whole passes under a block-causal mask: a literal version of exact block decoding."""
    ids, number = torch.tensor([prompt], dtype=torch.long), len(prompt)
    while ids.shape[1] < len(prompt) + settings.gen_length:
        number = size - (ids.shape[1] - first) % size
        ids = torch.cat([ids, torch.full((1, number), MASK)], dim=1)
        block = masking.block_numbers(torch.tensor([first]), ids.shape[1], size)
        for _ in range(number):
            logits = model(input_ids=ids, attention_mask=causal_by_blocks(block)).logits[0, -number:]
            logits[:, MASK] = -torch.inf
            best, token = logits.softmax(dim=-1).max(dim=-1)
            place = best.masked_fill(ids[0, -number:] != MASK, -1).argmax()
            ids[0, len(ids[0]) - number + place] = token[place]
    return ids[0, len(prompt) : len(prompt) + settings.gen_length]


@pytest.mark.parametrize("blocks_from", ["answer", "sample"])
def test_decoding_with_finished_blocks_kept_is_exact(model, blocks_from):
    model.config.block_diffusion_size, model.config.block_diffusion_from = 4, blocks_from
    prompts = [[10, 11, 12, 13, 14, 15, 16], [30, 31, 32], [50]]
    whole_prompt = blocks_from == "answer"
    settings = Settings(gen_length=16, block_length=4, steps=16)
    try:
        together, rows = decode.decode(model, prompts, settings)
        for row, prompt in zip(together, prompts):
            assert torch.equal(row, decode_without_cache(model, prompt, settings, 4, len(prompt) * whole_prompt))
            assert torch.equal(row, decode.decode(model, [prompt], settings)[0][0])
        assert rows == 3 * 16 if whole_prompt else 3 * 16 < rows <= 3 * 20  # the answers touch five blocks
        ends = [int(together[1, 5]), int(together[2, 9])]  # rows end in the second and third block, others go on
        stopped, _ = decode.decode(model, prompts, Settings(16, 4, 16, stop_at_end=True), ends)
        for row, whole, prompt in zip(stopped, together, prompts):
            shift = 0 if whole_prompt else len(prompt) % 4
            places = (i for i, token in enumerate(whole.tolist()) if token in ends)
            over = next((4 * ((i + shift) // 4 + 1) - shift for i in places), 16)
            assert torch.equal(row[:over], whole[:over]) and (row[over:] == END).all()
        guided = Settings(16, 4, 16, cfg_scale=0.5)
        alone = [decode.decode(model, [prompt], guided)[0][0] for prompt in prompts]
        assert torch.equal(decode.decode(model, prompts, guided)[0], torch.stack(alone))
        shorter = decode.decode(model, prompts, Settings(10, 4, 10))[0]  # the blocks stay whole, the answer is cut
        assert torch.equal(shorter, together[:, :10])
        for wrong in (Settings(16, 8, 16), Settings(16, 4, 16, cache="prefix"), Settings(16, 4, 16, suffix=0)):
            with pytest.raises(InputError, match="this checkpoint"):
                decode.decode(model, prompts, wrong)
    finally:
        del model.config.block_diffusion_size, model.config.block_diffusion_from


@pytest.mark.parametrize("blocks_from", ["answer", "sample"])
def test_an_empty_prompt_beside_others_sees_none_of_them(model, blocks_from):
    """Its logits are those of a pass over its first block alone (of which not all are masks: there would be ties)."""
    model.config.block_diffusion_size, model.config.block_diffusion_from = 4, blocks_from
    ids = torch.tensor([20, 21, MASK, 23])
    try:
        for prompts in ([[]], [[], [10, 11, 12, 13, 14, 15, 16]]):
            canvas = decode.make_canvas(model.config, prompts, 16, "cpu")
            block = slice(canvas.start, canvas.start + 4)
            canvas.ids[0, block] = ids
            logits = decode.FinishedBlocks(model, canvas, Settings(16, 4, 16)).logits(block)[0]
            wanted = model(ids[None]).logits[0]
            wanted[:, MASK] = -torch.inf
            torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-5)
    finally:
        del model.config.block_diffusion_size, model.config.block_diffusion_from


def test_written_padding_stays_visible(model):
    """The padding token may end texts, too: where it was written, later blocks see it, at its own position."""
    model.config.block_diffusion_size = 4
    try:
        canvas = decode.make_canvas(model.config, [[10, 11, 12], [13]], 8, "cpu")
        assert model.config.pad_token_id == END
        canvas.ids[:, 3:7], canvas.ids[:, 8] = END, 20
        finished = decode.FinishedBlocks(model, canvas, Settings(8, 4, 8))
        finished.logits(slice(3, 7))
        finished.append(torch.tensor([0, 1]), slice(3, 7))
        found = finished.logits(slice(7, 11))
        for row, prompt in enumerate(([10, 11, 12], [13])):
            block = masking.block_numbers(torch.tensor([len(prompt)]), len(prompt) + 8, 4)
            ids = torch.tensor([[*prompt, END, END, END, END, MASK, 20, MASK, MASK]])
            wanted = model(input_ids=ids, attention_mask=causal_by_blocks(block)).logits[0, -4:]
            wanted[:, MASK] = -torch.inf
            torch.testing.assert_close(found[row], wanted, rtol=2e-4, atol=2e-5)
    finally:
        del model.config.block_diffusion_size


def test_an_end_token_in_the_prompt_ends_no_answer(model):
    """With blocks from the start of the sample, the first one may have the end of the user's turn in it."""
    model.config.block_diffusion_size, model.config.block_diffusion_from = 4, "sample"
    try:
        settings = Settings(8, 4, 8)
        whole, _ = decode.decode(model, [[10, END, 12]], settings)
        stopped, _ = decode.decode(model, [[10, END, 12]], Settings(8, 4, 8, stop_at_end=True), [END])
        over = whole[0].tolist().index(END) if END in whole[0] else 8
        assert torch.equal(stopped[0, : over + 1], whole[0, : over + 1])
    finally:
        del model.config.block_diffusion_size, model.config.block_diffusion_from


def test_the_gradient_is_the_sum_of_those_of_the_blocks(base):
    """Two streams in one pass against a pass per block over the clean tokens before it and the masked block."""
    model = models.load_model(base, torch.float32).eval()
    batch = batch_of([(3, 14), (0, 12)], 16)
    block = masking.block_numbers(batch.prompt_len, 16, 4)
    length = masking.fill_blocks(batch.prompt_len, batch.length, 16, 4)
    masked, p = masking.block_diffusion_masks(
        batch.prompt_len, length, block, low=0.3, high=0.9, per_block=True, generator=seeded(1)
    )
    weights = masking.bound_weights(masked, p, 1, length - batch.prompt_len)
    part = masking.two_streams(batch, masked, weights, MASK, block).rows(slice(0, 2))
    logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
    masking.weighted_nll(logits, part).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    for i in range(2):
        for number in range(1, int(block[i].max()) + 1):
            inside = block[i] == number
            end = int(inside.nonzero().max()) + 1
            ids = torch.where(inside & masked[i], MASK, batch.input_ids[i])[None, :end]
            logits = model(input_ids=ids, attention_mask=causal_by_blocks(block[i : i + 1, :end])).logits[0]
            nll = torch.nn.functional.cross_entropy(logits, batch.input_ids[i, :end], reduction="none")
            some = (inside & masked[i])[:end]
            (nll[some] * weights[i, :end][some]).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=2e-4, atol=2e-6)


def test_blocks_may_be_counted_from_the_start_of_the_sample():
    """The paper's rule: the block where the prompt ends holds tokens of it, visible; the shares are of real blocks."""
    knobs = {name: value for name, value in vars(train_bd3lm).items() if name.isupper()}
    knobs = SimpleNamespace(
        **knobs | {"MAX_LEN": 20, "BLOCK_SIZE": 4, "MASK_ID": MASK, "MASK_LOW": 0.999, "MASK_HIGH": 1.0}
        | {"BLOCKS_FROM": "sample"}
    )  # fmt: skip
    noised = train_bd3lm.noise(batch_of([(6, 11), (2, 20)], 20), seeded(0), knobs)
    assert noised.extra["block"].tolist() == [[1 + i // 4 for i in range(20)]] * 2
    assert noised.supervised[:, :20].nonzero().tolist() == [
        *([0, i] for i in range(6, 12)), *([1, i] for i in range(2, 20))
    ]  # fmt: skip
    batch = batch_of([(6, 11), (9, 20)], 20)
    _, p = masking.block_diffusion_masks(
        batch.prompt_len, batch.length, masking.block_numbers(torch.zeros(2).long(), 20, 4), low=0.0, high=1.0,
        per_block=True, generator=seeded(0),
    )  # fmt: skip
    ratios = [p[0, 6], p[0, 8], p[1, 9], p[1, 12], p[1, 16]]
    assert sorted(int(5 * ratio) for ratio in ratios) == [0, 1, 2, 3, 4]


def test_the_mask_is_never_written(base):
    """Not even where the model finds it the most likely token."""
    model = models.load_model(base, torch.float32).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[MASK] = 0
        model.get_output_embeddings().weight.mul_(1e-3)
        model.get_output_embeddings().weight[MASK] += 1e-4 * torch.ones(64)
    for temperature in (0.0, 1.0):
        settings = Settings(gen_length=8, block_length=4, steps=8, temperature=temperature)
        ids, _ = decode.decode(model, [[10, 11], [12]] * 40, settings, generator=seeded(0))
        assert not (ids == MASK).any()


def test_it_trains_and_its_checkpoint_is_decoded_by_blocks(tmp_path, base, pt_file):
    """Under the real launcher, on two ranks; the losses are those of one rank."""
    flags = {
        "MODEL_NAME": base, "DATA_PT": pt_file, "MASK_ID": MASK, "MAX_LEN": 192, "LORA_RANK": 4, "LR": 1e-2,
        "BF16": False, "BLOCK_SIZE": 16, "TOTAL_TRAIN_STEPS": 3, "LORA_DROPOUT": 0.0, "SAMPLE_EVERY": 3,
    }  # fmt: skip
    losses = []
    for ranks in (2, 1):
        flags |= {"MICRO_BSIZE": 4 // ranks, "CKPT_DIR": tmp_path / f"run{ranks}"}
        done = launch(ranks, "train_bd3lm.py", *(f"--{name}={value}" for name, value in flags.items()), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / f"run{ranks}_logs/train_loss.csv").read_text().splitlines()[1:]
        losses.append([float(line.split(",")[1]) for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
    folder = tmp_path / "run2_step0003"
    for flags, said in ((("--gen_length", 32, "--steps", 32), ""), (("--block_length", 8), "give --block_length 16")):
        done = run("generate.py", "--model", folder, "--prompt", "What is 3 + 4?", *flags)
        assert bool(done.returncode) == bool(said) and said in done.stderr and "Traceback" not in done.stderr
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "3 + 4", "answer": "The answer is: 7"}\n')
    flags = ("--data", data, "--gen_length", 16, "--steps", 16, "--output", tmp_path / "results")
    done = run("eval.py", "--model", folder, *flags)
    assert done.returncode == 0 and "block_length 16" in done.stdout, done.stderr
    done = run("eval.py", "--compare", base, folder, *flags, "--block_length", 8)
    assert done.returncode and "give --block_length 16" in done.stderr and "Traceback" not in done.stderr
    model, _ = decode.load(str(folder), "float32", torch.device("cpu"))
    assert decode.block_diffusion_size(model.config) == 16
    done = launch(
        1, "train_fullseq.py", f"--MODEL_NAME={folder}", f"--DATA_PT={pt_file}", "--MASK_ID=4", "--MAX_LEN=192",
        "--LORA_RANK=4", "--BF16=False", "--TOTAL_TRAIN_STEPS=1", f"--CKPT_DIR={tmp_path / 'full'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    again = models.load_config(tmp_path / "full_step0001")
    assert decode.block_diffusion_size(again) is None, "trained to see all of the answer, it is decoded so"
    done = launch(1, "train_bd3lm.py", "--MASK_LOW=0.9", "--MASK_HIGH=0.9", cwd=tmp_path)
    assert done.returncode and "MASK_LOW=0.9 must be below MASK_HIGH=0.9" in done.stdout + done.stderr
    done = launch(1, "train_bd3lm.py", "--ATTENTION=flex", cwd=tmp_path)
    assert done.returncode and "ATTENTION='flex' needs a GPU" in done.stdout + done.stderr


def test_a_model_type_whose_attention_ignores_boolean_masks_is_refused(forked, tokenizer, tmp_path):
    """GPT-J has no sdpa attention: its own would add the mask to the scores."""
    config = GPTJConfig(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=256, rotary_dim=4, eos_token_id=END)
    config.is_causal, config.mask_token_id, config.pad_token_id = False, MASK, END
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    done = forked(tmp_path / "run", 1, "train_bd3lm.py", MODEL_NAME=tmp_path / "base", LORA_RANK=0, LORA_DROPOUT=0.0)
    assert done.codes == [1] and "block diffusion needs a model type with sdpa attention" in done.output
    assert "Traceback" not in done.output and not (tmp_path / "run/out").exists()
