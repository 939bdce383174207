"""Pass@1 on math problems, decoding block by block: of one checkpoint, or of two on the same problems.

    python eval.py --model ckpts_stagewise_sft_32_step0025 --task gsm8k
    python eval.py --compare GSAI-ML/LLaDA-8B-Instruct ckpts_stagewise_sft_32_step0025 --task math500
    deepspeed --num_gpus 8 eval.py --model FOLDER --task gsm8k

Problems are asked as those of the training were: with the same text around them, and the same chat template.
{output}/{model}-{task}/answers.jsonl has a line for each problem; the same command again continues an interrupted run,
or, once it is complete, only prints its figures.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from blockwise.cli import InputError, progress, read_jsonl, run_script
from blockwise.decoding.settings import Settings, add_flags, check_flags
from blockwise.prompts import (
    ANSWER,
    METAMATH,
    QUESTION,
    PromptFormat,
    add_wrap_flag,
    format_of,
    question_and_answer,
    question_ids,
    wrap_text,
)  # fmt: skip
from blockwise.run import files


@dataclass
class Task:
    """Where the problems of a benchmark are on the hub; blockwise/scoring.py says when an answer is right."""

    dataset: str
    config: str
    split: str
    rule: str  # a function of blockwise/scoring.py: (completion, gold) -> bool


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "test", "same_number"),
    "math500": Task("HuggingFaceH4/MATH-500", "default", "test", "same_math"),
}
LINE = {"problem", "question", "gold", "completion", "correct", "tokens", "forwards", "seconds"}  # of answers.jsonl


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a checkpoint, or hub id")
    what.add_argument("--compare", nargs=2, metavar=("BASE", "TUNED"), help="two of them, and a paired test")
    parser.add_argument(
        "--task", choices=TASKS, default="gsm8k", help="which problems, and when an answer is right (default: gsm8k)"
    )
    parser.add_argument(
        "--data", help=f"jsonl file with {'/'.join(QUESTION)} and {'/'.join(ANSWER)} (default: the hub's)"
    )
    parser.add_argument("--limit", type=int, default=0, help="only the first N problems (default: 0, which is all)")
    parser.add_argument("--output", default="results", help="folder of the results (default: results)")
    said = "jsonl file to write: the questions and right answers, for pt.py; must not exist yet (default: none)"
    parser.add_argument("--right_answers", metavar="FILE", help=said)
    add_flags(parser)
    add_wrap_flag(parser, "as the model was trained; metamath, if it does not say how")
    parser.add_argument("--batch_size", type=int, default=16, help="problems that are answered at a time (default: 16)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args()
    if args.batch_size < 1 or args.limit < 0:
        parser.error("--batch_size must be at least 1 and --limit at least 0")
    if args.adapter and args.compare:
        parser.error("--adapter belongs to --model; compare a merged checkpoint, or evaluate the two one by one")
    new = args.right_answers and Path(args.right_answers)
    if new and (args.compare or new.exists() or not new.absolute().parent.is_dir()):
        parser.error("--right_answers belongs to --model, and must be a new file in a folder that exists")
    return args


def main():
    args = parse_args()
    check_flags(args)
    wrap = args.wrap and wrap_text(args.wrap)
    problems = load_problems(args)
    from blockwise.run.ranks import Ranks, join_group  # only now: a mistyped flag is reported without waiting for torch

    if args.adapter:
        from blockwise.models import checkpoint

        checkpoint.adapter_config(args.adapter)  # before a folder of results is made

    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        import torch.distributed as dist

        # a rank may have many more problems to answer than another
        join_group(lambda: dist.init_process_group("gloo", timeout=timedelta(days=7)))
    names = args.compare or [args.model]
    folders = [Path(args.output) / f"{label(name, args.adapter)}-{args.task}" for name in names]
    if len(set(folders)) < len(folders):
        raise InputError(f"both models are called {Path(names[0]).name}; evaluate them one by one, with two --output.")
    settings = settings_for(args, names[-1])  # the same for both of a comparison
    asked = ways_to_ask(names, args.adapter, wrap)
    prompts = [encode(name, problems, settings, way) for name, way in zip(names, asked)]  # before the first is run
    for name, ids, folder in zip(names, prompts, folders):
        wanted = description(name, problems, ids, args, settings)
        ranks.on_first_rank(lambda folder=folder, wanted=wanted: prepare(folder, wanted))
    answers = [
        evaluate(name, ids, problems, folder, args, settings, ranks)
        for name, ids, folder in zip(names, prompts, folders)
    ]
    if ranks.rank == 0:
        adapter = f" + {args.adapter}" if args.adapter else ""
        wraps = " and ".join(dict.fromkeys(way.wrap_name for way in asked))
        report([f"{name}{adapter}" for name in names], answers, args, settings, wraps)
        if args.right_answers:
            write_right_answers(answers[0], args.right_answers)
    if ranks.world_size > 1:
        dist.destroy_process_group()


def label(name: str, adapter: str | None) -> str:
    """The name of a model's results: that of its folder, and of the adapters on it."""
    return "+".join(
        [
            Path(name).name or Path(name).resolve().name,
            *(["-".join(Path(adapter).absolute().parts[-2:])] if adapter else []),
        ]
    )


def settings_for(args: argparse.Namespace, name: str) -> Settings:
    """decode.settings_for of a model that is not loaded yet. Raises InputError."""
    from blockwise.decoding import decode
    from blockwise.models import base as models
    from blockwise.models import hub

    return decode.settings_for(args, models.load_config(hub.local_folder(name)))


def load_problems(args: argparse.Namespace) -> list[dict[str, str]]:
    """The problems, a list of {"question", "gold"}. Raises InputError that names a bad row."""
    from blockwise import scoring

    task = TASKS[args.task]
    right = getattr(scoring, task.rule)
    if args.data:
        rows = [(f"{args.data}, line {number}", row) for number, row in read_jsonl(args.data)]
    else:
        from blockwise.sources import load_split

        dataset = load_split(task.dataset, task.split, task.config)
        rows = [(f"{task.dataset}, row {number}", row) for number, row in enumerate(dataset)]
    problems = []
    for where, row in rows[: args.limit or None]:
        question, gold = question_and_answer(where, row)
        if not right(f"The answer is: {gold}", gold):  # not even the reference itself would be right
            raise InputError(f"{where}: nothing can be read in its answer; is it a problem of --task {args.task}?")
        problems.append({"question": question, "gold": gold})
    return problems


def ways_to_ask(names: list[str], adapter: str | None, wrap: str | None) -> list[PromptFormat]:
    """How each model is asked: as it was trained; of two, one that does not say is asked as the other. InputError."""
    found = [format_of(name, adapter, None, None) for name in names]
    known = next(filter(None, reversed(found)), METAMATH)
    return [format_of(name, adapter, wrap, known) for name in names]


def encode(name: str, problems: list[dict], settings: Settings, prompt_format: PromptFormat) -> list[list[int]]:
    """Checks a model without loading it. Returns the problems as prompts, lists of ids. Raises InputError."""
    from blockwise.decoding import decode
    from blockwise.models import base as models
    from blockwise.models import hub

    folder = hub.local_folder(name)
    config = models.load_config(folder)
    models.check_tensors(folder, config)
    decode.check_settings(config, settings)
    tokenizer = hub.load_tokenizer(folder)
    prompts = [question_ids(tokenizer, problem["question"], prompt_format) for problem in problems]
    decode.make_canvas(config, prompts, settings.gen_length, "cpu")
    return prompts


def evaluate(name: str, prompts: list, problems: list, folder: Path, args, settings: Settings, ranks) -> list[dict]:
    """Answers the problems that have no answer in the folder, shared out to the ranks. Returns all, by problem.

    Where an answer can depend on its batch, the batches are the same whatever was answered before and on however many
    ranks: so are the answers. Elsewhere a problem is a batch of its own here, and the next one takes its row.
    """
    order = sorted(range(len(problems)), key=lambda i: -len(prompts[i]))  # similar lengths together, longest first
    size = 1 if refills(name, settings) else args.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    todo = ranks.on_first_rank(lambda: collect(folder, batches))
    if todo:
        answer(name, problems, prompts, batches, todo[ranks.rank :: ranks.world_size], folder, args, settings, ranks)
    ranks.on_first_rank(lambda: collect(folder, batches))
    answers = read_answers(folder)
    return [answers[i] for i in range(len(problems))]


def refills(name: str, settings: Settings) -> bool:
    """Whether the next problem can take the row of one that is answered; see refill.fits."""
    from blockwise.decoding import refill
    from blockwise.models import base as models
    from blockwise.models import hub

    return refill.fits(models.load_config(hub.local_folder(name)), settings)


def answer(
    name: str, problems: list, prompts: list, batches: list, todo: list[int], folder: Path, args, settings, ranks
) -> None:
    """Answers the batches `todo` and appends a line for each problem to this rank's file, as they are answered."""
    from blockwise import scoring
    from blockwise.decoding import decode

    model, tokenizer = decode.load(name, args.dtype, ranks.device, args.adapter)
    ends, right = decode.end_ids(model, tokenizer), getattr(scoring, TASKS[args.task].rule)
    mine = sum(len(batches[k]) for k in todo)
    bar = progress(total=mine, desc=label(name, args.adapter), unit="problem", disable=ranks.rank != 0)
    began = time.perf_counter()
    for found in answered(model, prompts, batches, todo, settings, ends, args):
        seconds, lines = (time.perf_counter() - began) / len(found), []
        for i, answer, forwards in found:
            text, tokens = decode.completion(tokenizer, answer, ends), decode.length(answer, ends)
            result = {"completion": text, "correct": right(text, problems[i]["gold"]), "tokens": tokens}
            result["rep4"] = scoring.repetition(answer[:tokens])
            lines.append({"problem": i} | problems[i] | result | {"forwards": forwards, "seconds": seconds})
        append(folder / f"answers.rank{ranks.rank}.jsonl", lines)
        bar.update(len(found))
        began = time.perf_counter()
    bar.close()


def answered(
    model, prompts: list, batches: list, todo: list[int], settings: Settings, ends: list[int], args
) -> Iterator[list[tuple[int, list[int], float]]]:
    """Problems whose answers came together: their numbers, the ids of the answers, and forward passes."""
    import torch

    from blockwise.decoding import decode, refill

    if refill.fits(model.config, settings):
        mine = [i for k in todo for i in batches[k]]
        for found in refill.answers(model, [prompts[i] for i in mine], settings, ends, args.batch_size):
            yield [(mine[number], ids.tolist(), forwards) for number, ids, forwards in found]
        return
    for k in todo:
        generator = torch.Generator(model.device).manual_seed(random.Random(f"{args.seed} {k}").getrandbits(63))
        ids, rows = decode.decode(model, [prompts[i] for i in batches[k]], settings, ends, generator)
        yield [(i, answer, rows / len(batches[k])) for i, answer in zip(batches[k], ids.tolist())]


# ---------------------------------------------------------------- the folder of results


def description(name: str, problems: list, prompts: list, args: argparse.Namespace, settings: Settings) -> dict:
    """What the answers depend on, for settings.json: only a run with the same can continue.

    The prompts are in it for the tokenizer and its chat template.
    """
    from blockwise.models import hub

    weights = [hub.fingerprint(hub.local_folder(name))]
    weights += [files.sha256(file) for file in hub.adapter_files(args.adapter)] if args.adapter else []
    digest = hashlib.sha256(json.dumps([problems, prompts]).encode()).hexdigest()
    more = {key: getattr(args, key) for key in ("task", "batch_size", "dtype", "seed", "adapter")}
    return {"model": name, "weights": weights, "problems": len(problems), "sha256": digest} | more | asdict(settings)


def prepare(folder: Path, wanted: dict) -> None:
    """Makes the folder of results, or makes sure that it holds those of the same run. Raises InputError."""
    path = folder / "settings.json"
    if not path.exists():
        with files.writing(f"--output {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            files.lock(folder)
            if not path.exists():  # another run may have had the lock until now
                files.replace(path, json.dumps(wanted, indent=2) + "\n")
    try:
        before = asdict(Settings()) | json.loads(path.read_text())  # a newer setting had its default
        different = [key for key in wanted if before.get(key) != wanted[key]]
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path} cannot be read; remove {folder}, or name another --output.") from None
    if different:
        key = different[0]
        change = f"{key} was {before.get(key)!r}, now it is {wanted[key]!r}"
        if key == "weights":
            change = f"the content of {wanted['model']} or of its adapters has changed"
        raise InputError(
            f"{folder} holds the results of another run: {change}. Name another --output, or remove that folder."
        )


def append(path: Path, rows: list[dict]) -> None:
    """Adds lines to a jsonl file; they are on the disk when this returns."""
    with files.writing(f"--output {path}"):
        files.append(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files.sync(path)


def write_right_answers(answers: list[dict], path: str) -> None:
    """Writes rows for pt.py: each right answer once with its question. Raises InputError."""
    rows = dict.fromkeys((row["question"], row["completion"]) for row in answers if row["correct"])
    with files.writing(f"--right_answers {path}"):
        lines = (json.dumps({"question": question, "answer": answer}, ensure_ascii=False) for question, answer in rows)
        files.replace(path, "".join(f"{line}\n" for line in lines))
    questions, right = len({row["question"] for row in answers}), len({question for question, _ in rows})
    print(f"{path}: {len(rows):,} right answers to {right:,} of {questions:,} questions")


def read_answers(folder: Path) -> dict[int, dict]:
    """All lines of the folder's answers, {problem: line}. The unfinished last line of a file does not count."""
    answers = {}
    for path in sorted(folder.glob("answers*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and row.keys() >= LINE and type(row["problem"]) is int:
                answers[row["problem"]] = row
            else:
                raise InputError(f"{path} is damaged at {line[:60]!r}; remove that line, or the folder.")
    return answers


def collect(folder: Path, batches: list[list[int]]) -> list[int]:
    """Brings the lines of all ranks together in answers.jsonl, in the order of the problems; half batches go.

    Returns the numbers of the batches without answers. Locks the folder if there is something to do; the results of a
    finished run may lie where nothing can be written.
    """
    path = folder / "answers.jsonl"
    if list(folder.glob("answers*.jsonl")) == [path] and len(read_answers(folder)) == sum(map(len, batches)):
        return []
    files.lock(folder)
    answers = read_answers(folder)
    whole = sorted(i for batch in batches if answers.keys() >= set(batch) for i in batch)
    with files.writing(f"--output {folder}"):
        files.replace(path, "".join(json.dumps(answers[i], ensure_ascii=False) + "\n" for i in whole))
        for file in folder.glob("answers.rank*.jsonl"):
            file.unlink()
    return [k for k, batch in enumerate(batches) if not answers.keys() >= set(batch)]


# ---------------------------------------------------------------- the report


def figures(answers: list[dict]) -> tuple[float, tuple[float, float], float, float]:
    """Share of right answers, its 95 % interval, tokens per second and rank, forward passes per token."""
    from blockwise import scoring

    right, tokens = sum(row["correct"] for row in answers), sum(row["tokens"] for row in answers)
    seconds, forwards = sum(row["seconds"] for row in answers), sum(row["forwards"] for row in answers)
    return right / len(answers), scoring.wilson(right, len(answers)), tokens / seconds, forwards / tokens


def text_figures(answers: list[dict]) -> tuple[str, str]:
    """How repetitive the answers are (rep-4, the mean over them), and the share that is not empty, as text.

    "-" for repetition if lines of an earlier version are among them, which do not say it.
    """
    from blockwise import scoring

    known = all("rep4" in row for row in answers)
    repetition = f"{sum(row['rep4'] for row in answers) / len(answers):.1%}" if known else "-"
    return repetition, f"{scoring.not_empty([row['completion'] for row in answers]):.1%}"


def report(
    names: list[str], answers: list[list[dict]], args: argparse.Namespace, settings: Settings, wraps: str
) -> None:  # fmt: skip
    """Prints a line for each model, the settings, and for two models the paired test."""
    from blockwise import scoring

    width = max(map(len, names))
    print(f"\n{'':{width}}  problems  Pass@1   95 % interval  tokens/s  forwards/token   rep-4  not empty")
    for name, rows in zip(names, answers):
        share, (low, high), speed, forwards = figures(rows)
        interval = f"{low:.1%} - {high:.1%}"
        repetition, not_empty = text_figures(rows)
        costs = f"{speed:>10,.0f}{forwards:>16.2f}{repetition:>8}{not_empty:>11}"
        print(f"{name:{width}}  {len(rows):>8,}{share:>8.1%}{interval:>16}{costs}")
    print(f"\n{args.task}, {', '.join(f'{key} {value}' for key, value in asdict(settings).items())},")
    print(f"batch_size {args.batch_size}, dtype {args.dtype}, seed {args.seed}, wrap {wraps}.")
    print("Tokens are those of the answers, up to the one that ends them; tokens/s are per rank.")
    print("rep-4: share of an answer's sequences of 4 tokens that it has already had, mean over the answers.")
    if len(names) == 2:
        base, tuned = ([row["correct"] for row in rows] for rows in answers)
        gained, lost, (low, high), p = scoring.paired(base, tuned)
        points = 100 * (gained - lost) / len(base)
        print(
            f"Tuned - base: {points:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}); only the tuned "
            f"model solves {gained}, only the base {lost}; McNemar's exact test: p = {p:.2g}."
        )


if __name__ == "__main__":
    run_script(main)
