"""Texts packed into samples: nothing is lost, streams give the same, and trainers read the file like any other data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import pt
from blockwise import packing, prompts
from blockwise.cli import InputError
from blockwise.data import make_samples, read_pt
from blockwise.models import hub

TEXTS = [f"Story {i}: Ada has {i} pens, Gus has {i * 7 % 13}.\nNow they have {i + i * 7 % 13}.\n" for i in range(150)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with one .txt file, and a folder with jsonl of the same texts, in two files."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("txt", "jsonl"):
        (folder / name).mkdir()
    (folder / "txt/all.txt").write_text("".join(TEXTS))
    for half in (0, 1):
        lines = [json.dumps({"story": text}) + "\n" for text in TEXTS[half * 75 : (half + 1) * 75]]
        (folder / f"jsonl/part{half}.jsonl").write_text("".join(lines))
    return folder


def ids_of(file):
    return load_file(file)["ids"]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12), st.integers(2, 7))
def test_packing_loses_nothing_but_the_tail(tmp_path_factory, pieces, max_len):
    file = tmp_path_factory.getbasetemp() / "packed.pt"
    every = [token for piece in pieces for token in piece]
    arrays = [np.array(piece, np.int32) for piece in pieces]
    if len(every) < max_len:
        with pytest.raises(InputError, match=f"have {len(every)} tokens, one sample has {max_len}"):
            packing.write(file, arrays, max_len)
        return
    packed = packing.write(file, arrays, max_len)
    whole = len(every) // max_len * max_len
    assert ids_of(file).flatten().tolist() == every[:whole] and packed.left_over == len(every) - whole
    assert torch.equal(packing.read(file), ids_of(file)) and packed.samples == whole // max_len


@pytest.mark.parametrize("end", [False, True])
def test_the_file_holds_the_texts_in_their_order(base, texts, tmp_path, end):
    tokenizer = hub.load_tokenizer(base)
    flags = ["--model", base, "--max_len", 64, *(["--insert_eos"] * end)]
    done = run("pt.py", "--text", "story", "--dataset", texts / "jsonl", "--output", tmp_path / "a.pt", *flags)
    assert done.returncode == 0, done.stderr
    wanted = []
    for text in TEXTS:
        wanted += tokenizer(text, add_special_tokens=False)["input_ids"] + [1] * end
    ids = ids_of(tmp_path / "a.pt")
    assert ids.flatten().tolist() == wanted[: ids.numel()] and ids.dtype == torch.int32 and ids.shape[1] == 64
    left = len(wanted) - ids.numel()
    assert 0 <= left < 64 and f"{len(ids):,} samples of 64 tokens, without prompt; {left} tokens" in done.stdout
    stream = ("pt.py", "--text", "story", "--dataset", texts / "jsonl", *flags, "--streaming", "--max_tokens", 1000)
    done = run(*stream, "--output", tmp_path / "b.pt")
    assert done.returncode == 0, done.stderr
    assert torch.equal(ids_of(tmp_path / "b.pt"), ids[: 1000 // 64])


def test_a_text_file_is_one_text(base, texts, tmp_path):
    wanted = hub.load_tokenizer(base)("".join(TEXTS), add_special_tokens=False)["input_ids"]
    for name in ("txt", "txt/all.txt"):
        flags = ("--model", base, "--max_len", 32, "--output", tmp_path / "a.pt")
        done = run("pt.py", "--text", "text", "--dataset", texts / name, *flags)
        assert done.returncode == 0, done.stderr
        ids = ids_of(tmp_path / "a.pt").flatten().tolist()
        assert ids == wanted[: len(ids)] and len(wanted) - len(ids) < 32


@pytest.mark.parametrize("script", ["train_fullseq.py", "train_bd3lm.py"])
def test_training_on_texts_is_training_on_samples_without_prompts(forked, tmp_path, script):
    """The same losses as from a list of the same samples, on one rank and on two."""
    ids = torch.randint(8, 400, (40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packing.write(tmp_path / "text.pt", list(ids.numpy()), 64)
    pt.save([(0, row.numpy().astype(np.int64)) for row in ids], tmp_path / "list.pt", prompts.PLAIN)
    knobs = {"MAX_LEN": 64, "TOTAL_TRAIN_STEPS": 3, "LORA_DROPOUT": 0.0, "LR": 1e-3, "CKPT_DIR": "out/run"}
    losses = []
    for number, (data, ranks) in enumerate([("text", 1), ("text", 2), ("list", 1)]):
        folder = tmp_path / str(number)
        done = forked(folder, ranks, script, DATA_PT=tmp_path / f"{data}.pt", **knobs, MICRO_BSIZE=4 // ranks)
        assert not any(done.codes), done.output
        lines = (folder / "out/run_logs/train_loss.csv").read_text().splitlines()[1:]
        losses.append([float(line.split(",")[1]) for line in lines])
    assert losses[0] == losses[2] and losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def test_previews_continue_the_first_half_of_texts(forked, base, tmp_path):
    ids = torch.randint(8, 250, (40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packing.write(tmp_path / "text.pt", list(ids.numpy()), 64)
    knobs = {"MAX_LEN": 64, "TOTAL_TRAIN_STEPS": 1, "SAMPLE_EVERY": 1, "DATA_PT": tmp_path / "text.pt"}
    done = forked(tmp_path / "run", 1, "train_fullseq.py", **knobs, CKPT_DIR="out/run")
    assert not any(done.codes), done.output
    rows = [json.loads(line) for line in (tmp_path / "run/out/run_logs/samples.jsonl").read_text().splitlines()]
    tokenizer = hub.load_tokenizer(base)
    assert [row["prompt"] for row in rows] == [tokenizer.decode(row[:32].tolist()) for row in ids[:4]]


def test_shorter_samples_are_padded_and_wrong_ones_refused(tmp_path):
    knobs = {"DATA_PT": tmp_path / "text.pt", "MAX_LEN": 16, "MAX_SAMPLES": 3, "MASK_ID": 4, "EOS_TAIL": False}
    ids = torch.arange(8, 8 + 50, dtype=torch.int32).reshape(5, 10)
    packing.write(knobs["DATA_PT"], list(ids.numpy()), 10)

    def samples(vocab_size=400, **changes):
        config = SimpleNamespace(pad_token_id=1, vocab_size=vocab_size)
        return make_samples(read_pt(knobs["DATA_PT"]), SimpleNamespace(**knobs | changes), config)

    batch = samples().batch(torch.tensor([2, 0]), torch.tensor([0, 0]))
    assert batch.input_ids.tolist() == [[*row.tolist(), 1, 1, 1, 1, 1, 1] for row in (ids[2], ids[0])]
    assert batch.prompt_len.tolist() == [0, 0] and batch.length.tolist() == [10, 10]
    assert len(samples().number) == 3 and len(samples(MAX_SAMPLES=0).number) == 5
    assert samples(EOS_TAIL=True).length.tolist() == [16] * 3
    for changes, said in (
        ({"MAX_LEN": 9}, "has samples of 10 tokens, more than MAX_LEN=9"),
        ({"MASK_ID": 30}, "sample 2 contains the id 30, which is MASK_ID"),
        ({"vocab_size": 57, "MAX_SAMPLES": 0}, "sample 4 contains the id 57, outside the model's vocabulary of 57"),
    ):
        with pytest.raises(InputError, match=said):
            samples(**changes)


def test_bad_input_is_one_sentence_and_leaves_what_was_there(base, texts, tmp_path):
    output = tmp_path / "text.pt"
    output.write_text("before")
    for name in ("numbers", "short"):
        (tmp_path / name).mkdir()
    (tmp_path / "numbers/some.jsonl").write_text('{"story": "one"}\n{"story": null}\n')
    (tmp_path / "short/a.txt").write_text("Hi.")
    for flags, said in (
        (("--text", "tale", "--dataset", texts / "jsonl"), "has no such column; its columns are story"),
        (("--text", "text", "--dataset", tmp_path / "short"), "one sample has 64"),
        (("--text", "story", "--dataset", tmp_path / "numbers"), "row 1 of"),
        (("--text", "text", "--dataset", tmp_path / "none.txt"), "cannot be loaded"),
        (("--dataset", texts / "jsonl", "--max_tokens", 9), "belong to --text"),
    ):
        done = run("pt.py", *flags, "--model", base, "--max_len", 64, "--output", output)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr, (flags, done.stderr)
        assert output.read_text() == "before" and not list(tmp_path.glob("*unfinished*"))
