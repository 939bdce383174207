"""Knobs on the command line: what is accepted, what is refused, what --help prints; typing errors cost no time."""

import importlib
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import train_blockwise
import train_fullseq
from blockwise import knobs
from blockwise.cli import InputError

SCRIPTS = (train_blockwise, train_fullseq)
# the (lowest, highest) value of every number, and the texts of every choice, in both trainers
RANGES = {
    "MASK_ID": (0, math.inf), "SEED": (0, 4294967295),
    "MAX_LEN": (2, math.inf), "MAX_SAMPLES": (0, math.inf), "EPOCHS": (1, math.inf),
    "BLOCK_SIZE": (1, math.inf), "MASK_PROB_EPS": (0.0, 1.0),
    "PREFIX_MASK_RATE": (0.0, 1.0), "SUFFIX_MASK_PROB": (0.0, 1.0),
    "LORA_RANK": (0, math.inf), "LORA_ALPHA": (0, math.inf), "LORA_DROPOUT": (0.0, 0.99),
    "LR": (1e-12, 1.0), "WARMUP_RATIO": (0.0, 1.0), "MIN_LR_RATIO": (0.0, 1.0), "WEIGHT_DECAY": (0.0, 1.0),
    "MAX_GRAD_NORM": (1e-12, math.inf),
    "MICRO_BSIZE": (1, math.inf), "GRAD_ACC": (1, math.inf),
    "TOTAL_TRAIN_STEPS": (0, math.inf), "SAVE_EVERY": (0, math.inf), "SAMPLE_EVERY": (0, math.inf),
    "RESUME_EVERY": (0, math.inf), "MAX_BAD_STEPS": (1, math.inf), "VAL_EVERY": (0, math.inf),
    "DECAY_RATIO": (0.0, 1.0), "RANDOM_LENGTH": (0.0, 1.0),
}  # fmt: skip
CHOICES = {
    "WARMUP_TYPE": ("linear", "log"), "SAVE_DTYPE": ("bfloat16", "float16", "float32"),
    "LR_SCHEDULE": ("cosine", "constant", "wsd"), "LOSS_MEAN": ("sample", "token"),
    "TRACKER": ("", "tensorboard", "trackio", "wandb"), "PAD_TO": ("max_len", "longest"),
}  # fmt: skip
OPTIONAL = {"VAL_PT"}  # texts that may be empty

SOURCE = '''"""A script with knobs.

And a second paragraph.
"""

from pathlib import Path

from blockwise.knobs import at_least, between, one_of, optional, override

# ---------------------------------------------------------------- one section
LR: between(1e-12, 1.0) = 1e-5  # how fast
BLOCK_SIZE: at_least(1) = 32
BF16 = True
MODEL_NAME = "hub/name"  # hub id
# ---------------------------------------------------------------- another section
TARGET_MODS = ["q_proj"]
PREFIX_MASK_RATE: between(0.0, 1.0) = 0.0
SEED: between(0, 4294967295) = 42
MAX_GRAD_NORM: at_least(1e-12) = 1.0
WARMUP_TYPE: one_of("linear", "log") = "linear"  # how it starts
EXTRA_PT: optional() = ""
SHOWN_IN: one_of("", "a browser") = "a browser"
SEVERAL_LINES = [
    "k_proj",
]  # more than one line
not_a_knob = 1


def main():
    LR = 3  # a variable
'''
CONSTANTS = {
    "LR": 1e-5, "BLOCK_SIZE": 32, "BF16": True, "MODEL_NAME": "hub/name", "TARGET_MODS": ["q_proj"],
    "PREFIX_MASK_RATE": 0.0, "SEED": 42, "MAX_GRAD_NORM": 1.0, "WARMUP_TYPE": "linear",
    "EXTRA_PT": "", "SHOWN_IN": "a browser", "SEVERAL_LINES": ["k_proj"],
}  # fmt: skip


def load(path, source=SOURCE):
    """Writes a script and runs its top level, as Python does. Returns its globals."""
    path.write_text(source)
    script = {"__file__": str(path), "__name__": "__main__"}
    exec(compile(source, str(path), "exec"), script)
    return script


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("a folder") / "script ö.py"


@pytest.fixture
def script(path):
    return load(path)


def constants(script):
    return {name: value for name, value in script.items() if name.isupper()}


@pytest.mark.parametrize(
    "arg, name, value",
    [
        ("--LR=2e-5", "LR", 2e-5),
        ("--LR=1", "LR", 1.0),  # an int may stand for a float
        ("--BLOCK_SIZE=8", "BLOCK_SIZE", 8),
        ("--BF16=False", "BF16", False),
        ("--MODEL_NAME=a folder/with=signs ö", "MODEL_NAME", "a folder/with=signs ö"),
        ("--MODEL_NAME=123", "MODEL_NAME", "123"),  # text stays text
        ("--WARMUP_TYPE=log", "WARMUP_TYPE", "log"),
        ("--EXTRA_PT=a.pt", "EXTRA_PT", "a.pt"),
        ("--EXTRA_PT=", "EXTRA_PT", ""),  # only these two may be empty
        ("--SHOWN_IN=", "SHOWN_IN", ""),
        ('--TARGET_MODS=["q_proj","v_proj"]', "TARGET_MODS", ["q_proj", "v_proj"]),
        ("--SEED=4294967295", "SEED", 4294967295),
    ],
)
def test_override_sets_the_script_and_returns_all_constants(script, arg, name, value):
    assert constants(script) == CONSTANTS
    found = knobs.override(script, ["--local_rank=1", arg])
    assert script[name] == getattr(found, name) == value and type(script[name]) is type(CONSTANTS[name])
    assert list(vars(found).items()) == list((CONSTANTS | {name: value}).items())
    assert constants(script) == CONSTANTS | {name: value} and script["not_a_knob"] == 1


@pytest.mark.parametrize(
    "arg, said",
    [
        ("--BLOK_SIZE=8", "--BLOCK_SIZE"),  # a typing error: the nearest knob is named
        ("--lr=1e-3", "--LR"),
        ("--not_a_knob=2", "not a knob"),
        ("BLOCK_SIZE=8", "not a knob"),
        ("--helf", "The knobs are"),
        ("--BLOCK_SIZE", "needs a value"),
        ("--BLOCK_SIZE=", "not of type int"),
        ("--BLOCK_SIZE=8.0", "not of type int"),
        ("--BLOCK_SIZE=True", "not of type int"),
        ("--BLOCK_SIZE=0", "out of range: it must be at least 1"),
        ("--BF16=0", "not of type bool"),
        ("--BF16=false", "not of type bool"),
        ("--LR=fast", "not of type float"),
        ("--LR=True", "not of type float"),
        ("--LR=nan", "not of type float"),
        ("--LR=-1e-3", "out of range: it must be 1e-12 to 1.0"),
        ("--LR=1e999", "out of range"),
        ("--MAX_GRAD_NORM=1e999", "out of range"),
        ("--LR=1" + "0" * 400, "out of range"),
        ("--PREFIX_MASK_RATE=1.5", "out of range"),
        ("--SEED=-1", "out of range"),
        ("--SEED=4294967296", "out of range: it must be 0 to 4294967295"),
        ("--MODEL_NAME=", "is empty"),
        ("--WARMUP_TYPE=cosine", "WARMUP_TYPE='cosine' must be 'linear' or 'log'"),
        ("--WARMUP_TYPE=", "is empty"),
        ("--WARMUP_TYPE='log'", "must be 'linear' or 'log'"),
        ("--SHOWN_IN=x", "SHOWN_IN='x' must be '' or 'a browser'"),
        ("--TARGET_MODS=q_proj", "not of type list"),
        ("--TARGET_MODS=[]", "not a list of names"),
        ("--TARGET_MODS=[1]", "not a list of names"),
        ("--LR=__import__('os').system('true')", "not of type float"),
    ],
)
def test_override_refuses(script, arg, said):
    with pytest.raises(InputError) as error:
        knobs.override(script, [arg])
    assert said in str(error.value) and arg.partition("=")[0].strip("-") in str(error.value)
    assert constants(script) == CONSTANTS


@pytest.mark.parametrize("old, new", [("MODEL", "MODEL_NAME"), ("PT_FILE", "DATA_PT"), ("LORA_R", "LORA_RANK")])
@pytest.mark.parametrize("trainer", SCRIPTS)
def test_an_old_name_names_the_new_one(trainer, old, new):
    assert hasattr(trainer, new)
    with pytest.raises(InputError, match=f"^--{old}=8 is not a knob of this script. It is called --{new} now.$"):
        knobs.override(dict(vars(trainer)), [f"--{old}=8"])


@pytest.mark.parametrize(
    "name, value",
    [("BLOCK_SIZE", 0), ("PREFIX_MASK_RATE", 5), ("TARGET_MODS", []), ("MODEL_NAME", ""), ("WARMUP_TYPE", "steps")],
)
def test_constants_edited_in_the_script_are_checked_too(script, name, value):
    with pytest.raises(InputError, match=f"^{name}"):
        knobs.override(script | {name: value}, ["--SEED=1"])


def test_a_float_edited_to_an_int_still_takes_floats(path):
    script = load(path, "from blockwise.knobs import between\n\nLR: between(1e-12, 1.0) = 1\n")
    assert knobs.override(script, ["--LR=2e-5"]).LR == 2e-5


@given(st.text(max_size=40))
def test_any_text_gives_a_value_of_the_right_type_or_an_input_error(text):
    for name, default in vars(train_blockwise).items():
        if name.isupper():
            low, high = RANGES.get(name, (-math.inf, math.inf))
            choices = CHOICES.get(name, ())
            values = knobs.Range(low, high, choices)
            try:
                value = knobs.parse(name, text, default, values)
                knobs.check(name, value, values)
            except InputError:
                continue
            assert type(value) is type(default)
            assert not isinstance(value, float) or low <= value <= high
            assert not choices or value in choices


# ---------------------------------------------------------------- what the source says


def test_a_script_describes_its_constants(path):
    load(path, SOURCE)
    found = knobs.describe(path)
    assert list(found) == list(CONSTANTS)  # neither what a function has, nor what is imported
    assert {name: knob.comment for name, knob in found.items() if knob.comment} == {
        "LR": "how fast", "MODEL_NAME": "hub id", "WARMUP_TYPE": "how it starts",
        "SEVERAL_LINES": "more than one line",
    }  # fmt: skip
    sections = [knob.section for knob in found.values()]
    assert sections == ["one section"] * 4 + ["another section"] * 8
    assert (found["LR"].values, found["BLOCK_SIZE"].values) == (knobs.Range(1e-12, 1.0), knobs.Range(1, math.inf))
    assert found["WARMUP_TYPE"].values.choices == ("linear", "log") and found["EXTRA_PT"].values.empty
    assert found["BF16"].values == found["SEVERAL_LINES"].values == knobs.ANYTHING


@pytest.mark.parametrize("annotation", ["float", "'float'", "list[float]", "int | float"])
def test_a_plain_type_is_no_range(path, annotation):
    """What a user may write who edits a constant."""
    script = load(path, f"LR: {annotation} = 1e-5  # how fast\n")
    assert knobs.override(script, ["--LR=7.5"]).LR == 7.5


def test_knobs_of_an_imported_module_are_described_too(tmp_path, monkeypatch):
    """As experiments/train_causal.py imports those of train_blockwise.py; what it removes or sets anew is its own."""
    (tmp_path / "imported_knobs.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    own = "from imported_knobs import *\ndel BF16\nMODEL_NAME = 'own'  # its own\nEXTRA: at_least(3) = 4  # new\n"
    script = load(tmp_path / "script.py", own)
    found = knobs.override(script, ["--EXTRA=5", "--LR=0.1"])
    without = {name: value for name, value in CONSTANTS.items() if name != "BF16"}
    assert vars(found) == without | {"MODEL_NAME": "own", "EXTRA": 5, "LR": 0.1}
    described = knobs.describe(tmp_path / "script.py")
    assert described["LR"].comment == "how fast" and described["MODEL_NAME"].comment == "its own"
    for arg, said in (("--LR=2", "out of range"), ("--EXTRA=2", "at least 3"), ("--BF16=True", "not a knob")):
        with pytest.raises(InputError, match=said):
            knobs.override(script, [arg])


def test_the_control_has_the_knobs_of_the_block_wise_trainer_but_three():
    causal = importlib.import_module("experiments.train_causal")
    found = vars(knobs.override(dict(vars(causal)), []))
    blockwise = {name: value for name, value in vars(train_blockwise).items() if name.isupper()}
    assert blockwise.keys() - found.keys() == {"PREFIX_MASK_RATE", "SUFFIX_MASK_PROB", "BOUND_WEIGHTS"}
    assert {name for name in found if found[name] != blockwise.get(name)} == {"CKPT_DIR"}
    with pytest.raises(InputError, match="BLOCK_SIZE=0 is out of range"):
        knobs.override(dict(vars(causal)), ["--BLOCK_SIZE=0"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_default_is_in_range_and_every_number_has_a_range(script):
    described = knobs.describe(script.__file__)
    assert list(described) == [name for name in vars(script) if name.isupper()]
    for name, knob in described.items():
        value = getattr(script, name)
        assert knobs.parse(name, value if isinstance(value, str) else repr(value), value, knob.values) == value
        knobs.check(name, value, knob.values)
        if type(value) in (int, float):
            assert (knob.values.low, knob.values.high) == RANGES[name] and not knob.values.choices
            assert [type(bound) for bound in RANGES[name] if bound != math.inf] == [
                type(bound) for bound in (knob.values.low, knob.values.high) if bound != math.inf
            ]
        else:
            assert knob.values == knobs.Range(choices=CHOICES.get(name, ()), empty=name in OPTIONAL)
    every = {name for script in SCRIPTS for name in knobs.describe(script.__file__)}
    assert RANGES.keys() | CHOICES.keys() <= every


def test_the_trainers_share_all_constants_but_those_of_the_method():
    blockwise, fullseq = ({k: v for k, v in vars(s).items() if k.isupper()} for s in SCRIPTS)
    assert blockwise.keys() - fullseq.keys() == {"BLOCK_SIZE", "PREFIX_MASK_RATE", "SUFFIX_MASK_PROB"}
    assert fullseq.keys() - blockwise.keys() == {"LOSS_MEAN", "RANDOM_LENGTH"}
    assert {name for name in blockwise.keys() & fullseq.keys() if fullseq[name] != blockwise[name]} == {"CKPT_DIR"}


def test_defaults_are_the_published_ones():
    found = {k: v for k, v in vars(train_blockwise).items() if k.isupper()}
    assert found == {
        "MODEL_NAME": "GSAI-ML/LLaDA-8B-Instruct", "DATA_PT": "MathQA_256.pt", "CKPT_DIR": "ckpts_stagewise_sft_32",
        "MASK_ID": 126336, "MAX_LEN": 256, "MAX_SAMPLES": 6400, "BLOCK_SIZE": 32, "MASK_PROB_EPS": 1e-3,
        "PREFIX_MASK_RATE": 0.0, "SUFFIX_MASK_PROB": 1.0, "EOS_TAIL": False, "BOUND_WEIGHTS": False,
        "LORA_RANK": 256, "LORA_ALPHA": 0, "LORA_DROPOUT": 0.05,
        "TARGET_MODS": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "LR": 1e-5,
        "WEIGHT_DECAY": 0.0, "WARMUP_TYPE": "linear", "WARMUP_RATIO": 0.1, "MIN_LR_RATIO": 0.01, "MAX_GRAD_NORM": 1.0,
        "MICRO_BSIZE": 32, "GRAD_ACC": 1, "EPOCHS": 1, "TOTAL_TRAIN_STEPS": 0, "SAVE_EVERY": 0,
        "SAVE_DTYPE": "bfloat16", "SAMPLE_EVERY": 0, "RESUME": False, "RESUME_EVERY": 0, "MAX_BAD_STEPS": 3, "SEED": 42,
        "BF16": True, "GRADIENT_CHECKPOINTING": False, "COMPILE": False, "LR_SCHEDULE": "cosine", "DECAY_RATIO": 0.1,
        "VAL_PT": "", "VAL_EVERY": 0, "TRACKER": "", "BASE_4BIT": False, "PAD_TO": "max_len", "GROUP_BY_LENGTH": False,
    }  # fmt: skip
    assert train_fullseq.CKPT_DIR == "ckpts_fullseq_sft"
    assert train_fullseq.LOSS_MEAN == "sample" and train_fullseq.RANDOM_LENGTH == 0.0


def test_lora_alpha_0_is_twice_the_rank():
    from blockwise.engine import lora_alpha

    for rank, alpha, expected in ((256, 0, 512), (7, 0, 14), (7, 14, 14), (256, 1, 1), (4, 30, 30)):
        assert lora_alpha(SimpleNamespace(LORA_RANK=rank, LORA_ALPHA=alpha)) == expected


# ---------------------------------------------------------------- --help, and typing errors


def start(script, *args, cwd, **env):
    """Runs a script as a user does, without the launcher; a last line of its output says whether torch was imported."""
    code = f"import sys, runpy; sys.argv = [{script!r}, *{list(args)!r}]\n"
    code += f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    code += "finally: print('heavy' if {'torch', 'deepspeed', 'matplotlib'} & sys.modules.keys() else 'light')"
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


LINE = re.compile(r"^([A-Z][A-Z_0-9]+)(?:: (.+?))? = (.+?)(?:  # (.*))?$", re.MULTILINE)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_every_knob_with_default_range_and_comment(script, flag, tmp_path):
    file = f"{script.__name__}.py"
    done = start(file, "--local_rank=0", flag, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and done.stdout.endswith("\nlight\n")
    text = done.stdout.removesuffix("light\n")
    assert text.startswith(script.__doc__.strip() + "\n\nmodel and data\n  --MODEL_NAME=")
    found, source = [], (ROOT / file).read_text()
    for name, _, _, comment in LINE.findall(source):
        values = ""
        if name in RANGES:
            low, high = RANGES[name]
            values = f"[at least {low}] " if high == math.inf else f"[{low} to {high}] "
        elif name in CHOICES:
            values = f"[{' or '.join(map(repr, CHOICES[name]))}] "
        elif name in OPTIONAL:
            values = "[may be empty] "
        found.append(f"  --{name}={getattr(script, name)!r}\n        {values}{comment}".rstrip() + "\n")
    assert len(found) == len([name for name in vars(script) if name.isupper()])
    knobs_only = re.sub(r"^\n.*\n", "", text.removeprefix(script.__doc__.strip() + "\n"), flags=re.MULTILINE)
    assert knobs_only == "".join(found)
    headings = re.findall(r"^# -+ (.*)$", source, re.MULTILINE)
    assert re.findall(r"\n\n(\S.*)\n  --", text) == headings


def test_help_is_printed_once_for_all_ranks(tmp_path):
    done = start("train_blockwise.py", "--local_rank=1", "--help", cwd=tmp_path, LOCAL_RANK="1")
    assert done.returncode == 0 and done.stdout == "light\n" and not done.stderr


@pytest.mark.parametrize("script", ["train_blockwise.py", "train_fullseq.py", "pt.py"])
def test_a_typing_error_is_reported_without_importing_torch(script, tmp_path):
    done = start(script, "--LRR=1", cwd=tmp_path)
    assert done.returncode != 0 and "--LRR=1" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "light\n" and not list(tmp_path.iterdir())


def test_a_knob_that_is_set_anew_keeps_range_and_comment(tmp_path, monkeypatch):
    (tmp_path / "other_knobs.py").write_text(
        "from blockwise.knobs import at_least\n# --- first\nSIZE: at_least(2) = 4  # tokens\n# --- second\nX = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = "from other_knobs import *\nSIZE = 8\nOWN = 3  # new\n"
    load(tmp_path / "script.py", own)
    described = knobs.describe(tmp_path / "script.py")
    assert described["SIZE"] == knobs.Knob(knobs.at_least(2), "tokens", "first")
    assert described["OWN"] == knobs.Knob(knobs.ANYTHING, "new", "knobs of this script")


@pytest.mark.parametrize("annotation", ["between(0, 2**32)", "knobs.at_least(1)", "above(3)", "between(1)"])
def test_a_range_that_cannot_be_read_is_named(annotation, tmp_path):
    (tmp_path / "script.py").write_text(f"\nSIZE: {annotation} = 4\n")
    with pytest.raises(
        InputError, match=r"script.py, line 2: .* must be at_least, between, one_of, optional with numbers"
    ):
        knobs.describe(tmp_path / "script.py")
