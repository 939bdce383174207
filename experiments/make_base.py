"""A tiny base model in LLaDA's format: byte-level BPE tokenizer, config, weights from full-sequence pre-training.

    python -m experiments.make_data --output pretrain --rows 100000 --seed 0
    python -m experiments.make_base --data pretrain --output demo/base --steps 2000

--data is a folder of jsonl with query and response; its texts train the tokenizer and the model. A sample is made as
pt.py makes it, or, with --plain, of the question and the answer alone: no instruction around the question, no names of
the roles.
"""

import argparse
import copy
import time
from collections import deque
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import masking
from blockwise import formats, prompts
from blockwise.cli import progress
from blockwise.models import llada

# LLaDA's special tokens and chat template (hub: tokenizer_config.json), here with the first ids of the vocabulary
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MASK_ID = SPECIAL.index("<|mdm_mask|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def make_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer trained on texts, with LLaDA's special tokens and chat template.

    Every digit is a token. Other tokens may span words: the INSTRUCTION of training becomes a few of them.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def plain_sample(tokenizer, row: dict[str, str]) -> tuple[int, np.ndarray]:
    """prompt_len and full_ids of a row: beginning of text, query, end of turn, response; no instruction, no roles."""
    query, response = tokenizer([row["query"], row["response"]], add_special_tokens=False)["input_ids"]
    prompt = [tokenizer.bos_token_id, *query, SPECIAL.index("<|eot_id|>")]
    return len(prompt), np.array(prompt + response)


def make_config(vocab_size, d_model, n_layers):
    """A LLaDA config with the hub's keys (GSAI-ML/LLaDA-8B-Instruct: config.json), smaller.

    initializer_range: one over the root of the width. With LLaDA's 0.02, attention is uniform at this width, and stayed
    so for thousands of steps.
    """
    return llada.LLaDAConfig.from_dict(
        llada.SUPPORTED_VALUES
        | {
            "model_type": "llada", "architectures": ["LLaDAModelLM"], "dtype": "bfloat16",
            "d_model": d_model, "n_layers": n_layers, "n_heads": d_model // 32, "n_kv_heads": d_model // 32,
            "mlp_hidden_size": 3 * d_model, "vocab_size": vocab_size, "embedding_size": vocab_size,
            "max_sequence_length": 1024, "initializer_range": d_model**-0.5,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
            "mask_token_id": MASK_ID, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        }
    )  # fmt: skip


def pretrain(model, rows, steps, batch_size, lr, seed=0):
    """Trains all weights with the masks of the baseline, all over the answers. Yields step, mean of last losses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)  # warm-up
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for _, ids in rows], batch_first=True, padding_value=model.config.pad_token_id
    )
    prompt_len, length = torch.tensor([(start, len(ids)) for start, ids in rows]).T
    losses = deque(maxlen=50)
    bar = progress(range(1, steps + 1), desc="pre-training", unit="step")
    for step in bar:
        some = torch.randint(len(ids), (batch_size,), generator=generator)
        longest = int(length[some].max())
        batch = ids[some, :longest]  # (B, L)
        masked, supervised, _ = masking.full_sequence_masks(
            prompt_len[some], length[some], longest, mask_prob_eps=1e-3, generator=generator
        )
        weights = masking.sample_mean_weights(supervised)
        noised = masking.Noised(batch.masked_fill(masked, MASK_ID), supervised, batch, weights)
        logits = model(input_ids=noised.input_ids, logits_to_keep=supervised).logits  # (n, V)
        loss = masking.weighted_nll(logits, noised)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{fmean(losses):.3f}")
        yield step, fmean(losses)


def tokenizer_and_samples(args):
    """A tokenizer trained on the texts of --data, and (prompt_len, full_ids) of each row."""
    from datasets import load_dataset  # only now: benchmarks need neither of these for make_config

    from blockwise.encoding import PROBES, Encoder, encode

    dataset = load_dataset(args.data, split="train")
    texts = [
        [row["query"], row["response"]]
        if args.plain
        else ["user", "\n\n" + prompts.METAMATH.wrapped(row["query"]), "assistant", "\n\n" + row["response"]]
        for row in dataset.select(range(min(3000, len(dataset))))
    ]
    tokenizer = make_tokenizer(sum(texts, []), vocab_size=min(args.vocab_size, 4096))
    if args.plain:
        return tokenizer, [plain_sample(tokenizer, row) for row in dataset]
    encoder = Encoder(tokenizer, formats.METAMATH, prompts.METAMATH, dataset[:PROBES])
    return tokenizer, encode(dataset, encoder, max_len=256).samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with jsonl files of query and response")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="pre-training steps")
    parser.add_argument("--vocab_size", type=int, default=640, help="the tokenizer uses at most 4096 of it")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate, reached after 100 steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--plain", action="store_true", help="samples without instruction and roles")
    parser.add_argument("--save_every", type=int, default=0, help="steps between copies, to choose from; 0 = none")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    began = time.perf_counter()

    tokenizer, rows = tokenizer_and_samples(args)
    model = llada.LLaDAForCausalLM(make_config(args.vocab_size, args.d_model, args.n_layers))
    for step, loss in pretrain(model, rows, args.steps, args.batch_size, args.lr, args.seed):
        if step == args.steps or (args.save_every and step % args.save_every == 0):
            folder = args.output if step == args.steps else f"{args.output}_step{step:04d}"
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if not args.plain:
                Path(folder, prompts.FILE).write_bytes(prompts.METAMATH.to_json())
            size, seconds = sum(p.numel() for p in model.parameters()) / 1e6, time.perf_counter() - began
            print(f"{folder}: {size:.1f} M parameters, loss {loss:.3f} after {step} steps, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
