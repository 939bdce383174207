"""experiments/rl.py: the choice of the learning rate, the table, the picture; train_digits.py, estimators.py."""

import pytest

from experiments import estimators, rl
from experiments.train_digits import digits

BASE = dict.fromkeys(rl.COLUMNS, "0") | {"setting": "base", "pass_at_1": "0.2950"}


def rows_of(setting, lr, seed, *pass_at_1):
    """A row for each checkpoint, after 10, 20, ... rounds."""
    reward = "nan" if setting == rl.OWN else "0.8"
    return [
        {"setting": setting, "lr": f"{lr:g}", "seed": str(seed), "round": str(10 * i), "reward": reward,
         "pass_at_1": str(value), "only_tuned": "40", "only_base": "20", "p": "0.01"}
        for i, value in enumerate(pass_at_1, start=1)
    ]  # fmt: skip


def test_the_last_round_of_seed_0_chooses_the_learning_rate():
    low, middle, high = rl.LRS
    rows = [BASE, *rows_of("block", low, 0, 0.5, 0.3), *rows_of("block", middle, 0, 0.6, 0.3)]
    rows += rows_of("block", high, 1, 0.9, 0.9)
    assert rl.chosen_lr("block", rows) is None
    assert ("block", high, 0) in rl.missing(2, rows) and ("block", low, 0) not in rl.missing(2, rows)
    assert not any(seed for _, _, seed in rl.missing(2, rows))
    rows += rows_of("block", high, 0, 0.1, 0.4)
    assert rl.chosen_lr("block", rows) == high
    assert [run for run in rl.missing(2, rows) if run[0] == "block"] == [("block", high, 2)]


def test_table_and_picture(tmp_path):
    rows = [BASE, *rows_of("block", 1e-3, 0, 0.9, 0.9)]
    for seed, last in ((1, 0.4), (2, 0.6)):
        rows += rows_of("block", 1e-3, seed, 0.3, last) + rows_of(rl.OWN, 3e-4, seed, 0.3, 0.2)
    lines = rl.table(rows).splitlines()
    assert lines[1].split() == ["base", "29.5%"] and len(lines) == 4
    assert "0.001    50.0%   40.0% (40, 20; 0.01), 60.0% (40, 20; 0.01)" in lines[2]
    assert lines[3].startswith(rl.OWN) and "20.0%" in lines[3]
    rl.figure(rows, tmp_path / "R1.png")
    assert (tmp_path / "R1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "completion, share",
    [("The answer is: 012", 1.0), ("012", 1.0), ("The answer is: 112", 2 / 3), ("is: 01", 2 / 3), ("0120", 3 / 4),
     ("", 0.0), ("The answer is: x", 0.0)],
)  # fmt: skip
def test_the_share_of_right_digits(completion, share):
    """A zero in front is a digit like others."""
    assert digits(completion, {"response": "The answer is: 012"}) == pytest.approx(share)


def test_estimators_of_a_model_with_one_token_per_block(base, dataset_folder, monkeypatch, capsys):
    """With blocks of one token, `block` is what decoding computed, and the estimate in one step is not."""
    flags = ["--model", base, "--data", dataset_folder / "train.jsonl", "--block", 1, "--problems", 3, "--group", 2]
    monkeypatch.setattr("sys.argv", ["estimators", *map(str, flags)])
    estimators.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["block", "0.000", "1.00"] and lines[3][0] == "onestep" and float(lines[3][1]) > 0.01
