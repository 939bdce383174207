"""A training step of this repository against a plain one, and what each of the differences contributes.

    python -m benchmarks.bench_train

The plain step does what the reference implementation does: a DataLoader over a list of rows, masks by Python loops over
tokens, a materialised attention mask, fp32 logits and cross-entropy at all positions. All variants share model, rows,
draws and adapters and run in turn in one process; before, each runs in a process of its own, for its memory. A step is
rows, masks, forward, loss, backward to the LoRA adapters, AdamW. Prints seconds, ratios with their spread, memory, the
share of the measured matmul ceiling, and a JSON line. On CPUs in fp32, on a GPU in bf16; without DeepSpeed.
"""

import argparse
import json
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader

import masking
from benchmarks import common
from blockwise import engine
from blockwise.run.ranks import Ranks
from train_blockwise import TARGET_MODS

BLOCK, EPS, MASK, ROWS = 32, 1e-3, 4, 64


@dataclass
class Step:
    """What a variant does. With the defaults it is the step of blockwise/trainer.py."""

    rows: str = "tensor"  # or "loader": a DataLoader over a list of rows
    masks: str = "tensor"  # or "lists"
    attention: str = "free"  # or "materialised"
    head: str = "supervised"  # or "all"
    dropout: float = 0.0
    checkpointing: bool = False
    compiled: bool = False


VARIANTS = {
    "plain": Step("loader", "lists", "materialised", "all"),
    "ours": Step(),
    "but logits everywhere": Step(head="all"),
    "but a materialised attention mask": Step(attention="materialised"),
    "but masks by lists": Step(masks="lists"),
    "but rows by a DataLoader": Step(rows="loader"),
    "with LORA_DROPOUT 0.05": Step(dropout=0.05),
    "with GRADIENT_CHECKPOINTING": Step(checkpointing=True),
    "with COMPILE": Step(compiled=True),
}


class Trainer:
    """Model with adapters, random rows, and a function for each kind of step."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        model = common.random_model(args, device)
        self.config = model.config
        lora = LoraConfig(r=args.rank, target_modules=TARGET_MODS)
        self.model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        self.model.train()  # without dropout this changes nothing but to allow checkpointing
        engine.compile_layers(self.model)  # nothing is compiled before the first call
        self.compiled = [layer._compiled_call_impl for layer in model.model.layers]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(8, self.config.vocab_size, (ROWS, args.length), generator=generator)  # (N, L)
        prompt_len = torch.randint(args.length // 4, args.length // 2, (ROWS,), generator=generator)
        length = torch.full_like(prompt_len, args.length)
        data = [{"prompt_len": int(n), "full_ids": row} for n, row in zip(prompt_len, ids)]
        self.loader = DataLoader(data, args.batch, collate_fn=lambda rows: self.collate(rows), num_workers=0)
        self.on_device = [rows.to(device) for rows in (ids, prompt_len, length)]
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)

    def collate(self, rows):
        """The plain batch: rows padded one by one to the full length, as lists."""
        ids = [row["full_ids"].tolist() + [0] * (self.args.length - len(row["full_ids"])) for row in rows]
        prompt_len = [row["prompt_len"] for row in rows]
        return torch.tensor(ids), torch.tensor(prompt_len), torch.tensor([len(row["full_ids"]) for row in rows])

    def batch(self, how):
        """ids (B, L), prompt_len (B,), length (B,) on the device; always the first rows."""
        if how == "loader":
            return [tensor.to(self.device) for tensor in next(iter(self.loader))]
        some = torch.arange(self.args.batch, device=self.device)
        return [rows[some] for rows in self.on_device]

    def draws(self, prompt_len, length):
        """The active block of each row (B,), and a generator for the masks; the same in every step and variant."""
        blocks = masking.num_blocks(length - prompt_len, BLOCK)
        return blocks // 2, torch.Generator(self.device).manual_seed(self.args.seed)

    def masks(self, how, prompt_len, length):
        """masked and supervised, (B, L) bool."""
        block, generator = self.draws(prompt_len, length)
        if how == "lists":
            return masks_by_lists(prompt_len, length, block, self.args.length, generator)
        return masking.blockwise_masks(
            prompt_len, length, block, self.args.length, block_size=BLOCK, mask_prob_eps=EPS,
            prefix_mask_rate=0.0, suffix_mask_prob=1.0, generator=generator,
        )[:2]  # fmt: skip

    def set(self, step):
        """Brings the model into the state of a variant."""
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout["default"] = torch.nn.Dropout(step.dropout) if step.dropout else torch.nn.Identity()
        base = self.model.get_base_model()
        base.gradient_checkpointing_disable()
        if step.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for layer, call in zip(base.model.layers, self.compiled):
            layer._compiled_call_impl = call if step.compiled else None  # where torch's Module.compile() keeps it

    def loss(self, step):
        ids, prompt_len, length = self.batch(step.rows)
        masked, supervised = self.masks(step.masks, prompt_len, length)
        inputs, weights = {"input_ids": ids.masked_fill(masked, MASK)}, masking.sample_mean_weights(supervised)
        if step.attention == "materialised":  # (B, 1, L, L): nothing is forbidden
            shape = (len(ids), 1, ids.shape[1], ids.shape[1])
            inputs["attention_mask"] = torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        if step.head == "supervised":
            logits = self.model(**inputs, logits_to_keep=supervised).logits  # (n, V)
            return masking.weighted_nll(logits, masking.Noised(inputs["input_ids"], supervised, ids, weights))
        logits = self.model(**inputs).logits.float()  # (B, L, V)
        entropy = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")  # (B * L,)
        return (entropy * weights.flatten()).sum()

    def run(self, step):
        self.set(step)
        self.optimizer.zero_grad()
        loss = self.loss(step)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def masks_by_lists(prompt_len, length, block, max_len, generator):
    """The plain way to masking.blockwise_masks: a loop over rows and tokens, from the same draws."""
    uniform = {"generator": generator, "device": prompt_len.device}
    p = (EPS + (1 - EPS) * torch.rand(len(prompt_len), 1, **uniform)).flatten().tolist()
    u = torch.rand(len(prompt_len), max_len, **uniform).tolist()
    masked, supervised = [], []
    for row, (prompt, end, active) in enumerate(zip(prompt_len.tolist(), length.tolist(), block.tolist())):
        start = prompt + active * BLOCK
        masked.append([False] * max_len)
        supervised.append([False] * max_len)
        for i in range(start, min(start + BLOCK, end)):
            masked[row][i] = supervised[row][i] = u[row][i] < p[row]
        for i in range(start + BLOCK, end):
            masked[row][i] = True
    return torch.tensor(masked, device=prompt_len.device), torch.tensor(supervised, device=prompt_len.device)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_flags(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="also with compiled layers, which takes minutes at first"
    )
    parser.add_argument("--only", choices=VARIANTS, help="one variant, without ratios")
    return parser.parse_args()


def measure(args, device, names):
    """Seconds of each repeat and the loss of each variant, and the number of supervised positions."""
    trainer, losses = Trainer(args, device), {}
    variants = {name: lambda name=name: losses.update({name: trainer.run(VARIANTS[name])}) for name in names}
    times = common.in_turn(variants, args.repeats, device)
    _, prompt_len, length = trainer.batch("tensor")
    return times, losses, int(trainer.masks("tensor", prompt_len, length)[1].sum()), trainer.config


def main():
    args = parse_args()
    device = Ranks.from_environment().device
    if args.only:
        times, _, _, _ = measure(args, device, [args.only])
        print(json.dumps({"seconds": times[args.only], "mb": common.peak_memory_mb()}))
        return
    names = [name for name, step in VARIANTS.items() if args.compile or not step.compiled]
    memory = {name: common.own_process(__spec__.name, args, repeats=1, only=name)["mb"] for name in names}
    times, losses, supervised, config = measure(args, device, names)
    print(f"{supervised} of {args.batch * args.length:,} positions are supervised, loss {losses['ours']:.5f}")
    print(f"{'':34}  s/step  times 'ours' (min - max)   memory in MB  loss - ours")
    report = {}
    for name in names:
        ratio = common.ratios(times[name], times["ours"])
        report[name] = {"seconds": times[name], "times_ours": ratio, "mb": memory[name], "loss": losses[name]}
        low, high = ratio[1:]
        line = f"{name:34} {statistics.median(times[name]):7.3f}  {ratio[0]:6.2f} ({low:.2f} - {high:.2f})"
        print(f"{line} {memory[name]:18,.0f}  {losses[name] - losses['ours']:11.1e}")
    ceiling, tokens = common.matmul_ceiling(device), args.batch * args.length
    flops = common.step_flops(config, args.rank, tokens, args.length, supervised)
    share = flops / statistics.median(times["ours"]) / ceiling
    print(f"ours: {tokens / statistics.median(times['ours']):,.0f} tokens/s, {flops / tokens / 1e9:.3f} GFLOP a token:")
    print(f"{share:.0%} of the matmul ceiling of this machine, {ceiling / 1e12:.3f} TFLOP/s")
    common.print_json(
        args, variants=report, supervised=supervised, matmul_tflops=ceiling / 1e12, share_of_ceiling=share
    )


if __name__ == "__main__":
    main()
