"""The README is a promise: its commands are run as they stand there, its links and knobs exist.

The two commands at its top are what CI runs. Commands that need GPUs, a hub or other packages say so in a comment.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

import train_blockwise

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like the clone after demo.sh: the repository's files, and demo_run with its problems."""
    folder = tmp_path_factory.mktemp("clone")
    for file in ROOT.iterdir():
        if file.suffix in (".py", ".sh", ".txt") or file.name in ("adapters", "benchmarks", "demo"):
            (folder / file.name).symlink_to(file)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    not_work = shutil.ignore_patterns("work")
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=not_work)  # the report is written there
    (folder / "demo_run").mkdir()
    (folder / "demo_run/blockwise_step0100").symlink_to(ROOT / "demo/base")
    for name, rows in (("data", 1600), ("heldout", 16)):
        make = ("experiments/make_data.py", "--output", folder / "demo_run" / name, "--rows", rows)
        assert run(*make).returncode == 0
    return folder


def test_every_command_runs_or_says_what_it_needs(clone):
    commands = [line for block in blocks("bash") for line in block.splitlines() if "# needs" not in line]
    assert commands[:2] == ["bash demo.sh", "bash test.sh"]  # what .ci/run runs
    # run elsewhere: the packages are installed already, and the large vocabulary takes minutes
    script = "\n".join(line for line in commands[2:] if not line.startswith("pip install"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        script = script.replace("deepspeed ", f"deepspeed --master_port {probe.getsockname()[1]} ")
    small = script.replace("benchmarks.bench_decode", "benchmarks.bench_decode --limit 4 --repeats 1")
    env = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    done = subprocess.run(["bash", "-euc", small], cwd=clone, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (clone / "loss.png").exists() and (clone / "ckpts_mine_step0050/config.json").exists()
    for row in re.findall(r"^\| (\d+) \| ([\d.]+) \| (True|False) \| (\d+) \| (\d+) \|$", README, re.MULTILINE):
        assert re.search(r"\s+".join(map(re.escape, row)), done.stdout), (
            row
        )  # the memory table is what its command prints

    loading = blocks("python")[0]
    assert "# needs" not in loading and all("# needs" in block for block in blocks("python")[1:])
    done = subprocess.run([sys.executable, "-c", loading], cwd=clone, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_links_files_and_knobs_exist():
    for target in re.findall(r"\]\(([^)#][^)]*)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub names them
    for anchor in re.findall(r"\]\(#([^)]*)\)", README):
        assert anchor in anchors, anchor
    assert not re.findall(r"^[A-Z]+$|\| [A-Z]{4,} \|", README, re.MULTILINE), "a place that is still to be filled"
    named = set(re.findall(r"--([A-Z][A-Z_0-9]+)=", README)) | set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z_0-9]+)`", README))
    assert named - vars(train_blockwise).keys() - {"PYTHONPATH", "NAME"} == set()
