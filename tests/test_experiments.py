"""experiments/: the problems, the bases, one real run of the runner in its smallest size, and the report."""

import csv
import random
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, launch, run

from blockwise.decoding import decode
from blockwise.models import hub
from blockwise.run import files
from experiments import claims, make_data, report
from experiments import run as runner

COLUMNS = "claim,setting,lr,seed,steps,supervised_tokens,seconds,pass_at_1,token_accuracy,n"


def test_answers_are_the_sums_lowest_digit_first():
    rng, carries = random.Random(0), 0
    for _ in range(200):
        row = make_data.addition(rng)
        first, second = (int(text[::-1]) for text in re.fullmatch(r"(\d{12}) \+ (\d{12})", row["query"]).groups())
        (total,) = re.fullmatch(r"The answer is: (\d{13})", row["response"]).groups()
        assert int(total[::-1]) == first + second
        carries += total[-1] == "1"
    assert 60 < carries < 140


@pytest.mark.parametrize("task, values, needed", [("lag", 8, [4, 8]), ("lag3", 4, [4, 3, 8])])
def test_a_rule_is_a_table_of_64_entries_over_earlier_digits(task, values, needed):
    """needed: how far before a digit those stand that it needs; in the last column of lag3, 3 becomes 7."""
    table = {}
    for row in make_data.problems(task, 1, 300, seed=5):
        digits = row["query"] + row["response"]
        assert len(row["query"]) == 8 and len(row["response"]) == 16 and row["type"] == task
        for place in range(8, 24):
            back = [7 if distance == 3 and place % 4 == 3 else distance for distance in needed]
            key = "".join(digits[place - distance] for distance in back)
            assert table.setdefault(key, digits[place]) == digits[place], "the same digits give the same one"
    assert len(table) == 64 and set(Counter(table.values()).values()) == {64 // values}
    if task == "lag":  # a Latin square: in a row and in a column, each digit once
        for fixed in "01234567":
            assert len({value for key, value in table.items() if key[0] == fixed}) == 8
            assert len({value for key, value in table.items() if key[1] == fixed}) == 8
    assert make_data.problems(task, 1, 9, 5) == make_data.problems(task, 1, 9, 5) != make_data.problems(task, 2, 9, 5)


def test_the_shipped_base_is_half_way():
    """Neither at 0 nor at 100 %, and small."""
    assert sum(file.stat().st_size for file in runner.BASE.iterdir()) < 8e6
    right, tokens = map(float, runner.evaluate(runner.BASE, claims.decoding(4), claims.ADDITION, 60))
    assert 0.1 < right < 0.6 and 0.85 < tokens < 0.99
    model, tokenizer = decode.load(runner.BASE, "auto", torch.device("cpu"))
    assert decode.end_ids(model, tokenizer) == [1, 7] and model.config.mask_token_id == claims.COMMON["MASK_ID"]


def test_every_claim_has_settings_that_differ():
    for claim, settings in claims.CLAIMS.items():
        names = [setting.name for setting in settings]
        assert claim in report.TITLES and len(settings) > 1 and len(set(names)) == len(names)
        assert len({repr((s.script, s.knobs, s.decoding, s.task)) for s in settings}) == len(settings)
        assert all({setting.against or names[0], setting.lr_of or names[0]} <= set(names) for setting in settings)


def csv_row(claim, setting, lr, seed, right, tokens=0.5, steps=800):
    cells = (claim, setting, f"{lr:g}", seed, steps, 5, 2, right, tokens, 300)
    return dict(zip(runner.COLUMNS, map(str, cells)))


def test_seed_0_chooses_the_learning_rate_of_the_other_seeds():
    """First the grid; then the other seeds with the best Pass@1, and of equals with the best token accuracy."""
    names = ["full sequence", "block-wise"]
    first = [run for run in runner.missing(["C1"], 2, []) if run.setting.script]
    assert {run.key for run in first} == {("C1", name, f"{lr:g}", "0") for name in names for lr in claims.ADDITION_LRS}
    scores = {1e-3: (0.2, 0.9), 2e-3: (0.3, 0.5), 5e-3: (0.3, 0.6), 1e-2: (0.1, 0.99)}
    rows = [csv_row("C1", "block-wise", 1e-2, 0, 0.9, steps=50)]  # an earlier checkpoint
    rows += [csv_row("C1", "block-wise", lr, 0, *score) for lr, score in scores.items()]
    then = [run.key for run in runner.missing(["C1"], 2, rows) if run.setting.name == "block-wise"]
    assert then == [("C1", "block-wise", "0.005", "1"), ("C1", "block-wise", "0.005", "2")]
    rows += [csv_row("C1", "block-wise", lr, seed, 0.7) for lr in (1e-3, 5e-3) for seed in (1, 2)]
    assert not [run for run in runner.missing(["C1"], 2, rows) if run.setting.name == "block-wise"]
    reported = report.reported("C1", {"base": [], "full sequence": [], "block-wise": rows})["block-wise"]
    assert [(row["lr"], row["seed"]) for row in reported] == [("0.005", "1"), ("0.005", "2")]


def test_other_decodings_use_the_learning_rate_of_the_matching_one():
    same, other = claims.name_of_blocks(2, 2), claims.name_of_blocks(2, 8)
    assert not [run for run in runner.missing(["N4"], 1, []) if run.setting.name == other]
    rows = [csv_row("N4", same, lr, 0, right) for lr, right in zip(claims.LRS, (0.1, 0.2, 0.4, 0.3))]
    (run,) = [run for run in runner.missing(["N4"], 1, rows) if run.setting.name == other]
    assert (run.lr, run.seed) == (1e-2, 1) and run.knobs["BLOCK_SIZE"] == 2
    assert run.setting.decoding == {"gen_length": 16, "block_length": 8, "steps": 16}


def test_a_plain_base_and_its_rows(tmp_path):
    """Rows are beginning of text, query, end of turn and response; held-out problems are decoded from such prompts."""
    (wanted,) = [run for run in runner.missing(["N1"], 1, []) if run.setting.name == "base, rule 1"]
    folder = runner.base_folder(wanted.setting.task, 1, tmp_path, runner.SMOKE)
    runner.make_base(wanted, folder, tmp_path, runner.SMOKE)
    file = runner.rows_file(wanted.setting.task, tmp_path, runner.SMOKE)
    runner.make_rows(wanted, file, tmp_path, runner.SMOKE)
    tokenizer, samples = hub.load_tokenizer(folder), torch.load(file)
    problems = make_data.problems("lag", 1, 128, seed=1)
    assert len(samples) == 128
    for sample, row in zip(samples, problems):
        text = f"<|startoftext|>{row['query']}<|eot_id|>{row['response']}"
        assert tokenizer.decode(sample["full_ids"]) == text and sample["prompt_len"] == 10
        assert len(sample["full_ids"]) == wanted.knobs["MAX_LEN"] == 26
    (row,) = runner.rows_of([wanted], tmp_path, runner.SMOKE)
    assert row[:6] == ["N1", "base, rule 1", "0", "1", 0, 0] and 0 <= float(row[8]) < 0.4 and row[9] == 20


@pytest.mark.full
def test_a_smoke_run_its_continuation_and_its_report(tmp_path):
    results, output = tmp_path / "results.csv", tmp_path / "report"
    command = ("experiments.run", "C1", "K1", "--seeds", 1, "--smoke", "--jobs", 2, "--results", results)
    command = (*command, "--work", tmp_path / "work")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    lines = results.read_text().splitlines()
    samples = torch.load(tmp_path / "work/addition_128.pt")
    assert {len(sample["full_ids"]) - sample["prompt_len"] for sample in samples} == {16}
    rows = list(csv.DictReader(lines))
    ran = Counter((row["claim"], row["setting"], row["seed"]) for row in rows)
    assert lines[0] == COLUMNS and ran == {
        ("C1", "base", "0"): 1,
        ("C1", "full sequence", "0"): 4, ("C1", "full sequence", "1"): 1,
        ("C1", "block-wise", "0"): 4, ("C1", "block-wise", "1"): 1,
        ("K1", "block-wise", "0"): 1, ("K1", "rest of the answer", "0"): 1,
    }  # fmt: skip
    by_key = {(row["claim"], row["setting"], row["lr"], row["seed"]): list(row.values())[4:] for row in rows}
    shared = ("block-wise", "0.002", "0")
    assert by_key["C1", *shared] == by_key["K1", *shared], "K1 shares the training of C1"
    # 4 steps of 32 samples with 16 tokens in blocks of 4; half of what could be supervised is masked, on average
    expected = {"full sequence": 16 / 2, "block-wise": 4 / 2, "rest of the answer": (16 + 12 + 8 + 4) / 4 / 2}
    assert any(line.startswith("C1,base,0,0,0,0,0.0,") for line in lines)
    for row in rows:
        if row["setting"] != "base":
            assert row["steps"] == "4" and row["n"] == "20"
            assert int(row["supervised_tokens"]) / 128 == pytest.approx(expected[row["setting"]], rel=0.25)

    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    results.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:12])  # as if it had been killed while writing
    done = run(*command)
    assert done.returncode == 0 and results.read_text().splitlines() == lines
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")} == trained

    assert run("experiments.report", "--results", results, "--output", output).returncode == 0
    text = (output / "report.md").read_text()
    assert (
        re.search(r"\| full sequence \| 0\.\d+ \| 4 \| [\d,]+ \|", text) and "| learning rate, seed 0 | 0.001 |" in text
    )
    assert all((output / name).stat().st_size > 10_000 for name in ("figures/C1.png", "figures/K1.png"))


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "torn.csv").write_text(COLUMNS + "\nC1,base,0,0,4\n")
    (tmp_path / "old.csv").write_text(COLUMNS + "\nC1,something else,0,0,4,100,1.0,0.5,0.9,20\n")
    (tmp_path / "older.csv").write_text(COLUMNS.replace("lr,", "") + "\n")
    for command, said in (
        (("experiments.run", "C1", "C9"), "C9: no such claim"),
        (("experiments.run", "C1", "--jobs", "0"), "--seeds and --jobs must be at least 1"),
        (("experiments.run", "C1", "--results", tmp_path / "older.csv"), "older.csv is not a CSV with the columns"),
        (("experiments.make_data", "--output", tmp_path, "--task", "lag"), "need a --rule"),
        (("experiments.make_data", "--output", tmp_path, "--rule", "1"), "need a --rule"),
        (("experiments.run", "C1", "--smoke"), "--smoke is too small for results.csv"),
        (("experiments.run", "C1", "--work", tmp_path / "old.csv"), "old.csv"),
        (("experiments.report", "--results", tmp_path / "torn.csv"), "torn.csv, line 2 is not whole"),
        (("experiments.report", "--results", tmp_path / "missing.csv"), "missing.csv cannot be read"),
        (
            ("experiments.report", "--results", tmp_path / "old.csv"),
            "old.csv, line 2: experiments/claims.py has no",
        ),
    ):
        done = run(*command)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_a_work_folder_has_one_run_at_a_time(tmp_path):
    files.lock(tmp_path)
    done = run("experiments.run", "C1", "--work", tmp_path, "--results", tmp_path / "results.csv")
    assert done.returncode == 1 and "another run, or a process that it has left, works in" in done.stderr


def test_knobs_without_a_meaning_are_refused(tmp_path):
    done = launch(1, "experiments.train_causal", "--PREFIX_MASK_RATE=0.5", cwd=tmp_path)
    assert done.returncode != 0 and "is not a knob of this script" in done.stdout + done.stderr


def test_differences_are_paired_by_seed():
    def rows(setting, values):
        return [csv_row("K1", setting, 2e-3, i, value, value, steps=1) for i, value in enumerate(values)]

    settings = {"block-wise": rows("block-wise", [0.5, 0.7]), "rest of the answer": rows("rest", [0.6, 0.8])}
    lines = report.table("K1", settings).splitlines()
    half = 12.706 * 0.02**0.5 / 2**0.5
    assert (
        lines[-2] == f"| block-wise | 0.002 | 1 | 5 | 2 | 60.0% ± {half:.1%} | 50.0, 70.0 |  |  | 60.0% ± {half:.1%} |"
    )
    start = f"| rest of the answer | 0.002 | 1 | 5 | 2 | 70.0% ± {half:.1%} | 60.0, 80.0"
    assert lines[-1] == f"{start} | +10.0% ± 0.0% | block-wise | 70.0% ± {half:.1%} |"


def test_a_setting_is_compared_with_the_one_that_it_names():
    def rows(setting, value):
        return [csv_row("K4", setting, 2e-3, i, value) for i in range(2)]

    values = {
        "full sequence, masked mean": 0.5,
        "full sequence, 1/p": 0.4,
        "block-wise, masked mean": 0.2,
        "block-wise, 1/p": 0.1,
    }
    settings = {name: rows(name, value) for name, value in values.items()}
    told = [line.split(" | ")[7:9] for line in report.table("K4", settings).splitlines()[2:]]
    other = "full sequence, masked mean"
    assert told == [
        ["", ""],
        ["-10.0% ± 0.0%", other],
        ["-30.0% ± 0.0%", other],
        ["-10.0% ± 0.0%", "block-wise, masked mean"],
    ]


def test_intervals_are_students():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 * 1.0 / 3**0.5)
    assert report.interval([0.5]) == (0.5, 0.0)
    _, half = report.interval(list(range(10)))
    assert half == pytest.approx(2.262 * (110 / 12) ** 0.5 / 10**0.5)
    assert report.interval(list(range(30)))[1] > 0


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    assert run("experiments.report", "--output", tmp_path).returncode == 0
    assert (tmp_path / "report.md").read_text() == (ROOT / "experiments/report.md").read_text()
