"""From conversations to token ids by the chat template: the same in training, decoding and evaluation."""

import re
from itertools import takewhile

from blockwise.cli import InputError

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)


def user_message(query: str) -> dict[str, str]:
    """The message that poses a question, in training and in decoding."""
    return {"role": "user", "content": INSTRUCTION.format(query=query)}


def render(tokenizer, chats: list, with_header: bool) -> list[str] | str:
    """The texts of conversations by the chat template; with_header: add_generation_prompt. Raises InputError."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=with_header)
    except TemplateError as error:
        raise InputError(f"the chat template of the tokenizer cannot be rendered: {error}") from error


def prompt_ids(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation that waits for the assistant's answer, by the chat template. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template.")
    return tokenizer(render(tokenizer, messages, with_header=True), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


def extra_header(tokenizer) -> str:
    """The assistant header that some chat templates put behind the last answer, always; '' if this one does not.

    LLaDA's template ends every conversation with one, whatever add_generation_prompt says. Found by rendering a probe:
    what follows an answer in mid-conversation is its end of turn E and the user's header U, and U also opens the
    conversation, behind at most a bos token. What follows the last answer is E, or E and the extra header, which then
    stands behind a question, too. Raises InputError for a template in which E cannot be told from the header.
    """
    opening, _, after_answer, _ = render_pieces(tokenizer, "user", "assistant", "user")
    *_, ending = render_pieces(tokenizer, "user", "assistant")
    *_, with_header = render_pieces(tokenizer, "user", "assistant", with_header=True)
    *_, after_question = render_pieces(tokenizer, "user")
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


def render_pieces(tokenizer, *roles: str, with_header: bool = False) -> list[str]:
    """The rendered text before, between and after the contents of messages with these roles, with placeholders."""
    contents = [f"<probe {i}>" for i in range(len(roles))]
    text = render(
        tokenizer, [{"role": role, "content": content} for role, content in zip(roles, contents)], with_header
    )
    for token, placeholder in token_placeholders(tokenizer).items():
        text = text.replace(token, placeholder)
    return re.split("|".join(contents), text)
