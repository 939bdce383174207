"""Answers to many prompts with a batch that stays full: when an answer has ended, the next prompt takes its row.

Each row is in a block of its own, and begins the next one when that is written. A pass sees the whole canvas, so
blocks in different columns are no matter.

Letters in shapes are those of decode.py: R rows, L columns of the canvas, G gen_length, K block_length.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwise.decoding import conv, decode
from blockwise.decoding.settings import Settings


@dataclass
class Row:
    """A prompt that is being answered."""

    number: int  # of the prompt
    prompt: list[int]
    answer: Tensor  # (G,), with masks where nothing is written yet; part of the canvas
    written: int = 0  # tokens of the blocks that are finished
    passes: int = 0  # forward passes so far, twice as many with guidance


def fits(config, settings: Settings) -> bool:
    """Whether an answer does not depend on the other rows of its batch, and rows in different blocks can be written.

    Not so: random draws; keys and values that are kept, and a suffix window, which are about one block; blocks whose
    passes do not all write the same number of tokens.
    """
    random = settings.temperature or settings.remasking == "random" or settings.sampler != "blocks"
    kept = settings.cache != "none" or settings.suffix >= 0 or decode.block_diffusion_size(config)
    per_block = settings.steps * settings.block_length / settings.gen_length
    uneven = not (settings.threshold or settings.factor) and (per_block % 1 or settings.block_length % per_block)
    return not (random or kept or uneven or settings.gen_length % settings.block_length)


@torch.no_grad()
def answers(
    model, prompts: list[list[int]], settings: Settings, end_ids: list[int], batch_size: int
) -> Iterator[list[tuple[int, Tensor, int]]]:
    """decode.decode for any number of prompts, at most batch_size at a time, with settings that `fits` allows.

    Yields the answers that end together: for each the number of the prompt, from 0, the ids (G,), and its forward
    passes. They are those of decode.decode, up to rounding. Raises InputError.
    """
    decode.check_settings(model.config, settings)
    decode.make_canvas(model.config, prompts, settings.gen_length, "cpu")  # which refuses what does not fit
    waiting, rows, canvas = deque(enumerate(prompts)), [], None
    while waiting or rows:
        if canvas is None:
            while waiting and len(rows) < batch_size:
                number, prompt = waiting.popleft()
                empty = torch.full((settings.gen_length,), model.config.mask_token_id, device=model.device)
                rows.append(Row(number, prompt, empty))
            canvas = arrange(model, rows, settings.gen_length)
        write(model, canvas, rows, settings, end_ids)
        if done := [row for row in rows if row.written == settings.gen_length]:
            yield [(row.number, row.answer, row.passes) for row in done]
            rows, canvas = [row for row in rows if row.written < settings.gen_length], None


def arrange(model, rows: list[Row], gen_length: int) -> decode.Canvas:
    """A canvas of rows that are partly answered; their answers are parts of it from now on."""
    canvas = decode.make_canvas(model.config, [row.prompt for row in rows], gen_length, model.device)
    for row, ids in zip(rows, canvas.ids):
        ids[canvas.start :] = row.answer
        row.answer = ids[canvas.start :]
    return canvas


def write(model, canvas: decode.Canvas, rows: list[Row], settings: Settings, end_ids: list[int]) -> None:
    """A pass over all rows, which writes tokens in the block of each."""
    everyone, mask_id = torch.arange(len(rows), device=canvas.ids.device), model.config.mask_token_id
    starts = canvas.start + torch.tensor([row.written for row in rows], device=canvas.ids.device)[:, None]  # (R, 1)
    position = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)  # (L,)
    block = (position >= starts) & (position < starts + settings.block_length)  # (R, L)
    logits = decode.Forward(model, canvas, everyone, slice(0), settings).each(block)  # (R, K, V)
    old, near = canvas.ids[block].view(len(rows), -1), None
    if settings.remasking == "nearness":
        near = conv.nearness(canvas.visible(everyone, mask_id), settings.window)[block].view_as(old)
    number = decode.tokens_per_pass(settings, 0, settings.block_length)[0]
    last = decode.written_last(settings, end_ids)
    new = decode.commit(logits, old, mask_id, number, settings, last, near=near)  # (R, K)
    canvas.ids[block] = new.flatten()
    ends = torch.tensor(end_ids, dtype=torch.long, device=new.device)
    full = (new != mask_id).all(dim=1)
    over = full & torch.isin(new, ends).any(dim=1) & settings.stop_at_end
    for row, is_full, is_over in zip(rows, full.tolist(), over.tolist()):
        row.passes += 2 if settings.cfg_scale else 1
        row.written += settings.block_length if is_full else 0
        if is_over:
            row.answer[row.written :], row.written = decode.eos_ids(model.config)[0], settings.gen_length
