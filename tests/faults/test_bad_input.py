"""Bad input over all scripts: a non-zero exit, a sentence that names it, no traceback, and nothing new on the disk."""

import io
import json
import math
import pickle
import runpy
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAINING, arguments
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import train_blockwise
from blockwise import knobs
from blockwise.cli import InputError
from blockwise.data import make_samples, read_pt
from blockwise.models import base as models
from blockwise.models import checkpoint
from blockwise.run import signals

TRAINERS = {name: knobs.describe(ROOT / name) for name in ("train_blockwise.py", "train_fullseq.py")}


def beyond(values):
    """The values next to both ends of a Range, outside of it."""
    for end, infinity in ((values.low, -math.inf), (values.high, math.inf)):
        if abs(end) < math.inf:
            yield math.nextafter(end, infinity) if type(end) is float else end + int(math.copysign(1, infinity))


def out_of_range():
    """(script, flag, what is said) for both ends of the range of every knob, and for a text that is no choice."""
    for script, described in TRAINERS.items():
        for name, knob in described.items():
            for value in beyond(knob.values):
                yield script, f"--{name}={value}", f"{name}={value} is out of range: it must be {knob.values}"
            if knob.values.choices:
                yield script, f"--{name}=none", f"{name}='none' must be {knob.values.choices[0]!r} or "


WRONG_KNOBS = [
    *out_of_range(),
    *((script, flag, said) for script in TRAINERS for flag, said in [
        ("--LR=fast", "not of type float"), ("--BF16=1", "not of type bool"), ("--RESUME=yes", "not of type bool"),
        ("--RESUME_EVERY=1.5", "not of type int"), ("--MAX_BAD_STEPS=None", "not of type int"),
        ("--MODEL_NAME=", "MODEL_NAME is empty"), ("--CKPT_DIR=", "CKPT_DIR is empty"),
        ("--TARGET_MODS=q", "not of type list"),
        ("--RESUMEE=True", "Did you mean --RESUME=...?"), ("--SEED", "needs a value"), ("resume", "is not a knob"),
        ("--MODEL=x", "It is called --MODEL_NAME now"), ("--PT_FILE=x", "It is called --DATA_PT now"),
        ("--LORA_R=4", "It is called --LORA_RANK now"),
        ("--WARMUP_TYPE=cosine", "WARMUP_TYPE='cosine' must be 'linear' or 'log'"),
        ("--SAVE_DTYPE=int8", "SAVE_DTYPE='int8' must be 'bfloat16' or 'float16' or 'float32'"),

    ]),
]  # fmt: skip
WRONG_FILES = [  # knobs of a trainer, and what is said
    ({"DATA_PT": "missing.pt"}, "missing.pt does not exist"),
    ({"DATA_PT": "folder"}, "folder does not exist"),
    ({"DATA_PT": "text.pt"}, "text.pt is truncated, damaged or was not written by pt.py"),
    ({"DATA_PT": "pickle.pt"}, "pickle.pt is truncated, damaged or was not written by pt.py"),
    ({"DATA_PT": "dict.pt"}, "does not hold a list of samples"),
    ({"DATA_PT": "keys.pt"}, "sample 0 lacks the keys"),
    ({"VAL_PT": "missing.pt"}, "missing.pt does not exist; write it with pt.py"),
    ({"VAL_PT": "keys.pt"}, "keys.pt: sample 0 lacks the keys"),
    ({"VAL_PT": "long.pt"}, "long.pt: sample 1 has 200 tokens, more than MAX_LEN=192"),
    ({"VAL_PT": "masks.pt"}, "masks.pt: sample 0 contains the id 4, which is MASK_ID"),
    ({"VAL_EVERY": 2}, "VAL_EVERY=2 needs samples: name a file of pt.py with --VAL_PT=..."),
    ({"MODEL_NAME": "folder"}, "folder/config.json does not exist"),
    ({"MODEL_NAME": "no such/model/at all"}, "is not a local folder"),
    ({"TARGET_MODS": '["lm_head"]'}, "TARGET_MODS: 'lm_head' matches no layer"),
    ({"MASK_ID": 5}, "MASK_ID=5, but"),
    ({"MAX_LEN": 64}, "more than MAX_LEN=64"),
    ({"MAX_LEN": 4096}, "the model has 1024 positions"),
    ({"MICRO_BSIZE": 60}, "fewer than one global batch"),
    ({"BASE_4BIT": True, "LORA_RANK": 0}, "BASE_4BIT=True needs adapters"),
    ({"BASE_4BIT": True}, "needs the package bitsandbytes; pip install -r requirements-4bit.txt"),
    ({"TOTAL_TRAIN_STEPS": 1000}, "TOTAL_TRAIN_STEPS=1000 is more than"),
]
NO_ADAPTER = "--adapter folder: adapter_config.json is missing; give the folder adapter/ of a checkpoint"
OTHERS = [  # BASE and PT stand for a model and samples that can be used
    ("pt.py", ("--max_len", 1), "--max_len must be at least 2"),
    ("pt.py", ("--max_samples", -1), "--max_samples at least 0"),
    ("pt.py", ("--max_samples", "many"), "invalid int value"),
    ("pt.py", ("--outptu", "x.pt"), "unrecognized arguments"),
    ("pt.py", ("--output", "missing/x.pt"), "in a folder that exists"),
    ("pt.py", ("--output", "folder"), "in a folder that exists"),
    ("eval.py", ("--compare", "a", "b", "--adapter", "c"), "--adapter belongs to --model"),
    ("eval.py", ("--model", "BASE", "--data", "problems.jsonl", "--adapter", "folder"), NO_ADAPTER),
    ("eval.py", ("--model", "BASE", "--data", "problems.jsonl", "--adapter", "none"), "none: adapter_config.json is"),
    ("eval.py", (), "one of the arguments --model --compare is required"),
    ("eval.py", ("--model", "a", "--compare", "b", "c"), "not allowed with argument"),
    ("eval.py", ("--model", "a", "--task", "gsm9k"), "invalid choice"),
    ("eval.py", ("--model", "a", "--batch_size", 0), "--batch_size must be at least 1"),
    ("eval.py", ("--model", "a", "--limit", -1), "--limit at least 0"),
    ("eval.py", ("--model", "a", "--threshold", 0.9, "--factor", 1), "threshold and factor both say"),
    ("eval.py", ("--model", "a", "--data", "missing.jsonl"), "missing.jsonl cannot be read"),
    ("eval.py", ("--model", "a", "--data", "text.pt"), "text.pt, line 1 is not JSON"),
    ("generate.py", ("--model", "a"), "one of the arguments --prompt --prompts is required"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt"), "belong together"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--batch_size", 0), "--batch_size must be at least 1"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt", "--output", "text.pt"), "already exists"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt", "--output", "no/x"), "not a folder that can be written"),
    ("generate.py", ("--model", "a", "--prompts", "text.pt", "--output", "x"), "text.pt, line 1 is not JSON"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--temperature", -1), "temperature and cfg_scale must be"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--remasking", "best"), "remasking 'best' is none of"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--cache", "some"), "cache 'some' is none of"),
    ("generate.py", ("--model", "a", "--prompt", "x", "--seed", -1), "--seed -1 must be"),
    ("generate.py", ("--model", "BASE", "--prompt", "x", "--adapter", "folder"), NO_ADAPTER),
    ("chat.py", ("--model", "BASE", "--adapter", "folder"), NO_ADAPTER),
    ("chat.py", (), "the following arguments are required: --model"),
    ("chat.py", ("--model", "a", "--block_length", 0), "block_length 0 must be at least 1"),
    ("chat.py", ("--model", "a", "--steps", 7, "--block_length", 32), "steps 7 must be at least 8, one for each block"),
    ("chat.py", ("--model", "a", "--dtype", "int8"), "invalid choice"),
    ("plot_loss.py", (), "the following arguments are required: csv"),
    ("plot_loss.py", ("missing.csv",), "missing.csv cannot be read"),
    ("plot_loss.py", ("text.pt",), "text.pt holds no step with a loss"),
    ("blockwise.compare", (), "the following arguments are required: --checkpoint, --data"),
    ("blockwise.compare", ("--checkpoint", "folder", "--data", "PT"), "--checkpoint folder has no folder adapter/"),
    ("blockwise.compare", ("--checkpoint", "bare", "--data", "missing.pt"), "missing.pt does not exist"),
    ("blockwise.compare", ("--checkpoint", "bare", "--data", "PT"), "adapter_config.json is missing"),
    ("blockwise.compare", ("--checkpoint", "bare", "--data", "PT", "--base", "BASE"), "adapter_config.json is missing"),
    ("blockwise.compare", ("--checkpoint", "bare", "--data", "PT", "--base", "none"), "none is not a local folder"),
    ("blockwise.compare", ("--checkpoint", "bare", "--data", "keys.pt", "--base", "BASE"), "sample 0 lacks the keys"),
    ("experiments.run", ("C99",), "C99: no such claim"),
    ("experiments.run", ("C1", "--smoke"), "--smoke is too small for results.csv"),
    ("experiments.report", ("--results", "missing.csv"), "missing.csv cannot be read"),
    ("experiments.report", ("--results", "text.pt"), "text.pt is not a CSV with the columns"),
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(script, *flags) -> what a script says that ends with an error; it must leave its folder as it was."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "bare/adapter").mkdir(parents=True)
    (tmp_path / "text.pt").write_text("no samples\n")
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": "What is 3 + 4?", "answer": "7"}) + "\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps([{"prompt_len": 1, "full_ids": [5, 6]}]))
    torch.save({"samples": []}, tmp_path / "dict.pt")
    torch.save([{"ids": [1]}], tmp_path / "keys.pt")
    for name, lengths, token in (("long", (9, 200), 10), ("masks", (9,), 4)):
        samples = [{"prompt_len": 2, "full_ids": torch.full((length,), token)} for length in lengths]
        torch.save(samples, tmp_path / f"{name}.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(signals, "end_at_once", lambda: None)  # the signals of this process stay as they are
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def run(script, *flags):
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        with pytest.raises(SystemExit) as end:  # anything else would be a traceback
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        assert end.value.code not in (0, None)
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
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
    text = refused(script, *arguments(script, TRAINING | {"MODEL_NAME": base, "DATA_PT": pt_file} | changes))
    assert said in text.splitlines()[0] and text.startswith("error: ")


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed(refused, record_property, monkeypatch, name):
    """Found before anything is read."""
    record_property("fault", "bad inputs")
    monkeypatch.setitem(sys.modules, name, None)
    text = refused("train_fullseq.py", f"--TRACKER={name}")
    assert text.startswith(f"error: TRACKER='{name}': that package is not installed; pip install {name}.\n")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of modules that other tests have imported
@pytest.mark.parametrize("script, flags, said", OTHERS)
def test_the_other_scripts(refused, record_property, base, pt_file, script, flags, said):
    record_property("fault", "bad inputs")
    assert said in refused(script, *({"BASE": base, "PT": pt_file}.get(flag, flag) for flag in flags))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules", "ignore:The PEFT config's")
def test_comparing_with_a_base_that_has_moved_or_a_checkpoint_without_weights(refused, base, pt_file, record_property):
    record_property("fault", "bad inputs")
    model = get_peft_model(models.load_model(base), LoraConfig(target_modules=["q_proj"]))
    Path("checkpoint").mkdir()
    checkpoint.save_adapter(model, "moved", Path("checkpoint/adapter"))
    flags = ("--checkpoint", "checkpoint", "--data", pt_file)
    assert "moved is not a local folder" in refused("blockwise.compare", *flags)
    text = refused("blockwise.compare", *flags, "--base", base)
    assert "checkpoint has no weights: model.safetensors is missing" in text


# ---------------------------------------------------------------- anything at all

PARTS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
)
IDS = st.lists(st.integers(-3, 40), max_size=12).map(lambda ids: torch.tensor(ids, dtype=torch.long))
TENSORS = IDS | IDS.map(lambda ids: ids.float()) | IDS.map(lambda ids: ids[None])
SAMPLES = st.fixed_dictionaries({"prompt_len": st.integers(-2, 14) | PARTS, "full_ids": TENSORS | PARTS})
CONFIG = SimpleNamespace(pad_token_id=2, vocab_size=30)
KNOBS = {"MAX_LEN": 10, "MAX_SAMPLES": 0, "MASK_ID": 4, "EOS_TAIL": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "samples ö.pt"


@given(st.lists(SAMPLES | PARTS, max_size=4) | PARTS)
def test_any_content_gives_good_samples_or_a_sentence(file, content):
    """What is accepted is checked against its meaning: ids of the vocabulary, no masks, an answer in each sample."""
    torch.save(content, file)
    try:
        samples = make_samples(read_pt(file), SimpleNamespace(**KNOBS, DATA_PT=file), CONFIG)
    except InputError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    assert samples.ids.shape == (len(samples.number), 10) and samples.ids.min() >= 0 and samples.ids.max() < 30
    assert not (samples.ids == 4).any() and (samples.prompt_len < samples.length).all() and (samples.length <= 10).all()
    for ids, length, number in zip(samples.ids, samples.length, samples.number):
        assert ids[:length].tolist() == content[number]["full_ids"].tolist() and (ids[length:] == 2).all()


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
        samples = make_samples(read_pt(file), SimpleNamespace(**KNOBS, DATA_PT=file), CONFIG)
    except InputError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    else:  # the noise hit padding, or was what it replaced
        assert kind == "damaged" and samples.ids[:, :3].tolist() == [[5, 6, 7]] * 3


LIMITED = {name: knob.values for name, knob in TRAINERS["train_blockwise.py"].items() if knob.values != knobs.ANYTHING}


@given(
    st.sampled_from(sorted(LIMITED)),
    st.text(max_size=20) | st.integers().map(str) | st.floats().map(repr) | st.sampled_from(("log", "float16")),
)
def test_any_value_of_a_knob_is_in_range_or_a_sentence(name, text):
    script = {key: value for key, value in vars(train_blockwise).items() if key.isupper() or key == "__file__"}
    before = dict(script)
    try:
        value = getattr(knobs.override(script, [f"--{name}={text}"]), name)
    except InputError as error:
        assert name in str(error) and script == before
        return
    values = LIMITED[name]
    assert type(value) is type(before[name])
    if isinstance(value, str):
        assert value == text and (values.empty or value in values.choices)
    else:
        assert values.low <= value <= values.high
