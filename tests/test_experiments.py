"""experiments/: the problems, the shipped base, one real run of the runner in its smallest size, and the report."""

import csv
import random
import re

import pytest
import torch
from conftest import ROOT, launch, run

from blockwise.decoding import decode
from blockwise.run import files
from experiments import make_data, report
from experiments import run as runner

COLUMNS = "claim,setting,seed,steps,supervised_tokens,seconds,pass_at_1,token_accuracy,n"


def test_answers_are_the_sums_lowest_digit_first():
    rng, carries = random.Random(0), 0
    for _ in range(200):
        row = make_data.problem(rng)
        first, second = (int(text[::-1]) for text in re.fullmatch(r"(\d{12}) \+ (\d{12})", row["query"]).groups())
        (total,) = re.fullmatch(r"The answer is: (\d{13})", row["response"]).groups()
        assert int(total[::-1]) == first + second
        carries += total[-1] == "1"
    assert 60 < carries < 140


def test_the_shipped_base_is_half_way():
    """Neither at 0 nor at 100 %, and small."""
    assert sum(file.stat().st_size for file in runner.BASE.iterdir()) < 8e6
    right, tokens = map(float, runner.evaluate(runner.BASE, runner.decoding(4), 60))
    assert 0.1 < right < 0.6 and 0.85 < tokens < 0.99
    model, tokenizer = decode.load(runner.BASE, "auto", torch.device("cpu"))
    assert decode.end_ids(model, tokenizer) == [1, 7] and model.config.mask_token_id == runner.KNOBS["MASK_ID"]


def test_every_claim_has_settings_that_differ():
    for claim, settings in runner.CLAIMS.items():
        assert claim in report.TITLES and len(settings) > 1
        assert len({setting.name for setting in settings}) == len(settings)
        assert len({repr((s.script, s.knobs, s.decoding)) for s in settings}) == len(settings)


@pytest.mark.full
def test_a_smoke_run_its_continuation_and_its_report(tmp_path):
    results, output = tmp_path / "results.csv", tmp_path / "report"
    command = ("experiments.run", "C1", "K1", "--seeds", 1, "--smoke", "--results", results)
    command = (*command, "--work", tmp_path / "work")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    lines = results.read_text().splitlines()
    (folder,) = {file.parent for file in (tmp_path / "work").glob("train_*.pt")}
    samples = torch.load(folder / "train_128.pt")
    assert {len(sample["full_ids"]) - sample["prompt_len"] for sample in samples} == {16}
    rows = {(row["claim"], row["setting"]): row for row in csv.DictReader(lines)}
    assert lines[0] == COLUMNS and list(rows) == [
        ("C1", "base"), ("C1", "full sequence"), ("C1", "block-wise"),
        ("K1", "block-wise"), ("K1", "rest of the answer"),
    ]  # fmt: skip
    assert lines[3][3:] == lines[4][3:], "K1 shares the training of C1"
    # 4 steps of 32 samples with 16 tokens in blocks of 4; half of what could be supervised is masked, on average
    expected = {"full sequence": 16 / 2, "block-wise": 4 / 2, "rest of the answer": (16 + 12 + 8 + 4) / 4 / 2}
    assert lines[1].startswith("C1,base,0,0,0,0.0,")
    for (_, setting), row in list(rows.items())[1:]:
        assert row["steps"] == "4" and row["n"] == "20"
        assert int(row["supervised_tokens"]) / 128 == pytest.approx(expected[setting], rel=0.25)

    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    results.write_text("\n".join(lines[:3]) + "\nC1,block-wise,0,4,2")  # as if it had been killed while writing
    done = run(*command)
    assert done.returncode == 0 and results.read_text().splitlines() == lines
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")} == trained

    assert run("experiments.report", "--results", results, "--output", output).returncode == 0
    text = (output / "report.md").read_text()
    assert f"| full sequence | 1 | 4 | {int(rows['C1', 'full sequence']['supervised_tokens']):,} |" in text
    assert all((output / name).stat().st_size > 10_000 for name in ("figures/C1.png", "figures/K1.png"))


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "torn.csv").write_text(COLUMNS + "\nC1,base,0,4\n")
    (tmp_path / "old.csv").write_text(COLUMNS + "\nC1,something else,0,4,100,1.0,0.5,0.9,20\n")
    for command, said in (
        (("experiments.run", "C1", "C9"), "C9: no such claim"),
        (("experiments.run", "C1", "--smoke"), "--smoke is too small for results.csv"),
        (("experiments.run", "C1", "--work", tmp_path / "old.csv"), "old.csv"),
        (("experiments.report", "--results", tmp_path / "torn.csv"), "torn.csv, line 2 is not whole"),
        (("experiments.report", "--results", tmp_path / "missing.csv"), "missing.csv cannot be read"),
        (
            ("experiments.report", "--results", tmp_path / "old.csv"),
            "old.csv, line 2: experiments/run.py has no",
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
    def rows(values):
        return [
            {
                "seed": str(i),
                "steps": "1",
                "supervised_tokens": "5",
                "seconds": "2",
                "pass_at_1": v,
                "token_accuracy": v,
            }
            for i, v in enumerate(values)
        ]

    lines = report.table("C1", {"base": rows([0.2]), "a": rows([0.5, 0.7]), "b": rows([0.6, 0.8])}).splitlines()
    half = 12.706 * 0.02**0.5 / 2**0.5
    assert lines[-3] == "| base | 1 | 1 | 5 | 2 | 20.0% |  | 20.0% |"
    assert lines[-2] == f"| a | 2 | 1 | 5 | 2 | 60.0% ± {half:.1%} |  | 60.0% ± {half:.1%} |"
    assert lines[-1] == f"| b | 2 | 1 | 5 | 2 | 70.0% ± {half:.1%} | +10.0% ± 0.0% | 70.0% ± {half:.1%} |"


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
