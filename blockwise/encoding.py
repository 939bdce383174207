"""From the rows of a data set to samples: conversations, rendered with the chat template, as token ids."""

import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import fastokens
import numpy as np

from blockwise import formats, prompts
from blockwise.cli import InputError, progress

PROBES = 100  # rows on which a faster tokenizer must agree with the model's
BATCH = 1000  # rows that are tokenized at a time
PERCENT = (50, 90, 95, 99)
REFUSED, SPECIAL, APART = "refused by the chat template", "with a special token", "not behind its prompt as text"


@dataclass
class Encoded:
    """The samples of a data set, and what became of its rows."""

    samples: list = field(default_factory=list)  # (prompt_len, full_ids as int64 array) of each
    rows: list[int] = field(default_factory=list)  # of which row each is
    counts: Counter = field(default_factory=Counter)  # samples kept and too long, rows skipped by type, both unusable
    reasons: Counter = field(default_factory=Counter)  # of those that are unusable
    lengths: list[int] = field(default_factory=list)  # tokens of the samples that are kept or too long

    def report(self, rows: int) -> str:
        """What became of how many rows and samples."""
        names = ("kept", "skipped by type", "too long", "unusable")
        counts = ", ".join(f"{name} {self.counts[name]:,}" for name in names) + f" (of {rows:,} rows)"
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.reasons.most_common())
        return f"{counts}; unusable are {reasons}" if reasons else counts

    def lengths_report(self) -> str:
        """Percentiles of the lengths: the fewest tokens that this share of the samples stays within."""
        lengths = sorted(self.lengths)
        most = {percent: lengths[math.ceil(percent / 100 * len(lengths)) - 1] for percent in PERCENT}
        parts = ", ".join(f"{percent} % {tokens:,}" for percent, tokens in most.items())
        return f"lengths in tokens: {parts}; 95 % of the samples would need --max_len {most[95]}"


def encode(dataset, encoder: "Encoder", max_len: int, max_samples: int = 0, num_proc: int = 1) -> Encoded:
    """Tokenizes the rows of a data set, in batches, until max_samples are kept (0 = no limit).

    The same for every num_proc, which is the number of processes.
    """
    found, number = Encoded(), 0
    with progress(total=len(dataset), desc="tokenizing", unit="row") as bar:
        for batch in encoded_batches(dataset, encoder, num_proc):
            for row, outcomes in enumerate(batch, start=number):
                for status, sample in outcomes:
                    if sample is not None:
                        found.lengths.append(len(sample[1]))
                        status = "too long" if len(sample[1]) > max_len else "kept"
                    elif status != "skipped by type":
                        found.reasons[status] += 1
                        status = "unusable"
                    found.counts[status] += 1
                    if status == "kept":
                        found.samples.append(sample)
                        found.rows.append(row)
                    if len(found.samples) == max_samples > 0:
                        return found
            number += len(batch)
            bar.update(len(batch))
    return found


def encoded_batches(dataset, encoder: "Encoder", num_proc: int) -> Iterator[list]:
    """What the encoder gives for each batch of rows, in their order."""
    starts = range(0, len(dataset), BATCH)
    if num_proc == 1:
        yield from (encoder(dataset[start : start + BATCH]) for start in starts)
        return
    # spawn, not fork: tokenizers have threads, which a fork would leave behind
    with multiprocessing.get_context("spawn").Pool(num_proc, start_worker, (dataset, encoder)) as pool:
        yield from pool.imap(encode_in_worker, starts)


WORK = {}  # of a worker process: dataset and encoder


def start_worker(dataset, encoder: "Encoder") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends the workers
    WORK.update(dataset=dataset, encoder=encoder)


def encode_in_worker(start: int) -> list:
    return WORK["encoder"](WORK["dataset"][start : start + BATCH])


class Encoder:
    """Makes samples of rows: conversations by their columns, then ids by the tokenizer and its chat template."""

    def __init__(
        self, tokenizer, columns: formats.Columns, prompt_format: prompts.PromptFormat, probes: dict[str, list],
        filter_type: str = "", only_last: bool = False, quiet: bool = False,
    ):  # fmt: skip
        """probes: some rows, on which a faster tokenizer is tried. filter_type: rows whose `type` contains it are
        skipped, unless it is empty. only_last: of the answers in a conversation. quiet: say nothing if the faster
        tokenizer is not used. Raises InputError for a chat template that cannot be used.
        """
        self.arguments = (tokenizer, columns, prompt_format, probes, filter_type, only_last, True)
        self.tokenizer, self.columns, self.prompt_format = tokenizer, columns, prompt_format
        self.filter_type, self.only_last = filter_type, only_last
        self.header = prompts.extra_header(tokenizer, prompt_format.chat_template_kwargs)
        self.special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        turns = [turn for row in rows_of(probes) for _, turn in self.answers(row) if turn]
        self.ids_of = ids_function(tokenizer, [message["content"] for turn in turns for message in turn], quiet)

    def __reduce__(self):  # for worker processes: the faster tokenizer cannot be sent to them
        return Encoder, self.arguments

    def __call__(self, batch: dict[str, list]) -> list[list[tuple]]:
        """For each row its outcomes: ("", sample) for an answer, or why there is none, and None."""
        rows = [self.answers(row) for row in rows_of(batch)]
        encoded = iter(self.tokenize([turn for row in rows for _, turn in row if turn]))
        return [[next(encoded) if turn else (status, None) for status, turn in row] for row in rows]

    def answers(self, row: dict) -> list[tuple[str, list[dict] | None]]:
        """The answers in a row: for each ("", the conversation up to it), or why there is none, and None."""
        try:
            if self.filter_type and not isinstance(row["type"], str):
                raise formats.Unusable("without a text as type")
            if self.filter_type and self.filter_type in row["type"]:
                return [("skipped by type", None)]
            messages, first = formats.conversation(row, self.columns)
            ends = formats.answers(messages, first, self.only_last)
        except formats.Unusable as error:
            return [(str(error), None)]
        return [("", messages[: end + 1]) for end in ends]

    def tokenize(self, turns: list[list[dict]]) -> list[tuple]:
        """Conversations that end with an answer -> ("", (prompt_len, full_ids)) of each, or why not, and None.

        Prompt and whole conversation are tokenized both. Where a token reaches over the border between them, the answer
        is tokenized on its own behind the prompt's tokens: decoding, too, starts from exactly these. Unusable are
        conversations with a special token in a text, those that the template refuses, and those in which the answer
        does not follow the prompt, as text or after tokenizing it on its own.
        """
        chats = [self.prompt_format.conversation(turn) for turn in turns]
        starts = self.render([chat[:-1] for chat in chats], with_header=True)
        fulls = [full.removesuffix(self.header) for full in self.render(chats, with_header=False)]
        tails = [full[len(start) :] for start, full in zip(starts, fulls)]
        results = []
        for turn, *texts, start, ids, alone in zip(turns, starts, fulls, *map(self.ids_of, (starts, fulls, tails))):
            prompt, full = texts
            why = "" if full and prompt else REFUSED
            if any(token in message["content"] for message in turn for token in self.special):
                why = SPECIAL
            elif not why and not full.startswith(prompt):
                why = APART
            elif not why and ids[: len(start)].tobytes() != start.tobytes():
                whole, ids = ids, np.concatenate([start, alone])
                if self.tokenizer.decode(ids) != self.tokenizer.decode(whole):
                    why = APART  # so it is if it puts a space before every text
            results.append((why, None if why else (len(start), ids)))
        return results

    def render(self, chats: list, with_header: bool) -> list[str]:
        """The texts of conversations, '' for one that the template refuses."""
        options = self.prompt_format.chat_template_kwargs
        if not chats:
            return []
        try:
            return prompts.render(self.tokenizer, chats, with_header, options)
        except InputError:
            if len(chats) == 1:
                return [""]
        return [text for chat in chats for text in self.render([chat], with_header)]


def rows_of(batch: dict[str, list]) -> Iterator[dict]:
    """The rows of a batch of columns."""
    return (dict(zip(batch, values)) for values in zip(*batch.values()))


def ids_function(tokenizer, texts: list[str], quiet: bool = False) -> Callable[[list[str]], list[np.ndarray]]:
    """A function of texts that gives the ids of each, an array, without any that the tokenizer adds by itself.

    It is fastokens, many times faster than the tokenizer, if that reads it and gives the same ids for these texts; else
    the tokenizer itself, and a line says so unless `quiet`.
    """

    def by_tokenizer(texts):
        lists = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in lists]

    def by_fastokens(texts):
        ids, borders = fast.encode_batch_flat(texts)
        ids, borders = np.frombuffer(ids, np.uint32).astype(np.int64), np.frombuffer(borders, np.uint64).tolist()
        return [ids[start:end] for start, end in zip(borders, borders[1:])]

    texts = texts or [""]
    try:
        fast = fastokens.Tokenizer.from_json_str(tokenizer.backend_tokenizer.to_str())
    except (AttributeError, ValueError) as error:  # no backend: a tokenizer in Python
        why = f"cannot read it ({error})"
    else:
        if all(map(np.array_equal, by_fastokens(texts), by_tokenizer(texts))):
            return by_fastokens
        why = "gives other ids"
    if not quiet:
        print(f"note: tokenizing with the model's own tokenizer, which is slower, as fastokens {why}.")
    return by_tokenizer
