"""Conv decoding: the whole answer at once, but only near what is written already (arXiv 2509.15188, section 4.1).

A step at time t, on the way from 1 to almost 0, may write every masked position: the chance is that of ancestral
sampling of a masked diffusion model, times a factor that falls to 0 outside of a window around visible tokens. One
normaliser for the answer makes up for it, so that on average as many tokens are written in each step as without the
window. What is written stays.

Letters in shapes are those of decode.py, where G is the block: B prompts, R rows of a forward pass, L columns of the
canvas, G gen_length, V vocabulary; and k for top_k.

Different from the published code (ybseo-ac/Conv): docs/decoding.md has the list.
"""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from blockwise.cli import InputError

LAST = 1e-5  # the time after the last step. Above 0, so that positions far from all text still keep their masks there


def nearness(visible: Tensor, window: int) -> Tensor:
    """How near each position is to visible ones: tanh of their number in a window around it. (R, L) bool -> fp64

    The window reaches window // 2 positions to each side. The factor conv_mult of the published code is 1, as it is
    there in all runs: 1, 2 and 3 visible tokens give 0.76, 0.96 and 0.995.
    """
    total = F.pad(visible.cumsum(dim=1), (1, 0))  # (R, L + 1): visible positions before each
    at, length, half = torch.arange(visible.shape[1], device=visible.device), visible.shape[1], window // 2
    number = total[:, (at + half + 1).clamp(max=length)] - total[:, (at - half).clamp(min=0)]
    return number.double().tanh()


def nearer(confidence: Tensor, near: Tensor) -> Tensor:
    """Confidence x nearness, for the remasking rule `nearness`. (R, K), (R, K) -> (R, K)

    Positions that are near nothing would all be 0, and which of them is written a matter of chance: they come after
    all others, the first one first.
    """
    columns = near.shape[1]
    far = -torch.arange(1, columns + 1, device=near.device, dtype=near.dtype) / (columns + 1)  # (K,), above -1
    return torch.where(near > 0, confidence * near, far)


def weights(logits: Tensor, near: Tensor, masked: Tensor, t: float, s: float, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each position, and how much they, and last the mask, weigh in the step from t to s.

    logits (R, G, V) fp32; near (R, G) fp64; masked (R, G) bool. Returns ids (R, G, k) and weights (R, G, k + 1) fp64.
    In each row, near x probability is scaled such that its sum over masked positions and tokens is their number.
    """
    top = logits.topk(k, dim=-1)
    chance = (top.values - logits.logsumexp(dim=-1, keepdim=True)).exp().double()  # (R, G, k)
    chance = chance * (near * masked)[..., None]
    norm = masked.sum(dim=1) / (chance.sum(dim=(1, 2)) + 1e-12)  # (R,)
    stay = torch.full_like(near, s)[..., None]  # (R, G, 1)
    return top.indices, torch.cat([chance * norm[:, None, None] * (t - s), stay], dim=-1)


def draw(tokens: Tensor, weight: Tensor, generators: list[torch.Generator], mask_id: int) -> Tensor:
    """A token or the mask for each position, by their weights. (R, G, k), (R, G, k + 1), R generators -> (R, G)"""
    shape, like = weight.shape[1:], {"dtype": weight.dtype, "device": weight.device}
    noise = torch.stack([torch.rand(shape, generator=one, **like) for one in generators])  # (R, G, k + 1)
    choice = (weight / -noise.log()).argmax(dim=-1, keepdim=True)
    return F.pad(tokens, (0, 1), value=mask_id).gather(-1, choice)[..., 0]


def generators_of_rows(number: int, generator: torch.Generator | None, device) -> list[torch.Generator]:
    """A generator for each row, whose seed is one draw from the given one.

    So prompts that are answered one after the other with one generator get the draws that they would get in a batch.
    """
    seeds = [torch.randint(2**63 - 1, (1,), generator=generator, device=device).item() for _ in range(number)]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def after_end(answers: Tensor, mask_id: int, ends: Tensor) -> Tensor:
    """The masks behind a token that ends an answer in whose front no mask is left. (R, G) -> (R, G) bool"""
    masked, end = answers == mask_id, torch.isin(answers, ends)
    first = (masked | end).int().argmax(dim=1, keepdim=True)  # (R, 1)
    return masked & end.gather(1, first)


def stream(
    canvas, forward: Callable[[Tensor], Tensor], settings, mask_id: int, end_of_text: int, end_ids: list[int],
    generator: torch.Generator | None = None, watch=None,
) -> Iterator[tuple[Tensor, int]]:  # fmt: skip
    """As decode.stream, which calls it: yields (ids (B, G), rows so far) after each step.

    canvas: a decode.Canvas; forward: from rows of it (R,) to the logits (R, G, V) of their answers.
    A row takes no further passes when nothing in it is masked. If there still are masks after all steps, one more pass
    writes the likeliest token of each, and their number is logged. Raises InputError.
    """
    ids, answer, rows, dt = canvas.ids, slice(canvas.start, None), 0, (1 - LAST) / settings.steps
    everyone = torch.arange(len(ids), device=ids.device)
    if len(empty := (~canvas.visible(everyone, mask_id).any(dim=1)).nonzero()):
        raise InputError(f"prompt {empty[0].item() + 1} is empty; sampler 'conv' only writes near text: use 'blocks'.")
    own, ends = generators_of_rows(len(ids), generator, ids.device), torch.tensor(end_ids, device=ids.device)
    for step in range(settings.steps + 1):
        todo = everyone[(ids[:, answer] == mask_id).any(dim=1)]
        if not len(todo):
            break
        logits, old = forward(todo), ids[todo, answer]
        logits[..., [mask_id, *settings.suppress_tokens]] = -torch.inf
        masked = old == mask_id
        if step < settings.steps:
            near = nearness(canvas.visible(todo, mask_id), settings.window)[:, answer]
            tokens, weight = weights(logits, near, masked, 1 - step * dt, 1 - (step + 1) * dt, settings.top_k)
            token = draw(tokens, weight, [own[row] for row in todo.tolist()], mask_id)
        else:
            said = "tokens still masked after %d steps: %d; one more pass wrote the likeliest there"
            logging.getLogger(__name__).warning(said, settings.steps, masked.sum().item())
            token = logits.argmax(dim=-1)
        new = torch.where(masked, token, old)
        ids[todo, answer] = new
        rows += len(todo) * (2 if settings.cfg_scale else 1)
        if watch:
            watch(canvas.start, logits, old, new)
        if settings.stop_at_end:
            ids[todo, answer] = new.masked_fill(after_end(new, mask_id, ends), end_of_text)
        yield canvas.answers(), rows
    yield canvas.answers(), rows
