"""One training step with the head at the scored positions only, against the same step with logits everywhere.

    python -m benchmarks.bench_train --vocab_size 126464

Both variants run in turn in one process on the same rows and masks; prints seconds, their ratio and its spread, and a
JSON line. A step is forward, loss, backward to the LoRA adapters and AdamW; in fp32, without DeepSpeed.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import llada
import masking
import sft
from experiments.make_base import make_config


def make_batch(args, device):
    """Random rows with prompts of 64 to 128 tokens, and block-wise masks for them. Returns ids, hidden, scored."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(8, args.vocab_size, (args.batch, args.length), generator=generator, device=device)  # (B, L)
    prompt_len = torch.randint(64, 128, (args.batch,), generator=generator, device=device)
    length = torch.full_like(prompt_len, args.length)
    block = torch.randint(0, (args.length - 128) // 32, (args.batch,), generator=generator, device=device)
    hidden, scored, _ = masking.blockwise_masks(
        prompt_len, length, block, args.length, block_size=32, mask_prob_eps=1e-3, prefix_mask_rate=0.0,
        suffix_mask_prob=1.0, generator=generator,
    )  # fmt: skip
    return ids, hidden, scored


def scored_loss(model, ids, hidden, scored):
    """The step of sft.py: logits (n, V) at the scored positions."""
    logits = model(input_ids=ids.masked_fill(hidden, 4), logits_to_keep=scored).logits
    return masking.loss(logits, ids[scored], masking.sample_mean_weights(scored)[scored])


def full_loss(model, ids, hidden, scored):
    """The plain way: fp32 logits (B, L, V) everywhere, cross-entropy everywhere, most of it multiplied by 0."""
    logits = model(input_ids=ids.masked_fill(hidden, 4)).logits.float()
    entropy = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")  # (B * L,)
    return (entropy * masking.sample_mean_weights(scored).flatten()).sum()


def seconds(loss, model, optimizer, batch):
    optimizer.zero_grad()
    began = time.perf_counter()
    value = loss(model, *batch)
    value.backward()
    optimizer.step()
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, value.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=126464)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = llada.LLaDAForCausalLM(make_config(args.vocab_size, args.d_model, args.n_layers))
    model = get_peft_model(model.to(device), LoraConfig(r=16, target_modules=sft.LINEARS))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    batch = make_batch(args, device)

    variants = {"scored positions": scored_loss, "all positions": full_loss}
    times, losses = {name: [] for name in variants}, {}
    for repeat in range(args.repeats + 1):
        for name, loss in variants.items():
            took, losses[name] = seconds(loss, model, optimizer, batch)
            if repeat:  # the first round warms up
                times[name].append(took)
    print(f"{int(batch[2].sum())} scored of {batch[0].numel()} positions")
    for name in variants:
        print(f"head at {name:<17} {statistics.median(times[name]):.3f} s a step, loss {losses[name]:.5f}")
    ratios = sorted(full / scored for scored, full in zip(*times.values()))
    low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
    print(f"ratio {middle:.2f} ({low:.2f} to {high:.2f} in {args.repeats} repeats)")
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"}
    print(json.dumps(vars(args) | machine | {"torch": torch.__version__, "times": times, "ratio": middle}))


if __name__ == "__main__":
    main()
