"""The end of demo.sh: loads the checkpoints back, and a table of what was trained.

python -m demo.summary demo_run BLOCK_SIZE
"""

import csv
import sys
from pathlib import Path
from statistics import fmean, median

import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import llada  # noqa: F401  (registers the model type, so that the Auto classes below work)
import masking
import pt


def heldout_loss(folder, dataset, block_size):
    """The block-wise loss of a checkpoint on every block of problems that were not trained on, with fixed masks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    rows, _ = pt.encode(dataset, tokenizer, max_len=1024, max_samples=0, filter_type="")
    full_ids = [torch.tensor(ids) for _, ids in rows]
    ids = pad_sequence(full_ids, batch_first=True, padding_value=model.config.pad_token_id)  # (B, L)
    prompt_len, length = torch.tensor([(start, len(row)) for start, row in rows]).T
    generator, losses = torch.Generator().manual_seed(0), []
    for block in range(int(masking.num_blocks(length - prompt_len, block_size).max())):
        hidden, scored, _ = masking.blockwise_masks(
            prompt_len, length, torch.full_like(length, block), ids.shape[1], block_size=block_size,
            mask_prob_eps=1e-3, prefix_mask_rate=0.0, suffix_mask_prob=1.0, generator=generator,
        )  # fmt: skip
        with torch.no_grad():
            inputs = ids.masked_fill(hidden, model.config.mask_token_id)
            logits = model(input_ids=inputs, logits_to_keep=scored).logits  # (n, V)
        losses.append(masking.loss(logits, ids[scored], masking.sample_mean_weights(scored)[scored]).item())
    return fmean(losses)


def trained(run, name):
    """The columns of a trainer's line: steps, first and last loss, tokens per second, and its checkpoint's folder."""
    with open(run / f"{name}_logs" / "metrics.csv", newline="") as file:
        metrics = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    tenth = max(1, len(metrics) // 10)
    first, last = (fmean(row["loss"] for row in part) for part in (metrics[:tenth], metrics[-tenth:]))
    (folder,) = run.glob(f"{name}_step*")
    return len(metrics), first, last, median(row["tokens_per_second"] for row in metrics), folder


def main():
    run, block_size = Path(sys.argv[1]), int(sys.argv[2])
    dataset = load_dataset(str(run / "heldout"), split="train")
    base = run / "base"
    lines = [
        f"{'':<14}{'steps':>6}{'first loss':>12}{'last loss':>11}{'tokens/s':>10}{'held-out loss':>15}  checkpoint"
    ]
    lines += [f"{'base':<14}{heldout_loss(base, dataset, block_size):>54.3f}  {base}"]
    for name, label in (("fullseq", "full sequence"), ("blockwise", "block-wise")):
        steps, first, last, speed, folder = trained(run, name)
        loss = heldout_loss(folder, dataset, block_size)
        lines += [f"{label:<14}{steps:>6}{first:>12.3f}{last:>11.3f}{speed:>10,.0f}{loss:>15.3f}  {folder}"]
    print("", *lines, "", sep="\n")
    print("First and last loss are means over a tenth of the steps. The trainers ask different questions: only the")
    print(f"held-out loss (block-wise, the same masks for all) compares them. Curves: {run / 'loss.png'}")


if __name__ == "__main__":
    main()
