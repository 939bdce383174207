"""What several tests need: a tiny checkpoint in LLaDA's format, rows for it, and the real launcher."""

import importlib
import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from stories import problem

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the tests need no GPU, and compare fp32 numbers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ["WANDB_MODE"] = "offline"  # and no network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test.sh runs as many tests at a time as there are cores
ROOT = Path(__file__).parent.parent
settings.register_profile("default", deadline=None, max_examples=50, derandomize=False)
settings.register_profile("full", settings.get_profile("default"), max_examples=300)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all tests, all faults of tests/faults, more random examples")


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("full") else "default")


def pytest_ignore_collect(collection_path, config):
    """The packages of requirements-lm-eval.txt and requirements-4bit.txt are there with --full only."""
    return (
        True if collection_path.name in ("test_lm_eval.py", "test_4bit.py") and not config.getoption("full") else None
    )


def pytest_collection_modifyitems(config, items):
    """Without --full, tests that are marked so are left out."""
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_terminal_summary(terminalreporter):
    """How many faults of each kind were tried, and survived."""
    passed = terminalreporter.stats.get("passed", [])
    faults = Counter(value for report in passed for name, value in report.user_properties if name == "fault")
    for kind, number in sorted(faults.items()):
        terminalreporter.write_line(f"{number:>5} {kind}")


def problems(number, seed):
    rng = random.Random(seed)
    return [problem(rng) for _ in range(number)]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with LLaDA's special tokens (mask id 4) and chat template."""
    from blockwise.prompts import METAMATH
    from experiments.make_base import make_tokenizer

    return make_tokenizer((METAMATH.wrapped(row["query"]) + row["response"] for row in problems(200, 0)), 400)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """A checkpoint folder: 2 layers, width 64, several shards, bf16, random weights large enough to matter."""
    from blockwise.models import llada
    from experiments.make_base import make_config

    folder = tmp_path_factory.mktemp("base checkpoint ö")  # spaces and other letters must not matter
    torch.manual_seed(0)
    model = llada.LLaDAForCausalLM(make_config(400, 64, 2))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3 if "embed" in name else 0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="80KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base):
    """A folder of LoRA adapters on the base, as in a checkpoint's folder adapter/, with which answers are others."""
    from peft import LoraConfig, get_peft_model

    from blockwise.models import base as models
    from blockwise.models import checkpoint

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(models.load_model(base, torch.float32), config, autocast_adapter_dtype=False)
    folder = tmp_path_factory.mktemp("run_step0004") / "adapter"
    checkpoint.save_adapter(model, str(base), folder)
    return folder


@pytest.fixture(scope="session")
def adapted(base, adapter):
    """The base with those adapters, loaded by PEFT itself, in fp32 and evaluation mode."""
    from peft import PeftModel

    from blockwise.models import base as models

    return PeftModel.from_pretrained(models.load_model(base, torch.float32), adapter).get_base_model().eval()


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    """53 problems as jsonl: a number that no batch size divides."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems(53, 1)))
    return folder


@pytest.fixture(scope="session")
def pt_file(tmp_path_factory, base, dataset_folder):
    """Those problems as a .pt file, made by pt.py; the longest sample has fewer than 192 tokens."""
    import pt

    file = tmp_path_factory.mktemp("rows") / "train.pt"
    flags = ("--model", base, "--dataset", dataset_folder, "--output", file, "--max_len", 192)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pt.py", *map(str, flags)])
        pt.main()
    return file


@pytest.fixture
def call(request, monkeypatch, capsys):
    """call(*flags) -> exit code, stdout, stderr of the script that the test's file is named after, in this process.

    Anything but the two ways in which a script may end on purpose goes up to pytest: that would be a traceback.
    """
    from blockwise import cli

    name = getattr(request.module, "SCRIPT", request.module.__name__.removeprefix("test_"))
    script = importlib.import_module(name)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            cli.run_script(script.main)
        except SystemExit as end:
            code = end.code
        if isinstance(code, str):  # what Python does with it, once the progress bar is gone
            print(code, file=sys.stderr)
            code = 1
        return code, *capsys.readouterr()

    return call


def run(script, *args, cwd=ROOT, env=None):
    """Runs a file of the repository with this Python, or a module. Returns the process, with its output as text."""
    module = not script.endswith(".py")
    command = [sys.executable, *(["-m", script] if module else [str(ROOT / script)]), *map(str, args)]
    env = os.environ | ({"PYTHONPATH": str(ROOT)} if module else {}) | (env or {})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@contextmanager
def locked(folder, shared=False):
    """Another process holds the lock of a folder; see files.lock."""
    code = "import sys; from pathlib import Path; from blockwise.run import files; "
    code += f"files.lock(Path(sys.argv[1]), {shared}); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, folder]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if not process.stdout.readline():
            raise subprocess.CalledProcessError(process.wait(), command)
        yield
        process.kill()


def arguments(script, knobs):
    """Knobs as flags of a trainer."""
    return [f"--{name}={value}" for name, value in knobs.items() if "fullseq" not in script or name != "BLOCK_SIZE"]


@contextmanager
def taken(port=0):
    """Somebody listens at a port, 0 for a free one: this process, or whoever has it already. Yields its number."""
    with socket.socket() as server:
        with suppress(OSError):
            server.bind(("", port))
            server.listen()
        yield server.getsockname()[1] or port


def launcher_command(ranks, script, *args):
    """The command that runs a trainer through the real deepspeed launcher on CPU ranks, and its environment."""
    module = not script.endswith(".py")
    what = ["--module", script] if module else [ROOT / script]
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks, *what]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(ROOT)} if module else {}
    return [str(part) for part in (*command, *args)], env


def launch(ranks, script, *args, cwd):
    """Runs a trainer in the folder `cwd` by that command, as if another run had its port. Returns the process."""
    command, env = launcher_command(ranks, script, *args)
    with taken(29500):  # which the launcher gives to every run
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model(base):
    """The tiny base, for decoding in fp32."""
    from blockwise.models import base as models

    return models.load_model(base, torch.float32).eval()


@pytest.fixture(scope="session")
def fork():
    """fork(cwd, ranks, script, *argv, runs=..., faults=...) runs a script on several ranks; see faults/server.py.

    Returns the exit codes of its ranks, the seconds it took, and what it said, which is in {cwd}.output, too.
    """
    command, env = [sys.executable, ROOT / "tests/faults/server.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def start(cwd, ranks, script, *argv, runs=1, faults=None):
        output = cwd.with_name(f"{cwd.name}.output")
        output.unlink(missing_ok=True)
        faults = {"folder": str(cwd / "out"), **faults} if faults else {}
        request = {"script": script, "argv": [*map(str, argv)], "ranks": ranks, "runs": runs, "cwd": str(cwd)}
        cwd.mkdir(exist_ok=True)
        server.stdin.write(json.dumps(request | {"output": str(output), "faults": faults}) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        return SimpleNamespace(**answer, output=output.read_text())

    yield start
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="session")
def forked(fork, base, pt_file):
    """forked(cwd, ranks=1, script=..., runs=1, faults=..., **knobs) runs a training; see fork."""

    def train(cwd, ranks=1, script="train_blockwise.py", runs=1, faults=None, **changes):
        knobs = TRAINING | {"MODEL_NAME": base, "DATA_PT": pt_file} | changes
        return fork(cwd, ranks, script, *arguments(script, knobs), runs=runs, faults=faults)

    return train


@pytest.fixture(scope="session")
def uninterrupted(forked, tmp_path_factory):
    """uninterrupted(ranks=..., ...) -> the folder of such a run of `forked`, made once, with its events.

    Those of rank 0 are in the file trace0, and so on.
    """
    runs = {}

    def train(**how):
        key = repr(sorted(how.items()))
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("uninterrupted")
            done = forked(runs[key], **how, faults={"trace": str(runs[key] / "trace")})
            assert not any(done.codes), done.output
        return runs[key]

    return train


# 4 steps, a checkpoint after 3 and 4, a resume point after each; dropout, to see whether its random numbers come back
TRAINING = {
    "MASK_ID": 4, "MAX_LEN": 192, "LORA_RANK": 4, "LORA_DROPOUT": 0.1, "LR": 1e-2, "BF16": False,
    "MICRO_BSIZE": 2, "GRAD_ACC": 2, "BLOCK_SIZE": 16, "CKPT_DIR": "out/run ö", "TOTAL_TRAIN_STEPS": 4,
    "SAVE_EVERY": 3, "RESUME_EVERY": 1,
}  # fmt: skip
