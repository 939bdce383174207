"""Bad input over all scripts: a non-zero exit, a sentence that names it, no traceback, and nothing new on the disk."""

import math
import pickle
import runpy
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAINING, arguments
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import train_blockwise
import train_fullseq
import watch
from cli import InputError
from rows import make_rows, read_pt

TRAINERS = {"train_blockwise.py": train_blockwise, "train_fullseq.py": train_fullseq}


def out_of_range():
    """(script, flag, what is said) for both ends of the range of every knob."""
    for script, module in TRAINERS.items():
        for name, (low, high) in cli.RANGES.items():
            if name in vars(module):
                yield script, f"--{name}={low - 1}", f"{name}={low - 1}"
                if high < math.inf:
                    yield script, f"--{name}={high + 1}", f"{name}={high + 1}"


WRONG_KNOBS = [
    *out_of_range(),
    *((script, flag, said) for script in TRAINERS for flag, said in [
        ("--LR=fast", "not of type float"), ("--BF16=1", "not of type bool"), ("--RESUME=yes", "not of type bool"),
        ("--RESUME_EVERY=1.5", "not of type int"), ("--MAX_BAD_STEPS=None", "not of type int"),
        ("--MODEL=", "MODEL is empty"), ("--CKPT_DIR=", "CKPT_DIR is empty"), ("--TARGET_MODS=q", "not of type list"),
        ("--RESUMEE=True", "Did you mean --RESUME=...?"), ("--SEED", "needs a value"), ("resume", "is not a knob"),
    ]),
]  # fmt: skip
WRONG_FILES = [  # knobs of a trainer, and what is said
    ({"PT_FILE": "missing.pt"}, "missing.pt does not exist"),
    ({"PT_FILE": "folder"}, "folder does not exist"),
    ({"PT_FILE": "text.pt"}, "text.pt is truncated, damaged or was not written by pt.py"),
    ({"PT_FILE": "pickle.pt"}, "pickle.pt is truncated, damaged or was not written by pt.py"),
    ({"PT_FILE": "dict.pt"}, "does not hold a list of rows"),
    ({"PT_FILE": "keys.pt"}, "row 0 lacks the keys"),
    ({"MODEL": "folder"}, "folder/config.json does not exist"),
    ({"MODEL": "no such/model/at all"}, "is not a local folder"),
    ({"TARGET_MODS": '["lm_head"]'}, "TARGET_MODS: 'lm_head' matches no layer"),
    ({"MASK_ID": 5}, "MASK_ID=5, but"),
    ({"MAX_LEN": 64}, "more than MAX_LEN=64"),
    ({"MAX_LEN": 4096}, "the model has 1024 positions"),
    ({"MICRO_BSIZE": 60}, "fewer than one global batch"),
    ({"TOTAL_TRAIN_STEPS": 1000}, "TOTAL_TRAIN_STEPS=1000 is more than"),
]
OTHERS = [
    ("pt.py", ("--max_len", 1), "--max_len must be at least 2"),
    ("pt.py", ("--max_samples", -1), "--max_samples at least 0"),
    ("pt.py", ("--max_samples", "many"), "invalid int value"),
    ("pt.py", ("--outptu", "x.pt"), "unrecognized arguments"),
    ("pt.py", ("--output", "missing/x.pt"), "in a folder that exists"),
    ("pt.py", ("--output", "folder"), "in a folder that exists"),
    ("evaluate.py", (), "one of the arguments --model --compare is required"),
    ("evaluate.py", ("--model", "a", "--compare", "b", "c"), "not allowed with argument"),
    ("evaluate.py", ("--model", "a", "--task", "gsm9k"), "invalid choice"),
    ("evaluate.py", ("--model", "a", "--batch_size", 0), "--batch_size must be at least 1"),
    ("evaluate.py", ("--model", "a", "--limit", -1), "--limit at least 0"),
    ("evaluate.py", ("--model", "a", "--gen_length", 30), "gen_length 30 is not a multiple"),
    ("evaluate.py", ("--model", "a", "--data", "missing.jsonl"), "missing.jsonl cannot be read"),
    ("evaluate.py", ("--model", "a", "--data", "text.pt"), "text.pt, line 1 is no JSON"),
    ("generate.py", ("--model", "a"), "one of the arguments --prompt --prompts is required"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt"), "belong together"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--batch_size", 0), "--batch_size must be at least 1"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt", "--output", "text.pt"), "exists already"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt", "--output", "no/x"), "not a folder that can be written"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt", "--output", "x"), "text.pt, line 1 is no JSON"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--temperature", -1), "temperature and cfg_scale must be"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--remasking", "best"), "remasking 'best' is neither"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--cache", "some"), "cache 'some' is none of"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--seed", -1), "--seed -1 must be"),
    ("chat.py", (), "the following arguments are required: --model"),
    ("chat.py", ("--model", "a", "--block_length", 0), "is not a multiple of block_length 0"),
    ("chat.py", ("--model", "a", "--steps", 7), "steps 7 is not a multiple"),
    ("chat.py", ("--model", "a", "--dtype", "int8"), "invalid choice"),
    ("plot_loss.py", (), "the following arguments are required: csv"),
    ("plot_loss.py", ("missing.csv",), "missing.csv cannot be read"),
    ("plot_loss.py", ("text.pt",), "text.pt holds no step with a loss"),
    ("experiments/run.py", ("C99",), "C99: no such claim"),
    ("experiments/run.py", ("C1", "--smoke"), "--smoke is too small for results.csv"),
    ("experiments/report.py", ("--results", "missing.csv"), "missing.csv cannot be read"),
    ("experiments/report.py", ("--results", "text.pt"), "text.pt is not a CSV with the columns"),
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, *flags) -> what a script says that ends with an error; it must leave its folder as it was."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pt").write_text("no rows\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps([{"prompt_len": 1, "full_ids": [5, 6]}]))
    torch.save({"rows": []}, tmp_path / "dict.pt")
    torch.save([{"ids": [1]}], tmp_path / "keys.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "end_at_once", lambda: None)  # the signals of this process stay as they are
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def run(script, *flags):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        with pytest.raises(SystemExit) as end:  # anything else would be a traceback
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert end.value.code not in (0, None)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return f"{end.value.code}\n{capsys.readouterr().err}"

    return run


@pytest.mark.parametrize("script, flag, said", WRONG_KNOBS)
def test_wrong_knobs(refused, record_property, script, flag, said):
    record_property("fault", "bad inputs")
    text = refused(script, flag)
    assert said in text and text.startswith("error: ") and text.strip().count("\n") == 0


@pytest.mark.parametrize("changes, said", WRONG_FILES)
@pytest.mark.parametrize("script", TRAINERS)
def test_wrong_files_of_a_training(refused, record_property, base, pt_file, script, changes, said):
    record_property("fault", "bad inputs")
    text = refused(script, *arguments(script, TRAINING | {"MODEL": base, "PT_FILE": pt_file} | changes))
    assert said in text.splitlines()[0] and text.startswith("error: ")


@pytest.mark.parametrize("script, flags, said", OTHERS)
def test_the_other_scripts(refused, record_property, script, flags, said):
    record_property("fault", "bad inputs")
    assert said in refused(script, *flags)


# ---------------------------------------------------------------- anything at all

PARTS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
)
IDS = st.lists(st.integers(-3, 40), max_size=12).map(lambda ids: torch.tensor(ids, dtype=torch.long))
TENSORS = IDS | IDS.map(lambda ids: ids.float()) | IDS.map(lambda ids: ids[None])
ROWS = st.fixed_dictionaries({"prompt_len": st.integers(-2, 14) | PARTS, "full_ids": TENSORS | PARTS})
CONFIG = SimpleNamespace(pad_token_id=2, vocab_size=30)
KNOBS = {"MAX_LEN": 10, "MAX_SAMPLES": 0, "MASK_ID": 4, "EOS_TAIL": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "rows ö.pt"


@settings(deadline=None, max_examples=200)
@given(st.lists(ROWS | PARTS, max_size=4) | PARTS)
def test_any_content_gives_good_rows_or_a_sentence(file, content):
    """What is accepted is checked against its meaning: ids of the vocabulary, no masks, an answer in each row."""
    torch.save(content, file)
    try:
        rows = make_rows(read_pt(file), SimpleNamespace(**KNOBS, PT_FILE=file), CONFIG)
    except InputError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    assert rows.ids.shape == (len(rows.number), 10) and rows.ids.min() >= 0 and rows.ids.max() < 30
    assert not (rows.ids == 4).any() and (rows.prompt_len < rows.length).all() and (rows.length <= 10).all()
    for ids, length, number in zip(rows.ids, rows.length, rows.number):
        assert ids[:length].tolist() == content[number]["full_ids"].tolist() and (ids[length:] == 2).all()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_bytes_give_a_sentence(file, data):
    """Random bytes, zips of random bytes, and good files with some bytes replaced."""
    torch.save([{"prompt_len": 1, "full_ids": torch.tensor([5, 6, 7])}] * 3, file)
    kind = data.draw(st.sampled_from(("bytes", "zip", "damaged")))
    noise = data.draw(st.binary(min_size=1, max_size=60))
    if kind == "bytes":
        file.write_bytes(noise)
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", noise)
    else:
        good = file.read_bytes()
        start = data.draw(st.integers(0, len(good) - 1))
        file.write_bytes(good[:start] + noise + good[start + len(noise) :])
    try:
        rows = make_rows(read_pt(file), SimpleNamespace(**KNOBS, PT_FILE=file), CONFIG)
    except InputError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    else:  # the noise hit padding, or was what it replaced
        assert kind == "damaged" and rows.ids[:, :3].tolist() == [[5, 6, 7]] * 3


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(cli.RANGES)), st.text(max_size=20) | st.integers().map(str) | st.floats().map(repr))
def test_any_value_of_a_knob_is_in_range_or_a_sentence(name, text):
    script = {key: value for key, value in vars(train_blockwise).items() if key.isupper()}
    before = dict(script)
    try:
        knobs = cli.override(script, [f"--{name}={text}"])
    except InputError as error:
        assert name in str(error) and script == before
        return
    low, high = cli.RANGES[name]
    assert low <= getattr(knobs, name) <= high and type(getattr(knobs, name)) is type(before[name])
