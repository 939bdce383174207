"""adapters/lm_eval_llada.py: Monte Carlo likelihood against the exact bound, local tasks through the harness."""

import json
import subprocess
import sys
from itertools import combinations
from math import comb

import pytest
import torch
from conftest import ROOT, problems

from adapters import lm_eval_llada
from blockwise.cli import InputError
from blockwise.decoding import decode
from blockwise.decoding.settings import Settings
from blockwise.prompts import prompt_ids


@pytest.fixture(scope="module")
def lm(base):
    return lm_eval_llada.LLaDA(str(base), batch_size=8, gen_length=16, block_length=8, steps=16)


@torch.no_grad()
def exact_bound(model, context, continuation):
    """LLaDA's bound, summed over every number of masks and every choice of the masked positions."""
    length, total = len(continuation), 0.0
    for number in range(1, length + 1):
        for places in combinations(range(length), number):
            canvas = list(continuation)
            for place in places:
                canvas[place] = 4
            logits = model(torch.tensor([context + canvas])).logits[0, len(context) :]
            logs = logits.log_softmax(dim=-1)
            part = sum(float(logs[place, continuation[place]]) for place in places)
            total += part * length / number / length / comb(length, number)
    return total


def test_the_likelihood_is_the_bound_on_average(lm, tokenizer):
    context, continuation = tokenizer("Ada has 3 pens.")["input_ids"], tokenizer("3456")["input_ids"]
    assert len(continuation) == 4
    lm.mc_samples = 16
    draws = torch.tensor([lm.log_likelihood(context, continuation) for _ in range(120)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact_bound(lm.model, context, continuation)) < 4 * error
    assert error < 0.02 * draws.mean().abs(), "too noisy to tell anything"
    for token in (10, 20):  # one token: nothing is left to chance
        assert lm.log_likelihood(context, [token]) == pytest.approx(exact_bound(lm.model, context, [token]), abs=1e-4)


def request(*args):
    return type("Request", (), {"args": args})


def test_greedy_is_what_decoding_gives(lm, tokenizer):
    context = "Ada has 3 pens."
    ids, _ = decode.decode(lm.model, [tokenizer(context)["input_ids"]], Settings(3, 3, 3))
    for continuation, greedy in ((ids[0].tolist(), True), ([10, 11, 12], False)):
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


def test_with_an_adapter_the_model_is_base_and_adapters(base, adapter, adapted):
    with_adapter = lm_eval_llada.LLaDA(str(base), adapter=str(adapter), gen_length=16, block_length=8, steps=16)
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(with_adapter.model(ids).logits, adapted(ids).logits)


def test_unknown_arguments_are_refused(base):
    with pytest.raises(InputError, match="model_args colour"):
        lm_eval_llada.LLaDA(str(base), colour=3)
    for key, value in (("batch_size", "auto"), ("batch_size", 0), ("mc_samples", 0), ("dtype", "float8")):
        with pytest.raises(InputError, match=f"{key} '?{value}"):
            lm_eval_llada.LLaDA(str(base), **{key: value})


def test_the_last_turn_of_an_assistant_can_be_continued(lm):
    turns = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(turns[:1]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert lm.apply_chat_template(turns, add_generation_prompt=False).endswith("\n\nThe answer is")


def test_local_tasks_through_the_command_line(base, tokenizer, tmp_path):
    rows = [row | {"answer": row["response"].split()[-1]} for row in problems(5, 3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in {
        "story_generate": 'output_type: generate_until\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n\\n"]}\nmetric_list: [{metric: exact_match}]\n',
        "story_choice": 'output_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: ["{{answer}}", "0", "twelve"]\n'
        "metric_list: [{metric: acc}]\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
            f'test_split: test\ndoc_to_text: "{{{{query}}}}"\n{lines}'
        )
    command = ["-m", "adapters.lm_eval_llada", "run", "--model", "llada", "--tasks", "story_generate,story_choice"]
    model_args = f"pretrained={base},gen_length=16,block_length=8,steps=8,mc_samples=8"
    command += ["--model_args", model_args, "--include_path", tmp_path, "--apply_chat_template", "--batch_size", "4"]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["story_generate"]["exact_match,none"] == 0 and 0 <= results["story_choice"]["acc,none"] <= 1
    (file,) = (tmp_path / "out").rglob("samples_story_generate_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    model, tokenizer = decode.load(base, "float32", torch.device("cpu"))
    for sample, row in zip(sorted(samples, key=lambda sample: sample["doc_id"]), rows, strict=True):
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": row["query"]}])
        ids, _ = decode.decode(model, [prompt], Settings(16, 8, 8))
        answer = decode.completion(tokenizer, ids[0].tolist(), [1, 7]).split("\n\n")[0]
        assert sample["resps"] == [[answer]]
