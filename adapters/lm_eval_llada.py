"""LLaDA checkpoints in lm-evaluation-harness, as the model type `llada`: its command line with that model added.

    pip install -r requirements-lm-eval.txt
    python -m adapters.lm_eval_llada run --model llada --model_args pretrained=FOLDER,gen_length=256,block_length=32 \
        --tasks gsm8k --apply_chat_template --batch_size 16
    deepspeed --num_gpus 8 --module adapters.lm_eval_llada run --model llada ...

Model arguments are those of `LLaDA` below: `pretrained`, `adapter` (folder of LoRA adapters), `dtype`, `mc_num`,
`is_check_greedy` and `seed`, and any of blockwise/decoding/settings.py; lists of ids are written as [126081,126348].
They decide how answers are decoded; `max_gen_toks` and `temperature` of a task do not.
"""

import logging
import os
import random
import sys
from dataclasses import fields
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from blockwise.cli import InputError, run_script
from blockwise.decoding import decode
from blockwise.decoding.settings import DTYPES, Settings
from blockwise.run.ranks import Ranks, join_group


@register_model("llada")
class LLaDA(TemplateLM):
    """Answers by block-by-block decoding; likelihoods by Monte Carlo, as LLaDA's paper has them (2502.09992, eq. 6).

    Of several ranks, each has the model on its own device; the harness gives each of them its share of the problems.
    """

    def __init__(
        self, pretrained, adapter=None, dtype="auto", mc_num=128, is_check_greedy=False, seed=0, batch_size=1,
        max_batch_size=None, device=None, **settings,
    ):  # fmt: skip
        super().__init__()
        settings = {"stop_at_end": True} | settings  # what stands behind the end is not read
        check_arguments(settings, batch_size, mc_num, is_check_greedy, dtype)
        ranks = Ranks.from_environment()
        self._rank, self._world_size, self._device = ranks.rank, ranks.world_size, ranks.device
        if self._world_size > 1 and not dist.is_initialized():
            # a rank may have many more tokens to write than another
            join_group(lambda: dist.init_process_group("gloo", timeout=timedelta(days=7)))
        # the harness says "cuda" on machines without a GPU, too
        if self._world_size == 1 and device and torch.cuda.is_available():
            self._device = torch.device(device)
        self.batch_size, self.mc_num, self.is_check_greedy = int(batch_size), int(mc_num), is_check_greedy
        self.model, self.tokenizer = decode.load(pretrained, dtype, self._device, adapter)
        if size := decode.block_diffusion_size(self.model.config):
            settings = {"block_length": size} | settings
        self.settings = Settings(**settings)
        decode.check_settings(self.model.config, self.settings)
        self.pretrained, self.ends = str(pretrained), decode.end_ids(self.model, self.tokenizer)
        self.seed = int(seed)
        self.generator = torch.Generator(self._device).manual_seed(self.seed + self._rank)  # for decoding

    def all_gather(self, tensor):
        """A number of each of several ranks, as one tensor."""
        everyone = [torch.empty_like(tensor, device="cpu") for _ in range(self._world_size)]
        dist.all_gather(everyone, tensor.cpu())
        return torch.stack(everyone)

    def gather_object(self, obj, dst=0):
        """The objects of several ranks, on rank `dst`."""
        everyone = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, everyone, dst=dst)
        return everyone

    def barrier(self):
        dist.barrier()

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
        bar = tqdm(total=len(prompts), desc="answering", disable=disable_tqdm or self._rank > 0)
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
        """(log-likelihood, whether decoding gives it, if is_check_greedy) of continuations behind their contexts."""
        if decode.block_diffusion_size(self.model.config):
            raise NotImplementedError("likelihoods of block-diffusion checkpoints are not measured here, only answers")
        results = []
        bar = tqdm(requests, desc="likelihoods", disable=disable_tqdm or self._rank > 0)
        for texts, context, continuation in bar:
            greedy = self.is_check_greedy and self.decoding_gives(context, continuation)
            result = self.log_likelihood(context, continuation), greedy
            results.append(result)
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def decoding_gives(self, context, continuation):
        """Whether decoding writes exactly these ids, one token a step in one block. Two lists of ids -> bool."""
        length = len(continuation)
        settings = Settings(length, length, length, cfg_scale=self.settings.cfg_scale)
        return decode.decode(self.model, [context], settings)[0][0].tolist() == continuation

    @torch.no_grad()
    def log_likelihood(self, context, continuation):
        """The bound on log p(continuation | context) from mc_num masked copies. Two lists of ids -> float.

        A copy has l of the L tokens masked, l uniform on 1..L, and counts L / l times the log-probability of those.
        The l are spread evenly over 1..L from a random start: each is still uniform, but their mean varies less.
        The draws depend on the seed and the ids, so they are the same on any number of ranks.
        """
        ids = torch.tensor([context + continuation], device=self.device)
        length, device, mask_id = len(continuation), self.device, self.model.config.mask_token_id
        draw = random.Random(f"{self.seed} {context} {continuation}").getrandbits(63)
        generator = torch.Generator(device).manual_seed(draw)
        start = torch.rand(1, generator=generator, device=device)
        share = (start + torch.arange(self.mc_num, device=device) / self.mc_num) % 1
        number = 1 + (share * length).long().clamp(max=length - 1)  # (M,), M = mc_num
        noise = torch.rand(self.mc_num, length, generator=generator, device=device)
        masked = F.pad(noise.argsort(dim=1).argsort(dim=1) < number[:, None], (len(context), 0))  # (M, L)
        total = 0.0
        for mask, some in zip(masked.split(self.batch_size), number.split(self.batch_size)):
            copies = ids.expand(len(mask), -1)
            logits = self.logits(copies.masked_fill(mask, mask_id), mask, len(context))  # (n, V)
            weights = (length / some)[:, None].expand_as(mask)[mask]  # (n,)
            total -= (weights * F.cross_entropy(logits, copies[mask], reduction="none")).sum().item()
        return total / self.mc_num

    def logits(self, ids, mask, prompt_len):
        """Logits (n, V) at the n places of `mask` (M, L) in ids (M, L), with guidance if the settings say so."""
        if self.settings.cfg_scale:
            blind = ids.clone()
            blind[:, :prompt_len] = self.model.config.mask_token_id
            ids, mask = torch.cat([ids, blind]), mask.repeat(2, 1)
        logits = self.model(input_ids=ids, logits_to_keep=mask).logits.float()
        return decode.guided(logits, self.settings.cfg_scale)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError("perplexity of whole texts is not defined for a masked diffusion model here")


def check_arguments(settings, batch_size, mc_num, is_check_greedy, dtype):
    """Checks model arguments before anything large is read. Raises InputError."""
    if "mc_samples" in settings:
        raise InputError("model_args mc_samples: it is called mc_num now, as in LLaDA's own evaluation.")
    if unknown := settings.keys() - {field.name for field in fields(Settings)}:
        raise InputError(f"model_args {', '.join(sorted(unknown))} are not settings of blockwise/decoding/settings.py.")
    for key, value in (("batch_size", batch_size), ("mc_num", mc_num)):
        if not str(value).isdigit() or int(value) < 1:
            raise InputError(f"{key} {value}: give a number of rows, at least 1.")
    if type(is_check_greedy) is not bool:
        raise InputError(f"is_check_greedy {is_check_greedy!r} is neither True nor False.")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.")
    whole = {"block_length": settings.get("gen_length", Settings.gen_length)}  # the model may say another one
    Settings(**whole | settings)


def main():
    """The harness' command line, on one rank or several; the first rank prints and writes the results."""
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]  # the launcher's
    if os.environ.get("RANK", "0") != "0":
        logging.disable(logging.WARNING)  # the others would print the same lines
    cli_evaluate()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
