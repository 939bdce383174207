"""What README.md and docs/ promise: links, knobs and names exist, the words are those of docs/design.md.

Their commands are run by .ci/commands.py, which .ci/run calls.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import train_bd3lm
import train_blockwise
import train_fullseq
import train_grpo
import train_r2ft

SCRIPTS = (train_blockwise, train_fullseq, train_bd3lm, train_r2ft, train_grpo)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "demo/README.md"]
FILES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if name.endswith((".py", ".sh", ".md")) and (ROOT / name).exists()
]
OLD_WORDS = (  # see docs/design.md
    r"\bhid(e|es|den|ing)\b(?!_(size|act|layers))", r"\bscored\b", r"\bis no number\b", r"\bgoes on\b",
    r"\bbegins? (it )?again\b", r"\basked to stop\b", r"\bdid not take (the|it)\b", r"\bin place of\b", r"\bbeside\b",
    r"\bso many\b", r"\bfor ever\b", r"\bthere already\b", r"\bPlace\b", r"\bis_due\b", r"\bsuspects\b", r"\bONLY\b",
    r"\bFREE\b", r"\bfate\b", r"\bPT_FILE\b", r"\bLORA_R\b",
)  # fmt: skip
ALLOWED = {  # where an old word is what an error or the glossary names
    "blockwise/knobs.py": r"\b(PT_FILE|LORA_R)\b",
    "tests/test_knobs.py": r"\b(PT_FILE|LORA_R)\b",
    "tests/test_docs.py": r".*",
    "tests/faults/test_bad_input.py": r"\b(PT_FILE|LORA_R)\b",
    "docs/design.md": r".*",  # the glossary itself
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """As GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text_of(page)):
        if not target.startswith("https://"):
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_knobs_exist_and_no_place_is_left_to_be_filled(page):
    text, knobs = text_of(page), {name for script in SCRIPTS for name in vars(script)}
    named = set(re.findall(r"--([A-Z][A-Z_0-9]+)=", text)) | set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z_0-9]+)`", text))
    others = {"PYTHONPATH", "NAME", "OMP_NUM_THREADS", "DS_ACCELERATOR", "NUM_GPUS", "HF_ALLOW_CODE_EVAL"}
    others |= {"TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_PROJECT", "WANDB_MODE", "WANDB_PROJECT"}
    if page.name not in ("reference.md", "design.md"):  # which name the reference's and old constants
        assert named - knobs - others == set()
    assert not re.findall(r"\b(TODO|TBD|FIXME|[A-Z]+ FIGURES|DEMO_\w+|TEST_TIME)\b", text)


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 200


def test_a_strangers_walk_is_short():
    """README's top, masking.py without block diffusion, train_blockwise.py and the step: at most 2,000 words."""
    top, _, _ = text_of(ROOT / "README.md").partition("\n## ")
    step, end, _ = text_of(ROOT / "blockwise/trainer.py").partition("\n@dataclass\nclass Step")
    assert end and "engine.backward" in step
    method, end, _ = text_of(ROOT / "masking.py").partition(
        "# ---------------------------------------------------------------- block"
    )
    assert end
    walk = [top, method, text_of(ROOT / "train_blockwise.py"), step]
    assert sum(bool(re.search(r"\w", word)) for part in walk for word in part.split()) <= 2000


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_words(file):
    name, text = file.relative_to(ROOT).as_posix(), text_of(file)
    for pattern in OLD_WORDS:
        for found in re.finditer(pattern, text):
            assert re.fullmatch(ALLOWED.get(name, "(?!)"), found[0]), f"{name}: {found[0]!r}"


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if f.suffix == ".py" and "tests" not in f.parts],
    ids=lambda f: str(Path(f).relative_to(ROOT)),
)
def test_functions_are_short(file):
    """At most 40 lines each."""
    for node in ast.walk(ast.parse(text_of(file))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def test_the_dockerfile_is_short_and_copies_what_exists():
    lines = text_of(ROOT / "Dockerfile").splitlines()
    assert len(lines) <= 20
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied == ["setup.sh", "requirements.txt", "."] and all((ROOT / name).exists() for name in copied)
    assert ".venv" in text_of(ROOT / ".dockerignore").split(), "it would replace that of the image"
    assert lines[-1] == 'CMD ["bash", "demo.sh"]'
