"""generate.py: real runs on the tiny checkpoint, and what becomes of bad input."""

import json
import shutil

import pytest
import torch
from conftest import run

from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models

SHORT = ("--gen_length", 16, "--block_length", 8, "--steps", 16)


@pytest.mark.parametrize("raw", [False, True])
def test_answers_are_those_of_decode_in_the_order_of_the_prompts(base, tokenizer, tmp_path, call, raw):
    prompts = ["Ada has 3 pens.", "Eva gets 4 more. How many shells does Eva have now?", "a", "Gus ö"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    files = ("--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch_size", 3)
    code, _, err = call("--model", base, *files, *SHORT, *["--raw"] * raw)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = models.load_model(base, torch.float32).eval()
    for prompt, row in zip(prompts, rows, strict=True):
        turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n" + prompt
        turn += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ids, _ = decode.decode(model, [tokenizer(prompt if raw else turn)["input_ids"]], Settings(16, 8, 16))
        assert row["prompt"] == prompt and row["token_ids"] == ids[0].tolist()
        assert row["completion"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("raw", [False, True])
def test_gaps_are_filled_in(base, tokenizer, tmp_path, call, raw):
    answers = ["Eva has [MASK:3] shells, Gus [MASK:2][MASK:1].", "[MASK:5] and ö"]
    rows = [{"prompt": "Who has what?", "infill": answer} for answer in answers]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = call("--model", base, *files, *SHORT, *["--raw"] * raw)
    assert code == 0, err
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = models.load_model(base, torch.float32).eval()
    turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWho has what?"
    turn += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    prompt = tokenizer("Who has what?" if raw else turn)["input_ids"]
    pieces = [["Eva has ", 3, " shells, Gus ", 2, 1, "."], [5, " and ö"]]
    for row, parts in zip(written, pieces, strict=True):
        ids, places = [], []
        for part in parts:
            places += [slice(len(ids), len(ids) + part)] if isinstance(part, int) else []
            ids += [4] * part if isinstance(part, int) else tokenizer(part)["input_ids"]
        (filled,) = decode.infill(model, [prompt + ids], Settings(16, 8, 16))
        assert row["token_ids"] == filled[len(prompt) :] and 4 not in row["token_ids"]
        assert row["filled"] == [
            tokenizer.decode(row["token_ids"][place], skip_special_tokens=True) for place in places
        ]
    code, out, err = call(
        "--model", base, "--prompt", "Who has what?", "--infill", answers[0], *SHORT, *["--raw"] * raw
    )
    assert code == 0 and out == written[0]["completion"] + "\n", err


@pytest.mark.parametrize("gaps", ["no gap", "one of no token: [MASK:0]"])
def test_answers_without_gaps_are_refused(base, call, gaps):
    code, out, err = call("--model", base, "--prompt", "Who?", "--infill", gaps, *SHORT)
    assert code == 1 and "has no gap such as [MASK:12], or one of no token" in err and not out


def test_with_an_adapter_answers_are_those_of_base_and_adapters(base, adapter, adapted, tokenizer, tmp_path, call):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Ada has 3 pens."}\n{"prompt": "Gus ö"}\n')
    files = ("--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--raw")
    code, _, err = call("--model", base, "--adapter", adapter, *files, *SHORT)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    plain, prompts = models.load_model(base, torch.float32).eval(), ["Ada has 3 pens.", "Gus ö"]
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [tokenizer(prompt)["input_ids"]]
        wanted, untuned = (decode.decode(model, ids, Settings(16, 8, 16))[0][0].tolist() for model in (adapted, plain))
        assert row["token_ids"] == wanted != untuned


def test_adapters_that_cannot_be_used_are_refused(base, adapter, tmp_path, call):
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    for folder, said in (
        (tmp_path / "missing", "adapter_config.json is missing; give the folder adapter/ of a checkpoint"),
        (base, "adapter_config.json is missing"),
        (tmp_path / "adapter", "its tensors do not fit the layers of this model; give the base it names"),
    ):
        code, out, err = call("--model", base, "--adapter", folder, "--prompt", "a", *SHORT)
        assert code == 1 and not out and f"error: --adapter {folder}: {said}" in err


def test_one_prompt_is_answered_on_the_screen(base):
    done = run("generate.py", "--model", base, "--prompt", "Ada has 3 pens.", *SHORT)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_completion_ends_where_the_answer_does(base, tokenizer):
    ends = decode.end_ids(models.load_model(base), tokenizer)
    assert ends == [1, 7]
    ids = tokenizer("3 + 4 = 7")["input_ids"]
    assert (
        decode.completion(tokenizer, [*ids, 7, *ids, 1], ends) == decode.completion(tokenizer, ids, ends) == "3 + 4 = 7"
    )


@pytest.mark.parametrize(
    "lines, said",
    [
        ("", "has no rows"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not JSON"),
        ('{"text": "a"}\n', "line 1 is not a row"),
        ('{"prompt": ""}\n', "line 1 is not a row"),
        ('{"prompt": 3}\n', "line 1 is not a row"),
        ("[]\n", "line 1 is not a JSON object"),
        ('{"prompt": "\\ud800"}\n', "line 1 is not JSON in UTF-8"),
    ],
)
def test_a_bad_prompts_file_is_refused(base, tmp_path, call, lines, said):
    (tmp_path / "in.jsonl").write_text(lines)
    output = tmp_path / "out.jsonl"
    code, _, err = call("--model", base, "--prompts", tmp_path / "in.jsonl", "--output", output, *SHORT)
    assert code == 1 and said in err and "in.jsonl" in err and not output.exists()


def test_other_bad_input_is_refused(base, tmp_path, call):
    model = ("--model", base)
    for flags, said in (
        ((*model, "--prompt", " "), "--prompt is empty"),
        ((*model, "--prompt", "a\udcff"), "--prompt is not in UTF-8"),
        ((*model, "--prompt", "a", "--seed", 2**63), "--seed 9223372036854775808 must be"),
        ((*model, "--prompts", "in", "--output", tmp_path / "no/out.jsonl"), "no is not a folder that can be written"),
        ((*model, "--prompt", "a", "--gen_length", 0), "gen_length 0 and block_length 32 must be at least 1"),
        ((*model, "--prompt", "a", "--steps", 5), "steps 5 must be at least 8, one for each block of the answer"),
        ((*model, "--prompt", "a" * 4000, "--raw"), "more than the model's 1024 positions"),
        (("--model", tmp_path, "--prompt", "a"), "tokenizer"),
        (("--model", tmp_path / "missing", "--prompt", "a"), "is not a local folder"),
        ((*model, "--prompts", tmp_path / "missing.jsonl", "--output", tmp_path / "out.jsonl"), "missing.jsonl"),
    ):
        code, _, err = call(*flags)
        assert code == 1 and said in err, (flags, err)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "out.jsonl").write_text("precious\n")
    files = ("--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = call(*model, *files, *SHORT)
    assert code == 1 and "already exists" in err and (tmp_path / "out.jsonl").read_text() == "precious\n"
