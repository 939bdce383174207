"""What is hidden and what is scored: the whole method of Blockwise SFT (arXiv 2508.19529), as functions of tensors.

One row, BLOCK_SIZE 4, with block 1 of the answer active (`.` visible, `#` hidden, `?` hidden with the row's ratio p):

    position  0 1 2 3 4 5 | 6 7 8 9 | 10 11 12 13 | 14 15 16 | 17 18 19
    region    prompt      | prefix  | active      | suffix   | padding
    block                 | 0       | 1           | 2 (short)|
    input     . . . . . . | . . . . | ?  ?  ?  ?  | #  #  #  | .  .  .
    scored                            the hidden ones

That is what block-by-block decoding sees: a finished prefix, one block in progress, and nothing after it but masks.
Full-sequence SFT, the baseline, is the same with a single block as long as the answer.

Letters in shapes: B batch, L row length with padding, V vocabulary, n scored positions of a batch.
Everything runs on the device of its input, and all randomness comes from the generator that is passed in.
"""

import torch
import torch.nn.functional as F


def num_blocks(answer_len, block_size):
    """Blocks in an answer of `answer_len` tokens, the last one perhaps short. (B,) -> (B,), or int -> int."""
    return (answer_len + block_size - 1) // block_size


def regions(prompt_len, length, block, max_len, block_size):
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
    prompt_len, length, block, max_len, *, block_size, mask_prob_eps, prefix_mask_rate, suffix_mask_prob, generator
):
    """Draws which tokens the model does not see, and which of those it is asked for.

    Per row one mask ratio p ~ U(mask_prob_eps, 1). A token of the active block is hidden with probability p, one of the
    prefix with prefix_mask_rate, one of the suffix with suffix_mask_prob; prompt and padding never are.
    Returns hidden, scored: (B, L) bool; scored is the hidden part of the active block; and p: (B, 1).
    """
    prefix, active, suffix = regions(prompt_len, length, block, max_len, block_size)
    uniform = {"generator": generator, "device": prompt_len.device}
    p = mask_prob_eps + (1 - mask_prob_eps) * torch.rand(len(prompt_len), 1, **uniform)  # (B, 1)
    u = torch.rand(len(prompt_len), max_len, **uniform)  # (B, L), in [0, 1): rate 0.0 hides nothing, 1.0 everything
    scored = active & (u < p)
    return scored | (prefix & (u < prefix_mask_rate)) | (suffix & (u < suffix_mask_prob)), scored, p


def full_sequence_masks(prompt_len, length, max_len, *, mask_prob_eps, generator):
    """The baseline: every answer token is hidden with the row's p and scored. Returns hidden, scored, p as above."""
    return blockwise_masks(
        prompt_len, length, torch.zeros_like(prompt_len), max_len, block_size=max_len, mask_prob_eps=mask_prob_eps,
        prefix_mask_rate=0.0, suffix_mask_prob=0.0, generator=generator,
    )  # fmt: skip


def sample_mean_weights(scored):
    """Weights under which a sum over tokens is the mean over rows of the mean over each row's scored tokens.

    Rows in which p hid nothing have nothing to predict: they do not count as rows. scored: (B, L) bool -> (B, L) float.
    """
    per_row = scored.sum(dim=1, keepdim=True)  # (B, 1)
    rows = (per_row > 0).sum()
    return scored / (per_row * rows).clamp(min=1)


def bound_weights(scored, p, blocks, answer_len):
    """Weights under which a sum over tokens is, on average over the draws, the block-wise diffusion bound per token.

    Theorem 3.3: one block of a row and one p stand for all of them with the weight number of blocks x 1/p. With one
    block as long as the answer it is the loss of LLaDA (2502.09992, eq. 5). Rows without a scored token count as rows.
    scored: (B, L) bool, p: (B, 1), blocks: (B,) blocks of each answer, or 1; answer_len: (B,) -> (B, L) float.
    """
    per_row = blocks / (answer_len * len(scored))  # (B,)
    return torch.where(scored, per_row[:, None] / p, 0.0)


def loss(logits, targets, weights):
    """Weighted sum of cross-entropies, in fp32. logits (n, V), targets (n,) ids, weights (n,) -> scalar.

    With sample_mean_weights this is the paper's masked mean. n may be 0: the loss is then 0 with zero gradients.
    """
    return (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum()
