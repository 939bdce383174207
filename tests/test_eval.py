"""eval.py: real runs on the tiny checkpoint, interrupted ones too, on 1 and 2 ranks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch, locked, problems, run

from blockwise import formats, prompts
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import base as models

SHORT = ("--gen_length", 16, "--block_length", 8, "--steps", 8, "--batch_size", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """22 problems, a number that no batch size divides."""
    file = tmp_path_factory.mktemp("problems") / "heldout.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in problems(22, 5)))
    return file


def answers(folder):
    """The lines of answers.jsonl without what differs from run to run: the time."""
    assert [file.name for file in folder.glob("answers*")] == ["answers.jsonl"]
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """The results of a run that nothing interrupts, as a folder, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    done = run("eval.py", "--model", base, "--data", data, "--output", output, *SHORT)
    assert done.returncode == 0, done.stderr
    return output / f"{base.name}-gsm8k", done.stdout


def test_each_line_is_what_decoding_gives(whole, base, tokenizer):
    rows, model = answers(whole[0]), models.load_model(base, torch.float32).eval()
    assert [row["problem"] for row in rows] == list(range(22))
    for row, problem in zip(rows, problems(22, 5)):
        assert (row["question"], row["gold"]) == (problem["query"], problem["response"])
        turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n" + prompts.INSTRUCTION
        turn = turn.format(query=problem["query"]) + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ids, rows_run = decode.decode(model, [tokenizer(turn)["input_ids"]], Settings(16, 8, 8))
        ids = ids[0].tolist()
        end = min([i for i, token in enumerate(ids) if token in (1, 7)], default=None)
        assert row["completion"] == tokenizer.decode(ids[:end], skip_special_tokens=True)
        assert row["tokens"] == (16 if end is None else end + 1) and row["forwards"] == rows_run == 8
        assert row["correct"] is False  # a random model
        grams = [tuple(ids[i : i + 4]) for i in range(row["tokens"] - 3)]  # the token that ends it is one of them
        assert row["rep4"] == (1 - len(set(grams)) / len(grams) if grams else 0)


def test_the_report_counts(whole, tmp_path, base, data, call):
    """On answers of which the test makes some right by hand, in both of two folders."""
    for name, right in (("a", {0, 1, 2}), ("b", {2, 3, 4, 5, 6, 7})):
        (tmp_path / name).symlink_to(base)
        args = ("--model", tmp_path / name, "--data", data, "--output", tmp_path / "out", *SHORT)
        assert call(*args)[0] == 0
        rows = answers(tmp_path / f"out/{name}-gsm8k")
        rows = [row | {"correct": row["problem"] in right, "tokens": 4, "seconds": 0.5} for row in rows]
        for row in rows:
            row |= {"rep4": 0.5 * (row["problem"] < 11), "completion": " \n" if row["problem"] in right else "a b"}
            if name == "b" and row["problem"] == 21:
                del row["rep4"]  # an earlier version has written this line
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"out/{name}-gsm8k/answers.jsonl").write_text(text)
    models = ("--compare", tmp_path / "a", tmp_path / "b")
    code, out, _ = call(*models, "--data", data, "--output", tmp_path / "out", *SHORT)
    lines = out.splitlines()
    assert code == 0 and lines[2].split()[1:] == ["22", "13.6%", "4.7%", "-", "33.3%", "8", "2.00", "25.0%", "86.4%"]
    assert lines[3].split()[1:3] == ["22", "27.3%"] and lines[3].split()[-2:] == ["-", "72.7%"]
    assert lines[1].index("rep-4") + 5 == lines[2].index("25.0%") + 5 and len(lines[1]) == len(lines[2])
    assert "gen_length 16, block_length 8, steps 8, temperature 0.0, remasking low_confidence" in out
    assert "+13.6 points" in out and "tuned model solves 5, only the base 2" in " ".join(lines) and "p = 0.45" in out


def test_right_answers_become_rows_of_pt(tmp_path, base, call):
    """Of three runs over four problems, in which the test makes some right by hand."""
    rows = problems(4, 5) * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", *SHORT)
    new = ("--right_answers", tmp_path / "right.jsonl")
    code, out, _ = call(*flags, *new)
    assert code == 0 and "0 right answers to 0 of 4 questions" in out and (tmp_path / "right.jsonl").read_text() == ""
    code, _, err = call(*flags, *new)
    said = "--right_answers belongs to --model, and must be a new file in a folder that exists"
    assert code == 2 and said in err
    elsewhere = ("--right_answers", tmp_path / "missing/right.jsonl"), ("--right_answers", tmp_path / "new.jsonl")
    assert (
        said in call(*flags, *elsewhere[0])[2] and said in call("--compare", base, base, *flags[2:], *elsewhere[1])[2]
    )

    texts = {0: "It is 7", 4: "It is 7", 8: "7\n#### 7 ö", 2: "It is 3"}  # two of the first problem are alike
    answered = answers(tmp_path / f"out/{base.name}-gsm8k")
    answered = [row | {"seconds": 1.0, "correct": row["problem"] in texts} for row in answered]
    answered = [row | {"completion": texts.get(row["problem"], "It is 1")} for row in answered]
    text = "".join(json.dumps(row) + "\n" for row in answered)
    (tmp_path / f"out/{base.name}-gsm8k/answers.jsonl").write_text(text)
    (tmp_path / "right.jsonl").unlink()
    code, out, _ = call(*flags, *new)
    assert code == 0 and f"{tmp_path}/right.jsonl: 3 right answers to 2 of 4 questions" in out
    first, third = rows[0]["query"], rows[2]["query"]
    wanted = [(first, "It is 7"), (third, "It is 3"), (first, "7\n#### 7 ö")]
    found = [json.loads(line) for line in (tmp_path / "right.jsonl").read_text().splitlines()]
    assert found == [{"question": question, "answer": answer} for question, answer in wanted]
    assert formats.recognise("right.jsonl", list(found[0]), {}) == formats.Columns(prompt="question", answer="answer")


def test_with_an_adapter_answers_are_those_of_base_and_adapters(
    whole, base, adapter, adapted, data, tokenizer, tmp_path, call
):
    """They have a folder of results of their own, which other adapters of that name do not continue."""
    flags = ("--model", base, "--adapter", adapter, "--data", data, "--output", tmp_path / "out", *SHORT)
    code, out, err = call(*flags)
    assert code == 0 and "Pass@1" in out, err
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == f"{base.name}+{adapter.parent.name}-adapter-gsm8k"
    rows = answers(folder)
    for row, untuned, problem in zip(rows, answers(whole[0]), problems(22, 5), strict=True):
        prompt = prompts.question_ids(tokenizer, problem["query"], prompts.METAMATH)
        ids, _ = decode.decode(adapted, [prompt], Settings(16, 8, 8))
        assert row["completion"] == decode.completion(tokenizer, ids[0].tolist(), [1, 7]) != untuned["completion"]
    os.utime(adapter / "adapter_config.json", ns=(0, 0))  # a copy has another time, too
    assert call(*flags)[0] == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    code, _, err = call(*flags)
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    assert code == 1 and f"the content of {base} or of its adapters has changed" in err


def test_adapters_that_cannot_be_used_are_refused(base, adapter, data, tmp_path, call):
    flags = ("--data", data, "--output", tmp_path / "out", *SHORT)
    code, _, err = call("--compare", base, base, "--adapter", adapter, *flags)
    assert code == 2 and "--adapter belongs to --model; compare a merged checkpoint, or evaluate the two" in err
    code, _, err = call("--model", base, "--adapter", tmp_path / "missing", *flags)
    assert code == 1 and f"--adapter {tmp_path / 'missing'}: adapter_config.json is missing" in err
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal
import eval
from blockwise import cli
append = eval.append
def append_and_die(path, rows):
    append(path, rows)
    if len(path.read_text().splitlines()) >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
eval.append = append_and_die
cli.run_script(eval.main)
"""


def test_a_killed_run_continues_with_the_same_result(whole, base, data, tmp_path, call):
    flags = ("--model", base, "--data", data, "--output", tmp_path, *SHORT)
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, flags)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / f"{base.name}-gsm8k"
    part = folder / "answers.rank0.jsonl"
    lines = part.read_text().splitlines()
    assert len(lines) == 8
    with open(part, "a") as file:
        file.write('{"problem": 3, "completion": "half a li')  # as if it had been killed while writing
    code, out, _ = call(*flags)
    assert code == 0 and answers(folder) == answers(whole[0])
    kept = {json.loads(line)["problem"]: line for line in lines}
    final = {json.loads(line)["problem"]: line for line in (folder / "answers.jsonl").read_text().splitlines()}
    assert all(final[i] == line for i, line in kept.items()), "finished batches were answered again"
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert call(*flags)[1] == out and {file: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps


def test_half_a_batch_is_answered_again(whole, base, data, tmp_path, call):
    flags = ("--model", base, "--data", data, "--output", tmp_path, *SHORT, "--temperature", 0.7)
    assert call(*flags)[0] == 0
    folder = tmp_path / f"{base.name}-gsm8k"
    wanted, lines = answers(folder), (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    assert wanted != answers(whole[0])
    (folder / "answers.jsonl").write_text("".join(lines[:10]))
    assert call(*flags)[0] == 0 and answers(folder) == wanted, "random draws must not depend on the interruption"


def test_two_ranks_share_the_problems_and_give_the_same(whole, base, data, tmp_path):
    done = launch(2, "eval.py", "--model", base, "--data", data, "--output", tmp_path, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert answers(tmp_path / f"{base.name}-gsm8k") == answers(whole[0])
    assert done.stdout.count("Pass@1") == 1


def test_math_and_a_limit(base, tmp_path, call):
    rows = [{"problem": f"What is {i} + 1?", "answer": f"\\frac{{{i + 1}}}{{1}}"} for i in range(5)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", base, "--data", tmp_path / "math.jsonl", "--task", "math500", "--limit", 3)
    code, out, err = call(*flags, "--output", tmp_path, *SHORT)
    assert code == 0, err
    assert len(answers(tmp_path / f"{base.name}-math500")) == 3 and "math500, gen_length 16" in out


def test_another_run_is_not_mixed_in(whole, base, data, tmp_path, call):
    flags = ("--model", base, "--data", data, "--output", whole[0].parent)
    before = {file: file.read_bytes() for file in whole[0].iterdir()}
    for more, said in (
        (("--gen_length", 16, "--block_length", 8, "--steps", 16, "--batch_size", 4), "steps was 8, now it is 16"),
        ((*SHORT, "--limit", 20), "problems was 22, now it is 20"),
        ((*SHORT, "--seed", 1), "seed was 0, now it is 1"),
    ):
        code, _, err = call(*flags, *more)
        assert code == 1 and said in err and "Name another --output" in err, err
    assert {file: file.read_bytes() for file in whole[0].iterdir()} == before


def test_a_folder_that_is_older_than_a_setting_continues(whole, base, data, tmp_path, call):
    """Settings that did not exist when it was made had their defaults; the others must be as they were."""
    folder = shutil.copytree(whole[0], tmp_path / whole[0].name)
    flags = ("--model", base, "--data", data, "--output", tmp_path, *SHORT)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings.pop("suppress_tokens") == settings.pop("begin_suppress_tokens") == []
    (folder / "settings.json").write_text(json.dumps(settings))
    code, out, err = call(*flags)
    assert code == 0 and out == whole[1], err
    code, _, err = call(*flags, "--begin_suppress_tokens", 1, 7)
    assert code == 1 and "begin_suppress_tokens was [], now it is [1, 7]" in err
    code, _, err = call(*flags, "--suppress_tokens", 400)
    assert code == 1 and "token 400 cannot be suppressed: the model has 400 tokens" in err


@pytest.mark.parametrize(
    "lines, said",
    [
        ("", "has no rows"),
        ('{"question": "a", "answer": "1"}\n{"question": ', "line 2 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"question": "a"}\n', "line 1 needs a text as question or problem or query"),
        ('{"question": " ", "answer": "1"}\n', "line 1 needs a text"),
        ('{"question": "a", "answer": 1}\n', "line 1 needs a text"),
        ('{"question": "a", "answer": "one"}\n', "line 1: nothing can be read in its answer"),
        ('{"question": "\\udfff", "answer": "1"}\n', "line 1 is not JSON in UTF-8"),
        ('{"question": "%s", "answer": "1"}\n' % ("a b " * 2000), "more than the model's 1024 positions"),
    ],
)
def test_bad_problems_are_refused(base, tmp_path, call, lines, said):
    (tmp_path / "bad.jsonl").write_text(lines)
    code, _, err = call("--model", base, "--data", tmp_path / "bad.jsonl", "--output", tmp_path / "out", *SHORT)
    assert code == 1 and said in err and len(err.strip().splitlines()[-1]) < 400, err
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_refused(base, data, tmp_path, call):
    flags = ("--data", data, "--output", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for more, said in (
        (("--model", tmp_path / "missing"), "is not a local folder"),
        (("--model", tmp_path / "empty"), "empty"),
        (("--model", base, "--gen_length", 0), "gen_length 0 and block_length 32 must be at least 1"),
        (("--compare", base, tmp_path / "missing"), "missing is not a local folder"),
    ):
        code, _, err = call(*flags, *more)
        assert code == 1 and said in err, (more, err)
    twin = tmp_path / "other" / base.name
    twin.parent.mkdir()
    twin.symlink_to(base)
    code, _, err = call(*flags, "--compare", base, twin, *SHORT)
    assert code == 1 and "both models are called" in err
    (tmp_path / "file").write_text("")
    code, _, err = call("--model", base, "--data", data, "--output", tmp_path / "file", *SHORT)
    assert code == 1 and "cannot be written" in err
    assert not (tmp_path / "out").exists()


def test_the_second_model_is_checked_before_the_first_answers(whole, base, data, tmp_path, call):
    """With the results of another run in the second folder, nothing is answered for the first."""
    (tmp_path / "tuned").symlink_to(base)
    models = ("--compare", base, tmp_path / "tuned", "--data", data, "--output", tmp_path / "out")
    (tmp_path / "out/tuned-gsm8k").mkdir(parents=True)
    (tmp_path / "out/tuned-gsm8k/settings.json").write_text('{"model": "another"}')
    code, _, err = call(*models, *SHORT)
    assert code == 1 and "tuned-gsm8k holds the results of another run: model was 'another'" in err
    assert not list(tmp_path.rglob("answers*"))


def test_another_chat_template_is_another_run(whole, base, data, tmp_path, call):
    copy = tmp_path / base.name
    shutil.copytree(base, copy)  # with the times of the files, so that the weights count as the same
    flags = ("--model", copy, "--data", data, "--output", tmp_path / "out", *SHORT)
    assert call(*flags)[0] == 0
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|start_header_id|>'", "'<|start_header_id|>the '"))
    code, _, err = call(*flags)
    assert code == 1 and "sha256 was" in err


@pytest.mark.parametrize("line", [b'{"problem": 3}', b"[1]", b'{"problem": 3, "completion": "\xc3', b"LIST"])
def test_a_damaged_line_is_named(base, data, tmp_path, call, line):
    flags = ("--model", base, "--data", data, "--output", tmp_path, *SHORT)
    assert call(*flags)[0] == 0
    file = tmp_path / f"{base.name}-gsm8k/answers.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    line = first.replace(b'"problem": 0', b'"problem": [0]') if line == b"LIST" else line
    file.write_bytes(line + b"\n" + rest)
    code, _, err = call(*flags)
    assert code == 1 and "answers.jsonl is damaged at" in err


def test_what_only_the_first_rank_meets_ends_all_with_one_sentence(fork, base, data, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    flags = ("--model", base, "--data", data, "--output", tmp_path / "out", *SHORT)
    done = fork(tmp_path / "run", 2, "eval.py", *flags)
    assert done.codes == [1, 1] and "cannot be written" in done.output and "Traceback" not in done.output


def test_a_full_disk_ends_with_a_sentence_and_keeps_what_is_there(base, data, tmp_path, call, monkeypatch):
    flags, synced, fsync = ("--model", base, "--data", data, "--output", tmp_path, *SHORT), [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > 6:  # settings and an empty result, each with its folder, then two batches
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("blockwise.run.files.os.fsync", full)
        code, _, err = call(*flags)
    assert code == 1 and "cannot be written: No space left on device. What exists is kept." in err
    assert (tmp_path / f"{base.name}-gsm8k/answers.rank0.jsonl").read_text().count("\n") >= 8
    assert call(*flags)[0] == 0 and len(answers(tmp_path / f"{base.name}-gsm8k")) == 22


def test_two_evaluations_do_not_write_to_one_folder(whole, base, data, tmp_path, call):
    flags = ("--model", base, "--data", data, "--output", tmp_path, *SHORT)
    folder = shutil.copytree(whole[0], tmp_path / f"{base.name}-gsm8k")
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(lines[:8]))
    with locked(folder):
        code, _, err = call(*flags)
        assert code == 1 and f"another run, or a process that it has left, works in {folder}" in err
        assert (folder / "answers.jsonl").read_text() == "".join(lines[:8])
    assert call(*flags)[0] == 0 and answers(folder) == answers(whole[0])
