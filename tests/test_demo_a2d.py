"""What demo_a2d.sh does without a model: its flags, its text, its table and its picture."""

import json
import subprocess

import pytest
from conftest import ROOT

from blockwise.cli import InputError
from demo import conversion


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--step", "3"], "'--step' is not a flag; the flags are --steps N and --text FILE."),
        (["--steps"], "--steps '' is not a number of steps, 1 or more."),
        (["--steps", "0"], "--steps '0' is not a number of steps, 1 or more."),
        (["--text", "missing.txt"], "--text 'missing.txt' is not a file."),
    ],
)
def test_bad_flags_are_one_sentence(flags, said):
    done = subprocess.run(["bash", ROOT / "demo_a2d.sh", *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: {said}\n" and not done.stdout


def test_no_held_out_paragraph_is_trained_on():
    training, held_out = (
        {paragraph.strip() for paragraph in text.split("\n\n")} - {""} for text in conversion.split_topics()
    )
    assert len(training) > 1000 and len(held_out) > 100 and not training & held_out


def test_a_file_is_split_at_its_end(tmp_path):
    (tmp_path / "own.txt").write_text("ä" * 90 + "b" * 10, encoding="utf-8")
    assert conversion.split_file(tmp_path / "own.txt") == ("ä" * 90, "b" * 10)
    (tmp_path / "own.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="own.txt cannot be read"):
        conversion.split_file(tmp_path / "own.txt")


@pytest.mark.parametrize("held_out", ["a short text", " ".join(f"word{i}" for i in range(100))])
def test_prompts_are_held_out(tmp_path, held_out):
    conversion.write_text(tmp_path, "training", held_out)
    (row,) = [json.loads(line) for line in (tmp_path / "filled.jsonl").read_text().splitlines()]
    assert held_out.startswith(row["prompt"]) and row["infill"].startswith("[MASK:12]")
    assert " ".join([row["prompt"], row["truth"]]).strip() in held_out
    assert json.loads((tmp_path / "continued.jsonl").read_text())["prompt"] == row["prompt"]


def test_the_table_and_the_picture(tmp_path, capsys):
    lines = [
        "base: 8.6 ± 0.4 (standard error) nats",
        "mdlm: 6.25 ± 0.5 nats",
        "base: 8.9 nats",
        "bd3lm: 6.0 ± 0.1 nats",
    ]
    (tmp_path / "bounds.txt").write_text("\n".join(lines), encoding="utf-8")
    for name in conversion.METHODS:
        (tmp_path / f"{name}_logs").mkdir()
        (tmp_path / f"{name}_logs" / "train_loss.csv").write_text("step,loss\n1,8.0\n2,7.0\n")
    for name in ("base", *conversion.METHODS):
        rows = {"continued": {"completion": f"upon\na {name}"}, "filled": {"filled": [f"by {name}"]}}
        for kind, row in rows.items():
            (tmp_path / f"{kind}_{name}.jsonl").write_text(json.dumps(row))
    bounds = conversion.read_bounds(tmp_path)
    assert bounds == {"mdlm": [(8.6, 0.4), (6.25, 0.5)], "bd3lm": [(8.9, 0.0), (6.0, 0.1)]}
    conversion.draw(tmp_path, bounds)
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    conversion.show_bounds(bounds)
    conversion.write_text(tmp_path, "training", "a short text")
    conversion.show_samples(tmp_path, "continued", ("base", *conversion.METHODS))
    conversion.show_samples(tmp_path, "filled", ("base", "mdlm"))
    said = capsys.readouterr().out
    assert "6.25 ± 0.50" in said and "bd3lm  upon a bd3lm" in said and "mdlm   by mdlm" in said
