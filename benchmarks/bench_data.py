"""How fast pt.py makes rows, against the plain way: one row at a time, with the model's tokenizer and template.

    python -m benchmarks.bench_data --data gsm8k/train.jsonl

Both ways go from the rows of a dataset to the .pt file on the disk, and the two files must hold the same. The tokenizer
is made here from the data, with the regular expression of Llama 3, unless --model names one. Prints rows per second,
their ratio with its spread, and a JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import pt
from benchmarks import common
from blockwise import formats
from blockwise.cli import read_jsonl, run_script
from blockwise.encoding import PROBES, Encoder, encode
from blockwise.models import hub
from blockwise.prompts import METAMATH
from experiments.make_base import CHAT_TEMPLATE, SPECIAL

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(texts):
    """A byte-level BPE of 16,000 tokens that splits texts as most of today's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16000, special_tokens=SPECIAL, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **ends)


def plain(dataset, tokenizer, max_len, output):
    """A loop over rows: two templates, two calls of the tokenizer, a tensor."""
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    rows = []
    for row in dataset:
        chat = [{"role": "user", "content": METAMATH.wrapped(row["query"])}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        chat.append({"role": "assistant", "content": row["response"]})
        text = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix(header)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        if ids[: len(prompt)].tolist() != prompt:  # a token that reaches over the border
            answer = tokenizer(text[len(tokenizer.decode(prompt)) :], add_special_tokens=False)["input_ids"]
            ids = torch.tensor(prompt + answer)
        if len(ids) <= max_len:
            rows.append({"prompt_len": len(prompt), "full_ids": ids})
    torch.save(rows, output)


def ours(dataset, tokenizer, max_len, output):
    encoder = Encoder(tokenizer, formats.METAMATH, METAMATH, dataset[:PROBES])
    pt.save(encode(dataset, encoder, max_len).samples, output, METAMATH)


def check_same(folder):
    """Raises SystemExit if the files of the two ways differ; returns their number of rows."""
    first, second = (torch.load(folder / name, weights_only=True) for name in ("plain", "ours"))
    same = [a["prompt_len"] == b["prompt_len"] and a["full_ids"].equal(b["full_ids"]) for a, b in zip(first, second)]
    if len(first) != len(second) or not all(same):
        raise SystemExit(f"the two ways differ: {len(first)} and {len(second)} rows, {same.count(False)} not the same")
    return len(first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="jsonl file of rows with question and answer, as GSM8K's")
    parser.add_argument("--model", help="folder or hub id of a tokenizer")
    parser.add_argument("--max_len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    disable_progress_bars()
    rows = [{"query": row["question"], "response": row["answer"]} for _, row in read_jsonl(args.data)]
    texts = [METAMATH.wrapped(row["query"]) + row["response"] for row in rows]
    tokenizer = hub.load_tokenizer(args.model) if args.model else make_tokenizer(texts)
    dataset, device = Dataset.from_list(rows), torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        ways = {way.__name__: way for way in (plain, ours)}
        variants = {
            way: lambda way=way: ways[way](dataset, tokenizer, args.max_len, str(Path(name) / way)) for way in ways
        }
        times = common.in_turn(variants, args.repeats, device)
        kept = check_same(Path(name))
    speeds = {way: len(rows) / common.statistics.median(seconds) for way, seconds in times.items()}
    for way, speed in speeds.items():
        print(f"{way:<6} {speed:8,.0f} rows/s")
    ratio = common.ratios(times["plain"], times["ours"])
    print(f"{len(rows):,} rows, {kept:,} of at most {args.max_len} tokens, the same from both ways")
    print("times as fast: {:.1f} ({:.1f} to {:.1f})".format(*ratio))
    ceiling = common.copy_ceiling(device)
    share = sum(len(json.dumps(row)) for row in rows) / len(rows) * speeds["ours"] / ceiling
    print(f"{share:.2%} of the rate at which memory is copied ({ceiling / 1e9:.1f} GB/s)")
    common.print_json(args, times=times, ratio=ratio, copy_gb_per_s=ceiling / 1e9)


if __name__ == "__main__":
    run_script(main)
