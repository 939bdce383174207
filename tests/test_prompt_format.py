"""One prompt for training and asking: what pt.py has written is what generate.py, chat.py and eval.py ask."""

import json
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

import chat
import eval as evaluation
import generate
import pt
from blockwise import prompts
from blockwise.cli import InputError
from blockwise.data import stored_format
from blockwise.decoding.settings import Settings
from blockwise.models import base as models
from blockwise.prompts import FILE, METAMATH, PLAIN, PromptFormat, format_of

WRAP = 'Solve {this}, 100 %: {query}\nAnswer as {"x": 1}.'
OWN = PromptFormat(WRAP, "Be brief.", {"style": "long"})


def prepare(monkeypatch, base, folder, rows, *flags):
    """pt.py on rows. Returns its file."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wrap.txt").write_text(WRAP + "\n")
    argv = ["pt.py", "--model", base, "--dataset", folder / "rows.jsonl", "--output", folder / "out.pt", *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    pt.main()
    return folder / "out.pt"


def prompts_of(file):
    return [e["full_ids"][: e["prompt_len"]].tolist() for e in torch.load(file, weights_only=True)]


QUESTIONS = ["What is 1 + 1?", "{query} and 100 %?", " spaces around "]
CASES = {
    "MetaMathQA": ([{"query": q, "response": "2"} for q in QUESTIONS], ()),
    "plain": ([{"question": q, "answer": "2"} for q in QUESTIONS], ()),
    "a file, a system prompt and an option": (
        [{"question": q, "answer": "2"} for q in QUESTIONS],
        ("--wrap", "FOLDER/wrap.txt", "--system", "Be brief.", "--chat_template_kwargs", "style=long"),
    ),
    "chats": (
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "2"}]} for q in QUESTIONS],
        ("--wrap", "metamath"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_is_what_was_trained(monkeypatch, tmp_path, base, tokenizer, name):
    """Token for token, in all three scripts, once the format lies in the model's folder."""
    rows, flags = CASES[name]
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    file = prepare(monkeypatch, base, tmp_path, rows, *flags)
    trained = prompts_of(file)
    model = tmp_path / "model"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).symlink_to(path)
    (model / FILE).write_bytes(stored_format(file).to_json())

    found = format_of(str(model), None, None, PLAIN)
    assert [generate.encode(tokenizer, question, found) for question in QUESTIONS] == trained
    problems = [{"question": question} for question in QUESTIONS]
    (way,) = evaluation.ways_to_ask([str(model)], None, None)
    assert evaluation.encode(str(model), problems, Settings(32, 32, 32), way) == trained
    small = type("Model", (), {"config": models.load_config(base)})
    settings = Settings(32, 32, 32)
    asked = [chat.fit([{"role": "user", "content": q}], small, tokenizer, settings, found)[1] for q in QUESTIONS]
    assert asked == trained


def test_the_second_question_of_a_chat_is_asked_as_it_was_trained(monkeypatch, tmp_path, base, tokenizer):
    turns = ["What is 1?", "One.", "And 2?", "Two.", "And 3?", "Three."]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, turns)]
    flags = ("--wrap", tmp_path / "wrap.txt", "--system", "Be brief.")
    file = prepare(monkeypatch, base, tmp_path, [{"messages": messages}], *flags)
    small = type("Model", (), {"config": models.load_config(base)})
    found = stored_format(file)
    for number, trained in enumerate(prompts_of(file)):
        kept, asked = chat.fit(messages[: 2 * number + 1], small, tokenizer, Settings(32, 32, 32), found)
        assert asked == trained and kept == messages[: 2 * number + 1]
    assert number == 2
    assert tokenizer.decode(trained).count("Solve {this}, 100 %: ") == 3
    assert tokenizer.decode(trained).startswith(
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief."
    )


def test_the_file_is_the_list_that_it_was_and_holds_the_format(monkeypatch, tmp_path, base):
    file = prepare(monkeypatch, base, tmp_path, CASES["plain"][0], "--system", "Be brief.")
    once = file.read_bytes()
    entries = torch.load(file, weights_only=True, mmap=True)
    assert [set(entry) for entry in entries] == [{"prompt_len", "full_ids"}] * 3
    assert stored_format(file) == PromptFormat("{query}", "Be brief.", {})
    assert prepare(monkeypatch, base, tmp_path, CASES["plain"][0], "--system", "Be brief.").read_bytes() == once
    torch.save(entries, tmp_path / "older.pt")  # as earlier versions wrote it
    assert stored_format(tmp_path / "older.pt") is None
    with zipfile.ZipFile(tmp_path / "older.pt", "a") as archive:
        archive.writestr(f"older/{FILE}", '{"wrap": "no place for the question"}')
    with pytest.raises(InputError, match="older.pt"):
        stored_format(tmp_path / "older.pt")


def test_checkpoints_and_adapters_carry_it(monkeypatch, forked, tmp_path, base):
    """That of the data; if the data does not say, that of the base stays."""
    flags = ("--wrap", tmp_path / "wrap.txt", "--system", "Be brief.", "--chat_template_kwargs", "style=long")
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(16)]
    file = prepare(monkeypatch, base, tmp_path, rows, *flags)
    knobs = {"DATA_PT": file, "TOTAL_TRAIN_STEPS": 1, "MICRO_BSIZE": 4, "MAX_SAMPLES": 0}
    done = forked(tmp_path / "run", **knobs)
    assert not any(done.codes), done.output
    (checkpoint,) = (tmp_path / "run").rglob("*_step0001")
    for folder in (checkpoint, checkpoint / "adapter"):
        assert PromptFormat.from_json((folder / FILE).read_bytes(), folder) == OWN
        assert FILE in json.loads((folder / "manifest.json").read_text())["files"]
    assert format_of(str(checkpoint), None, None, None) == OWN
    assert format_of(str(base), str(checkpoint / "adapter"), None, PLAIN) == OWN
    assert format_of(str(checkpoint), None, METAMATH.wrap, None) == PromptFormat(
        METAMATH.wrap, "Be brief.", OWN.chat_template_kwargs
    )

    torch.save(torch.load(file, weights_only=True), tmp_path / "older.pt")
    done = forked(tmp_path / "further", **knobs | {"DATA_PT": tmp_path / "older.pt", "MODEL_NAME": checkpoint})
    assert not any(done.codes), done.output
    (further,) = (tmp_path / "further").rglob("*_step0001")
    assert (further / FILE).read_bytes() == (checkpoint / FILE).read_bytes()


def test_a_model_that_does_not_say_is_asked_by_eval_as_the_other_or_as_before(tmp_path, base):
    told = tmp_path / "told"
    told.mkdir()
    for path in base.iterdir():
        (told / path.name).symlink_to(path)
    (told / FILE).write_bytes(OWN.to_json())
    assert evaluation.ways_to_ask([str(base)], None, None) == [METAMATH]
    assert evaluation.ways_to_ask([str(base), str(told)], None, None) == [OWN, OWN]
    assert evaluation.ways_to_ask([str(told), str(base)], None, None) == [OWN, OWN]
    assert evaluation.ways_to_ask([str(base), str(told)], None, "{query}") == [replace(OWN, wrap="{query}")] * 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"wrap": 3, "system": "", "chat_template_kwargs": {}}',
        '{"wrap": "x", "system": "", "chat_template_kwargs": {}}',
        '{"wrap": "{query}", "system": ""}',
        '{"wrap": "{query}", "system": "", "chat_template_kwargs": {}, "more": 1}',
    ],
)
def test_damaged_files(tmp_path, content):  # fmt: skip
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match=FILE):
        format_of(str(tmp_path), None, None, PLAIN)


def test_wrap_flag(tmp_path):
    assert prompts.wrap_text("none") == "{query}" and prompts.wrap_text("metamath") == prompts.INSTRUCTION
    for name, content in (("latin.txt", b"caf\xe9 {query}"), ("plain.txt", b"no place")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"--wrap .*{name}"):
            prompts.wrap_text(str(tmp_path / name))
