"""experiments/repetition.py: the choice of the learning rate, the table, what is refused, one very small run."""

import csv

import pytest
from conftest import run

from experiments import repetition

COLUMNS = [*repetition.COLUMNS, *repetition.FIGURES]
SFT, R2FT, BLOCK = repetition.METHODS


def row(setting, lr, seed, window=0.4, chosen=3.8):
    return dict(zip(COLUMNS, map(str, (setting, f"{lr:g}", seed, 100, window, 0.4, 1.0, chosen, 3.9))))


BASES = [row("base", repetition.BASE_LR, seed) for seed in range(3)]


def test_the_least_repetition_that_costs_little_chooses_the_learning_rate():
    low, middle, high = repetition.LRS
    grid = [row("R2FT", low, 0, 0.3), row("R2FT", middle, 0, 0.2, 3.89), row("R2FT", high, 0, 0.1, 3.95)]
    assert repetition.chosen_lr(R2FT, BASES + grid) == middle, "the highest costs more than WORSE"
    assert repetition.chosen_lr(R2FT, grid) is None and repetition.chosen_lr(R2FT, BASES + grid[:2]) is None
    assert repetition.chosen_lr(R2FT, BASES + [one | {"nats_chosen": "5"} for one in grid]) == low
    first = repetition.missing(2, [])
    assert {run.key[1:] for run in first} == {("base", "0.003", seed) for seed in "012"} | {
        (setting.name, f"{lr:g}", "0") for setting in repetition.METHODS for lr in repetition.LRS
    }
    then = [run for run in repetition.missing(2, BASES + grid) if run.setting is R2FT]
    assert {(run.lr, run.seed) for run in then} == {(middle, 1), (middle, 2)}


def test_the_table_has_means_over_the_reported_seeds():
    rows = BASES + [row(one.name, 1e-4, seed, 0.2 * seed) for one in repetition.METHODS for seed in (0, 1, 2)]
    lines = repetition.table(rows).splitlines()
    assert lines[1].split()[:5] == ["base", "0.003", "0.400", "±", "0.000"]
    assert lines[3].split()[:5] == ["R2FT", "0.0001", "0.300", "±", "0.141"]


def test_bad_input_is_one_sentence(tmp_path):
    for flags, said in (
        (("--smoke",), "--smoke is too small for repetition.csv"),
        (("--seeds", 0), "--seeds must be at least 1"),
    ):
        done = run("experiments.repetition", *flags)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.full
def test_a_smoke_run_and_its_continuation(tmp_path):
    flags = ("--smoke", "--seeds", 1, "--results", tmp_path / "r.csv", "--work", tmp_path / "work")
    done = run("experiments.repetition", *flags)
    assert done.returncode == 0 and "R2FT, block" in done.stdout and "of the held-out text itself: 0.0" in done.stdout
    lines = (tmp_path / "r.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert len(rows) == 2 + 4 * len(repetition.METHODS)
    (tmp_path / "r.csv").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])  # killed while writing
    assert run("experiments.repetition", *flags).stdout == done.stdout
    assert (tmp_path / "r.csv").read_text().splitlines() == lines
