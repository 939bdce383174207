"""The method of Blockwise SFT (arXiv 2508.19529): which tokens are masked and which supervised, as tensor functions.

One sample, BLOCK_SIZE 4, with block 1 of the answer active (`.` visible, `#` masked, `?` masked with mask ratio p):

    position    0 1 2 3 4 5 | 6 7 8 9 | 10 11 12 13 | 14 15 16 | 17 18 19
    region      prompt      | prefix  | active      | suffix   | padding
    block                   | 0       | 1           | 2 (short)|
    input       . . . . . . | . . . . | ?  ?  ?  ?  | #  #  #  | .  .  .
    supervised                          the masked ones

That is what block-by-block decoding sees: a finished prefix, one block in progress, and nothing after it but masks.
Full-sequence SFT, the baseline, is the same with a single block as long as the answer.

Letters in shapes: G samples of a global batch (B, of any batch), L positions with padding, V vocabulary, n supervised
positions. Everything runs on the device of its input, and all randomness comes from the generator that is passed in.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Batch:
    """The samples of a global batch, which a trainer's `noise` function turns into a Noised."""

    input_ids: Tensor  # (G, L) int64, padded on the right
    prompt_len: Tensor  # (G,) where the answer starts
    length: Tensor  # (G,) where it ends
    block: Tensor  # (G,) block-wise SFT: the block to train, from 0; other objectives: how often the sample came before


@dataclass
class Noised:
    """A global batch as the model sees it, with all that the loss needs. L' is L, or longer for other objectives."""

    input_ids: Tensor  # (G, L')
    supervised: Tensor  # (G, L') bool: where the model computes logits, which the loss gets
    targets: Tensor  # (G, L') the right tokens
    weights: Tensor  # (G, L') float, of any sign: how much a position counts in the loss of the global batch
    extra: dict[str, Tensor] = field(default_factory=dict)  # more (G, ...) tensors for the loss
    model_args: dict[str, Tensor] = field(default_factory=dict)  # (G, ...) tensors for the model besides input_ids

    def rows(self, some: slice) -> "Noised":
        """Some of the samples, such as those of one rank's micro-batch."""
        extra = {name: value[some] for name, value in self.extra.items()}
        model_args = {name: value[some] for name, value in self.model_args.items()}
        tensors = (self.input_ids, self.supervised, self.targets, self.weights)
        return Noised(*(tensor[some] for tensor in tensors), extra, model_args)


def num_blocks(answer_len, block_size: int):
    """Blocks in an answer of `answer_len` tokens, the last one perhaps short. (B,) -> (B,), or int -> int."""
    return (answer_len + block_size - 1) // block_size


def regions(
    prompt_len: Tensor, length: Tensor, block: Tensor, max_len: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits each answer, the positions [prompt_len, length), around its active block.

    prompt_len, length, block: (B,) integers; the active block starts at prompt_len + block * block_size.
    Returns prefix, active, suffix: three disjoint (B, L) bool masks that together cover the answer and nothing else.
    """
    pos = torch.arange(max_len, device=prompt_len.device)  # (L,)
    start = (prompt_len + block * block_size)[:, None]  # (B, 1)
    answer = (pos >= prompt_len[:, None]) & (pos < length[:, None])  # (B, L)
    before, after = pos < start, pos >= start + block_size
    return answer & before, answer & ~before & ~after, answer & after


def blockwise_masks(
    prompt_len: Tensor, length: Tensor, block: Tensor, max_len: int, *, block_size: int, mask_prob_eps: float,
    prefix_mask_rate: float, suffix_mask_prob: float, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draws which tokens are masked in the model's input, and which of those are supervised.

    Per sample one mask ratio p ~ U(mask_prob_eps, 1). A token of the active block is masked with probability p, one of
    the prefix with prefix_mask_rate, one of the suffix with suffix_mask_prob; prompt and padding never are.
    Returns masked, supervised: (B, L) bool; supervised is the masked part of the active block; and p: (B, 1).
    """
    prefix, active, suffix = regions(prompt_len, length, block, max_len, block_size)
    uniform = {"generator": generator, "device": prompt_len.device}
    p = mask_prob_eps + (1 - mask_prob_eps) * torch.rand(len(prompt_len), 1, **uniform)  # (B, 1)
    u = torch.rand(len(prompt_len), max_len, **uniform)  # (B, L), in [0, 1): rate 0.0 masks nothing, 1.0 everything
    supervised = active & (u < p)
    return supervised | (prefix & (u < prefix_mask_rate)) | (suffix & (u < suffix_mask_prob)), supervised, p


def full_sequence_masks(
    prompt_len: Tensor, length: Tensor, max_len: int, *, mask_prob_eps: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The baseline: every answer token is masked with the sample's p, and the masked ones are supervised. As above."""
    return blockwise_masks(
        prompt_len, length, torch.zeros_like(prompt_len), max_len, block_size=max_len, mask_prob_eps=mask_prob_eps,
        prefix_mask_rate=0.0, suffix_mask_prob=0.0, generator=generator,
    )  # fmt: skip


def mask_answers(ids: Tensor, prompt_len: Tensor, length: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Samples as decoding first sees them: all of the answer masked. ids (B, L) -> ids, and the answer, both (B, L)."""
    whole = ids.shape[1]  # as the block size: one block, the answer
    _, answer, _ = regions(prompt_len, length, torch.zeros_like(length), whole, whole)
    return ids.masked_fill(answer, mask_id), answer


def sample_mean_weights(supervised: Tensor) -> Tensor:
    """Weights under which a sum over tokens is the mean over samples of the mean over a sample's supervised tokens.

    Samples in which p masked nothing have nothing to predict: they do not count. (B, L) bool -> (B, L) float.
    """
    per_sample = supervised.sum(dim=1, keepdim=True)  # (B, 1)
    samples = (per_sample > 0).sum()
    return supervised / (per_sample * samples).clamp(min=1)


def bound_weights(supervised: Tensor, p: Tensor, blocks: Tensor | int, answer_len: Tensor) -> Tensor:
    """Weights under which a sum over tokens is, on average over the draws, the block-wise diffusion bound per token.

    Theorem 3.3: one block of a sample and one p stand for all of them with the weight number of blocks x 1/p. With one
    block as long as the answer it is the loss of LLaDA (2502.09992, eq. 5). Samples without a supervised token count.
    supervised: (B, L) bool, p: (B, 1), blocks: (B,) blocks of each answer, or 1; answer_len: (B,) -> (B, L) float.
    """
    per_sample = blocks / (answer_len * len(supervised))  # (B,)
    return torch.where(supervised, per_sample[:, None] / p, 0.0)


def weighted_nll(logits: Tensor, part: Noised) -> Tensor:
    """Weighted sum of negative log-likelihoods, in fp32: the loss of both trainers. With sample_mean_weights it is the
    paper's masked mean.

    logits: (n, V) at the supervised positions of `part`, in their order -> scalar, the part's share of the global
    batch's loss. n may be 0: the loss is then 0 with zero gradients.
    """
    targets, weights = part.targets[part.supervised], part.weights[part.supervised]  # (n,), (n,)
    return (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum()
