"""From conversations to token ids: the same in training, decoding and evaluation. Imports nothing heavy at once."""

import argparse
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path

from blockwise.cli import InputError

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)
QUESTION, ANSWER = ("question", "problem", "query"), ("answer", "response")  # names in GSM8K, MATH-500, MetaMathQA
FILE = "prompt_format.json"  # in a .pt file, and in the folders of checkpoints and adapters


@dataclass(frozen=True)
class PromptFormat:
    """How questions are put to the model besides its chat template: the same in training and in decoding."""

    wrap: str = "{query}"  # what the user's messages become; {query} is the message
    system: str = ""  # the system prompt of conversations that have none
    chat_template_kwargs: dict = field(default_factory=dict)  # options of the chat template, such as enable_thinking

    @property
    def wrap_name(self) -> str:
        """What --wrap is called that gives this text."""
        names = {METAMATH.wrap: "metamath", PLAIN.wrap: "none"}
        return names.get(self.wrap, "of a file")

    def wrapped(self, question: str) -> str:
        """The text of a user's message."""
        return self.wrap.replace("{query}", question)

    def conversation(self, messages: list[dict]) -> list[dict]:
        """The messages of users and assistant as the model gets them."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        changes = ({"content": self.wrapped(m["content"])} if m["role"] == "user" else {} for m in messages)
        return [message | change for message, change in zip(messages, changes)]

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes | str, source: str | Path) -> "PromptFormat":
        """Reads what to_json has written. source: where it lies, for the message. Raises InputError."""
        try:
            values = json.loads(content)
            right = [isinstance(values[name.name], type(getattr(cls(), name.name))) for name in fields(cls)]
        except (ValueError, LookupError, TypeError):
            right = [False]
        if not all(right) or len(values) > len(right) or "{query}" not in values["wrap"]:
            raise InputError(f"{source} is damaged; write it anew, or remove it and say --wrap.")
        return cls(**values)


PLAIN, METAMATH = PromptFormat(), PromptFormat(INSTRUCTION)


def wrap_text(wrap: str) -> str:
    """The text that --wrap names: metamath, none, or a file that has {query} in it. Raises InputError."""
    if wrap in ("metamath", "none"):
        return METAMATH.wrap if wrap == "metamath" else PromptFormat.wrap
    try:
        text = Path(wrap).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--wrap {wrap} is neither metamath nor none nor a file that can be read: {error}") from error
    if "{query}" not in text:
        raise InputError(f"--wrap {wrap}: the file must have {{query}} where the question goes.")
    return text


def add_wrap_flag(parser: argparse.ArgumentParser, default: str) -> None:
    said = f"metamath, none, or a file with {{query}}: the text around each question (default: {default})"
    parser.add_argument("--wrap", metavar="metamath|none|FILE", help=said)


def format_of(model: str, adapter: str | None, wrap: str | None, default: PromptFormat | None) -> PromptFormat | None:
    """How to ask a model: as it was trained, or with another wrap. Raises InputError.

    model: folder or hub id; adapter: folder of adapters on it, whose format counts more. wrap: see wrap_text. default:
    for a model that does not say how it was trained.
    """
    from blockwise.models import hub  # only now: it imports transformers

    found = default
    for folder in filter(None, (adapter, hub.local_folder(model))):
        file = Path(folder, FILE)
        if file.exists():
            found = PromptFormat.from_json(file.read_bytes(), file)
            break
    return found if wrap is None else replace(found, wrap=wrap)


def text_of(row: dict, names: tuple[str, ...]) -> str | None:
    """What a row has under the first of the names that is there; None if that is no text, or an empty one."""
    text = next((row[name] for name in names if name in row), None)
    return text if isinstance(text, str) and text.strip() else None


def question_and_answer(where: str, row: dict) -> tuple[str, str]:
    """The texts of a problem, which may have several names. where: for the message. Raises InputError."""
    question, answer = text_of(row, QUESTION), text_of(row, ANSWER)
    if question is None or answer is None:
        raise InputError(f"{where} needs a text as {' or '.join(QUESTION)}, and one as {' or '.join(ANSWER)}.")
    return question, answer


def render(tokenizer, chats: list, with_header: bool, options: dict | None = None) -> list[str] | str:
    """The texts of conversations by the chat template; with_header: add_generation_prompt. Raises InputError.

    options: of the chat template, see PromptFormat.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=with_header, **(options or {})
        )
    except (TemplateError, TypeError) as error:  # the second, if it adds a text to something else
        raise InputError(f"the chat template of the tokenizer cannot be rendered: {error}") from error


def prompt_ids(tokenizer, messages: list[dict], prompt_format: PromptFormat = PLAIN) -> list[int]:
    """The ids of a conversation that waits for the assistant's answer, by the chat template. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template.")
    messages = prompt_format.conversation(messages)
    text = render(tokenizer, messages, with_header=True, options=prompt_format.chat_template_kwargs)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def question_ids(tokenizer, question: str, prompt_format: PromptFormat) -> list[int]:
    """The ids of a conversation of one question; see prompt_ids."""
    return prompt_ids(tokenizer, [{"role": "user", "content": question}], prompt_format)


def extra_header(tokenizer, options: dict | None = None) -> str:
    """The assistant header that some chat templates put behind the last answer, always; '' if this one does not.

    LLaDA's template ends every conversation with one, whatever add_generation_prompt says. Found by rendering a probe:
    what follows an answer in mid-conversation is its end of turn E and the user's header U, and U also opens the
    conversation, behind at most a bos token. What follows the last answer is E, or E and the extra header, which then
    stands behind a question, too. Raises InputError for a template in which E cannot be told from the header.
    """
    opening, _, after_answer, _ = render_pieces(tokenizer, "user", "assistant", "user", options=options)
    *_, ending = render_pieces(tokenizer, "user", "assistant", options=options)
    *_, with_header = render_pieces(tokenizer, "user", "assistant", with_header=True, options=options)
    *_, after_question = render_pieces(tokenizer, "user", options=options)
    if with_header != ending:
        return ""  # this template adds a header only where add_generation_prompt wants one
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reversed(opening), reversed(after_answer)))))
    header = ending.removeprefix(after_answer[: len(after_answer) - shared])  # U is what the two share
    if not header.strip() or not after_question.endswith(header):
        return ""
    before_user = opening[: len(opening) - shared]
    if len(before_user) > 1 or before_user.isascii() and before_user:  # more than one added token, or a text
        raise InputError("the chat template does not show where an answer ends; use a tokenizer with another template.")
    for token, placeholder in token_placeholders(tokenizer).items():
        header = header.replace(placeholder, token)
    return header


def token_placeholders(tokenizer) -> dict[str, str]:
    """{added token: one character that stands for it}, longest first: so no comparison of texts cuts a token in two."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return {token: chr(0xF0000 + i) for i, token in enumerate(added)}


def render_pieces(tokenizer, *roles: str, with_header: bool = False, options: dict | None = None) -> list[str]:
    """The rendered text before, between and after the contents of messages with these roles, with placeholders."""
    contents = [f"<probe {i}>" for i in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    text = render(tokenizer, messages, with_header, options)
    for token, placeholder in token_placeholders(tokenizer).items():
        text = text.replace(token, placeholder)
    return re.split("|".join(contents), text)
