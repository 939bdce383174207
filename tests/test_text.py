"""experiments/text.py: the text, the choice of the learning rate, the report, and one real run of the smallest size."""

import csv
import random

import pytest
import torch
from conftest import run

from blockwise import packing
from blockwise.models import hub
from experiments import report, text
from experiments import run as runner


def row(setting, lr, seed, nats):
    return dict(zip(text.COLUMNS, map(str, (setting, f"{lr:g}", seed, 400, nats, 0.03, 472))))


def test_every_eighth_text_is_held_out_and_no_token_is_lost_but_the_last(tmp_path):
    names = [f"{number:02}" for number in range(20)]
    random.Random(0).shuffle(names)
    parts = text.split({name: f"text {name}, and so on and on and on. " for name in names})
    assert [body[5:7] for body in parts["held_out"]] == ["07", "15"] and len(parts["train"]) == 18
    assert set(parts["train"]).isdisjoint(parts["held_out"])
    file = text.pack("held_out", parts["held_out"] * 3, tmp_path)
    ids, tokenizer = packing.read(file), hub.load_tokenizer(runner.BASE)
    whole = "".join(parts["held_out"] * 3)
    assert ids.shape[1] == text.LENGTH and whole.startswith(tokenizer.decode(ids.flatten().tolist()))


def grid(name):
    return [row(name, lr, 0, nats) for lr, nats in zip(text.LRS, (3.4, 3.2, 3.3))]


def test_the_lowest_bound_on_seed_0_chooses_the_learning_rate():
    """Of each of the two methods; that of block diffusion in blocks of 4 is used for blocks of other sizes, too."""
    first = text.missing(2, [])
    assert {run.key[1:] for run in first} == {
        (name, f"{lr:g}", "0") for name in ("full sequence", "blocks of 4") for lr in text.LRS
    }
    assert text.missing(2, grid("blocks of 4")[:2])[-1].seed == 0, "one rate of it has not been tried yet"
    then = [run for run in text.missing(2, grid("blocks of 4")) if run.setting.script == "train_bd3lm.py"]
    assert {run.key[1:] for run in then} == {
        (f"blocks of {size}", f"{text.LRS[1]:g}", seed) for size in (1, 4, 16, 64) for seed in "12"
    }
    assert {run.knobs["BLOCK_SIZE"] for run in then} == {1, 4, 16, 64}


def test_the_report_has_the_mean_over_the_other_seeds(tmp_path):
    (tmp_path / "figures").mkdir()
    rows = grid("blocks of 4")
    for name, first, second in (("blocks of 4", 3.0, 3.2), ("blocks of 1", 2.0, 2.2)):
        rows += [row(name, text.LRS[1], 1, first), row(name, text.LRS[1], 2, second)]
    lines, half = report.report_bounds(rows, tmp_path).splitlines(), 12.706 * 0.02**0.5 / 2**0.5
    assert f"| blocks of 4 | {text.LRS[1]:g} | 400 | 3.100 ± {half:.3f} | 3.0, 3.2 | 3.4 | 3.2 | 3.3 |" in lines
    assert f"| blocks of 1 | {text.LRS[1]:g} | 400 | 2.100 ± {half:.3f} | 2.0, 2.2 |  |  |  |" in lines
    assert (tmp_path / "figures/B1_blocks.png").stat().st_size > 5_000


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "other.csv").write_text("setting,seed\n")
    for flags, said in (
        (("--smoke",), "--smoke is too small for bounds.csv"),
        (("--seeds", 0), "--seeds must be at least 1"),
        (("--results", tmp_path / "other.csv", "--work", tmp_path / "work"), "other.csv is not a CSV with the columns"),
    ):
        done = run("experiments.text", *flags)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.full
def test_a_smoke_run_and_its_continuation(tmp_path):
    flags = ("--smoke", "--seeds", 1, "--results", tmp_path / "bounds.csv", "--work", tmp_path / "work")
    assert run("experiments.text", *flags).returncode == 0
    lines = (tmp_path / "bounds.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * len(text.LRS) + len(text.SETTINGS)
    assert all(4 < float(row["nats_per_token"]) < 9 and row["samples"] == "4" for row in rows)  # 6.5 = log 640
    (tmp_path / "bounds.csv").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])  # killed while writing
    assert run("experiments.text", *flags).returncode == 0
    assert (tmp_path / "bounds.csv").read_text().splitlines() == lines


def test_random_bases_are_those_of_their_seeds(tmp_path):
    from safetensors.torch import load_file

    folders = [text.random_base(seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
    first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
