"""A loss or a gradient that is NaN or infinite never reaches the weights, and is named.

The fault is in the base: the embedding of one token is non-finite, so that every sample with that token has a
non-finite loss.
"""

import json
import math
import shutil
import signal

import pytest
import torch
from outcome import losses
from safetensors.torch import load_file, save_file

KNOBS = {"TOTAL_TRAIN_STEPS": 6, "SAVE_EVERY": 0}


@pytest.fixture(scope="module")
def token(pt_file):
    """A token that no sample has."""
    used = {token for sample in torch.load(pt_file, weights_only=True) for token in sample["full_ids"].tolist()}
    return max(set(range(8, 400)) - used)


@pytest.fixture
def broken(base, tmp_path, pt_file, token):
    """broken(value, numbers) -> knobs of a base with that embedding of the token, and of samples: these have it."""

    def make(value, numbers):
        shutil.copytree(base, tmp_path / "base")
        for file in (tmp_path / "base").glob("*.safetensors"):
            tensors = load_file(file)
            if "model.transformer.wte.weight" in tensors:
                tensors["model.transformer.wte.weight"][token] = value
                save_file(tensors, file, {"format": "pt"})
        samples = torch.load(pt_file, weights_only=True)
        for number in numbers:
            samples[number]["full_ids"][0] = token
        torch.save(samples, tmp_path / "samples.pt")
        return KNOBS | {"MODEL_NAME": tmp_path / "base", "DATA_PT": tmp_path / "samples.pt"}

    return make


def bad_steps(folder):
    (file,) = folder.glob("out/*_logs/bad_steps.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("ranks, bf16, value", [(1, False, math.nan), (2, True, math.inf)])
def test_a_bad_sample_is_named_and_its_step_skipped(forked, broken, tmp_path, record_property, ranks, bf16, value):
    record_property("fault", "non-finite losses and gradients")
    knobs = broken(value, [17]) | {"BF16": bf16, "TOTAL_TRAIN_STEPS": 12 // ranks}
    done = forked(tmp_path / "run", ranks, **knobs)
    assert not any(done.codes), done.output
    (bad,) = bad_steps(tmp_path / "run")
    assert 17 in bad["rows"] and len(bad["rows"]) == 2 and bad["grad_norm"] == "inf"  # those of its micro-batch
    assert done.output.count("bad step     {") == 1
    skipped = [step for step, loss in enumerate(losses(tmp_path / "run/out"), start=1) if math.isnan(loss)]
    assert skipped == [bad["step"]]
    (checkpoint,) = (tmp_path / "run/out").glob("*_step00*")
    before = [tensor for file in (tmp_path / "base").glob("*.safetensors") for tensor in load_file(file).items()]
    after = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(after[name].isfinite().all() for name, tensor in before if tensor.isfinite().all())

    stop = {"at": [f"step {bad['step']}$", signal.SIGUSR1]}  # with a resume point before the bad step, and one after it
    assert set(forked(tmp_path / "stopped", ranks, **knobs, faults=stop).codes) == {75}
    points = [tmp_path / f"stopped/out/run ö_logs/resume_step{bad['step'] - i:04d}" for i in (1, 0)]
    for rank in range(ranks):
        tensors = [(point / f"rank{rank}.safetensors").read_bytes() for point in points]
        assert tensors[0] == tensors[1] and len(tensors[0]) > 10_000
    scheduler = [json.loads((point / "manifest.json").read_text())["scheduler"] for point in points]
    assert scheduler[0] == scheduler[1]
    resumed = forked(tmp_path / "stopped", ranks, **knobs, RESUME=True)
    assert not any(resumed.codes), resumed.output
    for name in ("train_loss.csv", "bad_steps.jsonl"):
        (one,), (other,) = tmp_path.glob(f"run/out/*/{name}"), tmp_path.glob(f"stopped/out/*/{name}")
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_in_a_row_stop_the_run(forked, broken, tmp_path, record_property, ranks):
    record_property("fault", "non-finite losses and gradients")
    done = forked(tmp_path / "run", ranks, **broken(math.nan, range(53)), MAX_BAD_STEPS=2)
    assert done.codes == [1] * ranks and "2 bad steps in a row, see out/run ö_logs/bad_steps.jsonl" in done.output
    assert [(bad["step"], len(bad["rows"])) for bad in bad_steps(tmp_path / "run")] == [(1, 4 * ranks), (2, 4 * ranks)]
    assert all(map(math.isnan, losses(tmp_path / "run/out"))) and len(losses(tmp_path / "run/out")) == 2
    assert not list((tmp_path / "run/out").glob("*_step*")) and "Traceback" not in done.output


def test_a_non_finite_gradient_is_enough(forked, tmp_path, record_property):
    """The adapters start at 0, so that however much they count, the loss is that of the base; not so its gradient."""
    record_property("fault", "non-finite losses and gradients")
    done = forked(tmp_path / "run", 2, **KNOBS, LORA_ALPHA=10**38, MAX_BAD_STEPS=2)
    assert done.codes == [1, 1] and "2 bad steps in a row" in done.output
    assert all(map(math.isfinite, losses(tmp_path / "run/out"))) and len(losses(tmp_path / "run/out")) == 2
    assert [(bad["grad_norm"], len(set(bad["rows"]))) for bad in bad_steps(tmp_path / "run")] == [("inf", 8)] * 2


def test_bad_steps_that_a_stop_lies_between_are_still_in_a_row(forked, broken, tmp_path, record_property):
    record_property("fault", "non-finite losses and gradients")
    knobs = broken(math.nan, range(53)) | {"MAX_BAD_STEPS": 3}
    assert forked(tmp_path / "run", **knobs, faults={"at": ["step 2$", signal.SIGUSR1]}).codes == [75]
    done = forked(tmp_path / "run", **knobs, RESUME=True)
    assert done.codes == [1] and [bad["step"] for bad in bad_steps(tmp_path / "run")] == [1, 2, 3]
    assert "resumes after step 3" in done.output  # that run had no other resume point
    done = forked(tmp_path / "run", **knobs | {"MAX_BAD_STEPS": 7}, RESUME=True)
    assert done.codes == [0] and [bad["step"] for bad in bad_steps(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
