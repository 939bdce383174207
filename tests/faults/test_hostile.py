"""Files that would run code if they were trusted. Each writes a file when it is executed; none may appear."""

import json
import runpy
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT


class Attack:
    """What a pickle of this does when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


CODE = """
open({mark!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
class Config(PretrainedConfig): model_type = "llada"
class Model(PreTrainedModel): config_class = Config
class Tokenizer(PreTrainedTokenizer): pass
"""


@pytest.fixture
def mark(tmp_path):
    """The file that an attack writes."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def model(base, tmp_path, mark):
    """A model folder whose config and tokenizer name code that lies next to them, and a pickle of its weights."""
    folder = tmp_path / "model ö"
    shutil.copytree(base, folder)
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}
    tokenizer = {"AutoTokenizer": [None, "code.Tokenizer"]}
    for file, auto_map in (("config.json", names), ("tokenizer_config.json", tokenizer)):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"auto_map": auto_map}))
    torch.save(Attack(mark), folder / "pytorch_model.bin")
    return folder


def test_the_attacks_would_work(tmp_path, mark):
    """If the file were trusted."""
    torch.save(Attack(tmp_path / "other"), tmp_path / "samples.pt")
    torch.load(tmp_path / "samples.pt", weights_only=False)
    assert (tmp_path / "other").exists()
    exec(CODE.format(mark=str(tmp_path / "third")), {})
    assert (tmp_path / "third").exists()


@pytest.mark.parametrize("where", ["the list", "a sample", "the ids"])
def test_samples_that_are_code(forked, tmp_path, mark, record_property, where):
    record_property("fault", "hostile files")
    attack = Attack(mark)
    samples = {"the list": attack, "a sample": [attack], "the ids": [{"prompt_len": 1, "full_ids": attack}]}[where]
    torch.save(samples, tmp_path / "samples.pt")
    done = forked(tmp_path / "run", DATA_PT=tmp_path / "samples.pt")
    assert done.codes == [1] and "is truncated, damaged or was not written by pt.py" in done.output
    assert not list((tmp_path / "run").iterdir())


def test_a_model_folder_with_code_is_trained_with_our_own(forked, tmp_path, model, mark, record_property):
    """And its code is in the checkpoint, where it is not executed either."""
    record_property("fault", "hostile files")
    done = forked(tmp_path / "run", MODEL_NAME=model, SAMPLE_EVERY=4)
    assert done.codes == [0], done.output
    assert (tmp_path / "run/out/run ö_step0004/code.py").exists()


def test_the_other_scripts_do_not_run_it_either(tmp_path, model, dataset_folder, mark, monkeypatch, record_property):
    record_property("fault", "hostile files")

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, "--model", str(model), *map(str, flags)])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    run("pt.py", "--dataset", dataset_folder, "--output", tmp_path / "samples.pt")
    assert (tmp_path / "samples.pt").exists()
    run("generate.py", "--gen_length", 8, "--block_length", 8, "--steps", 8, "--prompt", "hello")


def test_a_resume_point_that_is_code(forked, tmp_path, mark, record_property):
    record_property("fault", "hostile files")
    assert forked(tmp_path / "run", faults={"at": ["step 2$", signal.SIGUSR1]}).codes == [75]
    for point in (tmp_path / "run/out").glob("*/resume_step*"):
        torch.save(Attack(mark), point / "rank0.safetensors")
        torch.save(Attack(mark), point / "optimizer.pt")
        torch.save(Attack(mark), point / "manifest.json")
    done = forked(tmp_path / "run", RESUME=True)
    assert done.codes == [1] and "no resume point of out/run ö_logs is undamaged" in done.output


def test_adapters_that_are_code(tmp_path, base, mark, monkeypatch, capsys, record_property):
    record_property("fault", "hostile files")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        torch.save(Attack(mark), tmp_path / "adapter" / name)
    flags = ("--model", base, "--prompt", "hello", "--adapter", tmp_path / "adapter")
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    with pytest.raises(SystemExit, match="adapter cannot be used with this model"):
        runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")
