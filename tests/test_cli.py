"""Scripts that are started where the packages are not installed."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from blockwise.cli import PACKAGES

MODEL = ("--model", "demo/base")
SCRIPTS = {  # flags with which a script comes to its first package
    "a2d.py": (*MODEL, "--output", "x"),
    "chat.py": MODEL,
    "eval.py": (*MODEL, "--data", "train.jsonl"),
    "generate.py": (*MODEL, "--prompt", "a"),
    "plot_loss.py": ("loss.csv",),
    "pt.py": (*MODEL, "--dataset", "data", "--output", "x.pt"),
    "train_bd3lm.py": (),
    "train_blockwise.py": (),
    "train_fullseq.py": (),
    "train_grpo.py": (),
    "train_r2ft.py": (),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (folder / "loss.csv").write_text("step,loss\n1,2.0\n")
    return folder / "bin/python"


def test_no_script_is_left_out():
    assert {path.name for path in ROOT.glob("*.py")} == {*SCRIPTS, "masking.py"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_packages_a_script_says_how_to_get_them(bare, script):
    command, folder = [bare, ROOT / script, *SCRIPTS[script]], bare.parent.parent
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True)
    found = re.fullmatch(r"error: the package (\w+) is not in this Python, (.*): (.*)\.\n", done.stderr)
    assert done.returncode == 1 and found, done.stderr
    assert found[1] in PACKAGES and found[2] == str(bare)
    assert found[3] == "`source .venv/bin/activate`, or `pip install -r requirements.txt`"


def test_other_modules_that_are_missing_are_no_matter_of_packages(bare):
    code = "from blockwise.cli import run_script\nrun_script(lambda: __import__('blockwise.nothing'))"
    done = subprocess.run([bare, "-c", code], cwd=ROOT, env={}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("No module named 'blockwise.nothing'\n")


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {re.split("[=# ]", line)[0].replace("-", "_") for line in lines if line and "# tests/" not in line}
    assert needed - {"", "ruff"} <= PACKAGES
