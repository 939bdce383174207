"""Rollouts: the answers that a model itself gives to problems, and what they are worth, for policy gradients.

A round begins with PROMPTS problems, each answered GROUP times by block decoding; UPDATES optimizer steps train these
rollouts. A group is decoded as one batch, on one rank, with random numbers from (SEED, round, group): so rollouts are
the same on any number of ranks and for every MICRO_BSIZE.

Letters in shapes: N = PROMPTS x GROUP rollouts of a round, P longest prompt of the round, G tokens of an answer,
L = P + G columns, S parts of an answer, of which an update trains one.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

import masking
from blockwise import rewards
from blockwise.cli import InputError, read_jsonl
from blockwise.data import Samples, derive_seed, random_order
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import checkpoint, hub
from blockwise.prompts import METAMATH, format_of, question_ids, wrap_text
from blockwise.run.ranks import Ranks, print0


class Rollouts:
    """The problems of a training, and the rollouts of one round.

    columns: what metrics.csv shows besides; state: the tensors of the round, which a resume point keeps.
    """

    def __init__(self, knobs: SimpleNamespace):
        """Checks the knobs and reads the problems. Raises InputError."""
        self.knobs, self.round, self.state, self.measured = knobs, None, {}, []
        self.settings = Settings(
            knobs.GEN_LENGTH, knobs.BLOCK_SIZE, knobs.STEPS, knobs.TEMPERATURE, knobs.REMASKING, stop_at_end=True
        )
        blocks = masking.num_blocks(knobs.GEN_LENGTH, knobs.BLOCK_SIZE)
        self.parts = {"block": blocks, "trace": knobs.STEPS, "onestep": knobs.UPDATES}[knobs.ESTIMATOR]  # S
        self.check()
        self.rewards = rewards.parse(knobs.REWARD, knobs.ALLOW_CODE_EXECUTION)
        self.lines = read_jsonl(knobs.DATA)[: knobs.MAX_SAMPLES or None]
        for line, row in self.lines:
            rewards.check_row(self.rewards, row, f"{knobs.DATA}, line {line}")
        self.questions = [rewards.question(row, f"{knobs.DATA}, line {line}") for line, row in self.lines]
        self.columns = ("reward", "varied_groups", "answer_length", "rollout_tokens_per_second", "clip_share")
        self.columns += ("kl",) if knobs.BETA else ()
        self.what = f"the {knobs.GROUP} rollouts of a group"

    def check(self) -> None:
        """Refuses knobs that do not go together. Raises InputError."""
        knobs = self.knobs
        if knobs.LORA_DROPOUT:
            what = "with dropout, the model that answers and the one that is trained would differ"
            raise InputError(f"LORA_DROPOUT={knobs.LORA_DROPOUT} must be 0.0: {what}.")
        if knobs.BETA and not knobs.LORA_RANK:
            what = "the reference of KL is the base, which is the model with its adapters switched off"
            raise InputError(f"BETA={knobs.BETA} needs adapters: {what}; set BETA to 0.0, or raise LORA_RANK.")
        if knobs.P_MASK_PROMPT and knobs.ESTIMATOR != "onestep":
            raise InputError(f"P_MASK_PROMPT={knobs.P_MASK_PROMPT} is of ESTIMATOR 'onestep' only; set it to 0.0.")
        if self.parts < knobs.UPDATES:
            what = {"block": "block of GEN_LENGTH", "trace": "step of STEPS"}[knobs.ESTIMATOR]
            raise InputError(
                f"UPDATES={knobs.UPDATES} is more than the {self.parts} parts of an answer: with ESTIMATOR "
                f"{knobs.ESTIMATOR!r}, an update trains one {what} of each rollout, and none twice."
            )

    def prepare(self, base: Path, config, ranks: Ranks) -> int:
        """Asks the problems in the way of a model and checks them against it. Returns the number of optimizer steps.

        Sets the knob GRAD_ACC, which follows from the others. Raises InputError.
        """
        knobs = self.knobs
        if decode.block_diffusion_size(config):
            what = "its blocks do not see later ones, which log-probabilities here do not provide for"
            raise InputError(f"{base} was trained by block diffusion: {what}; start from another base.")
        wrap = wrap_text(knobs.WRAP) if knobs.WRAP else None
        self.prompt_format = format_of(knobs.MODEL_NAME, None, wrap, METAMATH)
        self.derived = {"wrap": self.prompt_format.wrap}  # the text itself: a file with it may change
        self.tokenizer, self.padding = hub.load_tokenizer(base), config.pad_token_id
        self.prompts = [question_ids(self.tokenizer, question, self.prompt_format) for question in self.questions]
        for (line, _), prompt in zip(self.lines, self.prompts):
            if len(prompt) + knobs.GEN_LENGTH > knobs.MAX_LEN:
                what = f"{len(prompt)} tokens, with GEN_LENGTH {knobs.GEN_LENGTH} more than MAX_LEN={knobs.MAX_LEN}"
                raise InputError(f"{knobs.DATA}, line {line}: its prompt has {what}; raise that, or remove the line.")
        decode.make_canvas(config, self.prompts[:1], knobs.GEN_LENGTH, "cpu")  # is there all that decoding needs?
        size, micro = knobs.PROMPTS * knobs.GROUP, knobs.MICRO_BSIZE * ranks.world_size
        knobs.GRAD_ACC, rest = divmod(size, micro)
        if rest:
            raise InputError(
                f"the {size} rollouts of a round = {knobs.PROMPTS} PROMPTS x {knobs.GROUP} GROUP cannot be shared out "
                f"as micro-batches of {knobs.MICRO_BSIZE} MICRO_BSIZE on {ranks.world_size} ranks; change MICRO_BSIZE."
            )
        return self.print_sizes(ranks, size)

    def print_sizes(self, ranks: Ranks, size: int) -> int:
        """Prints on rank 0 how the sizes come about. Returns the number of optimizer steps."""
        knobs, steps = self.knobs, self.knobs.ROUNDS * self.knobs.UPDATES
        factors = f"{knobs.MICRO_BSIZE} MICRO_BSIZE x {knobs.GRAD_ACC} GRAD_ACC x {ranks.world_size} ranks"
        for what, text in (
            ("problems", f"{len(self.prompts):,} of {knobs.DATA}, asked with the wrap {self.prompt_format.wrap_name}"),
            ("rollouts", f"{size:,} in a round = {knobs.PROMPTS} PROMPTS x {knobs.GROUP} GROUP"),
            ("global batch", f"{size:,} = {factors}"),
            ("steps", f"{steps:,} = {knobs.ROUNDS} ROUNDS x {knobs.UPDATES} UPDATES"),
        ):
            print0(ranks, what, text)
        return steps

    # ---------------------------------------------------------------- a round

    def has(self, step: int) -> bool:
        """Whether the rollouts are those of the round to which an optimizer step, from 1, belongs."""
        return self.round == (step - 1) // self.knobs.UPDATES

    def make(self, model, ranks: Ranks, step: int, should_stop: Callable[[], object]) -> dict[str, Tensor] | None:
        """Lets the model answer the problems of the round of a step; each rank takes its share of the groups.

        The model is left in training mode. should_stop: whether this rank got a signal; None: some rank did. Raises
        InputError on all ranks if a reward cannot be given.
        """
        began, round = time.perf_counter(), (step - 1) // self.knobs.UPDATES
        problems = self.problems_of(round)
        mine = range(ranks.rank, len(problems), ranks.world_size)
        model.eval()
        everyone = ranks.on_all_ranks(lambda: self.answers(model, round, problems, mine, should_stop))
        model.train()
        if None in everyone:
            return None
        groups = {number: group for part in everyone for number, group in part.items()}
        in_order = [groups[number] for number in range(len(problems))]
        state = {name: torch.cat([group[name] for group in in_order]) for name in in_order[0]}
        state["problem"] = torch.tensor(problems).repeat_interleave(self.knobs.GROUP)  # (N,)
        state["seconds"] = torch.tensor([ranks.on_first_rank(lambda: time.perf_counter() - began)])
        return state

    def problems_of(self, round: int) -> list[int]:
        """The problems of a round: each comes once, in random order, before any comes again."""
        number, chosen = len(self.prompts), []
        for place in range(round * self.knobs.PROMPTS, (round + 1) * self.knobs.PROMPTS):
            seed = derive_seed(self.knobs.SEED, "problems", place // number)
            order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
            chosen.append(int(order[place % number]))
        return chosen

    def answers(self, model, round: int, problems: list[int], mine: range, should_stop) -> dict[int, dict] | None:
        """{number of a group: its tensors} of this rank's groups; None after a signal."""
        ends = decode.end_ids(model, self.tokenizer)
        groups = {}
        for number in mine:
            seed = derive_seed(self.knobs.SEED, "rollouts", round, number)
            group = self.group(model, self.prompts[problems[number]], ends, seed, should_stop)
            if group is None:
                return None
            line, row = self.lines[problems[number]]
            completions = [decode.completion(self.tokenizer, ids, ends) for ids in group["answers"].tolist()]
            values = [float(rewards.total(self.rewards, completion, row)) for completion in completions]
            if not all(map(math.isfinite, values)):
                raise InputError(
                    f"{self.knobs.DATA}, line {line}: the reward of an answer is {values}; remove the line."
                )
            groups[number] = group | {"reward": torch.tensor(values, dtype=torch.float64)}
        return groups

    def group(self, model, prompt: list[int], ends: list[int], seed: int, should_stop) -> dict[str, Tensor] | None:
        """GROUP answers to a prompt: ids and the steps that wrote them, (GROUP, G) each, and lengths; on the CPU."""
        model, mask_id = checkpoint.without_adapters(model), model.config.mask_token_id
        generator = torch.Generator(model.device).manual_seed(seed)
        prompts, order = [prompt] * self.knobs.GROUP, None
        for step, (answers, _) in enumerate(decode.stream(model, prompts, self.settings, ends, generator)):
            if should_stop():
                return None
            order = torch.full_like(answers, -1) if order is None else order
            order[(order < 0) & (answers != mask_id)] = step
        length = torch.tensor([decode.length(ids, ends) for ids in answers.tolist()])
        return {"answers": answers.cpu(), "order": order.cpu(), "length": length}

    # ---------------------------------------------------------------- the round's optimizer steps

    def use(self, step: int, state: dict[str, Tensor], device: torch.device) -> tuple[Samples, Tensor]:
        """Takes the round of a step. Returns its rollouts as samples, and which part of each an update trains.

        Samples are padded on the left, as in decoding, and have the mask of what is seen, the order in which tokens
        were written (-1 in prompts), where the answer ends, and the advantage. Plan: (UPDATES x N, 2).
        """
        self.round, self.state, self.device = (step - 1) // self.knobs.UPDATES, state, device
        problem, size = state["problem"], self.knobs.PROMPTS * self.knobs.GROUP
        prompts = [self.prompts[number] for number in problem.tolist()]
        start = max(map(len, prompts))  # P
        ids = torch.full((size, start + self.knobs.GEN_LENGTH), self.padding)  # (N, L)
        seen, order = torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, -1)
        for row, prompt in enumerate(prompts):
            ids[row, start - len(prompt) : start], seen[row, : start - len(prompt)] = torch.tensor(prompt), False
        ids[:, start:], order[:, start:] = state["answers"], state["order"]
        extra = {"seen": seen, "order": order, "end": start + state["length"], "advantage": self.advantages()}
        whole = torch.full_like(problem, start)
        samples = Samples(ids.int(), whole, whole + self.knobs.GEN_LENGTH, problem, unanswered=0, extra=extra)
        seed = derive_seed(self.knobs.SEED, "parts", self.round)
        parts = random_order(self.has_part(), torch.Generator().manual_seed(seed))[:, : self.knobs.UPDATES]
        rows = torch.arange(size).repeat(self.knobs.UPDATES)
        return samples.to(device), torch.stack([rows, parts.T.flatten()], dim=1).to(device)

    def advantages(self) -> Tensor:
        """Each rollout's reward less the mean of its group, without a division by the deviation: (N,) fp32."""
        reward = self.state["reward"].view(-1, self.knobs.GROUP)
        centered = reward - reward.mean(dim=1, keepdim=True)
        return torch.where(self.varied()[:, None], centered, 0.0).flatten().float()

    def varied(self) -> Tensor:
        """Whether the rewards of a group differ: only then is there something to learn. (PROMPTS,) bool"""
        low, high = self.state["reward"].view(-1, self.knobs.GROUP).aminmax(dim=1)
        return high > low

    def has_part(self) -> Tensor:
        """Which parts of an answer have tokens up to its end: blocks, or steps that wrote them. (N, S) bool"""
        length, order = self.state["length"], self.state["order"]
        part = torch.arange(self.parts)
        if self.knobs.ESTIMATOR == "block":
            return part * self.knobs.BLOCK_SIZE < length[:, None]
        if self.knobs.ESTIMATOR == "trace":
            counts = torch.arange(order.shape[1]) < length[:, None]  # (N, G)
            return ((order[..., None] == part) & counts[..., None]).any(dim=1)
        return torch.ones(len(length), self.parts, dtype=torch.bool)  # all of the answer, each time

    @torch.no_grad()
    def add_log_probs(self, model, ranks: Ranks, noised_of: Callable[[int], masking.Noised]) -> None:
        """Adds to the state what the log-probabilities are before the round's updates, and of the reference.

        Each with the noise of its update, from micro-batches as in training. The first update needs no old ones: its
        ratio is 1. noised_of: the global batch of a step.
        """
        model.eval()
        for update in range(self.knobs.UPDATES):
            kinds = ["old"] * (update > 0) + ["reference"] * (self.knobs.BETA > 0)
            noised = noised_of(self.round * self.knobs.UPDATES + update + 1) if kinds else None
            for kind in kinds:
                with model.disable_adapter() if kind == "reference" else nullcontext():
                    self.state[f"{kind}.{update}"] = self.log_probs(model, ranks, noised).cpu()
        model.train()

    def log_probs(self, model, ranks: Ranks, noised: masking.Noised) -> Tensor:
        """Those of the supervised tokens of a global batch, (N, L) fp32, of which each rank computes its rows."""
        found = torch.zeros(noised.supervised.shape, device=ranks.device)
        size = self.knobs.MICRO_BSIZE
        for start in range(ranks.rank * size, len(found), ranks.world_size * size):
            rows = slice(start, start + size)
            part = noised.rows(rows)
            logits = model(input_ids=part.input_ids, logits_to_keep=part.supervised, **part.model_args).logits
            values = masking.log_probs(logits, part, self.knobs.TEMPERATURE, self.knobs.MASK_ID)
            found[rows] = found[rows].masked_scatter(part.supervised, values)
        if ranks.world_size > 1:
            dist.all_reduce(found)  # all other rows are 0
        return found

    def before(self, step: int) -> dict[str, Tensor]:
        """The log-probabilities that the loss of a step needs, {"old", "reference"}: (N, L) each, if they are known."""
        names = {kind: f"{kind}.{(step - 1) % self.knobs.UPDATES}" for kind in ("old", "reference")}
        return {kind: self.state[name].to(self.device) for kind, name in names.items() if name in self.state}

    # ---------------------------------------------------------------- what is shown of a round

    def loss(self, logits: Tensor, part: masking.Noised) -> Tensor:
        """masking.policy_loss, whose other numbers are kept for `measures`."""
        knobs = self.knobs
        loss, measured = masking.policy_loss(
            logits, part, temperature=knobs.TEMPERATURE, mask_id=knobs.MASK_ID, epsilon=knobs.EPSILON, beta=knobs.BETA
        )
        self.measured.append(measured)
        return loss

    def measures(self) -> dict[str, float]:
        """The numbers of `columns` for the step that was just trained; all ranks call this."""
        length, seconds = self.state["length"], self.state["seconds"]
        shares = torch.stack([torch.stack([*part.values()]) for part in self.measured]).sum(dim=0)
        names, self.measured = list(self.measured[0]), []
        if dist.is_initialized():
            dist.all_reduce(shares)
        return dict(zip(names, shares.tolist())) | {
            "reward": self.state["reward"].mean().item(),
            "varied_groups": self.varied().double().mean().item(),
            "answer_length": length.double().mean().item(),
            "rollout_tokens_per_second": (length.sum() / seconds).item(),
        }

    def rows(self, model, step: int) -> list[dict]:
        """The lines of samples.jsonl after a step, as dicts: the first group of its round, with rewards."""
        prompt, ends = self.prompts[int(self.state["problem"][0])], decode.end_ids(model, self.tokenizer)
        row = {"step": step, "round": self.round + 1, "prompt": self.tokenizer.decode(prompt)}
        group = zip(self.state["answers"][: self.knobs.GROUP].tolist(), self.state["reward"].tolist())
        return [row | {"completion": decode.completion(self.tokenizer, ids, ends), "reward": r} for ids, r in group]
