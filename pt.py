"""Writes the training samples: questions and answers, rendered with the model's chat template, as token ids.

    python pt.py --output MathQA_256.pt --model GSAI-ML/LLaDA-8B-Instruct --dataset meta-math/MetaMathQA --max_len 256

Output: torch.save of a list of {"prompt_len": int, "full_ids": LongTensor}. full_ids is prompt + answer + end of turn
(for LLaDA <|eot_id|>); the answer starts at prompt_len. Samples longer than max_len are dropped, never cut.

    python pt.py --text text --dataset my_texts/ --output text.pt --model models/a2d-Qwen3-0.6B --max_len 1024

With --text, the texts of that column are written one behind the other, cut into samples of exactly max_len tokens that
have no prompt, for pre-training. --dataset may be a .txt file, too, or a folder of them, whose column is `text`.
"""

import argparse
import io
from itertools import chain
from pathlib import Path

from blockwise.cli import InputError, progress, run_script
from blockwise.prompts import extra_header, render, user_message
from blockwise.run import files

PROBES = 100  # samples on which a faster tokenizer must agree with the model's


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="MathQA_256.pt", help="file to write")
    parser.add_argument("--model", default="GSAI-ML/LLaDA-8B-Instruct", help="hub id or local folder")
    parser.add_argument("--dataset", default="meta-math/MetaMathQA", help="hub id or folder of jsonl or parquet")
    parser.add_argument("--split", default="train")
    parser.add_argument("--max_len", type=int, default=256, help="tokens; longer samples are dropped")
    parser.add_argument("--max_samples", type=int, default=20000, help="stop after N kept samples; 0 = unlimited")
    parser.add_argument("--filter_type", default="GSM", help="skip rows whose `type` contains this text; '' = keep all")
    text = parser.add_argument_group("plain text, for pre-training")
    text.add_argument("--text", metavar="COLUMN", help="pack the texts of this column")
    text.add_argument("--insert_eos", action="store_true", help="write the end-of-text token behind each text")
    text.add_argument("--streaming", action="store_true", help="read the data set as a stream, without storing it")
    text.add_argument("--max_tokens", type=int, default=0, help="stop after N tokens; 0 = all of the data set")
    args = parser.parse_args()
    if args.max_len < 2 or args.max_samples < 0:
        parser.error("--max_len must be at least 2 and --max_samples at least 0")
    if args.max_tokens < 0:
        parser.error("--max_tokens must be at least 0")
    if (args.insert_eos or args.streaming or args.max_tokens) and not args.text:
        parser.error("--insert_eos, --streaming and --max_tokens belong to --text")
    return args


def main():
    args = parse_args()
    if not Path(args.output).absolute().parent.is_dir() or Path(args.output).is_dir():
        raise InputError(f"--output {args.output}: it must be a file in a folder that exists.")
    from blockwise.models import hub  # only now: a mistyped flag is reported without waiting for it

    tokenizer = hub.load_tokenizer(args.model)
    if args.text:
        print(pack_texts(args, tokenizer))
        return
    if not tokenizer.chat_template:
        raise InputError(f"{args.model}: its tokenizer has no chat template.")
    dataset = load_rows(args.dataset, args.split, needs_type=bool(args.filter_type))
    samples, counts = encode(dataset, tokenizer, args.max_len, args.max_samples, args.filter_type)
    report = ", ".join(f"{what} {number:,}" for what, number in counts.items()) + f" (of {len(dataset):,} rows)"
    if not samples:
        raise InputError(f"--dataset {args.dataset}: nothing to write: {report}; check --filter_type and --max_len.")
    save(samples, args.output)
    print(f"{args.output}: {report}")


def pack_texts(args: argparse.Namespace, tokenizer) -> str:
    """Writes the file of --text. Returns what it holds, in words. Raises InputError."""
    from blockwise import packing
    from blockwise.data import load_texts

    end = tokenizer.eos_token_id if args.insert_eos else None
    if args.insert_eos and end is None:
        raise InputError(f"--insert_eos: the tokenizer of {args.model} has no end-of-text token.")
    texts = load_texts(args.dataset, args.split, args.text, args.streaming)
    first = next(texts, [])
    ids = packing.token_ids(chain([first], texts), encoder(tokenizer, first[:PROBES]), end, args.max_tokens)
    packed = packing.write(args.output, ids, args.max_len)
    size = f"{packed.samples:,} samples of {args.max_len:,} tokens, without prompt"
    return f"{args.output}: {size}; {packed.left_over:,} tokens at the end were too few for another"


def save(samples: list, output: str | Path) -> None:
    """Writes [(prompt_len, full_ids)] as a .pt file, or leaves what was there before. Raises InputError."""
    import numpy as np
    import torch

    every_id = torch.from_numpy(np.concatenate([ids for _, ids in samples]))
    full_ids = every_id.split([len(ids) for _, ids in samples])  # views: one block in the file, read in half the time
    content = io.BytesIO()
    torch.save([{"prompt_len": start, "full_ids": ids} for (start, _), ids in zip(samples, full_ids)], content)
    with files.writing(f"--output {output}"):
        files.replace(output, content.getbuffer())


def load_rows(name: str, split: str, needs_type: bool):
    """The split of a hub dataset or of a local folder, with the columns query, response and perhaps type."""
    from blockwise.data import load_split

    dataset = load_split(name, split)
    for column in ["query", "response"] + ["type"] * needs_type:
        if column not in dataset.column_names:
            hint = ", which --filter_type needs (pass --filter_type '' to keep all rows)" if column == "type" else ""
            columns = ", ".join(dataset.column_names)
            raise InputError(f"--dataset {name} has no column {column!r}{hint}; its columns are {columns}.")
    return dataset


def encode(dataset, tokenizer, max_len: int, max_samples: int, filter_type: str) -> tuple[list, dict[str, int]]:
    """Tokenizes rows with query, response and perhaps type, in batches, until max_samples are kept (0 = no limit).

    Returns a list of (prompt_len, full_ids as int64 array), and how many rows were kept, skipped by type, too long, and
    unusable: rows with an empty text, or that cannot be written as prompt and answer (see tokenize).
    """
    samples, header, some = [], extra_header(tokenizer), dataset[:PROBES]
    ids_of = encoder(tokenizer, [*some["query"], *some["response"]])
    counts = dict.fromkeys(("kept", "skipped by type", "too long", "unusable"), 0)
    with progress(total=len(dataset), desc="tokenizing", unit="row") as bar:
        for batch in dataset.iter(1000):
            types = batch["type"] if filter_type else [""] * len(batch["query"])
            check_texts(zip(batch["query"], batch["response"], types), first=bar.n)
            skip = [bool(filter_type) and filter_type in kind for kind in types]
            wanted = [pair for pair, no in zip(zip(batch["query"], batch["response"]), skip) if not no]
            encoded = iter(tokenize(wanted, tokenizer, header, ids_of))
            for no in skip:
                sample = None if no else next(encoded)
                status = "skipped by type" if no else "unusable" if sample is None else "kept"
                status = "too long" if status == "kept" and len(sample[1]) > max_len else status
                counts[status] += 1
                if status == "kept":
                    samples.append(sample)
                if len(samples) == max_samples > 0:
                    return samples, counts
            bar.update(len(skip))
    return samples, counts


def check_texts(rows, first: int) -> None:
    """Refuses rows with something else than texts; `first` is the number of the first of them."""
    for number, row in enumerate(rows, start=first):
        if not all(isinstance(text, str) for text in row):
            raise InputError(f"row {number} of the dataset holds something else than texts: {row!r:.200}")


def encoder(tokenizer, texts: list[str]):
    """A function of texts that gives the ids of each, an array, without any that the tokenizer adds by itself.

    It is fastokens, many times faster than the tokenizer, if that reads it and gives the same ids for these texts; else
    the tokenizer itself, and a line says so.
    """
    import fastokens
    import numpy as np

    def by_tokenizer(texts):
        lists = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in lists]

    def by_fastokens(texts):
        ids, borders = fast.encode_batch_flat(texts)
        ids, borders = np.frombuffer(ids, np.uint32).astype(np.int64), np.frombuffer(borders, np.uint64).tolist()
        return [ids[start:end] for start, end in zip(borders, borders[1:])]

    texts = [text for text in texts if isinstance(text, str)] or [""]
    try:
        fast = fastokens.Tokenizer.from_json_str(tokenizer.backend_tokenizer.to_str())
    except (AttributeError, ValueError) as error:  # no backend: a tokenizer in Python
        why = f"cannot read it ({error})"
    else:
        if all(map(np.array_equal, by_fastokens(texts), by_tokenizer(texts))):
            return by_fastokens
        why = "gives other ids"
    print(f"note: tokenizing with the model's own tokenizer, which is slower, as fastokens {why}.")
    return by_tokenizer


def tokenize(pairs: list, tokenizer, header: str, ids_of) -> list:
    """[(query, response)] -> [(prompt_len, full_ids), or None for a pair that cannot be used].

    header: what to cut from the end of a conversation, see extra_header; ids_of: see encoder. Prompt and whole
    conversation are tokenized both. Where a token reaches over the border between them, the answer is tokenized on its
    own behind the prompt's tokens: decoding, too, starts from exactly these. Unusable are pairs with an empty text,
    with a special token in their text, or in which the answer does not follow the prompt, as text or after
    tokenizing it on its own.
    """
    import numpy as np

    if not pairs:
        return []
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    users = [[user_message(query)] for query, _ in pairs]
    chats = [user + [{"role": "assistant", "content": response}] for user, (_, response) in zip(users, pairs)]
    prompts = render(tokenizer, users, with_header=True)
    fulls = [full.removesuffix(header) for full in render(tokenizer, chats, with_header=False)]
    answers = [full[len(prompt) :] for prompt, full in zip(prompts, fulls)]
    samples = []
    for *texts, start, ids, alone in zip(pairs, prompts, fulls, ids_of(prompts), ids_of(fulls), ids_of(answers)):
        pair, prompt, full = texts
        usable = all(text.strip() and not any(token in text for token in special) for text in pair)
        usable = usable and full.startswith(prompt)
        if usable and ids[: len(start)].tobytes() != start.tobytes():
            whole, ids = ids, np.concatenate([start, alone])
            usable = tokenizer.decode(ids) == tokenizer.decode(whole)  # not so if it puts a space before every text
        samples.append((len(start), ids) if usable else None)
    return samples


if __name__ == "__main__":
    run_script(main)
