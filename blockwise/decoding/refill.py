"""Answers to many prompts with a batch that stays full: when an answer has ended, the next prompt takes its row.

Rows of the canvas may then be in different blocks. They are moved sideways such that the blocks that are written next
have the same columns; padding stands on both sides, and no row sees it.

Letters in shapes are those of decode.py: R rows, L columns of the canvas, G gen_length, K block_length.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blockwise.decoding import decode
from blockwise.decoding.settings import Settings


@dataclass
class Row:
    """A prompt that is being answered."""

    number: int  # of the prompt
    ids: Tensor  # (prompt + G,), with masks where nothing is written yet
    prompt_len: int
    written: int = 0  # tokens of the blocks that are finished
    passes: int = 0  # forward passes so far, twice as many with guidance

    @property
    def at(self) -> int:
        """Where the block starts that is written next."""
        return self.prompt_len + self.written


def fits(config, settings: Settings) -> bool:
    """Whether an answer does not depend on the other rows of its batch, and rows in different blocks can be written.

    Not so: random draws; block-diffusion models, whose finished blocks are kept for the whole batch; a window with the
    last mask of the answer, which is in another column of each row; blocks that differ in the tokens of their passes.
    """
    size, length = settings.block_length, settings.gen_length
    blocks = [(start, min(start + size, length)) for start in range(0, length, size)]
    alike = len({tuple(decode.tokens_per_pass(settings, *block)) for block in blocks}) == 1
    alike = alike or settings.threshold > 0 or settings.factor > 0  # each pass writes at least one, anywhere
    random = settings.temperature or settings.remasking == "random" or settings.sampler != "blocks"
    return not (random or decode.block_diffusion_size(config) or settings.suffix_last) and alike


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
    waiting, rows = deque(enumerate(prompts)), []
    ends = torch.tensor(end_ids, dtype=torch.long, device=model.device)
    numbers = decode.tokens_per_pass(settings, 0, min(settings.block_length, settings.gen_length))
    while waiting or rows:
        while waiting and len(rows) < batch_size:
            rows.append(start(model, *waiting.popleft(), settings.gen_length))
        canvas = arrange(rows, model.config.pad_token_id)
        block = slice(canvas.start, min(canvas.start + settings.block_length, canvas.ids.shape[1]))
        everyone = torch.arange(len(rows), device=model.device)
        for todo in decode.write_block(model, canvas, everyone, block, numbers, settings, end_ids):
            for row in todo.tolist():
                rows[row].passes += 2 if settings.cfg_scale else 1
        over = torch.isin(canvas.ids[:, block], ends) & canvas.answer[:, block] & settings.stop_at_end  # (R, K)
        for row, ids, stopped in zip(rows, canvas.ids, over.any(dim=1).tolist()):
            new = ids[block][: len(row.ids) - row.at]  # the last block may be shorter
            row.ids[row.at : row.at + len(new)] = new
            row.written += len(new)
            if stopped:
                row.ids[row.at :], row.written = decode.eos_ids(model.config)[0], settings.gen_length
        if done := [row for row in rows if row.at == len(row.ids)]:
            yield [(row.number, row.ids[row.prompt_len :], row.passes) for row in done]
        rows = [row for row in rows if row.at < len(row.ids)]


def start(model, number: int, prompt: list[int], gen_length: int) -> Row:
    """A prompt of which nothing is answered yet."""
    ids = torch.tensor(prompt + [model.config.mask_token_id] * gen_length, device=model.device)
    return Row(number, ids, len(prompt))


def arrange(rows: list[Row], pad_id: int) -> decode.Canvas:
    """Rows with the same columns for the blocks that are written next, which start at canvas.start."""
    begin = max(row.at for row in rows)
    width = begin + max(len(row.ids) - row.at for row in rows)
    ids = torch.full((len(rows), width), pad_id, device=rows[0].ids.device)  # (R, L)
    seen, answer = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        left = begin - row.at
        ids[number, left : left + len(row.ids)] = row.ids
        seen[number, left : left + len(row.ids)] = True
        answer[number, left + row.prompt_len : left + len(row.ids)] = True
    return decode.Canvas(ids, seen, answer, begin)
