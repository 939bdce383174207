"""Answers prompts with a LLaDA checkpoint, decoding block by block (blockwise/decoding/decode.py).

    python generate.py --model ckpts_stagewise_sft_32_step0025 --prompt "Ada has 3 pens and buys 4. How many are there?"
    python generate.py --model FOLDER --prompts in.jsonl --output out.jsonl

in.jsonl has rows {"prompt": text}, out.jsonl rows {"prompt", "completion", "token_ids"}, written as they are answered.

    python generate.py --model FOLDER --prompt "What is 3 + 4?" --infill "It is [MASK:1], because [MASK:12]."

With --infill, the answer is given with gaps, each of a number of tokens, and printed with them filled in. In in.jsonl,
it is the row's "infill"; out.jsonl then has the fillings as "filled".

    python generate.py --model FOLDER --prompt "What is 3 + 4?" --film film.html

film.html is a page that shows step by step how the answer was written.
"""

import argparse
import json
import os
import re
from pathlib import Path

from blockwise.cli import InputError, progress, read_jsonl, run_script
from blockwise.decoding.settings import add_flags, check_flags
from blockwise.prompts import PLAIN, PromptFormat, add_wrap_flag, format_of, question_ids, wrap_text
from blockwise.run import files


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="a text; its answer is printed")
    source.add_argument("--prompts", help='jsonl file with rows {"prompt": text}, and perhaps "infill": text')
    parser.add_argument(
        "--infill", help="an answer with gaps such as [MASK:12], of 12 tokens, to --prompt (default: none)"
    )
    parser.add_argument("--output", help="jsonl file to write, with --prompts; must not exist yet (default: none)")
    said = "page to write: how the answer to --prompt came about; must not exist yet (default: none)"
    parser.add_argument("--film", help=said)
    add_flags(parser)
    add_wrap_flag(parser, "as the model was trained")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts that are answered at a time (default: 16)")
    parser.add_argument(
        "--raw", action="store_true", help="no chat template: continue the text, or begin one (default: off)"
    )
    args = parser.parse_args()
    if bool(args.prompts) != bool(args.output) or args.batch_size < 1:
        parser.error("--prompts and --output belong together, and --batch_size must be at least 1")
    if args.infill is not None and args.prompts:
        parser.error('with --prompts, the answers with gaps are the "infill" of its rows')
    if args.raw and args.wrap:
        parser.error("--raw takes no --wrap")
    if args.film and args.prompts:
        parser.error("--film shows the answer to one --prompt")
    return args


def main():
    args = parse_args()
    check_flags(args)
    wrap = args.wrap and wrap_text(args.wrap)
    for flag in ("output", "film"):
        if getattr(args, flag):
            check_output(flag, Path(getattr(args, flag)))
    texts, gaps = ([args.prompt], [args.infill]) if args.prompt is not None else read_prompts(args.prompts, args.raw)
    if not texts[0].strip() and not args.raw:
        raise InputError("--prompt is empty; with --raw, an empty one lets the model begin by itself.")
    import torch  # only now: a mistyped flag is reported without waiting for it

    from blockwise.decoding import decode
    from blockwise.run.ranks import Ranks

    model, tokenizer = decode.load(args.model, args.dtype, Ranks.from_environment().device, args.adapter)
    settings = decode.settings_for(args, model.config)
    ends, generator = decode.end_ids(model, tokenizer), torch.Generator(model.device).manual_seed(args.seed)
    prompt_format = None if args.raw else format_of(args.model, args.adapter, wrap, PLAIN)
    prompts = [encode(tokenizer, text, prompt_format) for text in texts]
    if args.film:
        write_film(model, tokenizer, prompts[0], gaps[0], ends, args, settings, generator)
        return
    if gaps[0] is not None:
        fill(model, tokenizer, texts, prompts, gaps, args, settings, generator)
        return
    decode.make_canvas(model.config, prompts, settings.gen_length, "cpu")  # they fit, before the first is answered
    bar = progress(total=len(texts), desc="answering", unit="prompt", disable=not args.output)
    for start in range(0, len(texts), args.batch_size):
        some = slice(start, start + args.batch_size)
        ids, _ = decode.decode(model, prompts[some], settings, ends, generator)
        rows = [
            {"prompt": text, "completion": decode.completion(tokenizer, row, ends), "token_ids": row}
            for text, row in zip(texts[some], ids.tolist())
        ]
        write(rows, args.output)
        bar.update(len(rows))
    bar.close()


def fill(model, tokenizer, texts: list, prompts: list, gaps: list, args, settings, generator) -> None:
    """Answers with gaps: prints or writes them, filled in. Raises InputError."""
    from blockwise.decoding import decode

    answers = [with_masks(tokenizer, model.config.mask_token_id, gap) for gap in gaps]
    bar = progress(total=len(texts), desc="filling in", unit="answer", disable=not args.output)
    for start in range(0, len(texts), args.batch_size):
        some, rows = slice(start, start + args.batch_size), []
        whole = [prompt + ids for prompt, (ids, _) in zip(prompts[some], answers[some])]
        filled = decode.infill(model, whole, settings, generator)
        for text, prompt, (_, places), ids in zip(texts[some], prompts[some], answers[some], filled):
            ids = ids[len(prompt) :]
            parts = [tokenizer.decode(ids[place], skip_special_tokens=True) for place in places]
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            rows.append({"prompt": text, "completion": answer, "filled": parts, "token_ids": ids})
        write(rows, args.output)
        bar.update(len(rows))
    bar.close()


def write_film(model, tokenizer, prompt: list[int], gaps: str | None, ends: list, args, settings, generator) -> None:
    """Prints the answer to one prompt, or the one with its gaps filled in, and writes its film. Raises InputError."""
    from blockwise.decoding import decode, film

    masked = None if gaps is None else with_masks(tokenizer, model.config.mask_token_id, gaps)[0]
    shown = film.record(model, prompt, settings, ends, generator, masked)
    ends = ends if gaps is None else []  # what stands behind a gap is not behind the end
    print(decode.completion(tokenizer, [token.id for token in shown.tokens], ends))
    name = f"{args.model} + {args.adapter}" if args.adapter else args.model
    with files.writing(f"--film {args.film}"):
        page = film.page(shown, tokenizer, ends, settings, args.prompt, name)
        files.replace(args.film, page.encode(errors="replace"))  # a folder's name may be in other bytes


def with_masks(tokenizer, mask_id: int, text: str) -> tuple[list[int], list[slice]]:
    """An answer with gaps as ids, [MASK:3] as three masks, and where the gaps are. Raises InputError."""
    ids, places, parts = [], [], re.split(r"\[MASK:(\d+)\]", text)
    for number, part in enumerate(parts):
        if number % 2:
            places.append(slice(len(ids), len(ids) + int(part)))
            ids += [mask_id] * int(part)
        elif part:
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    if not places or any(place.start == place.stop for place in places):
        raise InputError(f"{text!r:.200} has no gap such as [MASK:12], or one of no token.")
    return ids, places


def check_output(flag: str, path: Path) -> None:
    """Refuses a file that already exists or cannot be made, before any work. Raises InputError."""
    if path.exists():
        raise InputError(f"--{flag} {path} already exists; remove it, or name another file.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--{flag} {path}: {path.parent} is not a folder that can be written to.")


def read_prompts(path: str, raw: bool) -> tuple[list[str], list[str | None]]:
    """The prompts of a jsonl file, and the answers with gaps, or None. Raises InputError that names the line.

    raw: a prompt may be empty.
    """
    prompts, gaps = [], []
    for number, row in read_jsonl(path):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip() and not raw:
            raise InputError(f'{path}, line {number} is not a row {{"prompt": text}} with some text.')
        gap = row.get("infill")
        if gap is not None and not isinstance(gap, str) or gaps and (gap is None) != (gaps[0] is None):
            raise InputError(f'{path}, line {number}: either all rows have an "infill", a text, or none has.')
        prompts.append(prompt)
        gaps.append(gap)
    return prompts, gaps


def encode(tokenizer, text: str, prompt_format: PromptFormat | None) -> list[int]:
    """A prompt as ids: as a question in a conversation, or as it is, if there is no prompt_format."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python keeps other bytes of a command line
        raise InputError("--prompt is not in UTF-8.")
    if not prompt_format:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return question_ids(tokenizer, text, prompt_format)


def write(rows: list, output: str | None) -> None:
    """Prints the answers of rows, or appends the rows to the output file."""
    if not output:
        for row in rows:
            print(row["completion"])
        return
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    with files.writing(f"--output {output}"):
        files.append(output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_script(main)
