"""A tiny base model in LLaDA's format: byte-level BPE tokenizer, config, and weights from a short masked pre-training.

    python -m demo.make_base --data FOLDER --output FOLDER --steps 200

--data is a folder of jsonl with query and response; its texts train the tokenizer and the model.
"""

import argparse
import time
from pathlib import Path

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import llada
import masking
import pt

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
    """A byte-level BPE tokenizer trained on texts, with LLaDA's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
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


def make_config(vocab_size, d_model, n_layers):
    """A LLaDA config with the hub's keys (GSAI-ML/LLaDA-8B-Instruct: config.json), smaller."""
    return llada.LLaDAConfig.from_dict(
        llada.ONLY
        | {
            "model_type": "llada", "architectures": ["LLaDAModelLM"], "dtype": "bfloat16",
            "d_model": d_model, "n_layers": n_layers, "n_heads": d_model // 64, "n_kv_heads": d_model // 64,
            "mlp_hidden_size": 3 * d_model, "vocab_size": vocab_size, "embedding_size": vocab_size,
            "max_sequence_length": 1024, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
            "mask_token_id": MASK_ID, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        }
    )  # fmt: skip


def pretrain(model, rows, steps, batch_size, lr):
    """Trains all weights to fill in masked tokens anywhere in prompt and answer. Returns the last loss."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for _, ids in rows], batch_first=True, padding_value=model.config.pad_token_id
    )
    length = torch.tensor([len(ids) for _, ids in rows])
    bar = tqdm(range(steps), desc="pre-training", unit="step")
    for _ in bar:
        some = torch.randint(len(ids), (batch_size,), generator=generator)
        longest = int(length[some].max())
        batch = ids[some, :longest]  # (B, L)
        hidden, scored, _ = masking.full_sequence_masks(
            torch.zeros_like(some), length[some], longest, mask_prob_eps=1e-3, generator=generator
        )
        logits = model(input_ids=batch.masked_fill(hidden, MASK_ID), logits_to_keep=scored).logits  # (n, V)
        loss = masking.loss(logits, batch[scored], masking.sample_mean_weights(scored)[scored])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with jsonl files of query and response")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=200, help="pre-training steps; 0 = random weights")
    parser.add_argument("--vocab_size", type=int, default=512, help="the tokenizer uses at most 4096 of it")
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--max_shard_size", default="4MB")
    args = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()

    dataset = load_dataset(args.data, split="train")
    texts = (pt.user_turn(row["query"])["content"] + row["response"] for row in dataset)
    tokenizer = make_tokenizer(texts, vocab_size=min(args.vocab_size, 4096))
    model = llada.LLaDAForCausalLM(make_config(args.vocab_size, args.d_model, args.n_layers))
    loss = float("nan")
    if args.steps:
        rows, _ = pt.encode(dataset, tokenizer, max_len=256, max_samples=0, filter_type="")
        loss = pretrain(model, rows, args.steps, batch_size=32, lr=2e-3)
    model.to(torch.bfloat16).save_pretrained(args.output, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(args.output)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    seconds = time.perf_counter() - began
    print(f"{Path(args.output)}: {size:.1f} M parameters, loss {loss:.3f} after {args.steps} steps, {seconds:.0f} s")


if __name__ == "__main__":
    main()
