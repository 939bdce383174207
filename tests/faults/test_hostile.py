"""Files that would run code if they were trusted. Each writes a file when it is executed; none may appear."""

import json
import shutil
import signal

import pytest
import torch
from conftest import run


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
    """A model folder whose config and tokenizer name code that lies beside them, and a pickle of its weights."""
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
    torch.save(Attack(tmp_path / "other"), tmp_path / "rows.pt")
    torch.load(tmp_path / "rows.pt", weights_only=False)
    assert (tmp_path / "other").exists()
    exec(CODE.format(mark=str(tmp_path / "third")), {})
    assert (tmp_path / "third").exists()


@pytest.mark.parametrize("where", ["the list", "a row", "the ids"])
def test_rows_that_are_code(forked, tmp_path, mark, record_property, where):
    record_property("fault", "hostile files")
    attack = Attack(mark)
    rows = {"the list": attack, "a row": [attack], "the ids": [{"prompt_len": 1, "full_ids": attack}]}[where]
    torch.save(rows, tmp_path / "rows.pt")
    done = forked(tmp_path / "run", PT_FILE=tmp_path / "rows.pt")
    assert done.codes == [1] and "is truncated, damaged or was not written by pt.py" in done.output
    assert not list((tmp_path / "run").iterdir())


def test_a_model_folder_with_code_is_trained_with_our_own(forked, tmp_path, model, mark, record_property):
    """And its code is in the checkpoint, where it is not executed either."""
    record_property("fault", "hostile files")
    done = forked(tmp_path / "run", MODEL=model, SAMPLE_EVERY=4)
    assert done.codes == [0], done.output
    assert (tmp_path / "run/out/run ö_step0004/code.py").exists()


def test_the_other_scripts_do_not_run_it_either(tmp_path, model, dataset_folder, mark, record_property):
    record_property("fault", "hostile files")
    done = run("pt.py", "--model", model, "--dataset", dataset_folder, "--output", tmp_path / "rows.pt")
    assert done.returncode == 0, done.stderr
    flags = ("--gen_length", 8, "--block_length", 8, "--steps", 8, "--prompt", "hello")
    done = run("generate.py", "--model", model, *flags)
    assert done.returncode == 0, done.stderr


def test_a_resume_point_that_is_code(forked, tmp_path, mark, record_property):
    record_property("fault", "hostile files")
    assert forked(tmp_path / "run", faults={"at": ["step 2$", signal.SIGUSR1]}).codes == [75]
    for point in (tmp_path / "run/out").glob("*/resume_step*"):
        torch.save(Attack(mark), point / "rank0.safetensors")
        torch.save(Attack(mark), point / "optimizer.pt")
        torch.save(Attack(mark), point / "manifest.json")
    done = forked(tmp_path / "run", RESUME=True)
    assert done.codes == [1] and "no resume point of out/run ö_logs is undamaged" in done.output
