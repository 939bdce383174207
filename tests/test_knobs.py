"""Knobs on the command line: what is accepted, what is refused, and that a typing error costs no time."""

import math
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import cli
import train_blockwise
import train_fullseq
from cli import InputError

SCRIPTS = (train_blockwise, train_fullseq)


def constants():
    return {
        "LR": 1e-5, "BLOCK_SIZE": 32, "BF16": True, "MODEL": "hub/name", "TARGET_MODS": ["q_proj"],
        "PREFIX_MASK_RATE": 0.0, "SEED": 42, "MAX_GRAD_NORM": 1.0, "not_a_knob": 1, "Path": object,
    }  # fmt: skip


@pytest.mark.parametrize(
    "arg, name, value",
    [
        ("--LR=2e-5", "LR", 2e-5),
        ("--LR=1", "LR", 1.0),  # an int may stand for a float
        ("--BLOCK_SIZE=8", "BLOCK_SIZE", 8),
        ("--BF16=False", "BF16", False),
        ("--MODEL=a folder/with=signs ö", "MODEL", "a folder/with=signs ö"),
        ("--MODEL=123", "MODEL", "123"),  # text stays text
        ('--TARGET_MODS=["q_proj","v_proj"]', "TARGET_MODS", ["q_proj", "v_proj"]),
    ],
)
def test_override_sets_the_script_and_returns_all_constants(arg, name, value):
    script = constants()
    knobs = cli.override(script, ["--local_rank=1", arg])
    assert script[name] == getattr(knobs, name) == value and type(script[name]) is type(constants()[name])
    assert vars(knobs) == {key: script[key] for key in constants() if key.isupper()}


@pytest.mark.parametrize(
    "arg, said",
    [
        ("--BLOK_SIZE=8", "--BLOCK_SIZE"),  # a typing error: the nearest knob is named
        ("--lr=1e-3", "--LR"),
        ("--not_a_knob=2", "not a knob"),
        ("BLOCK_SIZE=8", "not a knob"),
        ("--help", "The knobs are"),
        ("--BLOCK_SIZE", "needs a value"),
        ("--BLOCK_SIZE=", "not of type int"),
        ("--BLOCK_SIZE=8.0", "not of type int"),
        ("--BLOCK_SIZE=True", "not of type int"),
        ("--BLOCK_SIZE=0", "out of range"),
        ("--BF16=0", "not of type bool"),
        ("--BF16=false", "not of type bool"),
        ("--LR=fast", "not of type float"),
        ("--LR=True", "not of type float"),
        ("--LR=nan", "not of type float"),
        ("--LR=-1e-3", "out of range"),
        ("--LR=1e999", "out of range"),
        ("--MAX_GRAD_NORM=1e999", "out of range"),
        ("--LR=1" + "0" * 400, "out of range"),
        ("--PREFIX_MASK_RATE=1.5", "out of range"),
        ("--SEED=-1", "out of range"),
        ("--MODEL=", "is empty"),
        ("--TARGET_MODS=q_proj", "not of type list"),
        ("--TARGET_MODS=[]", "not a list of names"),
        ("--TARGET_MODS=[1]", "not a list of names"),
        ("--LR=__import__('os').system('true')", "not of type float"),
    ],
)
def test_override_refuses(arg, said):
    script = constants()
    with pytest.raises(InputError) as error:
        cli.override(script, [arg])
    assert said in str(error.value) and arg.partition("=")[0].strip("-") in str(error.value)
    assert script == constants() | {"Path": script["Path"]}


@pytest.mark.parametrize(
    "name, value", [("BLOCK_SIZE", 0), ("PREFIX_MASK_RATE", 5), ("TARGET_MODS", []), ("MODEL", "")]
)
def test_constants_edited_in_the_script_are_checked_too(name, value):
    with pytest.raises(InputError, match=f"^{name}"):
        cli.override(constants() | {name: value}, ["--SEED=1"])


def test_a_float_edited_to_an_int_still_takes_floats():
    assert cli.override(constants() | {"LR": 1}, ["--LR=2e-5"]).LR == 2e-5


@given(st.text(max_size=40))
def test_any_text_gives_a_value_of_the_right_type_or_an_input_error(text):
    for name, default in constants().items():
        if name.isupper():
            try:
                value = cli.parse(name, text, default)
                cli.check(name, value)
            except InputError:
                continue
            assert type(value) is type(default)
            low, high = cli.RANGES.get(name, (-math.inf, math.inf))
            assert not isinstance(value, float) or low <= value <= high


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_is_in_range_and_every_number_has_a_range(script):
    for name, value in vars(script).items():
        if name.isupper():
            assert cli.parse(name, value if isinstance(value, str) else repr(value), value) == value
            cli.check(name, value)
            assert not (type(value) in (int, float) and name not in cli.RANGES)


def test_the_trainers_share_all_constants_but_those_of_the_method():
    blockwise, fullseq = ({k: v for k, v in vars(s).items() if k.isupper()} for s in SCRIPTS)
    assert blockwise.keys() - fullseq.keys() == {"BLOCK_SIZE", "PREFIX_MASK_RATE", "SUFFIX_MASK_PROB"}
    assert {name for name in fullseq if fullseq[name] != blockwise.get(name)} == {"CKPT_DIR"}


def test_defaults_are_the_published_ones():
    knobs = {k: v for k, v in vars(train_blockwise).items() if k.isupper()}
    assert knobs == {
        "MODEL": "GSAI-ML/LLaDA-8B-Instruct", "PT_FILE": "MathQA_256.pt", "CKPT_DIR": "ckpts_stagewise_sft_32",
        "MASK_ID": 126336, "MAX_LEN": 256, "MAX_SAMPLES": 6400, "BLOCK_SIZE": 32, "MASK_PROB_EPS": 1e-3,
        "PREFIX_MASK_RATE": 0.0, "SUFFIX_MASK_PROB": 1.0, "EOS_TAIL": False, "BOUND_WEIGHTS": False,
        "LORA_R": 256, "LORA_ALPHA": 512, "LORA_DROPOUT": 0.05,
        "TARGET_MODS": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "LR": 1e-5,
        "WEIGHT_DECAY": 0.0, "WARMUP_RATIO": 0.1, "MIN_LR_RATIO": 0.01, "MAX_GRAD_NORM": 1.0, "MICRO_BSIZE": 32,
        "GRAD_ACC": 1, "EPOCHS": 1, "TOTAL_TRAIN_STEPS": 0, "SAVE_EVERY": 0, "SAMPLE_EVERY": 0, "RESUME": False,
        "RESUME_EVERY": 0, "MAX_BAD_STEPS": 3, "SEED": 42, "BF16": True, "GRADIENT_CHECKPOINTING": False,
        "COMPILE": False,
    }  # fmt: skip
    assert train_fullseq.CKPT_DIR == "ckpts_fullseq_sft"


@pytest.mark.parametrize("script", ["train_blockwise.py", "train_fullseq.py", "pt.py"])
def test_a_typing_error_is_reported_without_importing_torch(script, tmp_path):
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{script!r}, '--LRR=1']\n"
    code += f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    code += "finally: print('heavy' if {'torch', 'deepspeed', 'matplotlib'} & sys.modules.keys() else 'light')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "--LRR=1" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "light\n" and not list(tmp_path.iterdir())
