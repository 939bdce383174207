"""LLaDA checkpoints in lm-evaluation-harness, as the model type `llada`: its command line with that model added.

    pip install -r requirements-lm-eval.txt
    python -m adapters.lm_eval_llada run --model llada --model_args pretrained=FOLDER,gen_length=256,block_length=32 \
        --tasks gsm8k --apply_chat_template --batch_size 16

Model arguments are those of `LLaDA` below: `pretrained`, `adapter` (folder of LoRA adapters), `dtype`, `mc_samples` and
`seed`, and any of blockwise/decoding/settings.py.
They decide how answers are decoded; `max_gen_toks` and `temperature` of a task do not.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from blockwise.cli import InputError, run_script
from blockwise.decoding import decode
from blockwise.decoding.settings import DTYPES, Settings
from blockwise.run.ranks import Ranks


@register_model("llada")
class LLaDA(TemplateLM):
    """Answers by block-by-block decoding; likelihoods by Monte Carlo, as LLaDA's paper has them (2502.09992, eq. 6)."""

    def __init__(
        self, pretrained, adapter=None, dtype="auto", mc_samples=128, seed=0, batch_size=1, max_batch_size=None,
        device=None, **settings,
    ):  # fmt: skip
        super().__init__()
        if unknown := settings.keys() - {field.name for field in fields(Settings)}:
            raise InputError(
                f"model_args {', '.join(sorted(unknown))} are not settings of blockwise/decoding/settings.py."
            )
        for key, value in (("batch_size", batch_size), ("mc_samples", mc_samples)):
            if not str(value).isdigit() or int(value) < 1:
                raise InputError(f"{key} {value}: give a number of rows, at least 1.")
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.")
        self.settings, self.batch_size, self.mc_samples = Settings(**settings), int(batch_size), int(mc_samples)
        self._device = Ranks.from_environment().device
        if device and torch.cuda.is_available():  # the harness says "cuda" on machines without a GPU, too
            self._device = torch.device(device)
        self.model, self.tokenizer = decode.load(pretrained, dtype, self._device, adapter)
        self.pretrained, self.ends = str(pretrained), decode.end_ids(self.model, self.tokenizer)
        self.generator = torch.Generator(self._device).manual_seed(int(seed))

    @property
    def eot_token_id(self):
        return decode.eos_ids(self.model.config)[0]

    @property
    def prefix_token_id(self):
        """What stands in front of a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self):
        return self.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    def generate_until(self, requests, disable_tqdm=False):
        """The answers, each up to its end token or the first of the task's `until` texts."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers = [None] * len(prompts)
        bar = tqdm(total=len(prompts), desc="answering", disable=disable_tqdm)
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            ids, _ = decode.decode(self.model, [prompts[i] for i in some], self.settings, self.ends, self.generator)
            for i, row in zip(some, ids.tolist()):
                text, until = decode.completion(self.tokenizer, row, self.ends), requests[i].args[1].get("until", [])
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            bar.update(len(some))
        bar.close()
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """(log-likelihood, whether decoding gives it) of continuations behind their contexts."""
        results = []
        for texts, context, continuation in tqdm(requests, desc="likelihoods", disable=disable_tqdm):
            length = len(continuation)
            greedy, _ = decode.decode(self.model, [context], Settings(length, length, length))
            result = self.log_likelihood(context, continuation), greedy[0].tolist() == continuation
            results.append(result)
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    @torch.no_grad()
    def log_likelihood(self, context, continuation):
        """The bound on log p(continuation | context) from mc_samples masked copies. Two lists of ids -> float.

        A copy has l of the L tokens masked, l uniform on 1..L, and counts L / l times the log-probability of those.
        The l are spread evenly over 1..L from a random start: each is still uniform, but their mean varies less.
        """
        ids = torch.tensor([context + continuation], device=self.device)
        length, device = len(continuation), self.device
        start = torch.rand(1, generator=self.generator, device=device)
        share = (start + torch.arange(self.mc_samples, device=device) / self.mc_samples) % 1
        number = 1 + (share * length).long().clamp(max=length - 1)  # (M,), M = mc_samples
        noise = torch.rand(self.mc_samples, length, generator=self.generator, device=device)
        masked = F.pad(noise.argsort(dim=1).argsort(dim=1) < number[:, None], (len(context), 0))  # (M, L)
        total = 0.0
        for mask, some in zip(masked.split(self.batch_size), number.split(self.batch_size)):
            copies = ids.expand(len(mask), -1)
            logits = self.model(
                input_ids=copies.masked_fill(mask, self.model.config.mask_token_id), logits_to_keep=mask
            ).logits.float()  # (n, V)
            weights = (length / some)[:, None].expand_as(mask)[mask]  # (n,)
            total -= (weights * F.cross_entropy(logits, copies[mask], reduction="none")).sum().item()
        return total / self.mc_samples

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError("perplexity of whole texts is not defined for a masked diffusion model here")


if __name__ == "__main__":
    run_script(cli_evaluate)
