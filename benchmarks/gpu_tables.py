"""Writes what gpu.py has measured into docs/performance.md, as tables.

    python -m benchmarks.gpu_tables

Of each row the newest line of benchmarks/results.jsonl counts; of each part only the lines from the machine that
measured it last. Lines of --toy are left out.
"""

import functools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks import common, gpu_rows, memory
from blockwise.cli import run_script

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = common.ROOT / "docs/performance.md"
BEGIN, END = "<!-- python -m benchmarks.gpu_tables writes what follows -->\n", "<!-- up to here -->\n"
MACHINE = ("device", "driver", "cuda", "torch", "transformers", "deepspeed", "peft")
SCRIPTS = {"train_blockwise": "block-wise", "train_fullseq": "full sequence", "train_bd3lm": "block diffusion"}
MODELS = {"8b": "LLaDA-8B's shape", "1b": "1.4 billion parameters"}
NOTHING = "Nothing has been measured on a GPU yet.\n"


def lines_of(file: Path) -> dict[str, list[dict]]:
    """{part: its lines, in their first order}; see above which count."""
    parts = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        if line["benchmark"] == "gpu.py" and not line["toy"]:
            parts.setdefault(line["part"], []).append(line)
    newest = {}
    for part, lines in parts.items():
        same = [line for line in lines if machine(line) == machine(lines[-1])]
        rows = {}
        for line in same:
            rows[json.dumps([line["row"], line.get("way"), line.get("variant"), line.get("tokens_per_step")])] = line
        newest[part] = list(rows.values())
    return newest


def machine(line: dict) -> list:
    return [line[name] for name in MACHINE]


def measured_on(lines: list[dict]) -> str:
    one = lines[-1]
    versions = ", ".join(f"{name} {one[name]}" for name in MACHINE[3:])
    return f"**Measured on one {one['device']}** (driver {one['driver']}, CUDA {one['cuda']}; {versions})"


def table(head: str, rows: Iterable[list]) -> str:
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(values: list[float], digits: int) -> str:
    """The median and the range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


# ---------------------------------------------------------------- training


def speed(line: dict) -> list[str]:
    """Seconds per step, tokens/s, TFLOP/s, their share of a matrix product's, GB; or what came in their stead."""
    if line["status"] != "ok":
        return [line["status"], "", "", "", ""]
    seconds = statistics.median(line["seconds"])
    rate = line["flops"] / seconds / 1e12
    share = f"{rate / line['matmul_tflops']:.0%}"
    held = f"{line['allocated_gb']:.1f} ({line['reserved_gb']:.1f})"
    return [spread(line["seconds"], 3), f"{line['tokens'] / seconds:,.0f}", f"{rate:.0f}", share, held]


@functools.cache
def saved(dropout: float, rank: int) -> float:
    return memory.saved_bytes_per_token(gpu_rows.config_of("8b"), dropout, rank)


def calculated_gb(row: dict) -> float:
    """What benchmarks/memory.py says of a block-wise row on one GPU."""
    config, rank = gpu_rows.config_of("8b"), row.get("LORA_RANK", memory.defaults.LORA_RANK)
    base, lora = common.parameters(config, rank)
    sums = 4 * lora * (row.get("GRAD_ACC", 1) > 1)
    kept, checkpointing = saved(row["LORA_DROPOUT"], rank), row.get("GRADIENT_CHECKPOINTING", False)
    return (memory.total_bytes(config, base, lora, row["MICRO_BSIZE"], kept, checkpointing) + sums) / memory.GB


def training(lines: list[dict]) -> str:
    rows = []
    for line in sorted(lines, key=lambda line: -line["row"]["MICRO_BSIZE"]):
        row = line["row"]
        knobs = [row["MICRO_BSIZE"], row.get("GRAD_ACC", 1), row.get("LORA_RANK", memory.defaults.LORA_RANK)]
        knobs += [row["LORA_DROPOUT"], row.get("GRADIENT_CHECKPOINTING", False), row.get("COMPILE", False)]
        rows.append([*map(str, knobs), *speed(line), f"{calculated_gb(row):.0f}"])
    head = (
        "| `MICRO_BSIZE` | `GRAD_ACC` | `LORA_RANK` | `LORA_DROPOUT` | `GRADIENT_CHECKPOINTING` | `COMPILE` "
        "| s per step | tokens/s | TFLOP/s | share | GB | calculated GB |"
    )
    return table(head, rows)


def other_trainings(lines: list[dict]) -> str:
    rows = []
    for line in lines:
        row = line["row"]
        how = [f"`{name}` {row[name]}" for name in ("LORA_RANK", "ATTENTION", "COMPILE") if name in row]
        what = ", ".join([SCRIPTS[row["script"]], MODELS[row["shape"]], *how])
        rows.append([what, str(row["MICRO_BSIZE"]), *speed(line)])
    return table("| | `MICRO_BSIZE` | s per step | tokens/s | TFLOP/s | share | GB |", rows)


def plain(lines: list[dict]) -> str:
    rows = []
    for line in lines:
        if line["status"] == "ok":
            ratio, low, high = line["times_ours"]
            name = {"ours": "a step here"}.get(line["variant"], line["variant"])
            times = "1" if line["variant"] == "ours" else f"{ratio:.2f} ({low:.2f} - {high:.2f})"
            rows.append([name, times, spread(line["seconds"], 3), f"{line['allocated_gb']:.1f}"])
        else:
            rows.append(["all", line["status"], "", ""])
    return table("| | times the seconds of a step here | s per step | GB |", rows)


# ---------------------------------------------------------------- decoding, saving, checks


def decoding(lines: list[dict]) -> str:
    rows = []
    for line in lines:
        batch = str(line["row"]["batch"])
        if line["status"] == "ok":
            per_step = "32" if "threshold" in line["way"] else str(line["tokens_per_step"])
            speeds = [line["written"] / seconds for seconds in line["seconds"]]
            ms, gb = spread(line["pass_ms"], 1), f"{line['allocated_gb']:.1f}"
            rows.append([batch, per_step, line["way"], str(line["passes"]), ms, spread(speeds, 0), gb])
        else:
            rows.append([batch, "", line["status"], "", "", "", ""])
    return table("| prompts | tokens a step | | passes | ms of a pass | tokens/s | GB |", rows)


def saving(lines: list[dict]) -> str:
    rows = []
    for line in lines:
        model = MODELS[line["row"]["shape"]]
        if line["status"] == "ok":
            first, gb = line["seen"]["first step"], line["metrics"]["peak_memory_gb"]
            seconds = (first, line["resume_seconds"], line["checkpoint_seconds"], line["seen"]["end"])
            rows.append([model, f"{line['base_gb']:.1f}", *(f"{some:.1f}" for some in seconds), f"{gb:.1f}"])
        else:
            rows.append([model, "", line["status"], "", "", "", ""])
    head = (
        "| | base in GB | s until the first step | s of a resume point | s of a checkpoint | s in all | GB of the GPU |"
    )
    return table(head, rows)


def checks(lines: list[dict]) -> str:
    rows = []
    for line in lines:
        row = line["row"]
        script = [f"{row[name]}.py" if name == "script" else f"`{name}` {row[name]}" for name in row]
        what = ", ".join(script) or f"decoding: {line.get('way', 'all')}"
        if line["status"] != "ok":
            found = line["status"]
        elif "way" in line:
            found = f"{line['same_tokens']:.1%} of {line['tokens']} tokens are the same"
        else:
            found = f"losses of {len(line['losses'])} steps differ by at most {line['difference']:.1g}"
        rows.append([what, found])
    return table("| | on the GPU against the CPU |", rows)


def section(file: Path) -> str:
    """What stands between BEGIN and END."""
    parts = lines_of(file)
    made = {
        "Training, LLaDA-8B's shape": (training, ["train"]),
        "Other trainings": (other_trainings, ["bd3lm", "full"]),
        "A plain step": (plain, ["plain"]),
        "Decoding": (decoding, ["decode"]),
        "Start, resume point, checkpoint": (saving, ["start"]),
        "The same numbers as on a CPU": (checks, ["check", "losses"]),
    }
    texts = []
    for title, (make, names) in made.items():
        if lines := [line for name in names for line in parts.get(name, [])]:
            texts.append(f"### {title}\n\n{measured_on(lines)}.\n\n{make(lines)}")
    return "\n".join(texts) or NOTHING


def main():
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n{section(RESULTS)}\n{end}{after}")
    print(f"{PAGE} has the tables of {RESULTS}")


if __name__ == "__main__":
    run_script(main)
