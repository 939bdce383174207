"""BASE_4BIT under the real launcher, against a plain training on weights that are rounded to nf4 here, literally.

Only with --full: bitsandbytes lies in a folder of its own (test.sh), as PEFT would import it in all other tests, too.
"""

import re
import shutil

import pytest
import torch
from conftest import ROOT, launch
from safetensors.torch import load_file, save_file
from test_trainer import flags, literal_training, losses, read_csv, tensors

from blockwise.models.hub import weight_files

LEVELS = torch.tensor([  # QLoRA, arXiv 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
LINEAR = r"\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)\.weight$"


def nf4(weight):
    """The nearest level times the largest absolute value, in each 64 consecutive numbers."""
    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(LEVELS).abs().argmin(dim=-1)
    return (LEVELS[nearest] * largest).reshape(weight.shape)


@pytest.fixture(scope="module")
def rounded(base, tmp_path_factory):
    """The base with its linear layers in nf4, written as fp32."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("rounded") / "base")
    for file in weight_files(folder):
        found = load_file(file)
        changed = {k: nf4(v) if re.search(LINEAR, k) and "blocks" in k else v.float() for k, v in found.items()}
        save_file(changed, file, {"format": "pt"})
    return folder


def test_trains_as_on_rounded_weights_and_merges_into_the_unrounded(base, rounded, pt_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".venv/4bit"))
    done = launch(
        2, "train_blockwise.py", *flags("", base, pt_file, BASE_4BIT=True, SAVE_DTYPE="float32"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    literal, _ = literal_training(rounded, pt_file, steps=53 // 8, size=8)
    exact, _ = literal_training(base, pt_file, steps=2, size=8)
    for row, (loss, norm, *_) in zip(read_csv(tmp_path / "out/run_logs/metrics.csv"), literal, strict=True):
        assert float(row["loss"]) == pytest.approx(loss, abs=5e-4)
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=5e-3)
    assert abs(losses(tmp_path)[0] - exact[0][0]) > 5e-3, "nothing was rounded"

    adapter = load_file(tmp_path / "out/run_step0006/adapter/adapter_model.safetensors")
    merged, before = tensors(tmp_path / "out/run_step0006"), tensors(base)
    a, b = (adapter[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight"].float() for x in "AB")
    name = "model.transformer.blocks.1.q_proj.weight"
    assert b.abs().max() > 0 and torch.allclose(merged[name], before[name].float() + 2 * b @ a, atol=1e-6)
    assert "quantization" not in (tmp_path / "out/run_step0006/config.json").read_text()
