"""The validation loss: what it is, that it changes nothing, and that it is the same on any number of ranks."""

import csv
import json
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TRAINING
from faults.outcome import check_finished, results

import masking
from blockwise import packing
from blockwise.cli import InputError
from blockwise.data import derive_seed, schedule
from blockwise.models import base as models
from blockwise.run import constants
from blockwise.run.ranks import Ranks
from blockwise.run.run_folder import RunFolder

VALIDATED = {"VAL_EVERY": 3, "SAVE_DTYPE": "float32"}  # after steps 3 and 4, of which there are checkpoints
ONCE = {"TOTAL_TRAIN_STEPS": 1, "LR": 1e-12, "SAVE_EVERY": 0, "RESUME_EVERY": 0}  # the weights stay those of the base


@pytest.fixture(scope="module")
def val_pt(tmp_path_factory, pt_file):
    """val_pt(n) -> a file of n samples of the data, the last of which has no answer if n is 8."""
    folder = tmp_path_factory.mktemp("held out")

    def write(number):
        samples = torch.load(pt_file, weights_only=True)[20 : 20 + number]
        if number == 8:
            samples[-1]["prompt_len"] = len(samples[-1]["full_ids"])
        torch.save(samples, folder / f"val{number}.pt")
        return folder / f"val{number}.pt"

    return write


def read(folder):
    """{step: row} of metrics.csv, without the columns that are others each time."""
    with open(folder / "out/run ö_logs/metrics.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0])[-1] == "val_loss"
    drop = ("tokens_per_second", "peak_memory_gb")
    return {int(row["step"]): {k: v for k, v in row.items() if k not in drop} for row in rows}


def literal_loss(model_folder, val_pt, script):
    """The loss in plain loops: one sample at a time, logits at all positions, the masks of the whole set at once."""
    samples = [s for s in torch.load(val_pt, weights_only=True) if s["prompt_len"] < len(s["full_ids"])]
    ids = torch.stack([F.pad(s["full_ids"], (0, 192 - len(s["full_ids"])), value=1) for s in samples])
    start = torch.tensor([s["prompt_len"] for s in samples])
    end = torch.tensor([len(s["full_ids"]) for s in samples])
    blockwise = script == "train_blockwise.py"
    blocks = torch.tensor([math.ceil(n / 16) if blockwise else 1 for n in (end - start).tolist()])
    sample, block = schedule(blocks, 1, derive_seed(42, "validation")).T
    assert sorted(sample.tolist()) == list(range(len(samples))) and (block < blocks[sample]).all()
    rates = {"block_size": 16, "suffix_mask_prob": 1.0} if blockwise else {"block_size": 192, "suffix_mask_prob": 0.0}
    masked, supervised, _ = masking.blockwise_masks(
        start[sample], end[sample], block, 192, **rates, mask_prob_eps=1e-3, prefix_mask_rate=0.0,
        generator=torch.Generator().manual_seed(derive_seed(42, "validation", "masks")),
    )  # fmt: skip
    model, tokens = models.load_model(model_folder, torch.float32).eval(), []
    with torch.no_grad():
        for i, mask, wanted in zip(sample, masked, supervised):
            logits = model(torch.where(mask, 4, ids[i])[None]).logits[0]
            tokens.append(F.cross_entropy(logits[wanted], ids[i][wanted], reduction="none").double())
    if blockwise:
        return torch.stack([losses.mean() for losses in tokens if len(losses)]).mean().item()
    return torch.cat(tokens).mean().item()  # LOSS_MEAN "token"


@pytest.mark.parametrize("script, more", [("train_blockwise.py", {}), ("train_fullseq.py", {"LOSS_MEAN": "token"})])
def test_it_is_the_objective_over_all_samples_without_dropout(uninterrupted, val_pt, script, more):
    """Against the checkpoints, after the steps of VAL_EVERY and the last; a line on the screen for each."""
    file = val_pt(8)
    folder = uninterrupted(ranks=1, script=script, VAL_PT=file, **VALIDATED, **more)
    rows = read(folder)
    assert [rows[step]["val_loss"] == "" for step in (1, 2, 3, 4)] == [True, True, False, False]
    said = folder.with_name(f"{folder.name}.output").read_text()
    for step in (3, 4):
        wanted = literal_loss(folder / f"out/run ö_step{step:04d}", file, script)
        assert float(rows[step]["val_loss"]) == pytest.approx(wanted, abs=2e-5)
        loss = float(rows[step]["val_loss"])
        assert said.count(f"validation   loss {loss:.4f} on 7 samples after step {step}\n") == 1
    assert rows[3]["val_loss"] != rows[4]["val_loss"]


def test_it_changes_nothing_else(uninterrupted, forked, val_pt, tmp_path):
    """Losses and checkpoints to the byte, but for the knobs in the cards; without it, metrics.csv is what it was."""
    plain = uninterrupted(ranks=1, SAVE_DTYPE="float32")
    validated = uninterrupted(ranks=1, script="train_blockwise.py", VAL_PT=val_pt(8), **VALIDATED)
    found, wanted = (
        {
            name: data
            for name, data in results(f / "out").items()
            if Path(name).name not in ("README.md", "manifest.json")
        }
        for f in (validated, plain)
    )
    assert found == wanted and {Path(name).suffix for name in found} == {".csv", ".json", ".safetensors", ".jinja"}
    line = (plain / "out/run ö_logs/metrics.csv").read_text().split()[0]
    assert line == "step,loss,lr,grad_norm,supervised_tokens,tokens_per_second,peak_memory_gb"
    derived = [
        json.loads((f / "out/run ö_logs/ablation_config.json").read_text())["derived"] for f in (validated, plain)
    ]
    assert len(derived[0]["val_data"]) == 64 and derived[0] | {"val_data": 0} == derived[1] | {"val_data": 0}
    assert "val_data" not in derived[1]


def test_a_run_that_is_stopped_while_it_validates_resumes_to_the_byte(uninterrupted, forked, val_pt, tmp_path):
    """The signal comes after step 3, before its validation is done: the resumed run makes that, then the checkpoint."""
    knobs = {"script": "train_blockwise.py", "VAL_PT": val_pt(8), **VALIDATED}
    whole = uninterrupted(ranks=1, **knobs)
    events = (whole / "trace0").read_text().splitlines()
    stepped = next(i for i, event in enumerate(events) if event.endswith(" stepped 3"))
    writes = next(event for event in events[stepped:] if event.endswith("/metrics.csv"))
    stopped = forked(tmp_path / "run", **knobs, faults={"at": [f"^{writes.split()[0]} ", signal.SIGTERM]})
    assert stopped.codes == [75] and "stopped      by SIGTERM, after step 3" in stopped.output
    assert read(tmp_path / "run") == {s: row | {"val_loss": ""} for s, row in read(whole).items() if s <= 3}
    assert not list((tmp_path / "run/out").glob("*_step*")) and "validation" not in stopped.output
    resumed = forked(tmp_path / "run", RESUME=True, **knobs)
    assert resumed.codes == [0] and resumed.output.count("validation   loss ") == 2
    assert read(tmp_path / "run") == read(whole)
    check_finished(tmp_path / "run/out", whole / "out")


def test_it_is_the_same_on_any_number_of_ranks(forked, base, val_pt, tmp_path):
    """To the digit, with 3 samples in micro-batches of 2; also a single one, of which a rank gets none, in bf16."""
    losses = []
    for ranks in (1, 2):
        done = forked(tmp_path / str(ranks), ranks, **ONCE, GRAD_ACC=2 // ranks, VAL_PT=val_pt(3))
        assert not any(done.codes), done.output
        losses.append(read(tmp_path / str(ranks))[1]["val_loss"])
    assert losses[0] == losses[1]
    assert float(losses[0]) == pytest.approx(literal_loss(base, val_pt(3), "train_blockwise.py"), abs=2e-5)
    assert not any(forked(tmp_path / "bf16", 2, **ONCE, BF16=True, VAL_PT=val_pt(1)).codes)
    wanted = literal_loss(base, val_pt(1), "train_blockwise.py")
    assert float(read(tmp_path / "bf16")[1]["val_loss"]) == pytest.approx(wanted, abs=0.1)


def test_block_diffusion_validates_on_packed_texts(forked, tmp_path):
    """The micro-batches of two streams need an attention mask each, the last one a smaller one."""
    ids = torch.randint(8, 400, (3 * 32,), generator=torch.Generator().manual_seed(0)).int().numpy()
    packing.write(tmp_path / "texts.pt", [ids], 32)
    done = forked(tmp_path / "run", script="train_bd3lm.py", **ONCE, VAL_PT=tmp_path / "texts.pt", MAX_LEN=192)
    assert done.codes == [0] and "on 3 samples after step 1" in done.output
    assert 4 < float(read(tmp_path / "run")[1]["val_loss"]) < 20


def test_which_runs_with_validation_are_resumed(tmp_path, val_pt):
    """Not with other samples; the message names their file."""
    shutil.copy(val_pt(3), tmp_path / "val.pt")
    ranks, folder = Ranks(0, 1, 0, 1, torch.device("cpu")), RunFolder(str(tmp_path / "run"))
    knobs = TRAINING | {"DATA_PT": val_pt(8), "MODEL_NAME": "m", "VAL_EVERY": 0, "TRACKER": ""}

    def compare(before, now):
        constants.compare(folder, *(made(val) for val in (before, now)), ranks)

    def made(val):
        return (
            val
            if isinstance(val, dict)
            else constants.constants_of(SimpleNamespace(**knobs, VAL_PT=val), ranks, 4, "b")
        )

    val = str(tmp_path / "val.pt")
    before = made(val)
    compare(before, val)
    for was, now, said in (
        ("", val, f"VAL_PT was '', now it is '{val}'"),
        (val, "", f"VAL_PT was '{val}', now it is ''"),
    ):
        with pytest.raises(InputError, match=f"is another run: {said}"):
            compare(was, now)
    shutil.copy(val_pt(1), tmp_path / "val.pt")
    with pytest.raises(InputError, match=f"the content of {val} has changed"):
        compare(before, val)
