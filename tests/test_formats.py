"""pt.py on data as it comes: formats of rows and files, conversations, unusable rows, a second file for validation."""

import copy
import gzip
import json
import re
import shlex
import subprocess

import datasets
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwise import encoding, formats
from blockwise.prompts import PLAIN, PromptFormat

SCRIPT = "pt"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """datasets keeps what it has read in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def turn(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def chat(*turns):
    """A conversation in LLaDA's template: texts of user and assistant in turn, ("system", text) as it is."""
    pairs, roles = [], ["user", "assistant"]
    for part in turns:
        pairs.append(part if isinstance(part, tuple) else (roles[sum(r != "system" for r, _ in pairs) % 2], part))
    return "<|startoftext|>" + "".join(turn(role, text) for role, text in pairs)


HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def sample(*turns):
    """The texts of prompt and answer of the sample that trains the last of these turns."""
    return chat(*turns[:-1]) + HEADER, turns[-1] + "<|eot_id|>"


def texts(file, tokenizer):
    """The prompts and answers in a .pt file."""
    entries = torch.load(file, weights_only=True)
    assert all(set(entry) == {"prompt_len", "full_ids"} for entry in entries)
    ids = [(entry["full_ids"][: entry["prompt_len"]], entry["full_ids"][entry["prompt_len"] :]) for entry in entries]
    return [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in ids]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def message(role, content, **more):
    return {"role": role, "content": content} | more


TWO = [sample("What is 1?", "One."), sample("What is 1?", "One.", "And 2?", "Two.")]
MESSAGES = [message("user", "What is 1?"), message("assistant", "One."), message("user", "And 2?")]
MESSAGES += [message("assistant", "Two.")]
PARTS = [{"type": "text", "text": "What "}, {"type": "text", "value": "is 1?"}]
# rows of one conversation, further flags, the columns that are announced, the samples
FORMATS = {
    "messages": ({"messages": MESSAGES, "id": 3}, (), "messages=messages", TWO),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What is 1?"}, {"from": "gpt", "value": "One."}]},
        (), "messages=conversations", TWO[:1]),
    "parts of text": ({"messages": [message("user", PARTS), message("assistant", ["One", "."])]}, (),
                      "messages=messages", TWO[:1]),
    "a system prompt": ({"messages": [message("system", "Be brief."), *MESSAGES[:2]]}, (), "messages=messages",
                        [sample(("system", "Be brief."), "What is 1?", "One.")]),
    "--system": ({"messages": MESSAGES}, ("--system", "Be brief.", "--turns", "last"), "messages=messages",
                 [sample(("system", "Be brief."), "What is 1?", "One.", "And 2?", "Two.")]),
    "--system is for rows without one": (
        {"messages": [message("system", "Be nice."), *MESSAGES[:2]]}, ("--system", "Be brief."), "messages=messages",
        [sample(("system", "Be nice."), "What is 1?", "One.")]),
    "another role": ({"messages": [MESSAGES[0], message("tool", "1"), MESSAGES[1]]}, (), "messages=messages",
                     [(chat("What is 1?") + turn("tool", "1") + HEADER, "One.<|eot_id|>")]),
    "--turns last": ({"messages": MESSAGES}, ("--turns", "last"), "messages=messages", TWO[1:]),
    "prompt and completion": ({"prompt": "What is 1?", "completion": "One."}, (), "prompt=prompt, answer=completion",
                              TWO[:1]),
    "prompt and completion as messages": (
        {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, (), "prompt=prompt, answer=completion", TWO[1:]),
    "Alpaca": ({"instruction": "Add.", "input": "1 + 1", "output": "2"}, (),
               "prompt=instruction, input=input, answer=output", [sample("Add.\n\n1 + 1", "2")]),
    "Alpaca without input": ({"instruction": "Add 1 + 1.", "input": "", "output": "2"}, (),
                             "prompt=instruction, input=input, answer=output", [sample("Add 1 + 1.", "2")]),
    "query and response": ({"query": "What is 1?", "response": "One."}, ("--wrap", "none"),
                           "prompt=query, answer=response", TWO[:1]),
    "question and answer": ({"question": "What is 1?", "answer": "One."}, (), "prompt=question, answer=answer",
                            TWO[:1]),
    "problem and solution": ({"problem": "What is 1?", "solution": "One.", "answer": "1"}, (),
                             "prompt=problem, answer=solution", TWO[:1]),
    "--columns": ({"prompt": "no", "completion": "no", "q": "What is 1?", "a": "One."},
                  ("--columns", "prompt=q", "answer=a"), "prompt=q, answer=a", TWO[:1]),
    "--columns of messages": ({"dialog": MESSAGES[:2]}, ("--columns", "messages=dialog"), "messages=dialog", TWO[:1]),
    "a column with system prompts": ({"question": "What is 1?", "answer": "One.", "system": "Be brief."}, (),
                                     "prompt=question, answer=answer, system=system",
                                     [sample(("system", "Be brief."), "What is 1?", "One.")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(call, base, tokenizer, tmp_path, name):
    row, flags, columns, wanted = FORMATS[name]
    data, output = write(tmp_path / "rows.jsonl", [row, row]), tmp_path / "out.pt"
    code, out, err = call("--model", base, "--dataset", data, "--output", output, *flags)
    assert code == 0, err
    assert out.splitlines()[0] == f"columns {columns}; --wrap none"
    assert texts(output, tokenizer) == wanted * 2
    assert f"kept {2 * len(wanted)}, skipped by type 0, too long 0, unusable 0 (of 2 rows)\n" in out


def as_csv(separator):
    return lambda rows: pd.DataFrame(rows).to_csv(sep=separator, index=False).encode()


def as_parquet(rows):
    return pd.DataFrame(rows).to_parquet(index=False)


FILES = {
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "rows.jsonl.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    "rows.csv": as_csv(","),
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(",")(rows)),
    "rows.tsv": as_csv("\t"),
    "rows.parquet": as_parquet,
    "folder/train.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "folder/train.jsonl.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    "folder/train.csv": as_csv(","),
    "folder/train.tsv": as_csv("\t"),
    "folder/train.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_files(call, base, tokenizer, tmp_path, name):
    """What looks like a number, or like a missing value, in a table of texts stays the text that it is."""
    rows = [{"question": "007, or 7?", "answer": "007"}, {"question": 'A "quoted"\nline', "answer": "NA"}]
    file, output = tmp_path / name, tmp_path / "out.pt"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(FILES[name](rows))
    source = file.parent if "/" in name else file
    code, _, err = call("--model", base, "--dataset", source, "--output", output)
    assert code == 0, err
    assert texts(output, tokenizer) == [sample(row["question"], row["answer"]) for row in rows]


def test_unusable_rows_are_counted_by_reason(call, base, tokenizer, tmp_path):
    good = [message("user", "a"), message("assistant", "b")]
    rows = [
        {"messages": good},
        {"messages": None},
        {"messages": []},
        {"messages": "a"},
        {"messages": [message("user", "a")]},
        {"messages": [message("user", None), message("assistant", "b")]},
        {"messages": [message("user", 3), message("assistant", "b")]},
        {"messages": [message("user", [{"type": "image", "image": "x"}]), message("assistant", "b")]},
        {"messages": [message("user", "a"), message("assistant", " \n")]},
        {"messages": [{"content": "a"}, message("assistant", "b")]},
        {"messages": [message("user", "a<|eot_id|>"), message("assistant", "b")]},
        {"messages": good},
    ]
    data, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.pt"
    code, out, err = call("--model", base, "--dataset", data, "--output", output)
    assert code == 0, err
    assert texts(output, tokenizer) == [sample("a", "b")] * 2
    assert "kept 2, skipped by type 0, too long 0, unusable 10 (of 12 rows); unusable are 2 without messages, " in out
    reasons = {"1 not a list of messages", "1 without an assistant's message", "1 null", "2 not a text", "1 empty"}
    reasons |= {"1 a message without role", "1 with a special token"}
    assert reasons <= set(out.split("unusable are ")[1].splitlines()[0].split(", "))


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}"
    "{% if no_thoughts is defined and no_thoughts %}{{ '(none) ' }}{% endif %}{% endif %}"
)


def test_a_conversation_that_the_template_refuses_is_unusable_and_its_neighbours_are_not(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = STRICT
    good, bad = MESSAGES[:2], [message("system", "Be brief."), *MESSAGES[:2]]
    encoder = encoding.Encoder(tokenizer, formats.Columns(messages="m"), PLAIN, {"m": [good]})
    (first,), (second,), (third,) = encoder({"m": [good, bad, good]})
    assert second == ("refused by the chat template", None)
    for why, (start, ids) in (first, third):
        assert not why and tokenizer.decode(ids) == "user: What is 1?\nassistant: One.\n"
        assert tokenizer.decode(ids[start:]) == "One.\n"


def test_options_of_the_chat_template(call, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    none = "('(none) ' if m['role'] == 'assistant' and no_thoughts is defined and no_thoughts else '')"
    tokenizer.chat_template = STRICT.replace("m['content'] +", f"{none} + m['content'] +")
    tokenizer.save_pretrained(tmp_path / "model")
    data, output = write(tmp_path / "rows.jsonl", [{"messages": MESSAGES[:2]}]), tmp_path / "out.pt"
    flags = ("--model", tmp_path / "model", "--dataset", data, "--output", output)
    for options, prompt in ((), "assistant: "), (("--chat_template_kwargs", "no_thoughts=True"), "assistant: (none) "):
        assert call(*flags, *options)[0] == 0
        assert texts(output, tokenizer)[0][0].endswith(prompt)
        assert "".join(texts(output, tokenizer)[0]) == f"user: What is 1?\n{prompt}One.\n"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab 1", max_size=5), st.text("cd 2", max_size=5)), min_size=1, max_size=4), st.booleans()
)
def test_every_answer_of_a_conversation_is_a_sample_behind_exactly_what_precedes_it(tokenizer, turns, only_last):
    """Against LLaDA's template, written out."""
    turns = [(f"q{question}?", f"a{answer}.") for question, answer in turns]
    messages = [message(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair)]
    encoder = encoding.Encoder(tokenizer, formats.Columns(messages="m"), PLAIN, {"m": [messages]}, "", only_last)
    (outcomes,) = encoder({"m": [messages]})
    flat = [text for pair in turns for text in pair]
    wanted = [sample(*flat[:end]) for end in range(2, len(flat) + 1, 2)]
    wanted = wanted[-1:] if only_last else wanted
    assert [(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])) for _, (start, ids) in outcomes] == wanted


@pytest.fixture
def conversations(tmp_path):
    """60 conversations of one to three answers, of which no two are the same."""
    rows = []
    for number in range(60):
        pairs = [(f"What is {number} + {k}?", f"It is {number + k}.") for k in range(1 + number % 3)]
        rows.append({"messages": [message(r, t) for pair in pairs for r, t in zip(("user", "assistant"), pair)]})
    return write(tmp_path / "chats.jsonl", rows)


def test_val_share(call, base, tokenizer, conversations, tmp_path):
    """The two files together are what one is without it, and no conversation is in both; a second run is the same."""
    output = tmp_path / "out.pt"
    flags = ("--model", base, "--dataset", conversations, "--output", output)
    assert call(*flags)[0] == 0
    whole, alone = texts(output, tokenizer), output.read_bytes()
    code, out, _ = call(*flags, "--val_share", 0.25)
    assert code == 0
    training, validation = texts(output, tokenizer), texts(tmp_path / "out_val.pt", tokenizer)
    assert sorted(training + validation) == sorted(whole) and len(whole) == 120
    first = [{prompt.split("<|eot_id|>")[0] for prompt, _ in part} for part in (training, validation)]
    assert len(first[0] | first[1]) == 60 and not first[0] & first[1]
    assert 5 <= len(first[1]) <= 25  # of 60 at a share of 0.25: 15, standard deviation 3.4
    assert f"{len(training)} samples are in {output}, {len(validation)} in {tmp_path / 'out_val.pt'}, for VAL_PT" in out
    written = [file.read_bytes() for file in (output, tmp_path / "out_val.pt")]
    assert call(*flags, "--val_share", 0.25)[0] == 0
    assert written == [file.read_bytes() for file in (output, tmp_path / "out_val.pt")] and written[0] != alone
    code, _, err = call(*flags, "--val_share", 1e-9)
    assert code == 1 and "--val_share" in err and [output.read_bytes()] == written[:1]


def test_num_proc_changes_nothing(call, base, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 10)  # in this process; the workers have their own
    rows = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(2500)]
    data, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.pt"
    flags = ("--model", base, "--dataset", data, "--output", output, "--max_samples", 2100)
    assert call(*flags)[0] == 0
    alone = output.read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code, out, _ = call(*flags, "--num_proc", 2)
    assert code == 0 and "kept 2,100," in out
    assert output.read_bytes() == alone


def test_lengths(call, base, conversations, tmp_path):
    """Percentiles over all samples that could be used, kept or too long: a literal count."""
    flags = ("--model", base, "--dataset", conversations, "--output", tmp_path / "out.pt", "--max_samples", 0)
    assert call(*flags, "--max_len", 10_000)[0] == 0
    lengths = [len(entry["full_ids"]) for entry in torch.load(tmp_path / "out.pt", weights_only=True)]
    limit = sorted(lengths)[40]
    code, out, _ = call(*flags, "--max_len", limit)
    within = [sum(x <= n for x in lengths) for n in range(10_000)]
    said = [next(n for n in range(10_000) if within[n] >= p / 100 * 120) for p in (50, 90, 95, 99)]
    assert code == 0 and len(lengths) == 120 and f"too long {120 - within[limit]}," in out and within[limit] < 120
    wanted = "lengths in tokens: 50 % {}, 90 % {}, 95 % {}, 99 % {}; 95 % of the samples would need --max_len {}"
    assert out.splitlines()[-1] == wanted.format(*said, said[2])


def test_calls_of_tools_and_null_keys():
    """Tables give each message the keys of all others; what is null goes, and a call without a text stays."""
    calls = [{"id": "1", "function": {"name": "add", "arguments": {"a": 1, "city": None}}}]
    row = [
        message("user", "1 + 1?", tool_calls=None, name=None),
        message("assistant", None, tool_calls=calls),
        message("tool", "2", tool_calls=None),
        message("assistant", "2", tool_calls=None),
    ]
    messages, first = formats.conversation({"m": row}, formats.Columns(messages="m"))
    bare = [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert messages == [
        message("user", "1 + 1?"), message("assistant", "", tool_calls=bare), message("tool", "2"),
        message("assistant", "2"),
    ]  # fmt: skip
    assert formats.answers(messages, first, only_last=False) == [1, 3]


LATIN = "caf\xe9".encode("latin-1")
BAD = {
    "Latin-1 jsonl": ("r.jsonl", b'{"question": "' + LATIN + b'", "answer": "a"}\n', (), ("UTF-8", "iconv")),
    "Latin-1 csv": ("r.csv", b"question,answer\n" + LATIN + b",a\n", (), ("UTF-8", "iconv")),
    "Latin-1 name of a column": ("r.csv", b"question," + LATIN + b"\na,b\n", (), ("UTF-8", "iconv")),
    "no such kind": ("r.xlsx", b"x", (), (".jsonl", ".csv")),
    "empty csv": ("r.csv", b"", (), ("r.csv",)),
    "ragged csv": ("r.csv", b"question,answer\na,b,c,d\ne,f\ng,h,i,j,k\n", (), ("r.csv",)),
    "unknown columns": ("r.jsonl", b'{"x": "a", "y": "b"}\n', (), ("x, y", "--columns prompt=NAME")),
    "no such column": ("r.jsonl", b'{"x": "a"}\n', ("--columns", "prompt=z", "answer=x"), ("prompt=z", "x")),
    "no such part": ("r.jsonl", b'{"x": "a"}\n', ("--columns", "text=x"), ("text=x", "prompt")),
    "half of the columns": ("r.jsonl", b'{"x": "a"}\n', ("--columns", "prompt=x"), ("--columns", "answer")),
    "no pair": ("r.jsonl", b'{"x": "a"}\n', ("--columns", "x"), ("NAME=VALUE",)),
    "no wrap": ("r.jsonl", b'{"question": "a", "answer": "b"}\n', ("--wrap", "alpaca"), ("--wrap alpaca", "none")),
    "share": ("r.jsonl", b'{"question": "a", "answer": "b"}\n', ("--val_share", 1.0), ("--val_share",)),
    "split of a file": ("r.jsonl", b'{"question": "a", "answer": "b"}\n', ("--split", "test"), ("'test'",)),
    "all null": ("r.jsonl", b'{"question": "a", "answer": null}\n', (), ("nothing to write", "1 null")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(call, base, tmp_path, name):
    file, content, flags, parts = BAD[name]
    (tmp_path / file).write_bytes(content)
    code, _, err = call("--model", base, "--dataset", tmp_path / file, "--output", tmp_path / "out.pt", *flags)
    assert code not in (0, None) and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert "error: " in last and all(part in last for part in parts), last
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_several_kinds_is_refused(call, base, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", [{"question": "a", "answer": "b"}])
    (tmp_path / "data" / "more.csv").write_text("question,answer\na,b\n")
    code, _, err = call("--model", base, "--dataset", tmp_path / "data", "--output", tmp_path / "out.pt")
    assert code == 1 and ".csv, .jsonl" in err


def test_wrap_of_a_file(call, base, tokenizer, tmp_path):
    """Braces and percent signs of the user's own are no placeholders."""
    (tmp_path / "wrap.txt").write_text('Solve {this}, 100 %:\n{query}\nAnswer as {"x": 1}.\n')
    data, output = write(tmp_path / "rows.jsonl", [{"question": "{query} 1?", "answer": "1"}]), tmp_path / "out.pt"
    code, out, _ = call("--model", base, "--dataset", data, "--output", output, "--wrap", tmp_path / "wrap.txt")
    assert code == 0 and "--wrap of a file" in out
    assert texts(output, tokenizer) == [sample('Solve {this}, 100 %:\n{query} 1?\nAnswer as {"x": 1}.', "1")]
    assert PromptFormat("{query}").wrapped("{query} 1?") == "{query} 1?"


def test_the_commands_of_the_page_print_its_lines(call, tmp_path, monkeypatch):
    """docs/data.md: each command on the demo's model, in a folder like the repository's."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "demo_run").mkdir()
    monkeypatch.chdir(tmp_path)
    parts = re.findall(r"^```bash\n((?:[^`].*\n)+)```\n```text\n((?:.+\n)+?)```", page, re.M)
    for commands, wanted in parts:
        said = ""
        for line in commands.splitlines():
            if line.startswith("python pt.py "):
                code, out, err = call(*shlex.split(line)[2:])
                assert code == 0, err
                said += out
            else:
                subprocess.run(["bash", "-c", line], check=True)
        assert said == wanted
    assert len(parts) == 4
