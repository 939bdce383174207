"""Block-by-block decoding with low-confidence remasking, as a function of ids (LLaDA, arXiv 2502.09992).

The canvas is the prompt and gen_length masks. Blocks are written from left to right; within a block every step runs the
model over the whole canvas and commits the tokens that it is most confident of. Committed tokens stay. With the sampler
`conv`, conv.py writes the whole answer at once.

Letters in shapes: B prompts, R rows of a forward pass, P longest prompt, G gen_length, L = P + G columns of the canvas,
K block_length, V vocabulary.
Prompts are padded on the left, so that a block stands in the same columns in every row.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache

from blockwise.cli import InputError
from blockwise.decoding import conv
from blockwise.decoding.settings import Settings, from_flags
from blockwise.models import base as models
from blockwise.models import hub

# is told of each step: where its block starts, (R, K, V) logits, and (R, K) ids of the block before and after the step
Watch = Callable[[int, Tensor, Tensor, Tensor], None]
END_OF_TURN = ("<|eot_id|>", "<|role_end|>")  # of LLaDA and of LLaDA-MoE


def load(name: str, dtype: str, device: torch.device, adapter: str | None = None):
    """Model, in evaluation mode, and tokenizer of a folder or hub id. Raises InputError.

    dtype: `float32`, `bfloat16`, or `auto`, which is the checkpoint's own on a GPU and float32 on a CPU (faster there).
    adapter: folder of LoRA adapters in PEFT's format, which are computed besides the base's weights, not merged.
    """
    folder = hub.local_folder(name)
    tokenizer = hub.load_tokenizer(folder)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    model = models.load_model(folder, dtype if dtype == "auto" else getattr(torch, dtype), device)
    if adapter:
        from blockwise.models import checkpoint  # only now: importing peft takes seconds

        model = checkpoint.load_adapter(model, adapter).get_base_model()  # in which the adapters are layers now
    return model.eval(), tokenizer


def end_ids(model, tokenizer) -> list[int]:
    """The ids that end an answer: end of text, and end of turn if the tokenizer knows LLaDA's or LLaDA-MoE's."""
    turns = {tokenizer.get_vocab().get(token) for token in END_OF_TURN}
    return sorted({*eos_ids(model.config), tokenizer.eos_token_id, *turns} - {None})


def eos_ids(config) -> list[int | None]:
    """What a config says ends a text: one id, or a list of them."""
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def length(ids: list[int], ends: list[int]) -> int:
    """The number of tokens of an answer (a list of ids) with the first one that ends it."""
    return next((number for number, token in enumerate(ids, start=1) if token in ends), len(ids))


def completion(tokenizer, ids: list[int], ends: list[int]) -> str:
    """The text of an answer (a list of ids), up to the first id that ends it."""
    ids = [token for token in ids[: length(ids, ends)] if token not in ends]
    return tokenizer.decode(ids, skip_special_tokens=True)


def decode(
    model,
    prompts: list[list[int]],
    settings: Settings,
    end_ids: list[int] = (),
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, int]:
    """Answers prompts. Returns ids (B, G) and the number of rows that went through the model, over all forward passes.

    model: LLaDAForCausalLM in evaluation mode; prompts: list of lists of ids; end_ids: tokens that end an answer.
    watch: see Watch.
    At temperature 0, with low_confidence or nearness remasking, a batch gives what its prompts give one by one, up to
    rounding; so does the sampler `conv`, with the same generator for one after the other.
    """
    rows = 0
    for answers, rows in stream(model, prompts, settings, end_ids, generator, watch):  # noqa: B007
        pass
    return answers, rows


@torch.no_grad()
def stream(
    model, prompts: list[list[int]], settings: Settings, end_ids: list[int] = (),
    generator: torch.Generator | None = None, watch: Watch | None = None,
) -> Iterator[tuple[Tensor, int]]:  # fmt: skip
    """decode, step by step: yields (ids (B, G), with masks where nothing is written yet, and rows so far)."""
    check_settings(model.config, settings)
    canvas = make_canvas(model.config, prompts, settings.gen_length, model.device)
    if settings.sampler == "blocks":
        yield from stream_blocks(model, canvas, settings, end_ids, generator, watch)
        return
    answers, special = slice(canvas.start, canvas.ids.shape[1]), (model.config.mask_token_id, eos_ids(model.config)[0])

    def forward(rows):
        return Forward(model, canvas, rows, answers, settings).first()

    yield from conv.stream(canvas, forward, settings, *special, end_ids, generator, watch)


def stream_blocks(
    model, canvas, settings: Settings, end_ids: list[int], generator: torch.Generator | None, watch: Watch | None
) -> Iterator[tuple[Tensor, int]]:  # fmt: skip
    """stream for the sampler `blocks`."""
    mask_id = model.config.mask_token_id
    ids, rows = canvas.ids, 0  # (B, L)
    ends, open_rows = torch.tensor(end_ids, dtype=torch.long, device=ids.device), torch.arange(len(ids)).to(ids.device)
    last = written_last(settings, end_ids)
    finished = FinishedBlocks(model, canvas, settings) if block_diffusion_size(model.config) else None
    for start in range(canvas.start, ids.shape[1], settings.block_length):
        block, forward = slice(start, min(start + settings.block_length, ids.shape[1])), None
        for number in tokens_per_pass(settings, start - canvas.start, block.stop - canvas.start):
            todo = open_rows[(ids[open_rows, block] == mask_id).any(dim=1)]
            if not len(todo):
                break
            if finished:
                todo, logits = open_rows, finished.logits(block)
            elif forward is None or settings.cache == "none":
                forward = Forward(model, canvas, todo, block, settings)
                logits = forward.first()
            else:
                logits = forward.again(todo, ids)
            rows += len(todo) * (2 if settings.cfg_scale else 1)
            old, near = ids[todo, block], nearness(canvas, todo, block, mask_id, settings)
            ids[todo, block] = commit(logits, old, mask_id, number, settings, last, generator, near)
            if watch:
                watch(start, logits, old, ids[todo, block])
            yield canvas.answers(), rows
        if settings.stop_at_end:
            over = (torch.isin(ids[open_rows, block], ends) & canvas.answer[open_rows, block]).any(dim=1)
            ids[open_rows[over], block.stop :] = eos_ids(model.config)[0]
            open_rows = open_rows[~over]
        if finished and block.stop < ids.shape[1] and len(open_rows):
            finished.append(open_rows, block)
    yield canvas.answers(), rows


def written_last(settings: Settings, end_ids: list[int]) -> list[int]:
    """The ids that are written only when nothing else is left in a block."""
    return [*settings.begin_suppress_tokens, *(end_ids if settings.suppress_end else ())]


@torch.no_grad()
def infill(
    model, texts: list[list[int]], settings: Settings, generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:  # fmt: skip
    """Fills in the masks of texts, lists of ids, and returns them whole. The model sees what is before and behind.

    Windows of block_length tokens are filled from left to right, as blocks are in decode, each in as many steps as a
    block; gen_length and steps only say how many tokens a step writes. Raises InputError.
    """
    if block_diffusion_size(model.config):
        raise InputError("this checkpoint was trained to see no later block, so it cannot fill in gaps.")
    if settings.sampler != "blocks":
        raise InputError("gaps are filled in window by window; leave sampler at 'blocks'.")
    if settings.cfg_scale or settings.cache != "none" or settings.suffix >= 0:
        raise InputError(
            "filling in gaps has neither guidance nor a cache, and the model sees all of the text; leave cfg_scale, "
            "cache and suffix as they are."
        )
    config, longest = model.config, max(map(len, texts))
    if longest > config.max_position_embeddings:
        raise InputError(f"a text has {longest} tokens; the model has {config.max_position_embeddings} positions.")
    ids = torch.full((len(texts), longest), config.pad_token_id)  # (B, L), padded on the right
    seen = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], seen[row, : len(text)] = torch.tensor(text), True
    canvas = Canvas(ids.to(model.device), seen.to(model.device), (ids == config.mask_token_id).to(model.device), 0)
    ids, last = canvas.ids, settings.begin_suppress_tokens
    per_step = 1 if settings.threshold or settings.factor else -(-settings.gen_length // settings.steps)
    for start in range(0, longest, settings.block_length):
        window = slice(start, min(start + settings.block_length, longest))
        number = min(per_step, window.stop - window.start)
        while len(todo := (ids[:, window] == config.mask_token_id).any(dim=1).nonzero()[:, 0]):
            logits = Forward(model, canvas, todo, window, settings).first()
            old, near = ids[todo, window], nearness(canvas, todo, window, config.mask_token_id, settings)
            ids[todo, window] = commit(logits, old, config.mask_token_id, number, settings, last, generator, near)
            if watch:
                watch(start, logits, old, ids[todo, window])
    return [row[: len(text)].tolist() for row, text in zip(ids, texts)]


@dataclass
class Canvas:
    """What is decoded: prompts, each with its answer behind it, which is masks at first."""

    ids: Tensor  # (B, L), padded on the left
    seen: Tensor  # (B, L) bool: prompt or answer, not padding
    answer: Tensor  # (B, L) bool: the G columns of each row's answer
    start: int  # the column where the first block starts

    def answers(self) -> Tensor:
        """The answers as they are now, (B, G)."""
        return self.ids[self.answer].view(len(self.ids), -1)

    def visible(self, rows: Tensor, mask_id: int) -> Tensor:
        """Where some rows (R,) have a token that is neither padding nor a mask, (R, L) bool."""
        return self.seen[rows] & (self.ids[rows] != mask_id)

    @cached_property
    def prompt(self) -> Tensor:
        """The columns of each row's prompt, (B, L) bool."""
        return self.seen & (self.answer.cumsum(dim=1) == 0)

    def without_prompts(self, rows: Tensor, columns: slice, mask_id: int) -> Tensor:
        """Some rows and columns of the ids, with the prompts masked: what guidance compares with."""
        return self.ids[rows, columns].masked_fill(self.prompt[rows, columns], mask_id)


def make_canvas(config, prompts: list[list[int]], gen_length: int, device) -> Canvas:
    """Prompts on the right edge of P columns, then gen_length masks.

    A block-diffusion model knows whole blocks only: masks fill up the last one, and what is written there is left out.
    It may count its blocks from the start of the prompt: the columns then are such that a block starts in the same
    column of every row, the first one perhaps with the end of the prompt in it.
    Raises InputError that names the first prompt that does not fit, or what the model's config lacks.
    """
    special = {"mask_token_id": getattr(config, "mask_token_id", None), "pad_token_id": config.pad_token_id}
    for key, token in [*special.items(), *(("eos_token_id", token) for token in eos_ids(config))]:
        if token is None or not 0 <= token < config.vocab_size:
            raise InputError(f"the model's config.json has {key} {token}; decoding needs one of its tokens there.")
    size = block_diffusion_size(config)
    from_prompt = size if size and blocks_from_sample(config) else 1
    over = [len(prompt) % from_prompt for prompt in prompts]  # tokens of the prompt in the first block
    start = max(len(prompt) - some for prompt, some in zip(prompts, over))
    width = max(over) + gen_length
    width += -width % size if size else 0
    for number, (prompt, some) in enumerate(zip(prompts, over), start=1):
        if len(prompt) - some + width > config.max_position_embeddings:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with gen_length {gen_length} that is more than the "
                f"model's {config.max_position_embeddings} positions."
            )
    ids = torch.full((len(prompts), start + width), config.mask_token_id)
    seen, answer = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, some) in enumerate(zip(prompts, over)):
        padding, end = start + some - len(prompt), start + some
        ids[row, :padding], seen[row, :padding] = config.pad_token_id, False
        ids[row, padding:end] = torch.tensor(prompt, dtype=torch.long)
        answer[row, end : end + gen_length] = True
    return Canvas(ids.to(device), seen.to(device), answer.to(device), start)


def block_diffusion_size(config) -> int | None:
    """Tokens of a block, for a model that was trained to see no later block (train_bd3lm.py)."""
    return getattr(config, "block_diffusion_size", None)


def blocks_from_sample(config) -> bool:
    """Whether its blocks are counted from the start of the prompt, not from that of the answer."""
    return getattr(config, "block_diffusion_from", None) == "sample"


def settings_for(args: argparse.Namespace, config) -> Settings:
    """The settings of parsed flags for a model: a block-diffusion model has its own block length. Raises InputError."""
    settings = from_flags(args, block_diffusion_size(config))
    check_settings(config, settings)
    return settings


def check_settings(config, settings: Settings) -> None:
    """Refuses ids that a model does not have, and what a block-diffusion model cannot do. Raises InputError."""
    for token in settings.suppress_tokens + settings.begin_suppress_tokens:
        if token >= config.vocab_size:
            raise InputError(f"token {token} cannot be suppressed: the model has {config.vocab_size:,} tokens.")
    if settings.top_k >= config.vocab_size:
        raise InputError(f"top_k {settings.top_k}: give less than the model's {config.vocab_size:,} tokens.")
    size = block_diffusion_size(config)
    if size and settings.sampler != "blocks":
        raise InputError("this checkpoint was trained to write blocks from left to right; leave sampler at 'blocks'.")
    if size and settings.block_length != size:
        raise InputError(f"this checkpoint writes blocks of {size} tokens; give --block_length {size}.")
    if size and settings.cache != "none":
        raise InputError(
            f"cache {settings.cache!r} is approximate; this checkpoint keeps finished blocks exactly: 'none'."
        )
    if size and settings.suffix >= 0:
        raise InputError(f"suffix {settings.suffix} has no meaning: this checkpoint sees nothing behind a block.")


def tokens_per_pass(settings: Settings, start: int, stop: int) -> list[int]:
    """How many tokens each pass over a block writes; its tokens are start to stop, counted from the first block.

    With a threshold or factor, at least these are written. All passes up to the end of a block are in proportion to the
    tokens up to there, rounded down: every block has one, and together they are the steps. Within a block, the first
    passes write one token more if they cannot all write the same (LLaDA).
    """
    size = stop - start
    if settings.threshold or settings.factor:
        return [1] * size
    passes = settings.steps * stop // settings.gen_length - settings.steps * start // settings.gen_length
    return [size // passes + (step < size % passes) for step in range(passes)]


class FinishedBlocks:
    """Decoding of a block-diffusion model: keys and values of prompt and finished blocks, which never change again.

    A step runs the model over one block only. Exact, as no position sees a later block. rows: those of the canvas that
    are kept, R of them; with guidance, they come twice, and the second half has its prompt masked.
    """

    def __init__(self, model, canvas, settings):
        self.model, self.canvas, self.settings, self.cache = model, canvas, settings, DynamicCache()
        self.rows = torch.arange(len(canvas.ids), device=canvas.ids.device)
        self.seen = canvas.seen.repeat(2, 1) if settings.cfg_scale else canvas.seen  # (R, L)
        self.positions = (self.seen.cumsum(dim=1) - 1).clamp(min=0)  # (R, L): padding does not count
        by_blocks = blocks_from_sample(model.config)
        size = settings.block_length if by_blocks else max(1, canvas.start)  # else the prompt is one block
        for start in range(0, canvas.start, size):
            self.run(slice(start, start + size), head=1)

    def run(self, columns, head):
        """The model on columns of the canvas, behind what is in the cache, which grows. Logits of the last `head`."""
        ids, seen = self.canvas.ids[self.rows, columns], self.seen[:, : columns.stop]
        if self.settings.cfg_scale:
            mask_id = self.model.config.mask_token_id
            ids = torch.cat([ids, self.canvas.without_prompts(self.rows, columns, mask_id)])
        return self.model(
            input_ids=ids,
            attention_mask=None if seen.all() else seen,
            position_ids=self.positions[:, columns],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=head,
        ).logits.float()

    def logits(self, block):
        """Logits (R, K, V) of the block in progress; the cache stays as it is."""
        logits = self.run(block, head=block.stop - block.start)
        self.cache.crop(block.start - block.stop)
        logits = guided(logits, self.settings.cfg_scale)
        logits[..., self.model.config.mask_token_id] = -torch.inf  # no probability for the mask (2503.09573: SUBS)
        return logits

    def append(self, rows, block):
        """Adds a finished block, and drops the rows of the canvas that are not among `rows`."""
        keep_rows(self, rows)
        self.run(block, head=1)


def keep_rows(forward: "FinishedBlocks | Forward", rows: Tensor) -> None:
    """Drops the rows of the canvas that are not among `rows` from what a forward pass remembers."""
    kept = torch.isin(forward.rows, rows)
    every = kept.repeat(2) if forward.settings.cfg_scale else kept
    forward.rows, forward.seen, forward.positions = forward.rows[kept], forward.seen[every], forward.positions[every]
    forward.cache.batch_select_indices(every.nonzero()[:, 0])


def guided(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: the first half of the rows has seen the prompt, the second has not."""
    if not scale:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)


class Forward:
    """The model on some rows of the canvas, for the steps of one block; keeps keys and values if the settings say so.

    With guidance, every row comes twice: the second half has its prompt masked.
    With a suffix window, the columns behind it are left out, L is the number of those that stay, and these keep their
    positions. Left out is only what stands behind the block, so that the block has the same columns as before.
    """

    def __init__(self, model, canvas, rows, block, settings):
        self.model, self.rows, self.block, self.settings = model, rows, block, settings
        self.ids, self.seen = canvas.ids[rows], canvas.seen[rows]  # (R, L), (R, L)
        self.positions = (self.seen.cumsum(dim=1) - 1).clamp(min=0)  # (R, L): padding does not count
        if settings.cfg_scale:
            masked = canvas.without_prompts(rows, slice(None), model.config.mask_token_id)
            self.ids, self.seen = torch.cat([self.ids, masked]), self.seen.repeat(2, 1)
            self.positions = self.positions.repeat(2, 1)
        self.columns = torch.arange(self.ids.shape[1], device=self.ids.device)  # of the canvas
        if settings.suffix >= 0:
            last = self.columns[block.stop + settings.suffix :][-1:] if settings.suffix_last else self.columns[:0]
            self.columns = torch.cat([self.columns[: block.stop + settings.suffix], last])
            self.ids, self.seen = self.ids[:, self.columns], self.seen[:, self.columns]
            self.positions = self.positions[:, self.columns]

    def first(self):
        """Logits (R, K, V) of the block from a pass over the whole canvas, or what the suffix window leaves of it."""
        cache = None if self.settings.cache == "none" else DynamicCache(config=self.model.config)
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        logits = self.run(self.ids, columns, columns[self.block], cache)
        if cache is not None:
            after = columns[self.block.stop :] if self.settings.cache == "dual" else columns[:0]
            self.kept = torch.cat([columns[: self.block.start], after])
            self.new = columns[self.block] if self.settings.cache == "dual" else columns[self.block.start :]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, self.kept], layer.values[:, :, self.kept]
            self.cache = cache
        return logits

    def each(self, columns):
        """Logits (R, K, V) of K columns in each row, other ones in each: (R, L) bool. Without cache and window."""
        wanted = columns.repeat(2, 1) if self.settings.cfg_scale else columns
        logits = self.run(self.ids, self.columns, wanted, None)
        return logits.view(len(columns), -1, logits.shape[-1])

    def again(self, rows, ids):
        """Logits (R, K, V) of the block from a pass over the columns whose keys and values are not kept. ids: (B, L)

        rows: those of the canvas where something is left to be written; the others are dropped.
        """
        if len(rows) < len(self.rows):
            keep_rows(self, rows)
        ids = ids[self.rows][:, self.columns[self.new]].repeat(2 if self.settings.cfg_scale else 1, 1)
        wanted = torch.arange(self.block.stop - self.block.start, device=ids.device)
        logits = self.run(ids, self.new, wanted, self.cache, self.kept)
        self.cache.crop(-len(self.new))
        return logits

    def run(self, ids, columns, wanted, cache, kept=None):
        """The model on ids, which stand in these of the L columns; wanted: where in `ids` the head is needed."""
        seen = self.seen if kept is None else self.seen[:, torch.cat([kept, columns])]
        logits = self.model(
            input_ids=ids,
            attention_mask=None if seen.all() else seen,  # no mask, if it can be: attention is faster then
            position_ids=self.positions[:, columns],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=wanted,
        ).logits.float()
        return guided(logits, self.settings.cfg_scale)


def nearness(canvas: Canvas, rows: Tensor, block: slice, mask_id: int, settings: Settings) -> Tensor | None:
    """conv.nearness of a block in some rows (R,) of the canvas, (R, K), if remasking goes by it."""
    if settings.remasking == "nearness":
        return conv.nearness(canvas.visible(rows, mask_id), settings.window)[:, block]
    return None


def commit(
    logits: Tensor, block: Tensor, mask_id: int, number: int, settings: Settings, last: list[int], generator=None,
    near: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes the `number` tokens of each row that the model is most confident of, and more by threshold or factor.

    logits (R, K, V) fp32; block (R, K) ids with masks; last: ids that are written after all others. Confidence is the
    probability among the tokens that are not in `last`, as in LLaDA's code; near (R, K): see conv.nearer. Returns the
    block with the tokens written.
    """
    if settings.suppress_tokens:
        logits = logits.index_fill(-1, torch.tensor(settings.suppress_tokens, device=logits.device), -torch.inf)
    never = torch.arange(logits.shape[-1], device=logits.device) == mask_id  # (V,): the mask is no token to write
    token = sample(logits.masked_fill(never, -torch.inf), settings.temperature, generator)  # (R, K)
    if settings.remasking == "random":
        confidence = torch.rand(token.shape, generator=generator, device=token.device)
    else:
        confidence = probability(logits, token)
    if last:
        ids = torch.tensor(last, device=token.device)
        late = torch.isin(token, ids)  # (R, K)
        if settings.remasking != "random":
            confidence = torch.where(late, confidence, probability(logits.index_fill(-1, ids, -torch.inf), token))
    if near is not None:
        confidence = conv.nearer(confidence, near)
    if last:
        confidence = confidence - 2.0 * late
    masked = block == mask_id
    confidence = confidence.masked_fill(~masked, -torch.inf)
    chosen = torch.zeros_like(masked)
    chosen.scatter_(1, confidence.topk(number, dim=1).indices, True)
    if settings.threshold:
        chosen |= confidence > settings.threshold
    if settings.factor:
        chosen |= above_factor(confidence, settings.factor)
    return torch.where(chosen & masked, token, block)


def above_factor(confidence: Tensor, factor: float) -> Tensor:
    """Fast-dLLM's rule (2505.22618): the n best of a row if the n-th is at least 1 - factor / (n + 1). (R, K) -> bool

    If one fails, so do all behind it: confidence falls and the limit rises. The published code also writes a mask that
    is the only one to fail, which is not in the paper, so not here. Ids that come last have a confidence below 0, which
    no factor lets pass.
    """
    best, place = confidence.sort(dim=1, descending=True)
    limit = 1 - factor / torch.arange(2, best.shape[1] + 2, device=best.device)  # (K,)
    return torch.zeros_like(best, dtype=torch.bool).scatter(1, place, best >= limit.clamp(min=0))


def probability(logits: Tensor, token: Tensor) -> Tensor:
    """The probability of each position's token. (R, K, V), (R, K) -> (R, K)"""
    return logits.softmax(dim=-1).gather(-1, token[..., None])[..., 0]


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """The most likely tokens, or at a temperature above 0 a draw by the Gumbel trick in fp64. (R, K, V) -> (R, K)"""
    if not temperature:
        return logits.argmax(dim=-1)
    noise = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
    return (logits.double() - temperature * (-noise.log()).log()).argmax(dim=-1)
