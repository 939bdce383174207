"""A conversation with a LLaDA checkpoint: every token appears where it is written, block by block.

    python chat.py --model ckpts_stagewise_sft_32_step0025

Ctrl-C stops an answer; at the prompt it ends the conversation, as the line /quit does. /reset begins a new one. Without
a terminal, as in `echo "What is 3 + 4?" | python chat.py --model FOLDER`, every other line is a question, and answers
come a block a line.
"""

import argparse
import sys
import time

from blockwise.cli import InputError, run_script
from blockwise.decoding.settings import add_flags, check_flags
from blockwise.prompts import PLAIN, add_wrap_flag, format_of, prompt_ids, wrap_text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or hub id")
    add_flags(parser)
    add_wrap_flag(parser, "as the model was trained")
    args = parser.parse_args()
    check_flags(args)
    wrap = args.wrap and wrap_text(args.wrap)
    import torch  # only now: a mistyped flag is reported without waiting for it

    from blockwise.decoding import decode
    from blockwise.run.ranks import Ranks

    sys.stdin.reconfigure(errors="replace")  # what is not UTF-8 becomes question marks
    model, tokenizer = decode.load(args.model, args.dtype, Ranks.from_environment().device, args.adapter)
    settings = decode.settings_for(args, model.config)
    ends, generator = decode.end_ids(model, tokenizer), torch.Generator(model.device).manual_seed(args.seed)
    prompt_format = format_of(args.model, args.adapter, wrap, PLAIN)
    show, messages = show_live if sys.stdout.isatty() else show_blocks, []
    talks = sys.stdin.isatty() and sys.stdout.isatty()
    if talks:
        print(f"{args.model}: blocks of {settings.block_length} tokens, {settings.gen_length} tokens for an answer.")
        print("Ctrl-C stops an answer; /reset begins a new conversation, /quit ends this one.")
    while (question := read_question()) not in (None, "/quit"):
        if question == "/reset":
            messages = []
            if talks:
                print("(This is a new conversation.)")
            continue
        try:
            asked = [*messages, {"role": "user", "content": question}]
            messages, prompt = fit(asked, model, tokenizer, settings, prompt_format)
        except InputError as error:
            print(error)
            continue
        answers = ((ids[0].tolist(), rows) for ids, rows in decode.stream(model, [prompt], settings, ends, generator))
        ids = show(answers, tokenizer, model.config.mask_token_id, ends, settings.block_length)
        messages.append({"role": "assistant", "content": decode.completion(tokenizer, ids, ends)})


def read_question() -> str | None:
    """The user's next message; None at the end of the input, and after Ctrl-C."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    try:
        while not (line := input(prompt).strip()):
            pass
        return line
    except (EOFError, KeyboardInterrupt):
        return None


def fit(messages: list, model, tokenizer, settings, prompt_format=PLAIN) -> tuple[list, list[int]]:
    """The conversation and its ids; the oldest messages go if it is too long. Raises InputError if the last one is."""
    from blockwise.decoding import decode

    while True:
        prompt = prompt_ids(tokenizer, messages, prompt_format)
        try:
            decode.make_canvas(model.config, [prompt], settings.gen_length, "cpu")
            return messages, prompt
        except InputError:
            if len(messages) == 1:
                raise
            messages = messages[2:]
            print("(The conversation is too long for the model; its oldest question is left out.)")


def show_live(answers, tokenizer, mask_id: int, ends: list[int], block_length: int) -> list[int]:
    """Draws an answer again after each step, until it is complete or Ctrl-C. Returns the ids that were written.

    answers: (ids, forward passes so far) after each step. Their speed stands under the answer.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from blockwise.decoding import decode

    ids, rows, stopped, console, began = [], 0, "", Console(highlight=False), time.perf_counter()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            for ids, rows in answers:  # noqa: B007
                lines = drawing(ids, tokenizer, mask_id, ends, block_length).wrap(console, console.width)
                live.update(Text("\n").join(lines[1 - console.height :]), refresh=True)  # what has room
        except KeyboardInterrupt:
            stopped = " (stopped)"
    seconds = time.perf_counter() - began
    console.print(drawing(ids, tokenizer, mask_id, ends, block_length).append(stopped, "dim"))
    written = [token for token in ids if token != mask_id]
    if tokens := decode.length(written, ends):
        speed = f"{tokens} tokens, {tokens / seconds:.1f} per second, {rows / tokens:.2f} forward passes per token"
        console.print(speed, style="dim")
    return written


def drawing(ids: list[int], tokenizer, mask_id: int, ends: list[int], block_length: int):
    """An unfinished answer as a rich Text: what is written, with a dot for each mask up to the end of its block."""
    from rich.text import Text

    masks = [i for i, token in enumerate(ids) if token == mask_id]
    stop = (masks[0] // block_length + 1) * block_length if masks else len(ids)
    text, run = Text(), []
    for token in ids[:stop]:
        if token in ends and not masks:
            break
        if token == mask_id:
            text.append(tokenizer.decode(run, skip_special_tokens=True)).append("·", "dim")
            run = []
        else:
            run.append(token)
    return text.append(tokenizer.decode(run, skip_special_tokens=True))


def show_blocks(answers, tokenizer, mask_id: int, ends: list[int], block_length: int) -> list[int]:
    """Prints each block of an answer as soon as it is complete, up to the end. Returns the ids of the answer.

    answers: (ids, forward passes so far) after each step.
    """
    from blockwise.decoding import decode

    shown = 0
    for ids, _ in answers:
        while shown < len(ids) and mask_id not in (block := ids[shown : shown + block_length]):
            if not any(token in ends for token in ids[:shown]):
                block = block[: decode.length(block, ends)]
                text = tokenizer.decode(block, skip_special_tokens=True).replace("\n", "⏎")
                print(f"block {shown // block_length + 1}  {text}", flush=True)
            shown += block_length
    return ids


if __name__ == "__main__":
    run_script(main)
