"""Who imports whom: the floors of blockwise/, and that importing it registers LLaDA with transformers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ELSEWHERE = {".venv", ".git", "demo_run", "work", "__pycache__"}  # folders with code that is not the repository's
FILES = [file for file in sorted(ROOT.rglob("*.py")) if not ELSEWHERE & set(file.relative_to(ROOT).parts)]
FLOORS = (  # from low to high; a name stands for all modules in it
    ("masking", "blockwise.cli"),
    ("blockwise.knobs", "blockwise.scoring", "blockwise.sandbox", "blockwise.sandboxed"),
    ("blockwise.run",),
    ("blockwise.models",),
    (
        "blockwise.decoding",
        "blockwise.prompts",
        "blockwise.data",
        "blockwise.packing",
        "blockwise.sources",
        "blockwise.formats",
        "blockwise.encoding",
        "blockwise.rewards",
    ),
    ("blockwise.engine", "blockwise.previews", "blockwise.rollouts", "blockwise.validation"),
    ("blockwise.trainer", "blockwise.compare"),
)


def name_of(file):
    """blockwise/run/files.py -> blockwise.run.files; a package has the name of its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imports(file):
    """The names of all modules that a file imports, at its top or in a function.

    `from a import b` is a.b where that is a module of the repository, else a.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = file.relative_to(ROOT).parent.parts
                module = ".".join([*package[: len(package) - node.level + 1], *filter(None, [module])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
    return found


def ours(file):
    """Those of them that are in the repository."""
    tops = {name.partition(".")[0] for name in MODULES}
    return {name for name in imports(file) if name.partition(".")[0] in tops}


def floor(name):
    """The number of a module's floor, or None."""
    for number, names in enumerate(FLOORS):
        if any(name == known or name.startswith(f"{known}.") for known in names):
            return number
    return None


PACKAGE = [name for name in MODULES if name.startswith("blockwise.")]  # blockwise itself only registers LLaDA


def test_the_walk_sees_the_repository():
    assert {"masking", "blockwise", "blockwise.run.files", "train_blockwise", "eval", "tests.test_imports",
            "experiments.train_causal", "benchmarks.common", "adapters.lm_eval_llada"} <= MODULES.keys()  # fmt: skip
    assert "blockwise.models.checkpoint" in imports(MODULES["blockwise.decoding.decode"])  # in a function
    assert "blockwise.models.hub" in ours(MODULES["blockwise.sources"]) and "train_blockwise" in ours(
        MODULES["experiments.train_causal"]
    )


def test_masking_needs_only_torch():
    tops = {name.partition(".")[0] for name in imports(MODULES["masking"])}
    assert tops - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", PACKAGE)
def test_modules_import_their_own_and_lower_floors_only(name):
    """So neither a script nor anything else outside of blockwise/ but masking."""
    if MODULES[name].name == "__init__.py":
        assert not imports(MODULES[name])
        return
    assert floor(name) is not None, f"{name} is on no floor"
    for imported in ours(MODULES[name]):
        assert floor(imported) is not None and floor(imported) <= floor(name), f"{name} imports {imported}"


def test_no_module_imports_by_name_what_the_walk_would_not_see():
    for name in PACKAGE:
        assert "import_module" not in MODULES[name].read_text() and "__import__" not in MODULES[name].read_text()


def test_there_are_no_cycles():
    graph = {name: ours(file) for name, file in MODULES.items() if file.name != "__init__.py"}
    done = set()

    def visit(name, path):
        assert name not in path, f"a cycle: {' -> '.join([*path, name])}"
        if name in graph and name not in done:
            for imported in graph[name]:
                visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_file_changes_where_python_looks_for_modules():
    for file in FILES:
        assert file == Path(__file__) or "sys.path" not in file.read_text(encoding="utf-8"), file


# ---------------------------------------------------------------- import blockwise


def python(code, *args, cwd):
    """Runs code in another process in a folder that is not the repository's. Returns what it prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
print(type(model).__module__, type(model).__name__, model.dtype, sum(p.numel() for p in model.parameters()))
"""
AUTO = "from transformers import AutoModelForCausalLM"


@pytest.mark.parametrize(
    "code",
    [
        f"import blockwise\n{AUTO}",
        f"{AUTO}\nimport blockwise",
        pytest.param(f"import transformers\nimport blockwise\n{AUTO}", marks=pytest.mark.full),
        pytest.param(f"import blockwise\nimport transformers.models.llama\n{AUTO}", marks=pytest.mark.full),
        pytest.param(f"import blockwise\nimport peft\n{AUTO}", marks=pytest.mark.full),
        f"import blockwise.cli\n{AUTO}",
        f"import blockwise\nfrom importlib.util import find_spec\nassert find_spec('transformers')\n{AUTO}",
        pytest.param(f"import blockwise\nimport accelerate\nimport datasets\n{AUTO}", marks=pytest.mark.full),
    ],
)
def test_importing_blockwise_registers_llada(base, tmp_path, code):
    """Before or after transformers, and however that comes to be imported, or only looked for."""
    from blockwise.models import base as models

    number = sum(weight.numel() for weight in models.load_model(base).parameters())
    found = python(code + LOAD, base, cwd=tmp_path)
    assert found.split() == ["blockwise.models.llada", "LLaDAForCausalLM", "torch.bfloat16", str(number)]


def test_importing_blockwise_imports_nothing_heavy(tmp_path):
    heavy = {"torch", "transformers", "peft", "deepspeed", "numpy"}
    code = f"import sys, blockwise, blockwise.cli, blockwise.knobs\nprint({heavy!r} & sys.modules.keys())"
    assert python(code, cwd=tmp_path) == "set()\n"


def test_an_engine_needs_nothing_of_torchs_compiler(tmp_path):
    """All of it would take each rank more than a second; the environment is as before."""
    code = """
import os, sys
from blockwise import engine
import deepspeed.runtime.zero.utils  # what deepspeed.initialize imports
before = dict(os.environ)
engine.import_muon()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print([name for name in ("torch._inductor.compile_fx", "torch._inductor.lowering") if name in sys.modules])
print(dict(os.environ) == before)
"""
    assert python(code, cwd=tmp_path) == "[]\nTrue\n"
