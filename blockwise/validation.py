"""The loss on samples that are not trained, with the same blocks and masks each time; see VAL_PT."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import masking
from blockwise.cli import InputError
from blockwise.data import derive_seed, make_samples, read_pt, schedule
from blockwise.run.ranks import Ranks


def read(knobs: SimpleNamespace) -> list | Tensor | None:
    """What the file VAL_PT holds, see data.read_pt; None if there is to be no validation. Raises InputError."""
    if knobs.VAL_EVERY and not knobs.VAL_PT:
        raise InputError(f"VAL_EVERY={knobs.VAL_EVERY} needs samples: name a file of pt.py with --VAL_PT=...")
    return read_pt(knobs.VAL_PT) if knobs.VAL_PT else None


class Validation:
    """The validation samples, one block of each, and the objective.

    Blocks and masks come from SEED alone, so that they are the same after every step of every run with that SEED.
    """

    def __init__(
        self, data: list | Tensor, knobs: SimpleNamespace, config, noise: Callable, loss: Callable,
        blocks: Callable[[Tensor], Tensor] | None,
    ):  # fmt: skip
        """data: of `read`; config: the model's; noise, loss, blocks: see trainer.train. Raises InputError."""
        named = vars(knobs) | {"DATA_PT": knobs.VAL_PT, "MAX_SAMPLES": 0}
        self.samples = make_samples(data, SimpleNamespace(**named), config)
        self.knobs, self.noise, self.objective = knobs, noise, loss
        answer_len = self.samples.length - self.samples.prompt_len  # (N,)
        blocks_of_each = blocks(answer_len) if blocks else torch.ones_like(answer_len)
        self.plan = schedule(blocks_of_each, 1, derive_seed(knobs.SEED, "validation"))  # (N, 2)

    def noised(self, device: torch.device) -> masking.Noised:
        """All samples as one batch with its noise, the same on every rank and each time."""
        sample, block = self.plan.to(device).T  # (N,), (N,)
        batch = self.samples.to(device).batch(sample, block)
        generator = torch.Generator(device).manual_seed(derive_seed(self.knobs.SEED, "validation", "masks"))
        return self.noise(batch, generator, self.knobs)

    @torch.no_grad()
    def loss(self, model, ranks: Ranks, should_stop: Callable[[], object]) -> float | None:
        """The loss that an optimizer step would have whose global batch is all of the samples, without dropout.

        Every rank takes its share of the micro-batches; their losses are added up in the order of the samples. The
        model is left in training mode. should_stop: whether this rank got a signal; None: some rank did, so that the
        loss is not known. nan if no token is supervised.
        """
        noised, size, parts = self.noised(ranks.device), self.knobs.MICRO_BSIZE, []
        model.eval()
        for start in range(ranks.rank * size, len(self.plan), ranks.world_size * size):
            if should_stop():
                break
            part = noised.rows(slice(start, start + size))
            logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
            parts.append((start, self.objective(logits, part).item()))
        model.train()
        everyone = ranks.on_all_ranks(lambda: None if should_stop() else parts)
        if None in everyone:
            return None
        return sum(loss for _, loss in sorted(sum(everyone, []))) if noised.supervised.any() else math.nan
