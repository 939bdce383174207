"""R2FT on a base that repeats itself, against as many further steps of SFT.

    python -m experiments.repetition

The text is that of experiments/text.py, what Python's own help says about the language, here with one space between
words. A tiny random model is trained on it until its likelihood is fair; decoded greedily it then repeats itself. From
there on it is trained further, by R2FT, by our variant of it for blocks, or as before. The learning rate of each is
chosen on seed 0, which is not reported. What is in the CSV is not run again.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, stdev

from blockwise.cli import InputError, progress, run_script
from experiments import run as runner
from experiments import text
from experiments.claims import FULLSEQ, Setting

R2FT = "train_r2ft.py"
COLUMNS = ["setting", "lr", "seed", "steps"]
FIGURES = ["rep4_window", "rep4_blocks", "not_empty", "nats_chosen", "nats_rejected"]
RESULTS = runner.ROOT / "experiments/repetition.csv"
BASE_STEPS, STEPS, BASE_LR, LRS = 1000, 100, 3e-3, (1e-4, 3e-4, 1e-3)
PROMPT, ANSWER, BLOCK, PROMPTS = 16, 48, 16, 128  # tokens, of which the first two make a sample; prompts to continue
DECODINGS = {"window": {"block_length": ANSWER, "steps": 12}, "blocks": {"block_length": BLOCK, "steps": ANSWER}}
WORSE = 0.1  # nats per chosen token by which a learning rate may be worse than the base, to be chosen

BASE = Setting("base", FULLSEQ, {"BOUND_WEIGHTS": True, "EPOCHS": 10}, task=text.TEXT)
METHODS = [
    Setting("further SFT", FULLSEQ, {"BOUND_WEIGHTS": True}, task=text.TEXT),
    Setting("R2FT", R2FT, {}, task=text.TEXT),
    Setting("R2FT, block", R2FT, {"VARIANT": "block", "BLOCK_SIZE": BLOCK}, task=text.TEXT),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="that are reported")
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument("--work", default=str(runner.ROOT / "experiments/work"), help="folder of data and checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few steps and samples, only to see that it runs")
    args = parser.parse_args()
    if args.smoke and Path(args.results).resolve() == RESULTS:
        raise InputError("--smoke is too small for repetition.csv; name another --results.")
    if args.seeds < 1:
        raise InputError("--seeds must be at least 1.")
    work, results = runner.begin(args.work, args.results, COLUMNS + FIGURES)
    words = {name: " ".join(body.split()) for name, body in topics.items()}
    data = {name: text.pack(f"words_{name}", texts, work) for name, texts in text.split(words).items()}
    while todo := missing(args.seeds, runner.read(results, COLUMNS + FIGURES)):  # first what chooses learning rates
        for run in progress(todo, desc="runs", unit="run"):
            size = (3, 2, 4) if args.smoke else (BASE_STEPS, STEPS, 0)
            runner.append(results, [row_of(run, data, work, *size)])
    print(table(runner.read(results, COLUMNS + FIGURES)))
    print(f"rep-4 of the held-out text itself: {own_repetition(data['held_out']):.3f}")


def missing(seeds: int, rows: list[dict[str, str]]) -> list[runner.Run]:
    """The runs that are not among the rows and whose learning rate is known, by seed."""
    done = {tuple(row[column] for column in COLUMNS[:3]) for row in rows}
    runs = [runner.Run("R2FT", BASE, BASE_LR, seed) for seed in range(seeds + 1)]
    for setting in METHODS:
        lr = chosen_lr(setting, rows)
        runs += [runner.Run("R2FT", setting, lr, 0) for lr in LRS]
        runs += [runner.Run("R2FT", setting, lr, seed) for seed in range(1, seeds + 1) if lr]
    return [run for run in sorted(runs, key=lambda run: run.seed) if run.key[1:] not in done]


def chosen_lr(setting: Setting, rows: list[dict[str, str]]) -> float | None:
    """The learning rate with the least repetition in a window on seed 0; None until all of them have been run.

    Of those that cost at most WORSE nats per chosen token against the base; the lowest rate, if all cost more.
    """
    grid = {float(row["lr"]): row for row in rows if (row["setting"], row["seed"]) == (setting.name, "0")}
    base = next((row for row in rows if (row["setting"], row["seed"]) == (BASE.name, "0")), None)
    if base is None or not set(LRS) <= grid.keys():
        return None
    good = [lr for lr in LRS if float(grid[lr]["nats_chosen"]) <= float(base["nats_chosen"]) + WORSE]
    return min(good or LRS[:1], key=lambda lr: float(grid[lr]["rep4_window"]))


def row_of(run: runner.Run, data: dict[str, Path], work: Path, base_steps: int, steps: int, samples: int) -> list:
    """Trains, unless it has been done, and measures. Returns a row of the CSV.

    base_steps, steps: of the base, and from there on; samples: that are held out, 0 = all.
    """

    def train(run, steps, base):
        setting = replace(run.setting, knobs=run.setting.knobs | {"TOTAL_TRAIN_STEPS": steps})
        return runner.train(replace(run, setting=setting), base, data["train"], work)[0][steps]

    checkpoint = train(replace(run, setting=BASE, lr=BASE_LR), base_steps, text.random_base(run.seed, work))
    if run.setting is BASE:
        steps = base_steps
    else:
        checkpoint = train(run, steps, checkpoint)
    figures = measure(checkpoint, data["held_out"], samples)
    return [*run.key[1:], steps, *(f"{figures[name]:.4f}" for name in FIGURES)]


def measure(checkpoint: Path, data: Path, samples: int) -> dict[str, float]:
    """FIGURES of a checkpoint on held-out samples: how it continues their first tokens, and what it expects."""
    import torch

    from blockwise import scoring
    from blockwise.data import read_pt
    from blockwise.decoding import decode
    from blockwise.decoding.settings import Settings
    from experiments import bound

    model, tokenizer = decode.load(checkpoint, "float32", torch.device("cpu"))
    batch = bound.held_out(read_pt(data), data, model.config, number=samples)
    prompts, ends, figures, texts = (
        batch.input_ids[:PROMPTS, :PROMPT].tolist(),
        decode.end_ids(model, tokenizer),
        {},
        [],
    )
    for name, how in DECODINGS.items():
        ids, _ = decode.decode(model, prompts, Settings(gen_length=ANSWER, **how), ends)
        answers = [answer[: decode.length(answer, ends)] for answer in ids.tolist()]
        figures[f"rep4_{name}"] = fmean(map(scoring.repetition, answers))
        texts += [decode.completion(tokenizer, answer, ends) for answer in answers]
    return figures | {"not_empty": scoring.not_empty(texts)} | nats(model, batch)


def own_repetition(data: Path) -> float:
    """What a perfect answer would have: the repetition of what really follows the prompts."""
    from blockwise import scoring
    from blockwise.data import read_pt

    return fmean(scoring.repetition(sample[PROMPT:]) for sample in read_pt(data)[:PROMPTS].tolist())


def nats(model, batch) -> dict[str, float]:
    """What a model expects behind a random cut of each sample: the mean negative log-probability of a token there.

    Of the chosen tokens, which really follow, and of the rejected ones; the same cuts and repetitions for all models.
    """
    import torch

    import train_r2ft

    knobs = {name: value for name, value in vars(train_r2ft).items() if name.isupper()}
    knobs |= {"MAX_LEN": batch.input_ids.shape[1], "MASK_ID": model.config.mask_token_id, "VARIANT": "answer"}
    noised = train_r2ft.noise(batch, torch.Generator().manual_seed(0), argparse.Namespace(**knobs))
    kinds = {
        "nats_chosen": (noised.targets, noised.weights > 0),
        "nats_rejected": (noised.extra["repeated"], noised.extra["rejected"] > 0),
    }
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for ids in noised.input_ids.split(32)]
    logp = torch.cat(logits).log_softmax(dim=-1)  # (N, L, V)
    return {name: -logp.gather(2, ids[..., None])[..., 0][where].mean().item() for name, (ids, where) in kinds.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Means over the reported seeds, with the values of each seed."""
    lines = [f"{'':14}{'lr':>8}  " + "".join(f"{name:>24}" for name in FIGURES)]
    for setting in (BASE, *METHODS):
        some = [row for row in rows if row["setting"] == setting.name and row["seed"] != "0"]
        cells = []
        for name in FIGURES:
            values = [float(row[name]) for row in some]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}")
        lines.append(f"{setting.name:14}{some[0]['lr']:>8}  " + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join([*lines, "mean ± standard deviation over seeds; rep-4 in tokens, nats per token"])


if __name__ == "__main__":
    run_script(main)
