"""A training step of this repository against those of two others, which are written here as they publish them.

    python -m benchmarks.bench_peers

"reference" is Bowen-Sun-0728/Blockwise-SFT: a Dataset that masks lists token by token, a DataLoader, logits and
cross-entropy at all MAX_LEN positions. "dLLM" is the MDLM step of ZHZisZZ/dllm's SFT of LLaDA: transformers' collator,
which pads to the longest sample of a batch with tokens that are trained, logits and cross-entropy at all positions,
weighted 1/p. Its cross-entropy is over logits of (B, V, L), which is slow on CPUs; "dLLM, by rows" is the same but for
(B L, V). Each is compared with the trainer here that has the same objective: train_blockwise.py with its defaults, and
train_fullseq.py with EOS_TAIL, BOUND_WEIGHTS, LOSS_MEAN token and PAD_TO longest. All have the same samples, model,
adapters, AdamW and clipping, fp32 on the CPU, and neither dropout nor DeepSpeed.

Every measurement is a process of its own, for its memory, and they run in turn. Prints CPU seconds per step, ratios
with their spread, memory, and a JSON line.
"""

import argparse
import json
import math
import random
import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

import masking
import train_blockwise
import train_fullseq
from benchmarks import common
from blockwise import trainer
from blockwise.data import make_samples, schedule
from blockwise.run.ranks import Ranks

WIDTHS, SAMPLES, PAD, MASK, EPS = (64, 256), 64, 1, 4, 1e-3
RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
OURS = {  # what a peer is compared with: script, and knobs that are not its defaults
    "reference": (train_blockwise, {}),
    "dLLM": (train_fullseq, {"EOS_TAIL": True, "BOUND_WEIGHTS": True, "LOSS_MEAN": "token", "PAD_TO": "longest"}),
}


def make_data(number, max_len, vocab_size):
    """Samples as in a .pt file: answers from a quarter to the whole of max_len less the prompt, at random."""
    rng, data = random.Random(0), []
    for _ in range(number):
        prompt_len = rng.randint(max_len // 4, max_len // 2)
        length = rng.randint(prompt_len + 1 + max_len // 8, max_len)
        ids = [rng.randrange(8, vocab_size) for _ in range(length)]
        data.append({"prompt_len": prompt_len, "full_ids": torch.tensor(ids)})
    return data


# ---------------------------------------------------------------- the reference


class ReferenceData(Dataset):
    """Samples with one of their unused blocks masked, as padded lists."""

    def __init__(self, data, max_len, block_size):
        self.data, self.max_len, self.block_size = data, max_len, block_size
        answers = [len(sample["full_ids"]) - sample["prompt_len"] for sample in data]
        self.unused = [set(range(math.ceil(answer / block_size))) for answer in answers]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, number):
        ids, start = self.data[number]["full_ids"].tolist(), self.data[number]["prompt_len"]
        noisy, asked = list(ids), [False] * len(ids)
        if self.unused[number]:  # else the sample comes unmasked, with a loss of 0
            block = random.choice(tuple(self.unused[number]))
            self.unused[number].remove(block)
            first, end = start + block * self.block_size, min(start + (block + 1) * self.block_size, len(ids))
            p = random.uniform(EPS, 1.0)
            for i in range(first, end):
                if random.random() < p:
                    noisy[i], asked[i] = MASK, True
            for i in range(end, len(ids)):
                noisy[i] = MASK
        padding = self.max_len - len(ids)
        rows = {"input_ids": ids + [PAD] * padding, "noisy_ids": noisy + [PAD] * padding}
        return {name: torch.tensor(row) for name, row in (rows | {"asked": asked + [False] * padding}).items()}


def reference_loader(data, args):
    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    dataset = ReferenceData(data, args.max_len, train_blockwise.BLOCK_SIZE)
    return DataLoader(dataset, args.batch, shuffle=True, collate_fn=collate)


def reference_loss(model, batch):
    """The mean over all samples of the mean over a sample's masked tokens; 0 for one without any."""
    logits = model(batch["noisy_ids"]).logits  # (B, L, V)
    labels = batch["input_ids"].clone()
    labels[~batch["asked"]] = -100
    nll = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100, reduction="none")
    return (nll.view(labels.shape).sum(dim=-1) / batch["asked"].sum(dim=-1).clamp(min=1)).mean()


# ---------------------------------------------------------------- dLLM


def dllm_loader(data, args):
    words = Tokenizer(WordLevel({"<unk>": 0, "<pad>": PAD}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="right")
    pad = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt", padding=True, label_pad_token_id=PAD)
    rows = []
    for sample in data:
        ids, start = sample["full_ids"].tolist(), sample["prompt_len"]
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})

    def collate(some):
        batch = pad(some)
        del batch["attention_mask"]  # LLaDA is to see its padding
        return batch

    return DataLoader(rows, args.batch, shuffle=True, collate_fn=collate)


def dllm_loss(model, batch, by_rows=False):
    """The sum over masked tokens of nll / t, divided by the number of tokens that could have been masked.

    by_rows: cross-entropy over logits of (B L, V) instead of (B, V, L).
    """
    ids, asked = batch["input_ids"], batch["labels"] != -100  # (B, L)
    t = EPS + (1 - EPS) * torch.rand(len(ids))  # (B,)
    masked = (torch.rand(ids.shape) < t[:, None]) & asked
    logits = model(input_ids=torch.where(masked, MASK, ids)).logits  # (B, L, V)
    if by_rows:
        nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)  # (B, L)
    else:
        nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # (B, L)
    return (nll * (1 / (t + 1e-6))[:, None] * masked / asked.sum().clamp(min=1)).sum()


# ---------------------------------------------------------------- here


def our_batches(data, config, args, peer):
    """The global batches of the trainer with the objective of a peer, one after the other."""
    script, changes = OURS[peer]
    knobs = {name: value for name, value in vars(script).items() if name.isupper()} | changes
    knobs |= {"DATA_PT": "", "MAX_LEN": args.max_len, "MICRO_BSIZE": args.batch, "MASK_ID": MASK}
    knobs = SimpleNamespace(**knobs)
    config.update(trainer.BLOCK_DIFFUSION)
    samples = make_samples(data, knobs, config)
    answer_len = samples.length - samples.prompt_len
    blocks = masking.num_blocks(answer_len, knobs.BLOCK_SIZE) if peer == "reference" else torch.ones_like(answer_len)
    plan = schedule(blocks, 1, knobs.SEED)
    run = SimpleNamespace(knobs=knobs, ranks=RANKS, samples=samples, plan=plan, noise=script.noise, rollouts=None)
    return (trainer.global_batch(run, step)[1] for step in range(1, 1 + len(plan) // args.batch))


def our_loss(model, noised):
    logits = model(input_ids=noised.input_ids, logits_to_keep=noised.supervised).logits  # (n, V)
    return masking.weighted_nll(logits, noised)


# ---------------------------------------------------------------- measured


def batches_and_loss(name, data, config, args):
    """What a step needs: its batches, and model and batch -> loss."""
    if name.startswith("here"):
        return our_batches(data, config, args, name.removeprefix("here, as ")), our_loss
    loader, loss = {
        "reference": (reference_loader, reference_loss),
        "dLLM": (dllm_loader, dllm_loss),
        "dLLM, by rows": (dllm_loader, partial(dllm_loss, by_rows=True)),
    }[name]
    return iter(loader(data, args)), loss


# and what each is compared with
NAMES = {"reference": "here, as reference", "dLLM": "here, as dLLM", "dLLM, by rows": "here, as dLLM"}
NAMES |= {name: name for name in NAMES.values()}


def measure(args):
    """CPU seconds of each step of `args.only`, but for a first one, and its losses."""
    base = common.random_model(args, RANKS.device)
    batches, loss_of = batches_and_loss(args.only, make_data(SAMPLES, args.max_len, args.vocab_size), base.config, args)
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules=train_blockwise.TARGET_MODS))
    weights = [weight for weight in model.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, betas=(0.9, 0.95))
    seconds, losses = [], []
    random.seed(0)
    torch.manual_seed(0)
    for _ in range(args.steps + 1):
        began = time.process_time()
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.process_time() - began)
    return seconds[1:], losses


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_flags(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="that are measured in a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each")
    parser.add_argument("--only", choices=NAMES, help="one, of width --d_model, without ratios")
    return parser.parse_args()


def main():
    args, report = parse_args(), []
    if args.only:
        seconds, losses = measure(args)
        print(json.dumps({"seconds": seconds, "losses": losses, "mb": common.peak_memory_mb()}))
        return
    print("width                        CPU s/step   times those here (min - max)   MB  times those here")
    for width in WIDTHS:
        runs = {name: [] for name in NAMES}
        for _ in range(args.repeats):
            for name in NAMES:
                runs[name].append(common.own_process(__spec__.name, args, d_model=width, only=name))
        seconds = {name: [statistics.median(run["seconds"]) for run in some] for name, some in runs.items()}
        mb = {name: statistics.median(run["mb"] for run in some) for name, some in runs.items()}
        for name in NAMES:
            ours = NAMES[name]
            ratio, low, high = common.ratios(seconds[name], seconds[ours])
            line = (
                f"{width:5}  {name:20} {statistics.median(seconds[name]):10.3f}   {ratio:6.2f} ({low:.2f} - {high:.2f})"
            )
            print(f"{line:66} {mb[name]:6,.0f}  {mb[name] / mb[ours]:.2f}")
            report.append({"d_model": width, "name": name, "ratio": [ratio, low, high], "runs": runs[name]})
    common.print_json(args, widths=report)


if __name__ == "__main__":
    main()
