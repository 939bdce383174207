"""The fast paths give what the plain ones give, and each benchmark runs."""

import argparse
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, problems
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import masking
from benchmarks import (
    bench_blocks,
    bench_data,
    bench_decode,
    bench_growth,
    bench_merge,
    bench_refill,
    bench_train,
    common,
    report_decode,
    scale,
)
from blockwise import trainer as trainers
from blockwise.cli import InputError
from blockwise.data import Samples
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.models import llada
from blockwise.run.ranks import Ranks

CPU = torch.device("cpu")
TINY = {"vocab_size": 300, "d_model": 64, "n_layers": 2, "llada_8b": False}


def trainer(seed):
    """A bench_train.Trainer of a tiny model whose adapters do something."""
    args = argparse.Namespace(**TINY, batch=3, length=128, rank=4, seed=seed)
    made = bench_train.Trainer(args, CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in made.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    return made


def loss_and_gradients(trainer, step):
    trainer.set(step)
    trainer.optimizer.zero_grad()
    loss = trainer.loss(step)
    loss.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [name for name, step in bench_train.VARIANTS.items() if not step.dropout])
def test_every_variant_of_a_step_has_the_plain_loss_and_gradients(name, seed):
    """In fp32; sums come in another order, which is worth a few units of its last place (6e-8 of 1)."""
    step = bench_train.VARIANTS[name]
    if step.compiled and (seed or not shutil.which("g++")):
        pytest.skip("compiling takes long, and needs g++")
    made = trainer(seed)
    wanted_loss, wanted = loss_and_gradients(made, bench_train.VARIANTS["plain"])
    loss, gradients = loss_and_gradients(made, step)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert largest > 1e-3 and wanted.keys() == gradients.keys()
    for key in wanted:
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-4, atol=1e-5 * float(largest))


class Engine:
    """What train_step needs of DeepSpeed's engine, without changing a weight."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        return self.model(**inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass

    def was_step_applied(self):
        return True

    def get_global_grad_norm(self):
        return 0.0


def test_the_step_that_is_measured_is_that_of_the_trainers(monkeypatch):
    made = trainer(0)
    wanted_loss, wanted = loss_and_gradients(made, bench_train.Step())
    made.optimizer.zero_grad()
    ids, prompt_len, length = made.on_device
    block, _ = made.draws(prompt_len, length)

    def noise(batch, generator, knobs):
        masked, supervised = made.masks("tensor", batch.prompt_len, batch.length)
        inputs, weights = batch.input_ids.masked_fill(masked, knobs.MASK_ID), masking.sample_mean_weights(supervised)
        return masking.Noised(inputs, supervised, batch.input_ids, weights)

    run = argparse.Namespace(
        engine=Engine(made.model), ranks=Ranks(0, 1, 0, 1, CPU), noise=noise, loss=masking.weighted_nll,
        knobs=argparse.Namespace(MICRO_BSIZE=3, GRAD_ACC=1, SEED=0, MASK_ID=bench_train.MASK),
        samples=Samples(ids, prompt_len, length, torch.arange(len(ids)), 0),
        plan=torch.stack([torch.arange(3), block[:3]], 1), rollouts=None,
    )  # fmt: skip
    with monkeypatch.context() as patch:  # there is no other rank
        patch.setattr(trainers, "gather_losses", lambda losses, stop: (torch.stack(losses)[None], stop))
        step = trainers.train_step(run, 1)
    assert step.loss == wanted_loss.item()
    for name, weight in made.model.named_parameters():
        assert not weight.requires_grad or torch.equal(weight.grad, wanted[name])


def test_operations_of_llada_8b_are_the_known_ones():
    """32.6 GFLOP a token with the head at 32 of 256 positions, 34.4 with all of them, counted by others."""
    config = llada.LLaDAConfig.from_dict(common.LLADA_8B)
    for heads, wanted in ((32, 32.6), (256, 34.4)):
        assert common.step_flops(config, 256, 256, 256, heads) / 256 / 1e9 == pytest.approx(wanted, rel=0.005)
    assert common.parameters(config, 256) == (8_015_581_184, 671_088_640)


def test_operations_are_those_of_the_matrix_products():
    """Against torch's own counter, which knows attention as matrix products only, on a tiny model."""
    made = trainer(0)
    made.set(bench_train.Step())
    supervised = made.masks("tensor", *made.batch("tensor")[1:])[1].sum()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made.loss(bench_train.Step()).backward()
    tokens, d, rank = 3 * 128, 64, 4
    mine = common.step_flops(made.config, rank, tokens, 128, int(supervised))
    mine -= 2 * tokens * 3 * (d * d + d * rank)  # a frozen embedding: the first q, k, v pass none on
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.002)


def results(module, monkeypatch, capsys, *flags):
    """Runs a benchmark's main in this process; returns what it printed and its JSON line."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
    module.main()
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.full
def test_rows(monkeypatch, capsys, tmp_path, base):
    lines = [json.dumps({"question": row["query"], "answer": row["response"]}) for row in problems(300, 3)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    for model in ((), ("--model", base)):  # the second has tokens that reach over the border
        out, found = results(
            bench_data, monkeypatch, capsys, "--data", tmp_path / "train.jsonl", "--repeats", 2, *model
        )
        assert "the same from both ways" in out and len(found["times"]["ours"]) == 2


def test_rows_that_differ_are_noticed(tmp_path):
    for name, ids in (("plain", [1, 2, 3]), ("ours", [1, 2, 4])):
        torch.save([{"prompt_len": 1, "full_ids": torch.tensor(ids)}], tmp_path / name)
    with pytest.raises(SystemExit, match="the two ways differ"):
        bench_data.check_same(tmp_path)


@pytest.mark.full
def test_merge(monkeypatch, capsys):
    small = ("--gigabytes", 0.005, "--d_model", 64, "--vocab_size", 1000, "--repeats", 1)
    _, found = results(bench_merge, monkeypatch, capsys, *small)
    assert found["ratios"].keys() == {"seconds", "mb"} and found["checkpoint_mb"] > 1


def test_train_and_blocks(monkeypatch, capsys):
    size = [part for key in ("vocab_size", "d_model", "n_layers") for part in (f"--{key}", TINY[key])]
    monkeypatch.setattr(common, "own_process", lambda *args, **changes: {"mb": 1.0})
    monkeypatch.setattr(common, "copy_ceiling", lambda device: 1e10)
    _, found = results(bench_train, monkeypatch, capsys, *size, "--batch", 2, "--length", 128, "--repeats", 2)
    for variant in found["variants"].values():
        assert len(variant["seconds"]) == 2
        assert variant["loss"] == pytest.approx(found["variants"]["plain"]["loss"], rel=0.1)  # 0.1: dropout
    size = [*size, "--block_length", 8, "--prompt_length", 4]
    _, found = results(bench_blocks, monkeypatch, capsys, *size, "--gen_lengths", 16, 32, "--repeats", 2)
    assert found["gen_lengths"].keys() == {"16", "32"}
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in found["gen_lengths"].values())


def test_full_batches(monkeypatch, capsys):
    size = [part for key in ("vocab_size", "d_model", "n_layers") for part in (f"--{key}", TINY[key])]
    size += ["--problems", 12, "--batch_size", 3, "--gen_length", 16, "--block_length", 4, "--repeats", 1]
    out, found = results(bench_refill, monkeypatch, capsys, *size)
    assert found["same"] == 12 and "12 of 12 answers are the same" in out
    assert len(set(found["lengths"])) > 2 and found["ratio"] > 0


def test_decoders(monkeypatch, capsys, tmp_path, base, dataset_folder):
    """Every configuration, on two batches of a tiny model; the files are those that are read back."""
    flags = ("--data", dataset_folder / "train.jsonl", "--limit", 3, "--batch_size", 2, "--gen_length", 8)
    out, _ = results(bench_decode, monkeypatch, capsys, "--models", base, *flags, "--repeats", 1, "--output", tmp_path)
    rows = report_decode.read(tmp_path / "decoding.csv")
    tables = (bench_decode.curves(8, 4), bench_decode.long_curves(16, 4))
    wanted = [(decoder, len(points)) for table in tables for decoder, points in table.items()]
    assert [(key, len(some)) for (key, _), some in report_decode.by(rows, "decoder", "gen_length")] == wanted
    first, _, same = rows[:3]  # plain and exact decoding of the same: what speed and Pass@1 are compared with
    assert first["times_as_fast"] == 1 and same["to_exact"] == 0 and first["forwards_per_token"] >= 1
    assert same["forwards_per_token"] == first["forwards_per_token"] and same["tokens_per_second"] > 0
    short, text = report_decode.short_tables(rows), (tmp_path / "decoding.md").read_text()
    assert short in out and short in text and text.count("\n| ") == short.count("\n| ") + 1 + len(rows) + 2
    assert (tmp_path / "decoding.png").stat().st_size > 10_000


@pytest.mark.parametrize("steps", (12, 6, 5))
def test_the_plain_sampler_of_the_benchmark_is_exact_decoding(base, steps):
    """Of LLaDA's sampler, written a second time: the same tokens, and a forward pass for each row and step."""
    model, _ = decode.load(str(base), "float32", CPU)
    prompts = [torch.randint(8, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 4, 7)]
    settings = Settings(gen_length=12, block_length=12 if steps == 5 else 6, steps=steps)
    ids, rows = bench_decode.plain(model, prompts, settings)
    wanted, wanted_rows = decode.decode(model, prompts, settings)
    assert ids.tolist() == wanted.tolist() and rows == wanted_rows == 3 * steps


def test_what_the_tables_of_decoders_say(tmp_path):
    """Of each decoder the fastest setting that loses at most two points, and which of all are on the front, by hand."""
    points = (  # decoder, flags, Pass@1, times as fast
        ("exact", "--steps 16", 0.80, 1.2), ("exact", "--steps 8", 0.70, 2.4), ("conv", "--window 8", 0.60, 3.0),
        ("threshold", "--threshold 0.9", 0.79, 2.0), ("threshold", "--threshold 0.8", 0.785, 3.0),
        ("threshold", "--threshold 0.7", 0.77, 4.0), ("suffix", "--suffix 4", 0.9, 1.5), ("suffix", "", 0.81, 1.6),
    )  # fmt: skip
    rows = [
        dict.fromkeys(report_decode.COLUMNS, 0.0)
        | {"checkpoint": "a", "gen_length": 16, "decoder": decoder, "flags": flags, "pass_at_1": share, "problems": 200}
        | {"to_exact": share - 0.8, "times_as_fast": fast, "slowest": fast - 0.1, "fastest": fast + 0.1}
        for decoder, flags, share, fast in points
    ]
    assert report_decode.short_tables(rows).splitlines() == [
        "| `gen_length` 16 | `a` |",
        "|---|---|",
        "| exact | `--steps 16`: 80.0%, 1.2 (1.1 - 1.3) times |",
        "| conv | none; at best 60.0% |",
        "| threshold | `--threshold 0.8`: 78.5%, 3.0 (2.9 - 3.1) times |",
        "| suffix | `--suffix 4`: 90.0%, 1.5 (1.4 - 1.6) times |",
    ]
    best = [row["flags"] for row in report_decode.front(rows, "times_as_fast", -1)]
    assert best == ["--threshold 0.7", "--threshold 0.8", "--threshold 0.9", "", "--suffix 4"]
    (tmp_path / "decoding.csv").write_text("checkpoint,times_as_fast\na,\n")
    with pytest.raises(InputError, match="no row with seconds yet"):
        report_decode.read(tmp_path / "decoding.csv")


def test_the_page_has_the_tables_of_the_measured_run():
    folder = ROOT / "benchmarks/figures"
    rows = report_decode.read(folder / "decoding.csv")
    short, long = report_decode.short_tables(rows), report_decode.long_tables(rows)
    assert short in (ROOT / "docs/decoding.md").read_text()
    assert (folder / "decoding.md").read_text() == "\n".join([report_decode.HEAD, short, *long])


@pytest.mark.full
def test_growth(monkeypatch, capsys):
    monkeypatch.setattr(bench_growth, "SWEEPS", {"rank": (4, 8)})
    monkeypatch.setattr(common, "own_process", lambda *args, **changes: {"seconds": [changes["rank"]], "mb": 1.0})
    _, found = results(bench_growth, monkeypatch, capsys, "--steps")
    assert [row["seconds"] for row in found["steps"]] == [[4], [8]]
    _, found = results(bench_growth, monkeypatch, capsys, "--data", "--rows", 100, "--repeats", 1)
    assert found["data"][0]["rows"] == 100 and 1 < found["data"][0]["start_seconds"][0] < 120
    _, found = results(bench_growth, monkeypatch, capsys, "--text", "--tokens", 10_000, "--repeats", 1)
    assert found["text"][0]["mb"] == pytest.approx(0.04, rel=0.05) and 0.1 < found["text"][0]["memory_gb"] < 8
    _, found = results(bench_growth, monkeypatch, capsys, "--against", ROOT, "--repeats", 1)
    assert all(1 < one["first step"] < one["end"] < 120 for some in found["starts"].values() for one in some)


def test_scale(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--tflops", "1000", "--nvlink", "1", "--network", "1"])
    scale.main()
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["1", "2", "4", "8", "16", "32", "64"]
    one, two = ([float(field.rstrip("%")) for field in line] for line in lines[:2])
    assert one[4] == 0 and two[4] == pytest.approx(2 * 671_088_640 * 2 / 2 / 1e9, abs=0.01)  # half of it, twice
    assert two[5] == pytest.approx(1342, abs=1) and two[2] == pytest.approx(one[2] / 2, abs=0.01)
