"""pt.py: where the prompt ends and the answer starts, under many chat templates; the script's counts and refusals."""

import copy
import json
import sys

import datasets
import pytest
import torch
from conftest import problems, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import pt
from blockwise import encoding, formats, prompts
from blockwise.cli import InputError
from blockwise.models import hub

EOT = 7  # <|eot_id|> in the tests' tokenizer
QUERY, RESPONSE = "Ada has 3 pens and {gets} 4 more. How many?", "3 + 4 = 7\nThe answer is: 7"
# the user turn of the reference implementation, for QUERY
USER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAda has 3 pens and {gets} 4 more. How many?\n\n### Response: Let's think step by step."
)


def as_lists(samples):
    return [sample and (sample[0], sample[1].tolist()) for sample in samples]


def encoder(tokenizer, rows=(), filter_type=""):
    """An encoder of MetaMathQA's rows, as the script makes it by default."""
    probes = {name: [row[name] for row in rows] for name in ("query", "response")}
    return encoding.Encoder(tokenizer, formats.METAMATH, prompts.METAMATH, probes, filter_type)


def tokenize(pairs, tokenizer):
    """What becomes of (query, response) pairs: (prompt_len, ids as a list), or None."""
    rows = [{"query": query, "response": response} for query, response in pairs]
    batch = {name: [row[name] for row in rows] for name in ("query", "response")}
    outcomes = encoder(tokenizer, rows)(batch)
    assert all(len(of_row) == 1 and (of_row[0][1] is None) == bool(of_row[0][0]) for of_row in outcomes)
    return as_lists([sample for ((_, sample),) in outcomes])


COUNTS = ("kept", "skipped by type", "too long", "unusable")


def encode(rows, tokenizer, max_len, max_samples, filter_type):
    dataset = datasets.Dataset.from_list(rows)
    found = encoding.encode(dataset, encoder(tokenizer, (), filter_type), max_len, max_samples)
    assert found.reasons.total() == found.counts["unusable"]
    return as_lists(found.samples), {name: found.counts[name] for name in COUNTS}


# ---------------------------------------------------------------- chat templates


def loop(message):
    return "{% for m in messages %}" + message + "{% endfor %}"


def say(text):
    """Text in a template, newlines and all: outside of {{ }} Jinja drops a newline at the end."""
    return "{{ " + repr(text) + " }}"


def by_role(user, assistant):
    return loop("{% if m['role'] == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}")


def if_asked(header):
    return "{% if add_generation_prompt %}" + header + "{% endif %}"


LLADA_TURNS = loop(
    "{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}"
)
LLADA_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLADA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
CHATML_TURNS = loop("{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}")
CHATML_HEADER, CHATML_USER = "<|im_start|>assistant\n", "<|im_start|>user\n"
NO_SYSTEM_TURN = "{% if messages[0]['role'] != 'system' %}"
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LLAMA_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023<|eot_id|>"
HUMAN = by_role("{{ '### Human: ' + m['content'] + '\n' }}", "{{ '### Assistant: ' + m['content'] + '\n' }}")
GEMMA = loop(
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}"
)
VICUNA = by_role("{{ 'USER: ' + m['content'] + ' ' }}", "{{ 'ASSISTANT: ' + m['content'] + eos_token }}")
VICUNA_SYSTEM = "A chat between a user and an assistant. "

# name: (template, what the prompt has before the user's text, after it, what the answer has before the response, after)
TEMPLATES = {
    "LLaDA": (LLADA_TURNS + say(LLADA_HEADER), "<|startoftext|>" + LLADA_USER, "<|eot_id|>" + LLADA_HEADER,
              "", "<|eot_id|>"),
    "LLaDA, fixed to honour the flag": (
        LLADA_TURNS + if_asked(say(LLADA_HEADER)), "<|startoftext|>" + LLADA_USER, "<|eot_id|>" + LLADA_HEADER,
        "", "<|eot_id|>"),
    "ChatML": (CHATML_TURNS + if_asked(say(CHATML_HEADER)), CHATML_USER, "<|im_end|>\n" + CHATML_HEADER,
               "", "<|im_end|>\n"),
    "ChatML, always": (CHATML_TURNS + say(CHATML_HEADER), CHATML_USER, "<|im_end|>\n" + CHATML_HEADER,
                       "", "<|im_end|>\n"),
    "Qwen": (NO_SYSTEM_TURN + say(QWEN_SYSTEM) + "{% endif %}" + CHATML_TURNS + if_asked(say(CHATML_HEADER)),
             QWEN_SYSTEM + CHATML_USER, "<|im_end|>\n" + CHATML_HEADER, "", "<|im_end|>\n"),
    "Llama 3": (say("<|begin|>") + LLADA_TURNS.replace("bos_token", "''") + if_asked(say(LLADA_HEADER)),
                "<|begin|>" + LLADA_USER, "<|eot_id|>" + LLADA_HEADER, "", "<|eot_id|>"),
    "Llama 3.1": (say("<|begin|>" + LLAMA_SYSTEM) + LLADA_TURNS.replace("bos_token", "''")
                  + if_asked(say(LLADA_HEADER)),
                  "<|begin|>" + LLAMA_SYSTEM + LLADA_USER, "<|eot_id|>" + LLADA_HEADER, "", "<|eot_id|>"),
    "Gemma": (say("<|begin|>") + GEMMA + if_asked(say("<start_of_turn>model\n")),
              "<|begin|><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "", "<end_of_turn>\n"),
    "no headers": (loop("{{ m['content'] + '\n' }}"), "", "\n", "", "\n"),
    "no headers and no newline": (loop("{{ m['content'] }}"), "", "", "", ""),
    "text": (HUMAN + if_asked("### Assistant: "), "### Human: ", "\n### Assistant: ", "", "\n"),
    "text, always": (HUMAN + "### Assistant: ", "### Human: ", "\n### Assistant: ", "", "\n"),
    "text, always, behind a bos": ("{{ bos_token }}" + HUMAN + "### Assistant: ",
                                   "<|startoftext|>### Human: ", "\n### Assistant: ", "", "\n"),
    "text, header without its space": (HUMAN + if_asked("### Assistant:"), "### Human: ", "\n### Assistant:",
                                       " ", "\n"),
    "Mistral": ("{{ bos_token }}" + by_role("{{ '[INST] ' + m['content'] + ' [/INST]' }}",
                                            "{{ ' ' + m['content'] + eos_token }}"),
                "<|startoftext|>[INST] ", " [/INST]", " ", "<|endoftext|>"),
    "Vicuna": (VICUNA_SYSTEM + VICUNA + if_asked("ASSISTANT:"), VICUNA_SYSTEM + "USER: ", " ASSISTANT:",
               " ", "<|endoftext|>"),
    "only answers end with eos": (
        by_role("{{ 'Q: ' + m['content'] + '\n' }}", "{{ 'A: ' + m['content'] + eos_token + '\n' }}") + "A: ",
        "Q: ", "\nA: ", "", "<|endoftext|>\n"),
    "eos closes the conversation": (
        loop("{{ m['role'] + ': ' + m['content'] + '\n' }}") + if_asked("assistant: ")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "user: ", "\nassistant: ", "", "\n<|endoftext|>"),
    "separators between turns only": (
        loop("{{ m['role'] + ': ' + m['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}")
        + if_asked(say("\nassistant: ")), "user: ", "\nassistant: ", "", ""),
}  # fmt: skip
# Here the end of turn and the extra header are hard to tell apart: the cut must be exact, or the template refused.
HARD = {
    "LLaDA, a bos that is not the tokenizer's": (
        LLADA_TURNS.replace("bos_token", "'<|begin|>'") + say(LLADA_HEADER),
        "<|begin|>" + LLADA_USER, "<|eot_id|>" + LLADA_HEADER, "", "<|eot_id|>"),
    "Gemma, always": (say("<|begin|>") + GEMMA + say("<start_of_turn>model\n"),
                      "<|begin|><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n",
                      "", "<end_of_turn>\n"),
    "default system turn, always": (
        NO_SYSTEM_TURN + say(QWEN_SYSTEM) + "{% endif %}" + CHATML_TURNS + say(CHATML_HEADER),
        QWEN_SYSTEM + CHATML_USER, "<|im_end|>\n" + CHATML_HEADER, "", "<|im_end|>\n"),
    "Llama 3.1, always": (
        say("<|begin|>" + LLAMA_SYSTEM) + LLADA_TURNS.replace("bos_token", "''") + say(LLADA_HEADER),
        "<|begin|>" + LLAMA_SYSTEM + LLADA_USER, "<|eot_id|>" + LLADA_HEADER, "", "<|eot_id|>"),
    "default system line, always": (
        say("You are helpful.\n") + CHATML_TURNS + say(CHATML_HEADER),
        "You are helpful.\n" + CHATML_USER, "<|im_end|>\n" + CHATML_HEADER, "", "<|im_end|>\n"),
    "text behind a system line, always": (
        say("Be nice.\n") + HUMAN + "### Assistant: ",
        "Be nice.\n### Human: ", "\n### Assistant: ", "", "\n"),
    "text, always, header without its space": (
        HUMAN + "### Assistant:", "### Human: ", "\n### Assistant:", " ", "\n"),
    "Gemma, always, header without its newline": (
        say("<|begin|>") + GEMMA + "<start_of_turn>model",
        "<|begin|><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model", "\n", "<end_of_turn>\n"),
    "Vicuna, always": (
        VICUNA_SYSTEM + VICUNA + "ASSISTANT:", VICUNA_SYSTEM + "USER: ", " ASSISTANT:", " ", "<|endoftext|>"),
}  # fmt: skip
ADDED = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<start_of_turn>", "<end_of_turn>"]


def with_template(tokenizer, template, added=()):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def check(tokenizer, before, after, lead, end):
    """A sample of this tokenizer against the texts that it should consist of."""
    prompt, answer = before + USER + after, lead + RESPONSE + end
    turn = {"role": "user", "content": USER}
    assert tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True) == prompt
    ((prompt_len, ids),) = tokenize([(QUERY, RESPONSE)], tokenizer)
    assert ids[:prompt_len] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[:prompt_len]) == prompt
    assert tokenizer.decode(ids[prompt_len:]) == answer


@pytest.mark.parametrize("added", [(), ADDED], ids=["as text", "as added tokens"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer(tokenizer, name, added):
    template, *texts = TEMPLATES[name]
    check(with_template(tokenizer, template, added), *texts)


@pytest.mark.parametrize("added", [(), ADDED], ids=["as text", "as added tokens"])
@pytest.mark.parametrize("name", HARD)
def test_hard_templates_are_cut_exactly_or_refused(tokenizer, name, added):
    template, *texts = HARD[name]
    tokenizer = with_template(tokenizer, template, added)
    try:
        prompts.extra_header(tokenizer)
    except InputError as error:
        assert "template" in str(error)
    else:
        check(tokenizer, *texts)


@pytest.mark.parametrize("name", ["LLaDA, a bos that is not the tokenizer's", "Gemma, always"])
def test_an_added_token_in_front_is_no_obstacle(tokenizer, name):
    template, *texts = HARD[name]
    check(with_template(tokenizer, template, ADDED), *texts)


def test_tokenizer_without_bos(tokenizer):
    template, before, *texts = TEMPLATES["LLaDA"]
    tokenizer = with_template(tokenizer, template)
    tokenizer.bos_token = None
    check(tokenizer, before.replace("<|startoftext|>", ""), *texts)


def test_tokenizer_that_adds_a_bos_itself(tokenizer):
    """As Llama 3's does: the template has written one already, and inside a sample there is none."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    assert tokenizer("a")["input_ids"] == [0, *tokenizer("a", add_special_tokens=False)["input_ids"], 1]
    check(tokenizer, *TEMPLATES["LLaDA"][1:])


@pytest.mark.parametrize(
    "name, header",
    [
        ("LLaDA", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("LLaDA, fixed to honour the flag", ""),
        ("ChatML, always", "<|im_start|>assistant\n"),
        ("text, always", "### Assistant: "),
        ("Llama 3", ""),
        ("Qwen", ""),
        ("no headers", ""),
    ],
)
def test_extra_header(tokenizer, name, header):
    assert prompts.extra_header(with_template(tokenizer, TEMPLATES[name][0])) == header


def test_lladas_extra_header_has_the_47_characters_that_the_reference_cuts(tokenizer):
    assert len(prompts.extra_header(tokenizer)) == 47


def test_template_that_jinja_cannot_read(tokenizer):
    with pytest.raises(InputError, match="template"):
        prompts.extra_header(with_template(tokenizer, "{% for m in messages %}"))


def test_an_answer_that_ends_like_the_header_is_kept_whole(tokenizer):
    """With a template that appends none, nothing may be cut, whatever the answer ends with."""
    tokenizer = with_template(tokenizer, loop("{{ m['role'] + ': ' + m['content'] }}") + if_asked("assistant: "))
    response = "she says assistant: "
    ((prompt_len, ids),) = tokenize([(QUERY, response)], tokenizer)
    assert tokenizer.decode(ids[prompt_len:]) == response


def test_spaces_around_the_texts(tokenizer):
    """LLaDA's template trims each turn."""
    ((prompt_len, ids),) = tokenize([(QUERY, " \n7 apples \n")], tokenizer)
    assert tokenizer.decode(ids[prompt_len:]) == "7 apples<|eot_id|>"


def test_letters_of_all_kinds(tokenizer):
    response = "três œufs, 三個雞蛋, 🥚🥚🥚 {} {query} \\boxed{3}\t% </s>"
    ((prompt_len, ids),) = tokenize([("¿Cuántos? 🥚 {0}", response)], tokenizer)
    assert tokenizer.decode(ids[prompt_len:]) == response + "<|eot_id|>"
    assert "### Instruction:\n¿Cuántos? 🥚 {0}\n\n### Response:" in tokenizer.decode(ids[:prompt_len])


def test_unusable_rows(tokenizer):
    """Empty texts; and a template that puts something else than the answer behind the prompt."""
    samples = tokenize([("", "a"), ("a", ""), (" \n", "a"), ("a", "\t "), ("a", "b")], tokenizer)
    assert [sample is None for sample in samples] == [True, True, True, True, False]
    thinks = with_template(tokenizer, CHATML_TURNS + if_asked(say(CHATML_HEADER + "<think>\n\n</think>\n\n")))
    assert tokenize([("a", "b")], thinks) == [None]
    assert tokenize([], tokenizer) == []


# ---------------------------------------------------------------- a token over the border


def ab_tokenizer(pre_tokenizer, decoder):
    """A BPE in which "ab" is one token, with a template that ends the prompt with "a"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *map(chr, range(32, 127)), "\n", "▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["ab ab abab ba"] * 50, trainer)
    template = by_role("{{ m['content'] + '=a' }}", "{{ m['content'] + eos_token }}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize("response", ["b", "bab ab", "b ba"])
def test_token_over_the_border(response):
    """Tokenized as a whole, "...=a" + "b..." has the token "ab": the prompt's tokens would be no prefix."""
    byte_level = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("=", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # "=" on its own, so that "a" and "b" meet within one word
    tokenizer = ab_tokenizer(byte_level, decoders.ByteLevel())
    prompt = prompts.METAMATH.wrapped("ab?") + "=a"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + response + "</s>", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids  # else there is nothing to test

    ((prompt_len, ids),) = tokenize([("ab?", response)], tokenizer)
    assert ids[:prompt_len] == prompt_ids
    assert tokenizer.decode(ids[prompt_len:]) == response + "</s>"
    assert tokenizer.decode(ids) == prompt + response + "</s>"


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece"])
def test_token_over_the_border_where_a_text_starts_with_a_space(kind):
    """Some tokenizers put a space in front of every text: such a sample has no space too many, or it is not used."""
    if kind == "byte-level":
        tokenizer = ab_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel())
    else:
        tokenizer = ab_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace())
    tokenizer.chat_template = tokenizer.chat_template.replace("=a", " a")
    (sample,) = tokenize([("ab?", "bab ab")], tokenizer)
    if sample is not None:
        assert tokenizer.decode(sample[1]).endswith("Let's think step by step. abab ab</s>")


# ---------------------------------------------------------------- encode


def one_by_one(rows, tokenizer, max_len, filter_type):
    """pt.encode for LLaDA's template, written out: one row at a time, and no template engine."""
    kept, counts = [], {"kept": 0, "skipped by type": 0, "too long": 0, "unusable": 0}
    for row in rows:
        if filter_type and filter_type in row["type"]:
            counts["skipped by type"] += 1
            continue
        if not row["query"].strip() or not row["response"].strip():
            counts["unusable"] += 1
            continue
        user = USER.replace("Ada has 3 pens and {gets} 4 more. How many?", row["query"])
        prompt = "<|startoftext|>" + LLADA_USER + user.strip() + "<|eot_id|>" + LLADA_HEADER
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(prompt + row["response"].strip() + "<|eot_id|>", add_special_tokens=False)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids
        if len(ids) > max_len:
            counts["too long"] += 1
            continue
        counts["kept"] += 1
        kept.append((len(prompt_ids), ids))
    return kept, counts


@pytest.mark.parametrize("filter_type", ["GSM", ""])
def test_encode_equals_one_row_at_a_time(tokenizer, filter_type):
    """More rows than pt.encode takes in one batch (1,000), of every kind."""
    rows = problems(2300, 5)
    for i, row in enumerate(rows):
        row["type"] = "GSM_Rephrased" if i % 7 == 0 else "MATH_AnsAug"
        if i % 50 == 3:
            row["response"] = " "
    max_len = 115
    kept, counts = encode(rows, tokenizer, max_len, 0, filter_type)
    expected, expected_counts = one_by_one(rows, tokenizer, max_len, filter_type)
    assert kept == expected
    assert counts == expected_counts
    assert all(number > 100 or not filter_type for number in counts.values() if number != counts["unusable"])
    assert sum(counts.values()) == len(rows)
    assert len({prompt_len for prompt_len, _ in kept}) > 10  # the reference wrote 2 for every sample
    assert max(len(ids) for _, ids in kept) == max_len  # so the limit itself was met, and met samples kept


def test_the_fast_tokenizer_is_used_only_where_it_agrees(tokenizer, monkeypatch, capsys):
    sample, texts = ["What is 1 + 1?", "2 é\n"], ["a <|eot_id|> b", "", "What is 7?"]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    chosen = encoding.ids_function(tokenizer, sample)
    assert chosen.__name__ == "by_fastokens" and [ids.tolist() for ids in chosen(texts)] == wanted
    assert not capsys.readouterr().out
    real = tokenizer.backend_tokenizer.to_str()
    for text, why in ((real.replace('"2"', '"~~"').replace('"~"', '"2"'), "gives other ids"), ("{}", "cannot read it")):
        backend = type("Backend", (), {"to_str": lambda self, text=text: text})()
        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "backend_tokenizer", property(lambda self, backend=backend: backend))
            chosen = encoding.ids_function(tokenizer, sample)
        assert why in capsys.readouterr().out
        assert chosen.__name__ == "by_tokenizer" and [ids.tolist() for ids in chosen(texts)] == wanted


def test_max_samples_stops_early(tokenizer):
    """The counts are about the rows up to the last one kept."""
    good = {"query": "What is 1 + 1?", "response": "2", "type": "MATH"}
    gsm, blank = good | {"type": "GSM_SV"}, good | {"response": ""}
    rows = [good, gsm, blank, good, gsm, gsm, blank, good]
    kept, counts = encode(rows, tokenizer, 256, 2, "GSM")
    assert len(kept) == 2
    assert counts == {"kept": 2, "skipped by type": 1, "too long": 0, "unusable": 1}


@pytest.mark.parametrize("max_samples, number", [(0, 8), (1, 1), (7, 7), (8, 8), (100, 8)])
def test_max_samples(tokenizer, max_samples, number):
    dataset = problems(8, 2)
    every, _ = encode(dataset, tokenizer, 256, 0, "GSM")
    kept, counts = encode(dataset, tokenizer, 256, max_samples, "GSM")
    assert kept == every[:number]
    assert counts["kept"] == number


# ---------------------------------------------------------------- the script


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """datasets keeps what it has read in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(file):
    return torch.load(file, weights_only=True)


@pytest.fixture
def mixed(tmp_path, tokenizer):
    """A folder of known content: 5 rows of at most 100 tokens, 3 of type GSM, 2 too long, 1 unusable."""
    good = {"query": "What is 1 + 1?", "response": "1 + 1 = 2", "type": "MATH_AnsAug"}
    gsm = good | {"type": "GSM_FOBAR"}
    long = good | {"response": " ".join(["1 + 1 = 2"] * 40)}
    blank = good | {"response": " "}
    write_jsonl(tmp_path / "mixed" / "train.jsonl", [good, gsm, long, good, blank, gsm, good, good, long, gsm, good])
    return tmp_path / "mixed"


def test_real_run_with_defaults(base, mixed, tmp_path, tokenizer):
    """The script as a user starts it, in another folder, with the defaults for all but model and dataset."""
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run("pt.py", "--model", base, "--dataset", mixed, cwd=tmp_path, env=cache)
    assert done.returncode == 0, done.stderr
    lengths = [len(sample["full_ids"]) for sample in load(tmp_path / "MathQA_256.pt")]
    said = done.stdout.splitlines()
    assert said[0] == (
        "columns prompt=query, answer=response; --wrap metamath; rows whose type contains GSM are skipped, "
        "as in the recipe (--filter_type '' keeps them)"
    )
    counts = "kept 5, skipped by type 3, too long 2, unusable 1 (of 11 rows); unusable are 1 empty"
    assert said[1] == f"MathQA_256.pt: {counts}"
    assert said[2].startswith(f"lengths in tokens: 50 % {lengths[0]}, 90 % ") and len(said) == 3
    assert not list(tmp_path.glob("*.unfinished"))
    samples = load(tmp_path / "MathQA_256.pt")
    assert type(samples) is list and len(samples) == 5
    header = tokenizer(LLADA_HEADER, add_special_tokens=False)["input_ids"]
    for sample in samples:
        assert set(sample) == {"prompt_len", "full_ids"}
        assert type(sample["prompt_len"]) is int
        assert sample["full_ids"].dtype == torch.long and sample["full_ids"].dim() == 1
        ids, prompt_len = sample["full_ids"].tolist(), sample["prompt_len"]
        assert tokenizer.decode(ids[prompt_len:]) == "1 + 1 = 2<|eot_id|>"
        assert ids[-1] == EOT
        assert ids[prompt_len - len(header) : prompt_len] == header
        assert tokenizer.decode(ids).count("assistant<|end_header_id|>") == 1


def test_defaults_are_the_references(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pt.py"])
    assert vars(pt.parse_args()) == {
        "output": "MathQA_256.pt", "model": "GSAI-ML/LLaDA-8B-Instruct", "dataset": "meta-math/MetaMathQA",
        "config": None, "split": "train", "max_len": 256, "max_samples": 20000, "filter_type": None, "columns": {},
        "turns": "all", "system": "", "wrap": None, "chat_template_kwargs": {}, "val_share": 0.0, "num_proc": 1,
        "text": None, "insert_eos": False, "streaming": False, "max_tokens": 0,
    }  # fmt: skip


def test_samples_are_dropped_and_never_cut(call, base, mixed, tmp_path):
    """With the limit at the length of the short samples they are all kept; one token less, and none is."""
    output = tmp_path / "out.pt"
    code, *_ = call("--model", base, "--dataset", mixed, "--output", output, "--max_len", 10_000)
    assert code == 0
    short, long = sorted({len(sample["full_ids"]) for sample in load(output)})
    for limit, kept, too_long in [(short, 5, 2), (long - 1, 5, 2), (long, 7, 0)]:
        code, out, _ = call("--model", base, "--dataset", mixed, "--output", output, "--max_len", limit)
        assert code == 0
        assert f"{output}: kept {kept}, skipped by type 3, too long {too_long}, unusable 1 (of 11 rows)" in out
        assert len(load(output)) == kept
    code, _, err = call("--model", base, "--dataset", mixed, "--output", output, "--max_len", short - 1)
    assert code == 1 and "too long 7" in err


def test_filter_type(call, base, mixed, tmp_path):
    output = tmp_path / "out.pt"
    for text, kept, skipped in [("", 8, 0), ("MATH", 3, 8), ("FOBAR", 5, 3), ("gsm", 8, 0), ("GSM", 5, 3)]:
        code, out, _ = call("--model", base, "--dataset", mixed, "--output", output, "--filter_type", text)
        assert code == 0
        assert f"kept {kept}, skipped by type {skipped}, " in out
        assert len(load(output)) == kept


def test_without_a_filter_no_type_is_needed(call, base, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"query": "What is 1 + 1?", "response": "2"}])
    flags = ("--model", base, "--dataset", tmp_path / "data", "--output", tmp_path / "out.pt")
    assert call(*flags, "--filter_type", "")[0] == 0
    code, out, _ = call(*flags)
    assert code == 0 and "kept 1" in out and "recipe" not in out
    code, _, err = call(*flags, "--filter_type", "GSM")
    assert code == 1 and "'type'" in err and "query, response" in err


def test_max_samples_of_the_script(call, base, dataset_folder, tmp_path):
    output = tmp_path / "out.pt"
    flags = ("--model", base, "--dataset", dataset_folder, "--output", output)
    assert call(*flags, "--max_samples", 0)[0] == 0
    every = load(output)
    assert len(every) == 53
    code, out, _ = call(*flags, "--max_samples", 10)
    assert code == 0 and "kept 10," in out and "(of 53 rows)" in out
    for one, other in zip(load(output), every[:10], strict=True):
        assert one["prompt_len"] == other["prompt_len"] and torch.equal(one["full_ids"], other["full_ids"])


def test_jsonl_and_parquet_and_splits(call, base, tmp_path):
    train, test = problems(6, 3), problems(4, 4)
    for kind in ("jsonl", "parquet"):
        folder = tmp_path / f"of {kind}"
        folder.mkdir()
        for split, rows in (("train", train), ("test", test)):
            if kind == "jsonl":
                write_jsonl(folder / f"{split}.jsonl", rows)
            else:
                datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
            code, out, err = call(
                "--model", base, "--dataset", folder, "--split", split, "--output", tmp_path / f"{split}.{kind}.pt"
            )
            assert code == 0, err
    tokenizer = hub.load_tokenizer(base)
    for split, rows in (("train", train), ("test", test)):
        expected, _ = one_by_one(rows, tokenizer, 256, "GSM")
        for kind in ("jsonl", "parquet"):
            written = load(tmp_path / f"{split}.{kind}.pt")
            assert [(sample["prompt_len"], sample["full_ids"].tolist()) for sample in written] == expected


def test_the_trainers_samples(pt_file, tokenizer):
    """The file that the trainers' tests use: each sample is its problem, and prompt_len is where the answer starts."""
    samples = load(pt_file)
    for sample, problem in zip(samples, problems(53, 1), strict=True):
        answer = tokenizer.decode(sample["full_ids"][sample["prompt_len"] :])
        assert answer == problem["response"] + "<|eot_id|>"
    assert len({sample["prompt_len"] for sample in samples}) > 5


# ---------------------------------------------------------------- bad input

GOOD = {"query": "What is 1 + 1?", "response": "2", "type": "MATH"}


def without(key):
    return [{name: text for name, text in GOOD.items() if name != key}]


# name: (files of the dataset folder, other flags, what stderr's last line must say)
BAD = {
    "no query": ({"train.jsonl": without("query")}, (), ("response, type", "question and answer", "--columns")),
    "no response": ({"train.jsonl": without("response")}, (), ("query, type", "--columns")),
    "no type": ({"train.jsonl": without("type")}, ("--filter_type", "GSM"), ("no column 'type'", "query, response")),
    "empty folder": ({}, (), ("DATA", "data files")),
    "empty file": ({"train.jsonl": ""}, (), ("DATA",)),
    "no data file": ({"notes.xyz": "text"}, (), ("DATA", "data files")),
    "malformed line": ({"train.jsonl": json.dumps(GOOD) + '\n{"query": "What\n'}, (), ("DATA", "JSON")),
    "malformed first line": ({"train.jsonl": "What?\n" + json.dumps(GOOD)}, (), ("DATA",)),
    "damaged parquet": ({"train.parquet": "PAR1 and no more"}, (), ("DATA", "arquet")),
    "null response": ({"train.jsonl": [GOOD | {"response": None}]}, (), ("unusable 1", "1 null")),
    "null type": ({"train.jsonl": [GOOD | {"type": None}]}, (), ("unusable 1", "1 without a text as type")),
    "a number": ({"train.jsonl": [GOOD | {"response": 2}]}, (), ("unusable 1", "1 not a text")),
    "a list": ({"train.jsonl": [GOOD | {"query": [["What?"]]}]}, (), ("unusable 1", "1 not a text")),
    "unknown split": ({"train.jsonl": [GOOD]}, ("--split", "validation"), ("'validation'", "train")),
    "all filtered": ({"train.jsonl": [GOOD] * 3}, ("--filter_type", "MA"), ("skipped by type 3", "--filter_type")),
    "all too long": ({"train.jsonl": [GOOD] * 3}, ("--max_len", 20), ("too long 3", "--max_len")),
    "all unusable": ({"train.jsonl": [GOOD | {"response": ""}]}, (), ("unusable 1",)),
    "max_len 1": ({"train.jsonl": [GOOD]}, ("--max_len", 1), ("--max_len",)),
    "max_samples -1": ({"train.jsonl": [GOOD]}, ("--max_samples", -1), ("--max_samples",)),
    "max_len a word": ({"train.jsonl": [GOOD]}, ("--max_len", "many"), ("--max_len", "many")),
    "unknown flag": ({"train.jsonl": [GOOD]}, ("--max_length", 200), ("--max_length",)),
}


def check_refusal(call, output, flags, parts):
    """The run ends with one sentence, and leaves the output's folder as it was: with and without an older output."""
    folder = output.parent
    for older in (None, b"an older file"):
        if older:
            output.write_bytes(older)
        before = sorted(folder.iterdir())
        code, out, err = call(*flags)
        assert code not in (0, None)
        assert out == "" or out.startswith("columns ") and out.count("\n") == 1
        assert "Traceback" not in err
        last = err.strip().splitlines()[-1]
        assert "error: " in last
        for part in parts:
            assert part in last
        assert sorted(folder.iterdir()) == before
        assert older is None or output.read_bytes() == older


@pytest.mark.parametrize("name", BAD)
def test_bad_dataset_or_flag(call, base, tmp_path, name):
    files, flags, parts = BAD[name]
    folder, output = tmp_path / "data", tmp_path / "out" / "samples.pt"
    folder.mkdir()
    output.parent.mkdir()
    for file, content in files.items():
        if isinstance(content, str):
            (folder / file).write_text(content)
        else:
            write_jsonl(folder / file, content)
    parts = [str(folder) if part == "DATA" else part for part in parts]
    check_refusal(call, output, ("--model", base, "--dataset", folder, "--output", output, *flags), parts)


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/folder/here", ""])
def test_dataset_that_does_not_exist(call, base, tmp_path, name):
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "samples.pt"
    flags = ("--model", base, "--dataset", name, "--output", output)
    check_refusal(call, output, flags, ["dataset", name])


@pytest.mark.parametrize("name", ["/no/such/model", "no/such/model/here"])
def test_model_that_does_not_exist(call, dataset_folder, tmp_path, name):
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "samples.pt"
    check_refusal(call, output, ("--model", name, "--dataset", dataset_folder, "--output", output), [name])


@pytest.mark.parametrize("template", [None, ""])
def test_tokenizer_without_chat_template(call, tokenizer, dataset_folder, tmp_path, template):
    with_template(tokenizer, template).save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "samples.pt"
    flags = ("--model", tmp_path / "model", "--dataset", dataset_folder, "--output", output)
    check_refusal(call, output, flags, ["chat template", str(tmp_path / "model")])


def test_folder_without_tokenizer(call, dataset_folder, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "samples.pt"
    flags = ("--model", tmp_path / "model", "--dataset", dataset_folder, "--output", output)
    check_refusal(call, output, flags, ["tokenizer", str(tmp_path / "model")])


def test_output_in_a_folder_that_does_not_exist(call, base, dataset_folder, tmp_path):
    output = tmp_path / "out" / "samples.pt"
    code, out, err = call("--model", base, "--dataset", dataset_folder, "--output", output)
    assert code == 1 and out == "" and str(output) in err
    assert not output.parent.exists()


def test_output_that_is_a_folder(call, base, dataset_folder, tmp_path):
    for output in (tmp_path, ""):
        code, out, err = call("--model", base, "--dataset", dataset_folder, "--output", output)
        assert code == 1 and out == "" and "--output" in err


def test_real_run_on_bad_input(base, tmp_path):
    """One refusal as a user sees it, exit code and all."""
    write_jsonl(tmp_path / "data" / "train.jsonl", without("response"))
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run("pt.py", "--model", base, "--dataset", "data", "--output", "samples.pt", cwd=tmp_path, env=cache)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith(
        "error: --dataset data: its columns are query, type, none of the known formats (messages; "
    )
    assert sentence.endswith("Say what they hold: --columns prompt=NAME answer=NAME, or --columns messages=NAME.")
    assert not list(tmp_path.glob("samples.pt*"))
