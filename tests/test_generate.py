"""generate.py: real runs on the tiny checkpoint, and what becomes of bad input."""

import json

import pytest
import torch
from conftest import run

import decode
import llada
from settings import Settings

SHORT = ("--gen_length", 16, "--block_length", 8, "--steps", 16)


@pytest.mark.parametrize("raw", [False, True])
def test_answers_are_those_of_decode_in_the_order_of_the_prompts(base, tokenizer, tmp_path, call, raw):
    prompts = ["Ada has 3 pens.", "Eva gets 4 more. How many shells does Eva have now?", "a", "Gus ö"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    files = ("--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch_size", 3)
    code, _, err = call("--model", base, *files, *SHORT, *["--raw"] * raw)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = llada.load_model(base, torch.float32).eval()
    for prompt, row in zip(prompts, rows, strict=True):
        turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n" + prompt
        turn += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ids, _ = decode.decode(model, [tokenizer(prompt if raw else turn)["input_ids"]], Settings(16, 8, 16))
        assert row["prompt"] == prompt and row["token_ids"] == ids[0].tolist()
        assert row["completion"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)


def test_one_prompt_is_answered_on_the_screen(base):
    done = run("generate.py", "--model", base, "--prompt", "Ada has 3 pens.", *SHORT)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_completion_ends_where_the_answer_does(base, tokenizer):
    ends = decode.end_ids(llada.load_model(base), tokenizer)
    assert ends == [1, 7]
    ids = tokenizer("3 + 4 = 7")["input_ids"]
    assert (
        decode.completion(tokenizer, [*ids, 7, *ids, 1], ends) == decode.completion(tokenizer, ids, ends) == "3 + 4 = 7"
    )


@pytest.mark.parametrize(
    "lines, said",
    [
        ("", "has no rows"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is no JSON"),
        ('{"text": "a"}\n', "line 1 is not a row"),
        ('{"prompt": ""}\n', "line 1 is not a row"),
        ('{"prompt": 3}\n', "line 1 is not a row"),
        ("[]\n", "line 1 is no JSON object"),
        ('{"prompt": "\\ud800"}\n', "line 1 is no JSON in UTF-8"),
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
        ((*model, "--prompt", "a", "--gen_length", 30), "gen_length 30 is not a multiple of block_length 32"),
        ((*model, "--prompt", "a", "--steps", 100), "steps 100 is not a multiple of the 8 blocks"),
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
    assert code == 1 and "exists already" in err and (tmp_path / "out.jsonl").read_text() == "precious\n"
