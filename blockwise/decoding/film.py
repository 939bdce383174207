"""The film of an answer: which step wrote which token, how sure the model was, and a web page that shows it.

Committed tokens stay, so that a film is one entry for each token, whatever the number of steps. The page is one file
that needs no network: film.html with the tokens in it, which are texts of HTML and nothing else; its script holds no
data, and without a script the finished answer is seen.
"""

from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from textwrap import shorten

import torch

from blockwise.decoding import decode
from blockwise.decoding.settings import Settings

TEMPLATE = Path(__file__).with_name("film.html")
LEVELS = (0.5, 0.75, 0.9, 0.99)  # confidences at which the colour changes
LETTERS = {" ": "\N{OPEN BOX}", "\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}  # as they are shown
AFTER_END = "\N{END OF PROOF}"  # stands for a special token behind the end, of which there may be hundreds
SIZES, PLAIN = ("gen_length", "block_length", "steps"), asdict(Settings())  # settings that are always said; defaults


@dataclass
class Token:
    """A token of an answer, and how it came there."""

    id: int
    step: int  # the forward pass after which it stood there, from 1; 0: it was given
    confidence: float | None  # its probability in that pass; None if no pass wrote it


@dataclass
class Film:
    """An answer to one prompt, token by token."""

    tokens: list[Token]
    before: int  # tokens of the first block that stand before the answer

    @property
    def steps(self) -> int:
        return max(token.step for token in self.tokens)


def record(
    model, prompt: list[int], settings: Settings, end_ids: list[int] = (), generator: torch.Generator | None = None,
    gaps: list[int] | None = None,
) -> Film:  # fmt: skip
    """Answers a prompt, a list of ids, as decode.decode does; tokens and draws are the same.

    gaps: an answer with masks, which are filled in as decode.infill does. Raises InputError.
    """
    step, written = 0, {}

    def watch(start, logits, old, new):  # (1, K, V), (1, K), (1, K)
        nonlocal step
        step += 1
        probability = logits[0].softmax(dim=-1).gather(-1, new[0, :, None])[:, 0]  # (K,)
        for i in (new != old)[0].nonzero()[:, 0].tolist():
            written[start + i - len(prompt)] = step, probability[i].item()

    if gaps is None:
        (ids,) = decode.decode(model, [prompt], settings, end_ids, generator, watch)[0].tolist()
        before = len(prompt) % settings.block_length if decode.blocks_from_sample(model.config) else 0
        rest = step, None  # with stop_at_end: what is behind the end, without a pass
    else:
        ids = decode.infill(model, [prompt + gaps], settings, generator, watch)[0][len(prompt) :]
        before, rest = len(prompt) % settings.block_length, (0, None)
    return Film([Token(token, *written.get(i, rest)) for i, token in enumerate(ids)], before)


def page(film: Film, tokenizer, end_ids: list[int], settings: Settings, prompt: str, model: str) -> str:
    """The page of a film. prompt: the text that was asked; model: the name of what answered."""
    blocks = {}  # {number: its tokens in HTML}
    end = decode.length([token.id for token in film.tokens], end_ids)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | {*end_ids}
    for i, token in enumerate(film.tokens):
        number = (film.before + i) // settings.block_length + 1
        blocks[number] = blocks.get(number, "") + box(token, tokenizer, token.id in special, i >= end)
    parts = [
        f'<div class="block"><span class="number">block {number}</span>{part}</div>' for number, part in blocks.items()
    ]
    said = {name: value for name, value in asdict(settings).items() if name in SIZES or value != PLAIN[name]}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(shorten(f"{model}: {prompt}", 80, placeholder=" ...")),
        prompt=escape(prompt.strip() or "(no prompt)"),
        model=escape(model),
        settings=escape(", ".join(f"{name} {value}" for name, value in said.items())),
        legend=legend(film),
        blocks="\n".join(parts),
        steps=film.steps,
    )


def box(token: Token, tokenizer, special: bool, after_end: bool) -> str:
    """A token in HTML: a box with its text, and a new line behind it if there is one in the text."""
    text = tokenizer.decode([token.id]) or str(tokenizer.convert_ids_to_tokens(token.id))
    kinds = ["t", colour(token), *["dim"] * (special or after_end)]
    said = "not written by a step" if token.confidence is None else f"step {token.step}, {token.confidence:.1%}"
    shown = AFTER_END if special and after_end else letters(text)
    content = f'<span class="{" ".join(kinds)}" data-step="{token.step}" title="{escape(text)}: {said}">'
    return f"{content}{escape(shown)}</span>" + "<br>" * ("\n" in text and not after_end)


def colour(token: Token) -> str:
    """The class of a token's box: its level of confidence, or that it has none."""
    return "none" if token.confidence is None else f"level{sum(token.confidence >= level for level in LEVELS)}"


def letters(text: str) -> str:
    """The text of a token, with signs for what would not be seen: new lines, tabs, and spaces that stand alone."""
    seen = "".join(LETTERS.get(letter, letter) for letter in text) if text.isspace() else text
    seen = "".join(LETTERS[letter] if letter in "\n\t" else letter for letter in seen)
    return "".join(chr(0x2400 + ord(letter)) if ord(letter) < 32 else letter for letter in seen)


def legend(film: Film) -> str:
    """What the colours mean, in HTML."""
    edges = [f"{level:.0%}" for level in LEVELS]
    names = [f"below {edges[0]}", *(f"from {edge}" for edge in edges)]
    entries = [(f"level{number}", name) for number, name in enumerate(names)]
    if any(token.confidence is None for token in film.tokens):
        entries.append(("none", "not written by a step"))
    boxes = [f'<span class="t {kind}">{name}</span>' for kind, name in entries]
    return " ".join(['<span class="t mask">masked</span>', *boxes])
