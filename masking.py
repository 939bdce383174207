"""The method of Blockwise SFT (arXiv 2508.19529): which tokens are masked and which supervised, as tensor functions.

One sample, BLOCK_SIZE 4, with block 1 of the answer active (`.` visible, `#` masked, `?` masked with mask ratio p):

    position    0 1 2 3 4 5 | 6 7 8 9 | 10 11 12 13 | 14 15 16 | 17 18 19
    region      prompt      | prefix  | active      | suffix   | padding
    block                   | 0       | 1           | 2 (short)|
    input       . . . . . . | . . . . | ?  ?  ?  ?  | #  #  #  | .  .  .
    supervised                          the masked ones

That is what block-by-block decoding sees: a finished prefix, one block in progress, and nothing after it but masks.
Full-sequence SFT, the baseline, is the same with a single block as long as the answer.

Letters in shapes: G samples of a global batch (B: of any batch), L positions, V vocabulary, n supervised positions.
Everything runs on its input's device; all randomness comes from the generator passed in.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass
class Batch:
    """Samples of a global batch, which a trainer's `noise` turns into a Noised."""

    input_ids: Tensor  # (G, L) int64, padded on the right
    prompt_len: Tensor  # (G,) where the answer starts
    length: Tensor  # (G,) where it ends
    block: Tensor  # (G,) the block to train, from 0; without blocks: another number in each epoch
    extra: dict[str, Tensor] = field(default_factory=dict)  # (G, ...)


@dataclass
class Noised:
    """A global batch as the model sees it, with all that the loss needs. L' is L, or longer."""

    input_ids: Tensor  # (G, L')
    supervised: Tensor  # (G, L') bool: where there are logits
    targets: Tensor  # (G, L')
    weights: Tensor  # (G, L') float, of any sign: what a position counts in the global batch's loss
    extra: dict[str, Tensor] = field(default_factory=dict)  # (G, ...) more for the loss
    model_args: dict[str, Tensor] = field(default_factory=dict)  # (G, ...) more for the model

    def __post_init__(self):
        shapes = {tensor.shape for tensor in (self.input_ids, self.supervised, self.targets, self.weights)}
        if len(shapes) > 1 or self.supervised.dtype != torch.bool:
            raise ValueError(f"one shape is needed, and supervised as bool: {shapes}, {self.supervised.dtype}")

    def rows(self, some: slice) -> "Noised":
        """Some samples, such as a micro-batch."""
        extra = {name: value[some] for name, value in self.extra.items()}
        model_args = {name: value[some] for name, value in self.model_args.items()}
        tensors = (self.input_ids, self.supervised, self.targets, self.weights)
        return type(self)(*(tensor[some] for tensor in tensors), extra, model_args)


def num_blocks(answer_len, block_size: int):
    """Blocks in an answer of `answer_len` tokens, the last perhaps short. (B,) -> (B,), or int -> int."""
    return (answer_len + block_size - 1) // block_size


def regions(
    prompt_len: Tensor, length: Tensor, block: Tensor, max_len: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits each answer, the positions [prompt_len, length), around its active block.

    prompt_len, length, block: (B,) integers; the active block starts at prompt_len + block * block_size.
    Returns prefix, active, suffix: disjoint (B, L) bool masks that together are the answer.
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
    """Draws which tokens are masked, and which of those are supervised: those of the active block.

    Per sample one mask ratio p ~ U(mask_prob_eps, 1). A token of the active block is masked with probability p, one of
    the prefix with prefix_mask_rate, one of the suffix with suffix_mask_prob, others never.
    Returns masked, supervised: (B, L) bool; p: (B, 1).
    """
    prefix, active, suffix = regions(prompt_len, length, block, max_len, block_size)
    uniform = {"generator": generator, "device": prompt_len.device}
    p = mask_prob_eps + (1 - mask_prob_eps) * torch.rand(len(prompt_len), 1, **uniform)  # (B, 1)
    u = torch.rand(len(prompt_len), max_len, **uniform)  # (B, L) in [0, 1)
    supervised = active & (u < p)
    return supervised | (prefix & (u < prefix_mask_rate)) | (suffix & (u < suffix_mask_prob)), supervised, p


def full_sequence_masks(
    prompt_len: Tensor, length: Tensor, max_len: int, *, mask_prob_eps: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The baseline: every answer token is masked with probability p, and supervised if it is.

    Returns masked, supervised, p as blockwise_masks does.
    """
    return blockwise_masks(
        prompt_len, length, torch.zeros_like(prompt_len), max_len, block_size=max_len, mask_prob_eps=mask_prob_eps,
        prefix_mask_rate=0.0, suffix_mask_prob=0.0, generator=generator,
    )  # fmt: skip


def sample_mean_weights(supervised: Tensor) -> Tensor:
    """A sum with these weights is the mean over samples of the mean over their supervised tokens.

    Samples without a supervised token do not count. (B, L) bool -> (B, L) float.
    """
    per_sample = supervised.sum(dim=1, keepdim=True)  # (B, 1)
    samples = (per_sample > 0).sum()
    return supervised / (per_sample * samples).clamp(min=1)


def bound_weights(
    supervised: Tensor, p: Tensor, blocks: Tensor | int, answer_len: Tensor, per_token: bool = False
) -> Tensor:
    """A sum with these weights is, on average over blocks and p, the block-wise diffusion bound per token.

    Theorem 3.3: one block and one p stand for all of them with the weight number of blocks x 1/p. With one block as
    long as the answer it is the loss of LLaDA (2502.09992, eq. 5). Samples without a supervised token do count.
    It is the mean over samples of each one's bound per token; per_token: over all tokens of the batch.
    supervised: (B, L) bool, p: (B, 1) or (B, L), blocks: (B,) or 1; answer_len: (B,) -> (B, L) float.
    """
    tokens = answer_len.sum() if per_token else answer_len * len(supervised)  # () or (B,)
    per_sample = (blocks / tokens).expand(len(supervised))  # (B,)
    return torch.where(supervised, per_sample[:, None] / p, 0.0)


def weighted_nll(logits: Tensor, part: Noised) -> Tensor:
    """The loss of both trainers: a weighted sum of negative log-likelihoods, in fp32.

    logits: (n, V) at the supervised positions of `part` -> scalar, the part's share of the global batch's loss; 0 with
    zero gradients if n is 0.
    """
    targets, weights = part.targets[part.supervised], part.weights[part.supervised]  # (n,), (n,)
    return (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum()


# ---------------------------------------------------------------- block diffusion


class TwoStreams(Noised):
    """A global batch for block diffusion (BD3LM, arXiv 2503.09573), in which every block is trained at once.

    The model gets each sample twice, masked and clean (L' = 2 L), and the attention mask lets a masked block see itself
    and the clean blocks before it:

        position    0 1 2 3 4 5 | 6 7 8 9 | 10 11 12 13 || 0 1 2 3 4 5 | 6 7 8 9 | 10 11 12 13
        stream      masked                              || clean
        block       0 (prompt)  | 1       | 2           || 0           | 1       | 2
        block 2 sees                        x  x  x  x     x x x x x x   x x x x

    extra["block"]: (G, L), the block of each position. A part gets its attention mask only when it is cut out: for
    the whole batch it would be too large.
    """

    def rows(self, some: slice) -> "TwoStreams":
        part = super().rows(some)
        part.model_args["attention_mask"] = self.attention(part.extra["block"])
        return part

    @staticmethod
    def attention(block: Tensor) -> Tensor:
        return two_stream_attention(block)


class FlexTwoStreams(TwoStreams):
    """The same for a model with flex attention, which skips the parts of its mask in which nothing is visible."""

    @staticmethod
    def attention(block: Tensor) -> BlockMask:
        length = block.shape[1]

        def sees(row, head, query, key):  # as two_stream_attention, for one pair
            of_query, of_key = block[row, query % length], block[row, key % length]
            masked = torch.where(key < length, of_query == of_key, of_query > of_key)
            return torch.where(query < length, masked, (key >= length) & (of_query >= of_key))

        return create_block_mask(sees, len(block), None, 2 * length, 2 * length, device=block.device)


def block_numbers(first: Tensor, max_len: int, block_size: int) -> Tensor:
    """The block of each position: 0 before the position `first`, from 1 behind it. (B,) -> (B, L)"""
    pos = torch.arange(max_len, device=first.device)  # (L,)
    return num_blocks((pos + 1 - first[:, None]).clamp(min=0), block_size)


def fill_blocks(first: Tensor, length: Tensor, max_len: int, block_size: int) -> Tensor:
    """Where answers end whose last block is filled up with padding, as decoding writes whole blocks. (B,) each."""
    return (first + num_blocks(length - first, block_size) * block_size).clamp(max=max_len)


def sample_blocks(
    prompt_len: Tensor, length: Tensor, max_len: int, block_size: int, from_sample: bool
) -> tuple[Tensor, Tensor]:
    """Where answers end once their last block is filled up, (B,), and the block of each position, (B, L).

    Blocks are counted from the start of the answer, or of the sample if from_sample.
    """
    first = torch.zeros_like(prompt_len) if from_sample else prompt_len
    return fill_blocks(first, length, max_len, block_size), block_numbers(first, max_len, block_size)


def block_diffusion_masks(
    prompt_len: Tensor, length: Tensor, block: Tensor, *, low: float, high: float, per_block: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draws which tokens of the answers are masked, all of which are supervised.

    block: see block_numbers, (B, L). A token is masked with the mask ratio p, uniform between low and high. per_block:
    every block of every sample has its own, one from each of as many equal shares of that range, which lowers the
    variance of the loss (2503.09573, appendix); else every sample has one. Returns masked (B, L) bool, p (B, L).
    """
    pos = torch.arange(block.shape[1], device=block.device)  # (L,)
    answer = (pos >= prompt_len[:, None]) & (pos < length[:, None])  # (B, L)
    uniform = {"generator": generator, "device": block.device}
    if per_block:
        blocks = torch.where(answer, block, 0)  # (B, L)
        real = torch.zeros(len(block), int(blocks.max()) + 1, dtype=torch.bool, device=block.device)
        real = real.scatter(1, blocks, True)[:, 1:]  # (B, N): blocks with tokens of the answer
        number = int(real.sum())
        shares = (torch.randperm(number, **uniform) + torch.rand(number, **uniform)) / number
        drawn = torch.zeros(real.shape, device=block.device).masked_scatter(real, shares)  # (B, N)
        drawn = drawn.gather(1, (blocks - 1).clamp(min=0))  # (B, L)
    else:
        drawn = torch.rand(len(block), 1, **uniform).expand(block.shape)  # (B, L)
    p = low + (high - low) * drawn
    return answer & (torch.rand(block.shape, **uniform) < p), p


def two_streams(
    batch: Batch, masked: Tensor, weights: Tensor, mask_id: int, block: Tensor, flex: bool = False
) -> TwoStreams:
    """The masked and the clean samples in one row, the same positions twice. masked, weights, block: (G, L).

    flex: for a model with flex attention.
    """
    ids, nothing = batch.input_ids, torch.zeros_like(masked)
    pos = torch.arange(ids.shape[1], device=ids.device)
    return (FlexTwoStreams if flex else TwoStreams)(
        input_ids=torch.cat([ids.masked_fill(masked, mask_id), ids], dim=1),  # (G, 2 L)
        supervised=torch.cat([masked, nothing], dim=1),
        targets=torch.cat([ids, ids], dim=1),
        weights=torch.cat([weights, torch.zeros_like(weights)], dim=1),
        extra={"block": block},
        model_args={"position_ids": torch.cat([pos, pos]).expand(len(ids), -1)},
    )


def two_stream_attention(block: Tensor) -> Tensor:
    """Who sees whom: (B, L) blocks -> (B, 1, 2 L, 2 L) bool, True where the query (row) sees the key (column).

    Masked positions see the masked ones of their block and the clean ones of earlier blocks; clean positions see the
    clean ones of their own and of earlier blocks (2503.09573, the mask of its vectorised training).
    """
    query, key = block[:, :, None], block[:, None, :]  # (B, L, 1), (B, 1, L)
    same, before = query == key, query > key  # (B, L, L)
    masked = torch.cat([same, before], dim=2)  # (B, L, 2 L)
    clean = torch.cat([torch.zeros_like(same), same | before], dim=2)
    return torch.cat([masked, clean], dim=1)[:, None]


# ---------------------------------------------------------------- trainings of whole answers and texts


def to_width(batch: Batch, *drawn: Tensor) -> list[Tensor]:
    """Masks (G, MAX_LEN) as the batch is padded, (G, L): they are drawn up to MAX_LEN whatever PAD_TO is."""
    return [tensor[:, : batch.input_ids.shape[1]] for tensor in drawn]


def token_mean_weights(supervised: Tensor) -> Tensor:
    """A sum with these weights is the mean over all supervised tokens. (B, L) bool -> (B, L) float."""
    return supervised / supervised.sum().clamp(min=1)


def loss_weights(supervised: Tensor, p: Tensor, answer_len: Tensor, *, bound: bool, per_token: bool) -> Tensor:
    """What the knobs BOUND_WEIGHTS and LOSS_MEAN stand for, in trainings that mask whole answers; (B, L) float.

    supervised: (B, L) bool; p: (B, 1) or (B, L); answer_len: (B,).
    """
    if bound:
        return bound_weights(supervised, p, 1, answer_len, per_token)
    return token_mean_weights(supervised) if per_token else sample_mean_weights(supervised)


def random_lengths(batch: Batch, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cuts a share of the answers to a length that is uniform from 1 to their own, as LLaDA's pre-training does.

    So the model learns texts that end before the last position (2502.09992, appendix B.1). Returns where the answers
    end, (G,), and which positions the model sees, (G, L) bool: of a cut sample, none behind its end.
    """
    size = {"size": batch.length.shape, "generator": generator, "device": batch.length.device}
    cut, answer_len = torch.rand(**size) < share, batch.length - batch.prompt_len  # (G,)
    shorter = batch.prompt_len + 1 + (torch.rand(**size) * answer_len).long()  # (G,)
    length = torch.where(cut, torch.minimum(shorter, batch.length), batch.length)
    pos = torch.arange(batch.input_ids.shape[1], device=length.device)  # (L,)
    return length, (pos < length[:, None]) | ~cut[:, None]


# ---------------------------------------------------------------- R2FT: chosen and rejected continuations


def random_cuts(prompt_len: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
    """Where answers are cut: uniformly before one of their tokens, but never before the last, which ends them.

    An answer of one token is cut before that. (B,) each.
    """
    u = torch.rand(prompt_len.shape, generator=generator, device=prompt_len.device)
    return prompt_len + (u * (length - prompt_len - 1).clamp(min=1)).long()


def repetitions(
    input_ids: Tensor, length: Tensor, cut: Tensor, end: Tensor, *, phrase: tuple[int, int], repeat: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draws a wrong continuation of each sample: the phrase before its cut, repeated (R2FT, 2509.15188, algorithm 1).

    An answer that ends with `e`, cut before position 6, with a phrase of 3 tokens, here begun at its second:

        position    0 1 2 3 4 5 | 6 7 8 9 10 11 12 13
        sample      a b c d e f | g h i j k  e
        rejected                | e f d e f  e  e  f     position 11: the end of the answer, anywhere but last

    That one token is there so that ending an answer is not unlearned. phrase, repeat: the fewest and most tokens of the
    phrase and of the repetition, uniform between; the phrase has at most the tokens that are before the cut, and
    repetitions stop at `end`. A sample with fewer tokens before its cut than the shortest phrase has none.
    input_ids: (B, L); length, cut, end: (B,). Returns where it is, (B, L) bool, and its tokens, (B, L).
    """
    pos = torch.arange(input_ids.shape[1], device=cut.device)  # (L,)
    u = torch.rand(4, len(cut), generator=generator, device=cut.device)
    size = phrase[0] + (u[0] * (cut.clamp(phrase[0], phrase[1]) - phrase[0] + 1)).long()  # (B,)
    first = (u[1] * size).long()  # the token of the phrase to begin with
    stop = torch.minimum(cut + repeat[0] + (u[2] * (repeat[1] - repeat[0] + 1)).long(), end)  # (B,)
    source = (cut - size)[:, None] + (pos - cut[:, None] + first[:, None]) % size[:, None]  # (B, L)
    repeated = input_ids.gather(1, source.clamp(min=0))
    ending = cut + (u[3] * (stop - cut - 1)).long()  # (B,)
    ending = (pos == ending[:, None]) & (stop - cut > 1)[:, None]  # (B, L)
    repeated = torch.where(ending, input_ids.gather(1, length[:, None] - 1), repeated)
    return (pos >= cut[:, None]) & (pos < stop[:, None]) & (cut >= phrase[0])[:, None], repeated


def chosen_and_rejected(
    batch: Batch, cut: Tensor, end: Tensor, divisor: Tensor, rejected: Tensor, repeated: Tensor, mask_id: int
) -> Noised:
    """A global batch for preference_loss: all from the cuts on is masked, and both continuations are supervised there.

    Chosen are the tokens of the answer from its cut to `end`, whose log-probabilities are divided by `divisor`; (G,)
    each. rejected, repeated: (G, L), see repetitions. Samples without a repetition do not count.
    """
    pos = torch.arange(batch.input_ids.shape[1], device=cut.device)  # (L,)
    counts = rejected.any(dim=1, keepdim=True)  # (G, 1)
    behind = pos >= cut[:, None]  # (G, L)
    chosen = behind & (pos < torch.minimum(end, batch.length)[:, None]) & counts
    extra = {
        "repeated": repeated,
        "rejected": rejected / rejected.sum(dim=1, keepdim=True).clamp(min=1),
        "share": counts[:, 0] / counts.sum().clamp(min=1),  # (G,) of each sample in the mean
    }
    inputs, weights = batch.input_ids.masked_fill(behind, mask_id), chosen / divisor[:, None]
    return Noised(inputs, chosen | rejected, batch.input_ids, weights, extra)


def preference_loss(
    logits: Tensor, part: Noised, *, beta_w: float, beta_l: float, beta_a: float, gamma: float
) -> Tensor:
    """The loss of R2FT, in fp32: the mean over samples of

        -log sigmoid(beta_w * m_w - beta_l * m_l - gamma) - beta_a * m_w

    with m_w and m_l the weighted sums of the log-probabilities of chosen and rejected tokens, from the same logits.
    logits: (n, V) at the supervised positions of `part`, see chosen_and_rejected -> scalar, the part's share.
    """
    logits = logits.float()
    norm = logits.logsumexp(dim=1)  # (n,)

    def mean(tokens, weights):  # (B, L) each -> (B,)
        at = logits.gather(1, tokens[part.supervised][:, None])[:, 0] - norm  # (n,) log-probabilities
        return (weights * torch.zeros_like(weights, dtype=at.dtype).masked_scatter(part.supervised, at)).sum(dim=1)

    m_w, m_l = mean(part.targets, part.weights), mean(part.extra["repeated"], part.extra["rejected"])
    losses = -F.logsigmoid(beta_w * m_w - beta_l * m_l - gamma) - beta_a * m_w
    return (part.extra["share"] * losses).sum()


# ---------------------------------------------------------------- policy gradients: rollouts, which the model wrote


def policy_block_masks(
    prompt_len: Tensor, length: Tensor, block: Tensor, max_len: int, block_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What block decoding sees when it begins a block: blockwise_masks with mask ratio 1 and the suffix masked.

    length: (B,), where the canvas ends, as decoding masks all of it. Returns masked, supervised: (B, L) bool.
    """
    masked, active, _ = blockwise_masks(
        prompt_len, length, block, max_len, block_size=block_size, mask_prob_eps=1.0, prefix_mask_rate=0.0,
        suffix_mask_prob=1.0, generator=generator,
    )  # fmt: skip
    return masked, active


def trace_masks(order: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """What decoding saw in one of its steps, and what it wrote there (TraceRL, 2509.06949).

    order: (B, L), the step in which each token was written, -1 for prompts; step: (B,). Returns masked, supervised.
    """
    return order >= step[:, None], order == step[:, None]


def one_step_masks(
    prompt: Tensor, answer: Tensor, p_mask_prompt: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The estimate of diffu-GRPO (2504.12216): all of the answer is masked, and so are some tokens of the prompt.

    prompt, answer: (B, L) bool; p_mask_prompt: the probability of that. Returns masked, supervised.
    """
    u = torch.rand(prompt.shape, generator=generator, device=prompt.device)
    return answer | (prompt & (u < p_mask_prompt)), answer


def log_probs(logits: Tensor, part: Noised, temperature: float, mask_id: int) -> Tensor:
    """Log-probabilities of the supervised targets of `part`, as sampling has them: (n, V) -> (n,), in fp32.

    Sampling divides the logits by the temperature, and never draws the mask.
    """
    never = torch.arange(logits.shape[1], device=logits.device) == mask_id  # (V,)
    logits = (logits.float() / temperature).masked_fill(never, -torch.inf)
    return -F.cross_entropy(logits, part.targets[part.supervised], reduction="none")


def policy_loss(
    logits: Tensor, part: Noised, *, temperature: float, mask_id: int, epsilon: float, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of group-relative policy optimisation (GRPO, 2402.03300), without the division by standard deviations.

    With ratio = exp(log p - old log p), the weighted sum over the supervised tokens of

        -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) + beta * KL,  KL = exp(d) - d - 1

    where d is the log-probability of the reference less that of the model. part.extra: "advantage" (B,), and (B, L)
    "old", without which the ratio is 1, and with beta "reference". logits: (n, V) -> scalar, the part's share of the
    global batch's loss; and its shares of what the batch shows: tokens whose ratio is clipped, and KL.
    """
    now, weights = log_probs(logits, part, temperature, mask_id), part.weights[part.supervised]  # (n,), (n,)
    advantage = part.extra["advantage"][:, None].expand_as(part.supervised)[part.supervised]  # (n,)
    old = part.extra["old"][part.supervised] if "old" in part.extra else now.detach()
    ratio = (now - old).exp()
    losses = -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    clipped = (ratio - 1) * advantage.sign() > epsilon  # only there the clip takes the gradient away
    measured = {"clip_share": (weights * clipped).sum()}
    if beta:
        distance = part.extra["reference"][part.supervised] - now
        kl = distance.exp() - distance - 1
        losses = losses + beta * kl
        measured["kl"] = (weights * kl.detach()).sum()
    return (weights * losses).sum(), measured
