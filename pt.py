"""Writes the training samples: prompts and answers, rendered with the model's chat template, as token ids.

    python pt.py --output MathQA_256.pt --model GSAI-ML/LLaDA-8B-Instruct --dataset meta-math/MetaMathQA --max_len 256
    python pt.py --output mine.pt --dataset my_chats.jsonl --val_share 0.05

Output: torch.save of a list of {"prompt_len": int, "full_ids": LongTensor}. full_ids is prompt + answer + end of turn
(for LLaDA <|eot_id|>); the answer starts at prompt_len. Samples longer than max_len are dropped, never cut. Of a
conversation, every answer of the assistant is a sample, whose prompt is what comes before it.
The formats that are recognised are in docs/data.md.

    python pt.py --text text --dataset my_texts/ --output text.pt --model models/a2d-Qwen3-0.6B --max_len 1024

With --text, the texts of that column are written one behind the other, cut into samples of exactly max_len tokens that
have no prompt, for pre-training. --dataset may be a .txt file, too, or a folder of them, whose column is `text`.
"""

import argparse
import ast
import io
import zipfile
from contextlib import suppress
from itertools import chain
from pathlib import Path

from blockwise import formats, prompts
from blockwise.cli import InputError, run_script
from blockwise.run import files


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="MathQA_256.pt", help="file to write")
    parser.add_argument("--model", default="GSAI-ML/LLaDA-8B-Instruct", help="hub id or local folder")
    known = "json, jsonl, csv, tsv or parquet, perhaps with .gz"
    parser.add_argument("--dataset", default="meta-math/MetaMathQA", help=f"hub id, or a file or folder of {known}")
    parser.add_argument("--config", help="which configuration of a data set of the hub, such as main")
    parser.add_argument("--split", default="train")
    parser.add_argument("--max_len", type=int, default=256, help="tokens; longer samples are dropped")
    parser.add_argument("--max_samples", type=int, default=20000, help="stop after N kept samples; 0 = unlimited")
    said = "skip rows whose `type` contains this text; '' = keep all (default: GSM for MetaMathQA, else '')"
    parser.add_argument("--filter_type", help=said)
    said = "which columns hold what, if they are not recognised: prompt=a answer=b, or messages=c"
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help=said)
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="which answers of conversations")
    parser.add_argument("--system", default="", help="system prompt for conversations that have none")
    prompts.add_wrap_flag(parser, "metamath for MetaMathQA, else none")
    said = "options of the chat template, such as enable_thinking=False"
    parser.add_argument("--chat_template_kwargs", nargs="+", default=[], metavar="NAME=VALUE", help=said)
    said = "share of the rows that go to a second file, OUTPUT_val.pt, for VAL_PT"
    parser.add_argument("--val_share", type=float, default=0.0, help=said)
    parser.add_argument("--num_proc", type=int, default=1, help="processes that tokenize; the output stays the same")
    text = parser.add_argument_group("plain text, for pre-training")
    text.add_argument("--text", metavar="COLUMN", help="pack the texts of this column")
    text.add_argument("--insert_eos", action="store_true", help="write the end-of-text token behind each text")
    text.add_argument("--streaming", action="store_true", help="read the data set as a stream, without storing it")
    text.add_argument("--max_tokens", type=int, default=0, help="stop after N tokens; 0 = all of the data set")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the script with a sentence for values that cannot be; turns NAME=VALUE flags into dictionaries."""
    if args.max_len < 2 or args.max_samples < 0:
        parser.error("--max_len must be at least 2 and --max_samples at least 0")
    if args.max_tokens < 0:
        parser.error("--max_tokens must be at least 0")
    if not 0 <= args.val_share < 1 or args.num_proc < 1:
        parser.error("--val_share must be at least 0 and below 1, --num_proc at least 1")
    if (args.insert_eos or args.streaming or args.max_tokens) and not args.text:
        parser.error("--insert_eos, --streaming and --max_tokens belong to --text")
    of_answers = args.columns or args.system or args.wrap or args.chat_template_kwargs or args.val_share
    if args.text and (of_answers or args.turns == "last" or args.num_proc > 1):
        parser.error("--text knows no conversations, and neither --val_share nor --num_proc")
    for flag in ("columns", "chat_template_kwargs"):
        pairs = [pair.partition("=") for pair in getattr(args, flag)]
        if not all(name and equals and value for name, equals, value in pairs):
            parser.error(f"--{flag} takes NAME=VALUE, once or more, not {' '.join(getattr(args, flag))}")
        setattr(args, flag, {name: value for name, _, value in pairs})
    for name, value in args.chat_template_kwargs.items():
        with suppress(ValueError, SyntaxError):  # it is a text then, which needs no quotation marks
            args.chat_template_kwargs[name] = ast.literal_eval(value)


def main():
    args = parse_args()
    if not Path(args.output).absolute().parent.is_dir() or Path(args.output).is_dir():
        raise InputError(f"--output {args.output}: it must be a file in a folder that exists.")
    wrap = None if args.wrap is None else prompts.wrap_text(args.wrap)
    from blockwise.models import hub  # only now: a mistyped flag is reported without waiting for it

    tokenizer = hub.load_tokenizer(args.model)
    if args.text:
        print(pack_texts(args, tokenizer))
        return
    if not tokenizer.chat_template:
        raise InputError(f"{args.model}: its tokenizer has no chat template.")
    from blockwise.encoding import PROBES, Encoder, encode
    from blockwise.sources import load_rows

    dataset = load_rows(args.dataset, args.split, args.config)
    columns = formats.recognise(args.dataset, dataset.column_names, args.columns)
    metamath, has_type = columns == formats.METAMATH, "type" in dataset.column_names
    filter_type = args.filter_type if args.filter_type is not None else "GSM" if metamath and has_type else ""
    if filter_type and not has_type:
        have = ", ".join(dataset.column_names)
        raise InputError(f"--filter_type {filter_type}: {args.dataset} has no column 'type'; its columns are {have}.")
    if wrap is None:
        wrap = prompts.wrap_text("metamath" if metamath else "none")
    prompt_format = prompts.PromptFormat(wrap, args.system, args.chat_template_kwargs)
    print(announcement(columns, prompt_format, filter_type, recipe=args.filter_type is None))
    encoder = Encoder(tokenizer, columns, prompt_format, dataset[:PROBES], filter_type, args.turns == "last")
    found = encode(dataset, encoder, args.max_len, args.max_samples, args.num_proc)
    if not found.samples:
        what = f"--dataset {args.dataset}: nothing to write"
        raise InputError(f"{what}: {found.report(len(dataset))}; check --filter_type and --max_len.")
    write(args, found, prompt_format, len(dataset))


def announcement(
    columns: formats.Columns, prompt_format: prompts.PromptFormat, filter_type: str, recipe: bool
) -> str:  # fmt: skip
    """The line that says how the rows are read. recipe: the filter is a default."""
    parts = [f"columns {columns}", f"--wrap {prompt_format.wrap_name}"]
    if filter_type:
        why = ", as in the recipe (--filter_type '' keeps them)" if recipe else ""
        parts.append(f"rows whose type contains {filter_type} are skipped{why}")
    return "; ".join(parts)


def write(args: argparse.Namespace, found, prompt_format: prompts.PromptFormat, rows: int) -> None:
    """Writes the samples, found being an encoding.Encoded, and prints what they are. Raises InputError."""
    import numpy as np

    output, validation = Path(args.output), []
    samples = found.samples
    if args.val_share:
        second = output.with_name(f"{output.stem}_val{output.suffix}")
        chosen = np.random.default_rng(0).random(rows) < args.val_share  # all answers of a row go the same way
        validation = [sample for sample, row in zip(found.samples, found.rows) if chosen[row]]
        samples = [sample for sample, row in zip(found.samples, found.rows) if not chosen[row]]
        if not samples or not validation:
            what = f"{len(samples):,} samples for training and {len(validation):,} for validation"
            raise InputError(f"--val_share {args.val_share} leaves {what}; give another share, or more rows.")
        save(validation, second, prompt_format)
    save(samples, output, prompt_format)
    print(f"{output}: {found.report(rows)}")
    if validation:
        print(f"{len(samples):,} samples are in {output}, {len(validation):,} in {second}, for VAL_PT")
    print(found.lengths_report())


def pack_texts(args: argparse.Namespace, tokenizer) -> str:
    """Writes the file of --text. Returns what it holds, in words. Raises InputError."""
    from blockwise import packing
    from blockwise.encoding import PROBES, ids_function
    from blockwise.sources import load_texts

    end = tokenizer.eos_token_id if args.insert_eos else None
    if args.insert_eos and end is None:
        raise InputError(f"--insert_eos: the tokenizer of {args.model} has no end-of-text token.")
    texts = load_texts(args.dataset, args.split, args.text, args.streaming)
    first = next(texts, [])
    ids = packing.token_ids(chain([first], texts), ids_function(tokenizer, first[:PROBES]), end, args.max_tokens)
    packed = packing.write(args.output, ids, args.max_len)
    size = f"{packed.samples:,} samples of {args.max_len:,} tokens, without prompt"
    return f"{args.output}: {size}; {packed.left_over:,} tokens at the end were too few for another"


def save(samples: list, output: str | Path, prompt_format: prompts.PromptFormat) -> None:
    """Writes [(prompt_len, full_ids)] as a .pt file, or leaves what was there before. Raises InputError.

    The prompt format is a file of its own in the zip archive that torch.save makes; torch.load takes no notice of it.
    """
    import numpy as np
    import torch

    every_id = torch.from_numpy(np.concatenate([ids for _, ids in samples]))
    full_ids = every_id.split([len(ids) for _, ids in samples])  # views: one block in the file, read in half the time
    content = io.BytesIO()
    torch.save([{"prompt_len": start, "full_ids": ids} for (start, _), ids in zip(samples, full_ids)], content)
    with zipfile.ZipFile(content, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{prompts.FILE}"), prompt_format.to_json())  # without the time
    with files.writing(f"--output {output}"):
        files.replace(output, content.getbuffer())


if __name__ == "__main__":
    run_script(main)
