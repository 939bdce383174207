"""benchmarks/gpu.sh, tried with tiny models on the CPU, and the tables that are made of what it measures."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, gpu, gpu_rows, gpu_tables
from blockwise.cli import InputError


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The lines of one run of all parts."""
    file = tmp_path_factory.mktemp("gpu") / "lines.jsonl"
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "benchmarks/gpu.sh", "--toy", "--results", file]
    done = subprocess.run(command, cwd=file.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line["status"] == "ok" for line in found), done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == found[-1]  # each line is on the screen, too
    return {name: [line for line in found if line["part"] == name] for name in gpu.PARTS}


def test_every_part_has_its_lines(lines):
    numbers = {"check": 8, "losses": 2, "train": 5, "plain": 8, "decode": 6, "bd3lm": 2, "full": 1, "start": 1}
    assert {name: len(found) for name, found in lines.items()} == numbers
    for line in sum(lines.values(), []):
        assert line["toy"] and line["torch"] == torch.__version__ and line["driver"] is None


def test_both_devices_give_the_same(lines):
    """Here both are the CPU; but one of the trainings is a loop in plain PyTorch, without DeepSpeed."""
    assert all(line["same_tokens"] == 1.0 and line["tokens"] == 64 for line in lines["check"])
    for line in lines["losses"]:
        assert len(line["losses"]) == 6 and line["difference"] < 1e-4
        assert line["wanted"][0] - min(line["wanted"]) > 0.5  # something was learnt, so that the steps are compared


def test_what_is_measured_of_a_training(lines):
    for line in lines["train"] + lines["bd3lm"] + lines["full"]:
        row = line["row"]
        samples, streams = 2 * row.get("GRAD_ACC", 1), 1 + (row["script"] == "train_bd3lm")
        assert line["tokens"] == samples * 256 * streams and len(line["seconds"]) == 5
        assert min(line["seconds"]) > 0 and line["matmul_tflops"] > 0 and 0.1 < line["allocated_gb"] < 8
        most = {"train_blockwise": 32, "train_fullseq": 192, "train_bd3lm": 192}[row["script"]]
        assert 0 < line["supervised"] <= samples * most
    assert [line["loss"] for line in lines["plain"]] == pytest.approx([lines["plain"][0]["loss"]] * 8, rel=0.1)


def test_operations_of_all_weights_are_those_of_the_matrix_products():
    """Against torch's own counter, which knows attention as matrix products only."""
    model = common.random_weights(gpu_rows.config_of("toy"), torch.device("cpu"))
    ids, heads = torch.arange(3 * 128).view(3, 128), torch.arange(3 * 128).view(3, 128) % 10 == 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=ids, logits_to_keep=heads).logits.sum().backward()
    counted = gpu_rows.flops(model.config, 0, 3 * 128, 128, int(heads.sum()))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.002)
    # by hand: embedding and head, layers of 4 D^2 + 3 D M and two norms, a norm; what the tables call 1.4 billion
    by_hand = 2 * 126464 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 6144 + 2 * 2048) + 2048
    assert common.parameters(gpu_rows.config_of("1b"), 8)[0] == by_hand == pytest.approx(1.4e9, rel=0.01)


def test_decoding_writes_all_tokens(lines):
    passes = {line["way"]: line["passes"] for line in lines["decode"]}
    assert passes.pop("threshold, all of a block at once") == 4 and set(passes.values()) == {8}  # 32 tokens
    assert all(line["written"] == 64 and len(line["seconds"]) == 2 for line in lines["decode"])


def test_the_launcher_is_watched(lines):
    (line,) = lines["start"]
    seen = line["seen"]
    assert list(seen) == ["first step", "last step", "resume point", "checkpoint", "end"]
    assert seen["first step"] > 1 and list(seen.values()) == sorted(seen.values())
    assert line["metrics"]["step"] == 2 and line["metrics"]["loss"] > 0


# ---------------------------------------------------------------- rows that do not end well


def good_then(what):
    """A measurement that gives one result and then ends otherwise."""
    yield {"number": 1}
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)  # as a system without memory does
    if what == "error":
        raise RuntimeError("something else")
    with subprocess.Popen(["sleep", "1000"]) as child:
        yield {"child": child.pid}
        time.sleep(1000)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("memory", {"status": "out of memory", "message": "CUDA out of memory"}),
        ("crash", {"status": "failed with exit code -9"}),
        ("error", {"status": "failed with exit code 1"}),
    ],
)
def test_a_row_that_fails_keeps_what_was_measured(what, wanted):
    assert list(gpu.measured(good_then, {"what": what}, 60)) == [{"status": "ok", "number": 1}, wanted]


def test_a_row_that_takes_too_long_is_killed_with_all_that_it_has_started():
    first, second, last = gpu.measured(good_then, {"what": "sleep"}, 3)
    assert first["status"] == second["status"] == "ok" and last == {"status": "stopped after 3 s"}
    for _ in range(100):
        if not psutil.pid_exists(second["child"]) or psutil.Process(second["child"]).status() == "zombie":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what the row has started still runs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured(monkeypatch):
    before = gpu.RESULTS.read_bytes()
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(InputError, match="no CUDA GPU was found; bash benchmarks/gpu.sh --toy"):
        gpu.main()
    assert gpu.RESULTS.read_bytes() == before


# ---------------------------------------------------------------- tables

CARD = {
    "device": "Card",
    "driver": "1.2",
    "cuda": "13.0",
    "torch": "2",
    "transformers": "5",
    "deepspeed": "0",
    "peft": "0",
}
STEP = {"seconds": [0.5, 0.4, 0.6], "tokens": 8192, "flops": 2e14, "matmul_tflops": 800, "allocated_gb": 70.04}
STEP |= {"reserved_gb": 71.26, "status": "ok"}


def line(part, row, **result):
    return json.dumps({"benchmark": "gpu.py", "toy": False, "part": part, "row": row, **CARD, **result})


def test_tables(tmp_path):
    file, row = tmp_path / "results.jsonl", {"script": "train_blockwise", "shape": "8b", "MICRO_BSIZE": 32}
    row["LORA_DROPOUT"] = 0.0
    found = [
        line("train", row, **STEP | {"seconds": [9.0]}),  # measured anew below
        line("train", row | {"LORA_DROPOUT": 0.05, "GRAD_ACC": 2}, status="out of memory"),
        line("train", row, **STEP),
        line("train", row | {"MICRO_BSIZE": 16}, **STEP | {"device": "another card"}),
        line("train", row | {"MICRO_BSIZE": 8}, **STEP),
        line("decode", {"shape": "8b", "batch": 64}, way="exact", tokens_per_step=8, passes=32, pass_ms=[700.0, 690.0],
             seconds=[20.0, 16.0], written=16000, allocated_gb=20.0, status="ok"),
        line("losses", {"script": "train_bd3lm", "ATTENTION": "flex"}, status="ok", losses=[1.0] * 6, difference=2e-6),
        json.dumps({"benchmark": "gpu.py", "toy": True}),
        json.dumps({"benchmark": "bench_train.py"}),
    ]  # fmt: skip
    file.write_text("\n".join(found) + "\n")
    made = gpu_tables.section(file)
    assert (
        made.count("**Measured on one Card** (driver 1.2, CUDA 13.0; torch 2, transformers 5, deepspeed 0, peft 0)")
        == 3
    )
    # calculated: docs/performance.md has 77, 105 and 39 GB; GRAD_ACC adds 2.7
    rows = [text for text in made.splitlines() if text.startswith(("| 32", "| 16", "| 8 "))]
    speed = "0.500 (0.400 - 0.600) | 16,384 | 400 | 50% | 70.0 (71.3)"
    assert rows == [
        f"| 32 | 1 | 256 | 0.0 | False | False | {speed} | 77 |",
        "| 32 | 2 | 256 | 0.05 | False | False | out of memory |  |  |  |  | 107 |",
        f"| 8 | 1 | 256 | 0.0 | False | False | {speed} | 39 |",
    ]
    assert "| 64 | 8 | exact | 32 | 695.0 (690.0 - 700.0) | 900 (800 - 1,000) | 20.0 |" in made
    assert "| train_bd3lm.py, `ATTENTION` flex | losses of 6 steps differ by at most 2e-06 |" in made


def test_the_page_has_the_tables_of_the_results():
    wanted = f"{gpu_tables.BEGIN}\n{gpu_tables.section(gpu_tables.RESULTS)}\n{gpu_tables.END}"
    assert wanted in gpu_tables.PAGE.read_text(), "run: python -m benchmarks.gpu_tables"
