"""adapters/lm_eval_llada.py: Monte Carlo likelihood against the exact bound, local tasks through the harness on one
rank and two, and eval_llada.sh: its tasks and settings exist."""

import json
import re
import shlex
import sqlite3
import subprocess
import sys
from itertools import combinations
from math import comb

import lm_eval
import pytest
import torch
from conftest import ROOT, launch, problems, run
from lm_eval._cli import HarnessCLI
from lm_eval.tasks import TaskManager

from adapters import lm_eval_llada
from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.prompts import prompt_ids


@pytest.fixture(scope="module")
def lm(base):
    return lm_eval_llada.LLaDA(str(base), batch_size=8, gen_length=16, block_length=8, steps=16)


@torch.no_grad()
def exact_bound(model, context, continuation, cfg_scale=0.0):
    """LLaDA's bound, summed over every number of masks and every choice of the masked positions."""
    length, total = len(continuation), 0.0
    for number in range(1, length + 1):
        for places in combinations(range(length), number):
            canvas = list(continuation)
            for place in places:
                canvas[place] = 4
            logits = model(torch.tensor([context + canvas])).logits[0, len(context) :]
            if cfg_scale:
                blind = model(torch.tensor([[4] * len(context) + canvas])).logits[0, len(context) :]
                logits = blind + (cfg_scale + 1) * (logits - blind)
            logs = logits.log_softmax(dim=-1)
            part = sum(float(logs[place, continuation[place]]) for place in places)
            total += part * length / number / length / comb(length, number)
    return total


@pytest.fixture
def likelihood(lm):
    """likelihood(context, continuation, **changes) -> that of the model, with other attributes for this test."""
    before = {name: getattr(lm, name) for name in ("seed", "mc_num", "settings", "is_check_greedy")}

    def measure(context, continuation, cfg_scale=0.0, **changes):
        vars(lm).update(changes, settings=Settings(16, 8, 16, cfg_scale=cfg_scale))
        return lm.log_likelihood(context, continuation)

    yield measure
    vars(lm).update(before)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_the_likelihood_is_the_bound_on_average(lm, likelihood, tokenizer, cfg_scale):
    context, continuation = tokenizer("Ada has 3 pens.")["input_ids"], tokenizer("3456")["input_ids"]
    assert len(continuation) == 4
    draws = [likelihood(context, continuation, cfg_scale, seed=seed, mc_num=16) for seed in range(120)]
    assert likelihood(context, continuation, cfg_scale, seed=3) == draws[3] != draws[4]
    draws = torch.tensor(draws)
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact_bound(lm.model, context, continuation, cfg_scale)) < 4 * error
    assert error < 0.02 * draws.mean().abs(), "too noisy to tell anything"
    for token in (10, 20):  # one token: nothing is left to chance
        exact = exact_bound(lm.model, context, [token], cfg_scale)
        assert likelihood(context, [token], cfg_scale) == pytest.approx(exact, abs=1e-4)


def test_the_numbers_of_masks_are_spread_evenly_and_each_is_uniform(lm, likelihood):
    """As in LLaDA's evaluation: with as many copies as tokens, or a multiple, every number comes equally often."""
    seen = []

    def count(module, args, kwargs):
        seen.extend((kwargs["input_ids"] == 4).sum(dim=1).tolist())

    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    context, continuation = [10, 11], [20, 21, 22, 23, 24]
    for seed in range(20):
        seen.clear()
        likelihood(context, continuation, seed=seed, mc_num=10)
        assert sorted(seen) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    seen.clear()
    for seed in range(500):
        likelihood(context, continuation, seed=seed, mc_num=1)
    handle.remove()
    frequency = torch.bincount(torch.tensor(seen), minlength=6)[1:] / 500
    assert (frequency - 0.2).abs().max() < 4 * (0.2 * 0.8 / 500) ** 0.5


def request(*args):
    return type("Request", (), {"args": args})


def test_greedy_is_what_decoding_gives_and_off_by_default(lm, likelihood, tokenizer):
    context = "Ada has 3 pens."
    assert lm.is_check_greedy is False
    ids, _ = decode.decode(lm.model, [tokenizer(context)["input_ids"]], Settings(3, 3, 3))
    for checked, continuation, greedy in (
        (True, ids[0].tolist(), True), (True, [10, 11, 12], False), (False, ids[0].tolist(), False),
    ):  # fmt: skip
        lm.is_check_greedy = checked  # likelihood puts it back
        result = lm._loglikelihood_tokens([((context, "x"), tokenizer(context)["input_ids"], continuation)])
        assert result[0][1] is greedy


def test_answers_are_decoded_and_cut_at_the_stop_texts(lm, tokenizer):
    texts = ["Ada has 3 pens.", "a", "How many shells does Eva have now?"]
    plain = []
    for text in texts:
        ids, _ = decode.decode(lm.model, [tokenizer(text)["input_ids"]], Settings(16, 8, 16))
        plain.append(decode.completion(tokenizer, ids[0].tolist(), [1, 7]))
    assert lm.generate_until([request(text, {"until": []}) for text in texts]) == plain
    stop = plain[2][3:5]
    cut = lm.generate_until([request(texts[2], {"until": ["never there", stop]})])
    assert stop and cut == [plain[2].split(stop)[0]]


def test_nothing_is_decoded_behind_the_end_and_answers_are_the_same(base, lm, tokenizer, monkeypatch):
    """stop_at_end is the default of the adapter; with an end that does occur, it saves the second block."""
    text, passes = "How many shells does Eva have now?", []
    handle = lm.model.register_forward_hook(lambda *_: passes.append(1))
    ids, _ = decode.decode(lm.model, [tokenizer(text)["input_ids"]], Settings(16, 8, 16))
    exact, end = len(passes), int(ids[0, 5])
    monkeypatch.setattr(lm, "ends", [end])
    (answer,) = lm.generate_until([request(text, {"until": []})])
    handle.remove()
    assert answer == decode.completion(tokenizer, ids[0].tolist(), [end]) and len(passes) - exact == 8 < exact == 16
    whole = lm_eval_llada.LLaDA(str(base), gen_length=16, block_length=8, steps=16, stop_at_end=False)
    assert lm.settings.stop_at_end and not whole.settings.stop_at_end


def test_lists_of_ids_are_read_as_the_harness_writes_them(base, lm, tokenizer, monkeypatch):
    plain = lm.generate_until([request("Ada has 3 pens.", {"until": []})])
    never = sorted(set(tokenizer(plain[0])["input_ids"]))[:2]
    model_args = f"pretrained={base},gen_length=16,block_length=8,steps=16,suppress_tokens=[{never[0]},{never[1]}]"
    monkeypatch.setattr(sys, "argv", ["lm-eval", "run", "--model", "llada", "--model_args", model_args])
    other = lm_eval_llada.LLaDA(**HarnessCLI().parse_args().model_args)
    ids, _ = decode.decode(
        lm.model, [tokenizer("Ada has 3 pens.")["input_ids"]], Settings(16, 8, 16, suppress_tokens=never)
    )
    answers = other.generate_until([request("Ada has 3 pens.", {"until": []})])
    assert answers == [decode.completion(tokenizer, ids[0].tolist(), [1, 7])] != plain


def test_with_an_adapter_the_model_is_base_and_adapters(base, adapter, adapted):
    with_adapter = lm_eval_llada.LLaDA(str(base), adapter=str(adapter), gen_length=16, block_length=8, steps=16)
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(with_adapter.model(ids).logits, adapted(ids).logits)


def test_unknown_arguments_are_refused(base):
    with pytest.raises(InputError, match="model_args colour"):
        lm_eval_llada.LLaDA(str(base), colour=3)
    with pytest.raises(InputError, match="mc_samples: it is called mc_num now"):
        lm_eval_llada.LLaDA(str(base), mc_samples=32)
    with pytest.raises(InputError, match=r"'\[1;2\]' is not a list of token ids, such as \[126081,126348\]"):
        lm_eval_llada.LLaDA(str(base), begin_suppress_tokens="[1;2]")
    wrong = (("batch_size", "auto"), ("batch_size", 0), ("mc_num", 0), ("dtype", "float8"), ("is_check_greedy", 1))
    for key, value in wrong:
        with pytest.raises(InputError, match=f"{key} '?{value}"):
            lm_eval_llada.LLaDA(str(base), **{key: value})


def test_the_last_turn_of_an_assistant_can_be_continued(lm):
    turns = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(turns[:1]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert lm.apply_chat_template(turns, add_generation_prompt=False).endswith("\n\nThe answer is")


RULE = """import subprocess
import sys

def process_results(doc, results):
    program = doc["prompt"] + results[0] + "\\n" + doc["check"]
    done = subprocess.run([sys.executable, "-"], input=program.encode(), capture_output=True, timeout=60)
    return {"pass_at_1": float(done.returncode == 0)}
"""
DECODING = Settings(16, 8, 8, suppress_tokens=[20, 30])
TASKS = {
    "story_generate": """doc_to_text: "{{query}}"
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"]}
metric_list: [{metric: exact_match}]
""",
    "story_choice": """doc_to_text: "{{query}}"
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: ["{{answer}}", "0", "twelve"]
metric_list: [{metric: acc}]
""",
    "story_code": """doc_to_text: "{{query}}"
output_type: generate_until
unsafe_code: true
gen_prefix: "{{prompt}}"
doc_to_target: "{{check}}"
process_results: !function story_code_rule.process_results
generation_kwargs: {until: ["\\n", "\\r"]}
metric_list: [{metric: pass_at_1, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def rows(lm, tokenizer):
    """Problems that are also code tasks: the model continues a comment, or, in the last, a text that is compared."""
    rows = [row | {"answer": row["response"].split()[-1]} for row in problems(5, 3)]
    checks = ["assert f() == 7", "assert f() == 8", "assert f() == 7", "raise SystemExit(3)"]
    for row, check in zip(rows, checks):
        row |= {"prompt": "def f():\n    return 7  #", "check": check}
    rows[4]["prompt"] = 'text = r"""'
    turn = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n" + rows[4]["query"]
    turn += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n" + rows[4]["prompt"]
    ids, _ = decode.decode(lm.model, [tokenizer(turn)["input_ids"]], DECODING)
    answer = decode.completion(tokenizer, ids[0].tolist(), [1, 7]).split("\n")[0].split("\r")[0]
    assert answer
    rows[4]["check"] = f'"""\nassert text == {answer!r} + "\\n"'
    return rows


@pytest.fixture(scope="module")
def tasks(rows, tmp_path_factory):
    """A folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "story_code_rule.py").write_text(RULE)
    for name, lines in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{lines}")
    return folder


def arguments(base, tasks, output):
    """Of the harness' command line, for all tasks."""
    model_args = f"pretrained={base},gen_length=16,block_length=8,steps=8,mc_num=8,suppress_tokens=[20,30]"
    return (
        "run", "--model", "llada", "--tasks", ",".join(TASKS), "--model_args", model_args, "--include_path", tasks,
        "--apply_chat_template", "--batch_size", 4, "--output_path", output, "--log_samples",
        "--confirm_run_unsafe_code",
    )  # fmt: skip


def results(output):
    """The results of a run, and its samples by task and problem: answers or likelihoods."""
    (file,) = output.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (lines,) = output.rglob(f"samples_{task}_*.jsonl")
        for sample in map(json.loads, lines.read_text().splitlines()):
            samples[task, sample["doc_id"]] = sample["filtered_resps"]
    return json.loads(file.read_text())["results"], samples


TWO = """from functools import partial

import lm_eval.tasks

lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the others take seconds
from adapters import lm_eval_llada
from blockwise.cli import run_script

run_script(lm_eval_llada.main)
"""


def two_ranks_share_the_problems_and_give_the_same(alone, base, tasks, tmp_path):
    """Under the real launcher: each rank's cache has what it answered, the first rank alone prints and writes."""
    (tmp_path / "two.py").write_text(TWO)
    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        flags = (*arguments(base, tasks, tmp_path / "out"), "--use_cache", cache)
        done = launch(2, str(tmp_path / "two.py"), *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures, samples = results(tmp_path / "out")
    assert samples == alone[1] and figures.keys() == alone[0].keys()
    for task, values in figures.items():
        assert values == pytest.approx(alone[0][task])
    answered = []
    for rank in range(2):
        with sqlite3.connect(f"{cache}_rank{rank}.db") as database:
            answered += database.execute("SELECT COUNT(*) FROM unnamed").fetchone()
    assert answered == [3 + 9 + 3, 2 + 6 + 2]  # problems 0, 2, 4 and 1, 3; each choice is a likelihood
    assert done.stdout.count("|story_choice") == 1 and done.stderr.count("Running loglikelihood requests") == 1


def test_local_tasks_through_the_command_line_on_one_rank_and_two(base, rows, tasks, tmp_path):
    done = run("adapters.lm_eval_llada", *arguments(base, tasks, tmp_path / "one"))
    assert done.returncode == 0, done.stdout + done.stderr
    alone = figures, samples = results(tmp_path / "one")
    assert figures["story_generate"]["exact_match,none"] == 0 and 0 <= figures["story_choice"]["acc,none"] <= 1
    assert figures["story_code"]["pass_at_1,none"] == 3 / 5  # two comments, and the text that the model wrote
    model, tokenizer = decode.load(base, "float32", torch.device("cpu"))
    for number, row in enumerate(rows):
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": row["query"]}])
        ids, _ = decode.decode(model, [prompt], DECODING)
        answer = decode.completion(tokenizer, ids[0].tolist(), [1, 7]).split("\n\n")[0]
        assert samples["story_generate", number] == [answer]
    two_ranks_share_the_problems_and_give_the_same(alone, base, tasks, tmp_path)


def test_code_is_not_run_unless_that_is_confirmed(lm, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.raises(ValueError, match="story_code which is marked as unsafe"):
        lm_eval.simple_evaluate(lm, tasks=["story_code"], task_manager=manager)


# ---------------------------------------------------------------- eval_llada.sh


def script(*args, **env):
    """bash eval_llada.sh, with few variables. Returns the finished process."""
    env = {"PATH": "/usr/bin:/bin"} | env
    return subprocess.run(["bash", ROOT / "eval_llada.sh", *args], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def published():
    """The rows of the script's table: model, task, few-shot examples, batch size, model arguments."""
    header, *lines = script().stdout.splitlines()
    assert header.split() == ["model", "task", "few-shot", "batch", "model_args"] and len(lines) == 22
    return [line.split() for line in lines]


def tokens_of(settings, name):
    """The ids of a list in the table."""
    found = re.search(rf"(?:^|,){name}=\[([^]]*)\]", settings)
    return found[1].split(",") if found else []


def test_each_published_evaluation_exists_in_the_harness(published, tokenizer, tmp_path, monkeypatch):
    """Parsed by the harness' own parser, its task is in the registry, and a model takes its arguments."""
    from blockwise.models import llada
    from experiments.make_base import make_config

    llada.LLaDAForCausalLM(make_config(126464, 32, 1)).save_pretrained(tmp_path)  # as many tokens as LLaDA-8B
    tokenizer.save_pretrained(tmp_path)
    known, models = TaskManager().all_tasks, {}
    for model, task, shots, batch, settings in published:
        done = script(model, task, "--dry-run", NUM_GPUS="2")
        command = shlex.split(done.stdout)
        begin = ["deepspeed", "--num_gpus", "2", "--module", "adapters.lm_eval_llada"]
        assert done.returncode == 0 and command[:5] == begin, done.stderr
        monkeypatch.setattr(sys, "argv", ["lm-eval", *command[5:]])
        args = HarnessCLI().parse_args()
        assert args.tasks == [task] and task in known
        assert (args.num_fewshot, args.batch_size, args.model) == (int(shots), batch, "llada")
        assert getattr(args, "apply_chat_template", False) == (model == "instruct")
        assert getattr(args, "confirm_run_unsafe_code", False) == task.startswith(("humaneval", "mbpp"))
        assert args.model_args.pop("pretrained") == f"GSAI-ML/LLaDA-8B-{model.capitalize()}"
        if settings not in models:
            models[settings] = lm_eval_llada.LLaDA(str(tmp_path), batch_size=batch, **args.model_args).settings
        found = models[settings]
        assert "mc_num" in settings or found.steps == found.gen_length == found.block_length
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            assert getattr(found, name) == [int(token) for token in tokens_of(settings, name)]


def test_eval_llada_takes_other_arguments_and_refuses_what_it_does_not_know(monkeypatch):
    done = script("base", "piqa", "pretrained=mine,mc_num=128", "adapter=mine/adapter", "--dry-run")
    command = shlex.split(done.stdout)
    assert command[:3] == ["deepspeed", "--num_gpus", "8"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *command[5:]])
    wanted = {"pretrained": "mine", "mc_num": 128, "cfg_scale": 0.5, "adapter": "mine/adapter"}
    assert HarnessCLI().parse_args().model_args == wanted
    for args, said in (
        (("base", "gsm8k_cot"), "error: 'base gsm8k_cot' is no row of the table; bash eval_llada.sh prints it."),
        (("instruct", "--dry-run"), "error: 'instruct ' is no row of the table"),
        (
            ("base", "humaneval"),
            "error: humaneval runs code that the model writes; where that may happen, set HF_ALLOW_CODE_EVAL=1.",
        ),
    ):
        done = script(*args)
        assert done.returncode == 1 and said in done.stderr and not done.stdout
