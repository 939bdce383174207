"""Writes the training rows: a dataset of questions and answers, rendered with the model's chat template, as token ids.

    python pt.py --output MathQA_256.pt --model GSAI-ML/LLaDA-8B-Instruct --dataset meta-math/MetaMathQA --max_len 256

Output: torch.save of a list of {"prompt_len": int, "full_ids": LongTensor}. full_ids is prompt + answer + end of turn
(for LLaDA <|eot_id|>); the answer starts at prompt_len. Rows longer than max_len are dropped, never cut.
"""

import argparse
import io
import re
from itertools import chain, takewhile
from pathlib import Path

import files
from cli import InputError, run

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)


PROBES = 100  # rows on which a faster tokenizer must agree with the model's


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="MathQA_256.pt", help="file to write")
    parser.add_argument("--model", default="GSAI-ML/LLaDA-8B-Instruct", help="hub id or local folder")
    parser.add_argument("--dataset", default="meta-math/MetaMathQA", help="hub id or folder of jsonl or parquet")
    parser.add_argument("--split", default="train")
    parser.add_argument("--max_len", type=int, default=256, help="tokens; longer rows are dropped")
    parser.add_argument("--max_samples", type=int, default=20000, help="stop after so many kept rows; 0 = unlimited")
    parser.add_argument("--filter_type", default="GSM", help="skip rows whose `type` contains this text; '' = keep all")
    args = parser.parse_args()
    if args.max_len < 2 or args.max_samples < 0:
        parser.error("--max_len must be at least 2 and --max_samples at least 0")
    return args


def main():
    args = parse_args()
    if not Path(args.output).absolute().parent.is_dir() or Path(args.output).is_dir():
        raise InputError(f"--output {args.output}: it must be a file in a folder that exists.")
    import llada  # only now: a typing error in a flag is reported without waiting for it

    tokenizer = llada.load_tokenizer(args.model)
    if not tokenizer.chat_template:
        raise InputError(f"{args.model}: its tokenizer has no chat template.")
    dataset = load_rows(args.dataset, args.split, needs_type=bool(args.filter_type))
    rows, counts = encode(dataset, tokenizer, args.max_len, args.max_samples, args.filter_type)
    report = ", ".join(f"{what} {number:,}" for what, number in counts.items()) + f" (of {len(dataset):,} rows)"
    if not rows:
        raise InputError(f"--dataset {args.dataset}: nothing to write: {report}; check --filter_type and --max_len.")
    save(rows, args.output)
    print(f"{args.output}: {report}")


def save(rows, output):
    """Writes [(prompt_len, full_ids)] as a .pt file, or leaves what was there before. Raises InputError."""
    import numpy as np
    import torch

    every_id = torch.from_numpy(np.concatenate([ids for _, ids in rows]))
    full_ids = every_id.split([len(ids) for _, ids in rows])  # views: one block in the file, read in half the time
    content = io.BytesIO()
    torch.save([{"prompt_len": start, "full_ids": ids} for (start, _), ids in zip(rows, full_ids)], content)
    with files.writing(f"--output {output}"):
        files.replace(output, content.getbuffer())


def load_split(name, split, config=None):
    """A split of a hub dataset or of a local folder. Raises InputError."""
    from datasets import load_dataset
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    import llada

    unloadable = (DatasetGenerationError, DatasetNotFoundError, DataFilesNotFoundError)
    unloadable += (ValueError, OSError, LookupError, StopIteration)  # also raised, for empty files and empty names
    try:
        return load_dataset(name, config, split=split)
    except unloadable as error:
        reason = llada.reason(error.__cause__ or error)
        raise InputError(f"dataset {name!r}, split {split!r}, cannot be loaded: {reason}") from error


def load_rows(name, split, needs_type):
    """The split of a hub dataset or of a local folder, with the columns query, response and perhaps type."""
    dataset = load_split(name, split)
    for column in ["query", "response"] + ["type"] * needs_type:
        if column not in dataset.column_names:
            hint = ", which --filter_type needs (pass --filter_type '' to keep all rows)" if column == "type" else ""
            there = ", ".join(dataset.column_names)
            raise InputError(f"--dataset {name} has no column {column!r}{hint}; its columns are {there}.")
    return dataset


def encode(dataset, tokenizer, max_len, max_samples, filter_type):
    """Tokenizes rows with query, response and perhaps type, in batches, until max_samples are kept (0 = no limit).

    Returns a list of (prompt_len, full_ids as int64 array), and how many rows were kept, skipped by type, too long, and
    unusable: rows with an empty text, or that cannot be written as prompt and answer (see tokenize).
    """
    from tqdm import tqdm

    rows, header, ids_of = [], extra_header(tokenizer), encoder(tokenizer, dataset[:PROBES])
    counts = dict.fromkeys(("kept", "skipped by type", "too long", "unusable"), 0)
    with tqdm(total=len(dataset), desc="tokenizing", unit="row") as bar:
        for batch in dataset.iter(1000):
            types = batch["type"] if filter_type else [""] * len(batch["query"])
            check_texts(zip(batch["query"], batch["response"], types), first=bar.n)
            skip = [bool(filter_type) and filter_type in kind for kind in types]
            wanted = [pair for pair, no in zip(zip(batch["query"], batch["response"]), skip) if not no]
            encoded = iter(tokenize(wanted, tokenizer, header, ids_of))
            for no in skip:
                row = None if no else next(encoded)
                fate = "skipped by type" if no else "unusable" if row is None else "kept"
                fate = "too long" if fate == "kept" and len(row[1]) > max_len else fate
                counts[fate] += 1
                if fate == "kept":
                    rows.append(row)
                if len(rows) == max_samples > 0:
                    return rows, counts
            bar.update(len(skip))
    return rows, counts


def check_texts(rows, first):
    """Refuses rows with something else than texts; `first` is the number of the first of them."""
    for number, row in enumerate(rows, start=first):
        if not all(isinstance(text, str) for text in row):
            raise InputError(f"row {number} of the dataset holds something else than texts: {row!r:.200}")


def user_turn(query):
    """The message that asks a question, in training and in decoding."""
    return {"role": "user", "content": INSTRUCTION.format(query=query)}


def render(tokenizer, chats, ask):
    """The texts of conversations by the chat template; ask: add_generation_prompt. Raises InputError."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise InputError(f"the chat template of the tokenizer cannot be rendered: {error}") from error


def prompt_ids(tokenizer, messages):
    """The ids of a conversation that waits for the assistant's answer, by the chat template. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template.")
    return tokenizer(render(tokenizer, messages, ask=True), add_special_tokens=False, verbose=False)["input_ids"]


def encoder(tokenizer, sample):
    """A function of texts that gives the ids of each, an array, without any that the tokenizer adds by itself.

    It is fastokens, many times faster than the tokenizer, if that reads it and gives the same ids for the texts of
    `sample`, rows with query and response; else the tokenizer itself, and a line says so.
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

    texts = [text for text in chain(sample["query"], sample["response"]) if isinstance(text, str)] or [""]
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


def tokenize(pairs, tokenizer, header, ids_of):
    """[(query, response)] -> [(prompt_len, full_ids), or None for a row that cannot be used].

    header: what to cut from the end of a conversation, see extra_header; ids_of: see encoder. Prompt and whole
    conversation are tokenized both. Where a token reaches over the border between them, the answer is tokenized on its
    own behind the prompt's tokens: decoding, too, starts from exactly these. Unusable are rows with an empty text, with
    a special token in their text, or in which the answer does not stand behind the prompt, as text or after tokenizing
    it on its own.
    """
    import numpy as np

    if not pairs:
        return []
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    users = [[user_turn(query)] for query, _ in pairs]
    chats = [user + [{"role": "assistant", "content": response}] for user, (_, response) in zip(users, pairs)]
    prompts = render(tokenizer, users, ask=True)
    fulls = [full.removesuffix(header) for full in render(tokenizer, chats, ask=False)]
    answers = [full[len(prompt) :] for prompt, full in zip(prompts, fulls)]
    rows = []
    for *texts, start, ids, alone in zip(pairs, prompts, fulls, ids_of(prompts), ids_of(fulls), ids_of(answers)):
        pair, prompt, full = texts
        usable = all(text.strip() and not any(token in text for token in special) for text in pair)
        usable = usable and full.startswith(prompt)
        if usable and ids[: len(start)].tobytes() != start.tobytes():
            whole, ids = ids, np.concatenate([start, alone])
            usable = tokenizer.decode(ids) == tokenizer.decode(whole)  # not so if it puts a space before every text
        rows.append((len(start), ids) if usable else None)
    return rows


def extra_header(tokenizer):
    """The assistant header that some chat templates put behind the last answer, unasked; '' if this one does not.

    LLaDA's template ends every conversation with one, whatever add_generation_prompt says. Found by rendering a probe:
    what follows an answer in mid-conversation is its end of turn E and the user's header U, and U also opens the
    conversation, behind at most a bos token. What follows the last answer is E, or E and the extra header, which then
    stands behind a question, too. Raises InputError for a template in which E cannot be told from the header.
    """
    opening, _, after_answer, _ = around(tokenizer, "user", "assistant", "user")
    *_, ending = around(tokenizer, "user", "assistant")
    *_, asked = around(tokenizer, "user", "assistant", ask=True)
    *_, after_question = around(tokenizer, "user")
    if asked != ending:
        return ""  # this template adds a header when it is asked to, and only then
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reversed(opening), reversed(after_answer)))))
    header = ending.removeprefix(after_answer[: len(after_answer) - shared])  # U is what the two share
    if not header.strip() or not after_question.endswith(header):
        return ""
    before_user = opening[: len(opening) - shared]
    if len(before_user) > 1 or before_user.isascii() and before_user:  # more than one added token, or a text
        raise InputError("the chat template does not show where an answer ends; use a tokenizer with another template.")
    for token, letter in letters(tokenizer).items():
        header = header.replace(letter, token)
    return header


def letters(tokenizer):
    """{added token: a letter that stands for it}, longest first: comparisons by letters cannot cut a token in two."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return {token: chr(0xF0000 + i) for i, token in enumerate(added)}


def around(tokenizer, *roles, ask=False):
    """The rendered text before, between and after the contents of messages with these roles, in letters."""
    contents = [f"<probe {i}>" for i in range(len(roles))]
    text = render(tokenizer, [{"role": role, "content": content} for role, content in zip(roles, contents)], ask)
    for token, letter in letters(tokenizer).items():
        text = text.replace(token, letter)
    return re.split("|".join(contents), text)


if __name__ == "__main__":
    run(main)
