"""The formats of data sets: which columns hold what, and a row as a conversation. Imports nothing heavy.

A conversation is a list of messages, {"role": ..., "content": text, ...}, as chat templates take them.
"""

from dataclasses import dataclass, fields

from blockwise.cli import InputError

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; others stay as they are


class Unusable(ValueError):
    """A row or an answer that cannot become a sample. The message is the reason, as it is counted."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold whole conversations, or else prompts and answers."""

    messages: str = ""
    prompt: str = ""
    input: str = ""  # what the prompt is about; in a row it may be empty
    answer: str = ""
    system: str = ""  # a system prompt; in a row it may be empty

    def __str__(self):
        return ", ".join(f"{field.name}={name}" for field in fields(self) if (name := getattr(self, field.name)))


METAMATH = Columns(prompt="query", answer="response")
KNOWN = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(prompt="prompt", answer="completion"),
    Columns(prompt="instruction", answer="output"),
    METAMATH,
    Columns(prompt="question", answer="answer"),
    Columns(prompt="problem", answer="solution"),
)


def recognise(source: str, columns: list[str], named: dict[str, str]) -> Columns:
    """Which columns hold what: as the user has named them, else the first of KNOWN that is there. Raises InputError.

    source: the data set's name, for messages.
    """
    have = f"its columns are {', '.join(columns)}"
    for what, column in named.items():
        if what not in Columns.__dataclass_fields__:
            raise InputError(f"--columns {what}={column}: it must be one of {', '.join(Columns.__dataclass_fields__)}.")
        if column not in columns:
            raise InputError(f"--columns {what}={column}: {source} has no such column; {have}.")
    if named:
        if not ("messages" in named or {"prompt", "answer"} <= named.keys()):
            raise InputError("--columns must name the column of messages, or those of prompt and answer.")
        return Columns(**named)
    for known in KNOWN:
        if {known.messages or known.prompt, known.answer or known.messages} <= set(columns):
            more = {"input": "input"} if known.prompt == "instruction" else {}
            more |= {"system": "system"}
            more = {what: column for what, column in more.items() if column in columns}
            return Columns(known.messages, known.prompt, answer=known.answer, **more)
    known = "; ".join(" and ".join(filter(None, (known.messages, known.prompt, known.answer))) for known in KNOWN)
    raise InputError(
        f"--dataset {source}: {have}, none of the known formats ({known}). Say what they hold: "
        "--columns prompt=NAME answer=NAME, or --columns messages=NAME."
    )


def conversation(row: dict, columns: Columns) -> tuple[list[dict], int]:
    """A row as a conversation, and the number of its first message that may be trained as an answer. Raises Unusable.

    The answers of a column of messages may all be trained; those in a prompt that is a list of messages may not.
    """
    if columns.messages:
        messages, first = messages_of(row[columns.messages], ""), 0
    else:
        prompt = row[columns.prompt]
        if columns.input and isinstance(prompt, str) and row[columns.input]:
            prompt = f"{prompt}\n\n{text_of(row[columns.input])}" if prompt.strip() else prompt
        messages = messages_of(prompt, "user")
        first = len(messages)
        messages += messages_of(row[columns.answer], "assistant")
    if columns.system and row[columns.system] and messages[0]["role"] != "system":
        messages, first = [{"role": "system", "content": text_of(row[columns.system])}, *messages], first + 1
    return messages, first


def messages_of(value: object, role: str) -> list[dict]:
    """A list of messages in OpenAI's or ShareGPT's form, or a text as the message of a role. Raises Unusable.

    role: "" if a text will not do.
    """
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return [message_of(message) for message in value]
    if not role:
        raise Unusable("without messages" if value in (None, []) else "not a list of messages")
    return [{"role": role, "content": text_of(value)}]


def message_of(message: dict) -> dict:
    """A message as chat templates take it. What else it holds, such as tool_calls, stays; null is left out."""
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise Unusable("a message without role")
    content = message.get("content", message.get("value"))
    known = ("role", "from", "content", "value")
    more = without_nulls({key: part for key, part in message.items() if key not in known})
    text = "" if content is None and "tool_calls" in more else text_of(content, may_be_empty="tool_calls" in more)
    return {"role": ROLES.get(role, role), "content": text} | more


def without_nulls(value: object) -> object:
    """A value without the keys that are null: tables give every message the keys that any of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def text_of(value: object, may_be_empty: bool = False) -> str:
    """A text, given as one or as a list of parts such as {"type": "text", "text": ...}. Raises Unusable."""
    if isinstance(value, list) and value:
        value = "".join(part_of(part) for part in value)
    if not isinstance(value, str):
        raise Unusable("null" if value is None else "not a text")
    if not value.strip() and not may_be_empty:
        raise Unusable("empty")
    return value


def part_of(part: object) -> str:
    """The text of a part of a message's content. Raises Unusable for pictures, sounds and other things."""
    if isinstance(part, dict) and part.get("type", "text") == "text":
        part = part.get("text", part.get("value"))
    if not isinstance(part, str):
        raise Unusable("not a text")
    return part


def answers(messages: list[dict], first: int, only_last: bool) -> list[int]:
    """The numbers of the messages that are trained as answers: the assistant's, from `first` on. Raises Unusable."""
    found = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if not found:
        raise Unusable("without an assistant's message")
    return found[-1:] if only_last else found
