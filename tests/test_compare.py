"""python -m blockwise.compare: its numbers against those of whole models, and bad input."""

import re
import shutil

import pytest
import torch
from conftest import run
from peft import PeftModel
from safetensors.torch import load_file, save_file

from blockwise.models import base as models
from blockwise.models.hub import weight_files

SCRIPT = "blockwise.compare"  # of the fixture `call`
GAP = re.compile(
    r"merged against unmerged logits: mean difference (\S+), largest (\S+), same first choice at (\S+)% of (\d+) "
    r"positions \(the adapters moved them by (\S+)\)"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forked):
    """A checkpoint of a training, and what the training printed."""
    folder = tmp_path_factory.mktemp("run")
    done = forked(folder, CKPT_DIR="out/run", SAVE_EVERY=0, RESUME_EVERY=0)
    assert not any(done.codes), done.output
    return folder / "out/run_step0004", done.output


def numbers(text):
    (found,) = GAP.findall(text)
    return [float(number) for number in found]


@torch.no_grad()
def gap_of_first_samples(base, checkpoint, pt_file):
    """The numbers of that line, computed with whole models: padded to the longest of the samples, in fp32."""
    samples = torch.load(pt_file, weights_only=True)[:4]
    inputs = torch.nn.utils.rnn.pad_sequence([sample["full_ids"] for sample in samples], True, padding_value=1)
    answer = torch.zeros_like(inputs, dtype=torch.bool)
    for row, sample in zip(answer, samples):
        row[sample["prompt_len"] : len(sample["full_ids"])] = True
    inputs[answer] = 4  # as decoding first sees them
    both = models.load_model(base, torch.float32), models.load_model(checkpoint, torch.float32)
    untuned, merged = (model(inputs).logits[answer] for model in both)
    tuned = PeftModel.from_pretrained(both[0], checkpoint / "adapter").eval()(inputs).logits[answer]
    gap, same = (merged - tuned).abs(), (merged.argmax(-1) == tuned.argmax(-1)).double().mean()
    moved = (tuned - untuned).abs().mean()
    return [gap.mean().item(), gap.max().item(), 100 * same.item(), len(tuned), moved.item()]


def test_the_numbers_are_those_of_whole_models(trained, pt_file, base, tmp_path):
    """The training pads to MAX_LEN, and the model sees the padding: so the training's line has other numbers."""
    checkpoint, output = trained
    done = run("blockwise.compare", "--checkpoint", checkpoint, "--data", pt_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert GAP.fullmatch(done.stdout.strip()) and not list(tmp_path.iterdir())
    found = numbers(done.stdout)
    assert found == pytest.approx(gap_of_first_samples(base, checkpoint, pt_file), rel=0.06)  # it has two digits
    assert found[3] == numbers(output)[3] and found[4] > 10 * found[0] > 0


def test_a_checkpoint_that_was_merged_wrongly_shows(trained, pt_file, base, tmp_path):
    """With one adapted tensor of the base in it."""
    wrong = shutil.copytree(trained[0], tmp_path / "wrong")
    name = "model.transformer.blocks.1.up_proj.weight"
    before = {key: weight for file in weight_files(base) for key, weight in load_file(file).items()}
    for file in weight_files(wrong):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: before[name]}, file, metadata={"format": "pt"})
    done = run("blockwise.compare", "--checkpoint", wrong, "--data", pt_file)
    assert done.returncode == 0 and numbers(done.stdout)[0] > 5 * numbers(trained[1])[0], done.stderr


def test_another_place_of_the_base(trained, pt_file, base, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    flags = ("--checkpoint", trained[0], "--data", pt_file)
    done, again = run("blockwise.compare", *flags, "--base", moved), run("blockwise.compare", *flags)
    assert done.returncode == 0 and done.stdout == again.stdout and "Warning" not in done.stderr, done.stderr


def test_bad_input_is_one_sentence(trained, pt_file, base, tmp_path, call):
    checkpoint, long = trained[0], tmp_path / "long.pt"
    torch.save([{"prompt_len": 1, "full_ids": torch.arange(8, 400).repeat(3)}], long)
    empty = shutil.copytree(checkpoint, tmp_path / "empty")
    (empty / "adapter/adapter_model.safetensors").unlink()
    for flags, said in (
        (("--checkpoint", base, "--data", pt_file), "has no folder adapter/, so nothing to compare with"),
        (("--checkpoint", tmp_path / "missing", "--data", pt_file), "has no folder adapter/"),
        (("--checkpoint", empty, "--data", pt_file), "adapter_model.safetensors is missing"),
        (("--checkpoint", checkpoint, "--data", tmp_path / "missing.pt"), "missing.pt does not exist"),
        (("--checkpoint", checkpoint, "--data", long), "sample 0 has 1176 tokens, more than MAX_LEN=1024"),
        (("--checkpoint", checkpoint, "--data", pt_file, "--base", tmp_path / "no"), "no is not a local folder"),
    ):
        code, out, err = call(*flags)
        assert code == 1 and said in err and err.count("\n") == 1 and not out, err
