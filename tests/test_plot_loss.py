"""plot_loss.py: the moving average, the picture, and bad files."""

import sys

import pytest
from conftest import run

import plot_loss
from blockwise.cli import InputError
from plot_loss import read_losses, read_validation, smooth


def test_smooth_is_a_centred_mean_with_a_shrinking_window():
    assert smooth([3.0, 0.0, 3.0, 6.0], 3) == [1.5, 2.0, 3.0, 4.5]
    assert smooth([1.0, 5.0], 1) == [1.0, 5.0]


def test_two_runs_become_one_png(tmp_path):
    for name in ("a_logs", "b_logs"):
        (tmp_path / name).mkdir()
        rows = "".join(f"{i},{1 / i:.6f}\n" for i in range(1, 30))
        (tmp_path / name / "train_loss.csv").write_text("step,loss\n" + rows + "30,nan\n")
    done = run("plot_loss.py", "a_logs/train_loss.csv", "b_logs/train_loss.csv", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "loss.png: a, b\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert list(read_losses(tmp_path / "a_logs" / "train_loss.csv"))[0] == tuple(range(1, 30))  # nan: no loss that step


def test_a_validation_loss_is_drawn_if_there_is_one(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    losses, metrics = tmp_path / "a_logs/train_loss.csv", tmp_path / "a_logs/metrics.csv"
    losses.parent.mkdir()
    losses.write_text("step,loss\n1,3.0\n2,2.0\n3,1.0\n4,1.0\n")
    assert read_validation(losses) == []
    metrics.write_text("step,loss,lr\n1,3.0,0.1\n2,2.0,0.1\n")  # of a run without
    assert read_validation(losses) == []
    metrics.write_text("step,loss,lr,val_loss\n1,3.0,0.1,\n2,2.0,0.1,2.5\n3,1.0,0.1,nan\n4,1.0,0.1,1.5\n")
    assert read_validation(losses) == [(2, 2.5), (4, 1.5)]
    monkeypatch.setattr(sys, "argv", ["plot_loss.py", str(losses), "--output", str(tmp_path / "x.png")])
    plot_loss.main()
    mean, _, points = plt.gca().lines
    assert points.get_xydata().tolist() == [[2, 2.5], [4, 1.5]] and points.get_color() == mean.get_color()
    labels = [text.get_text() for text in plt.gca().get_legend().get_texts()]
    plt.close()
    assert labels == ["a (mean of 1 steps)", "a, validation"]
    metrics.write_text("step,loss,lr,val_loss\n1,3.0,0.1,low\n")
    with pytest.raises(InputError, match="metrics.csv is not a CSV with the columns step,val_loss"):
        read_validation(losses)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "train_loss.csv").write_text("step,loss\n1,2.0\n")
    done = run("plot_loss.py", "train_loss.csv", "--output", "no/folder/x.png", cwd=tmp_path)
    assert done.returncode == 1 and "no/folder/x.png cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [None, "", "step,loss\n", "a,b\n1,2\n", "step,loss\n1,x\n", "step,loss\n1\n"])
def test_a_bad_csv_is_named(tmp_path, content):
    file = tmp_path / "train_loss.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match="train_loss.csv"):
        read_losses(file)
