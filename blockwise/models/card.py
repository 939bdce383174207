"""The model card of a checkpoint and of its adapters, their README.md: made from the constants of the run.

It holds no time, no name of the run and no path of the machine: a run gives the same bytes however often it is
resumed. push.py puts in what is known later: the name on the hub, and what eval.py has measured.
"""

import json
import re
from pathlib import Path

import yaml

from blockwise.run.constants import MAY_CHANGE_ON_RESUME, VERSIONS, data_knob

README = "README.md"
RESULTS = "<!-- blockwise.models.push puts what eval.py has measured here -->\n"
NAME = re.compile(r'^checkpoint = ".*$', re.MULTILINE)  # a line of the example
OBJECTIVES = {
    "train_blockwise.py": "block-wise SFT ([arXiv 2508.19529](https://arxiv.org/abs/2508.19529))",
    "train_fullseq.py": "full-sequence SFT of a masked diffusion model, as LLaDA's"
    " ([arXiv 2502.09992](https://arxiv.org/abs/2502.09992))",
    "train_bd3lm.py": "block diffusion ([arXiv 2503.09573](https://arxiv.org/abs/2503.09573))",
    "train_r2ft.py": "R2FT, a training against repetition ([arXiv 2509.15188](https://arxiv.org/abs/2509.15188))",
    "train_grpo.py": "group-relative policy optimisation on its own answers, block by block (GRPO,"
    " [arXiv 2402.03300](https://arxiv.org/abs/2402.03300))",
}
ELSEWHERE = {"MODEL_NAME", "DATA_PT", "DATA", "CKPT_DIR"}  # knobs that the card has in other words
UNSAID = {"model", "weights", "problems", "adapter"}  # of settings.json: what the card is about
BLOCK_LENGTH = 32  # of decoding, for a training without blocks


def card(constants: dict, step: int, base: Path, adapter: bool = False) -> str:
    """The card of the checkpoint after a step, or of its adapters.

    constants: see constants_of in blockwise/run/constants.py; base: the folder of the base.
    """
    model, kind = constants["MODEL_NAME"], "peft" if adapter else "transformers"
    local = Path(model).is_dir()
    tags = ["masked-diffusion", "blockwise-sft", *["lora"] * bool(constants["LORA_RANK"])]
    head = {} if local else {"base_model": model}  # the hub refuses what is none of its names
    head |= {"library_name": kind, "pipeline_tag": "text-generation", "tags": tags}
    model = Path(model).resolve().name if local else model
    script = constants["derived"]["script"]
    trained = f"{model}, fine-tuned with `{script}` of the repository Blockwise SFT"
    if script in OBJECTIVES:
        trained += f": {OBJECTIVES[script]}"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {model.rpartition('/')[2]} after {step} steps of {script}\n",
        f"{trained}. {what_it_is(constants, adapter)}\n",
        example(constants, model, base, adapter),
        RESULTS,
        training(constants, model, step),
        licences(base, model, adapter),
    ]
    return "\n".join(parts)


def what_it_is(constants: dict, adapter: bool) -> str:
    if adapter:
        return "These are the LoRA adapters alone, in PEFT's format."
    if constants["LORA_RANK"]:
        return f"The LoRA adapters are merged into its weights, which are rounded to {constants['SAVE_DTYPE']}."
    return f"All weights were trained; they are saved in {constants['SAVE_DTYPE']}."


EXAMPLE = """\
## Use

With the repository Blockwise SFT on `PYTHONPATH`; none of the code that may lie next to the weights is run.

```python
import blockwise

checkpoint = "."  # this folder
model, tokenizer = blockwise.load({load})
settings = {settings}
print(blockwise.generate(model, tokenizer, {ask}, **settings))
```
"""


def example(constants: dict, model: str, base: Path, adapter: bool) -> str:
    """How to load it and get an answer, with blocks and a length as in the training."""
    block = constants.get("BLOCK_SIZE", BLOCK_LENGTH)
    length = constants.get("GEN_LENGTH") or max(1, constants["MAX_LEN"] // block) * block
    settings = {"gen_length": length, "block_length": block, "steps": constants.get("STEPS", length)}
    name = json.dumps(model, ensure_ascii=False)
    return EXAMPLE.format(
        load=f"{name}, adapter=checkpoint" if adapter else "checkpoint",
        settings=json.dumps(settings),
        ask='"What is 3 + 4?"' if has_chat_template(base) else '"Once upon a time", raw=True',
    )


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of a model folder has one, in a file of its own or in its config."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or config.exists() and '"chat_template"' in config.read_text()


def training(constants: dict, model: str, step: int) -> str:
    """How it was trained: what from, how long, by which code, and all knobs."""
    derived = constants["derived"]
    micro, accumulated, ranks = constants["MICRO_BSIZE"], constants["GRAD_ACC"], derived["ranks"]
    size = f"{micro * accumulated * ranks} = {micro} MICRO_BSIZE x {accumulated} GRAD_ACC x {ranks} ranks"
    rows = {
        "base": f"{model}, fingerprint `{derived['model']}`",
        "data": f"{Path(constants[data_knob(constants)]).name}, sha256 `{derived['data']}`",
        "step": f"{step} of {derived['total_steps']}",
        "global batch": size,
        "code": f"commit `{derived['commit']}` of Blockwise SFT" if derived["commit"] else "commit unknown",
        "versions": ", ".join(f"{name} {derived[name]}" for name in VERSIONS),
    }
    knobs = {
        f"`{knob}`": f"`{without_path(value)!r}`"
        for knob, value in constants.items()
        if knob not in {"derived", *ELSEWHERE, *MAY_CHANGE_ON_RESUME}
    }
    return f"## Training\n\n{table(rows, 'what', '')}\n{table(knobs, 'knob', 'value')}"


def without_path(value: object) -> object:
    """The value of a knob, without the folder of a file that lies somewhere on the machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def table(rows: dict[str, str], *titles: str) -> str:
    """A table in Markdown."""
    lines = [titles, ("---", "---"), *((name, text.replace("|", "\\|")) for name, text in rows.items())]
    return "".join(f"| {name} | {text} |\n" for name, text in lines)


def licences(base: Path, model: str, adapter: bool) -> str:
    """Which licences to check: what the base's own card and files say."""
    said = re.match(r"---\n.*?^license: *(\S+)$.*?^---$", base_card(base), re.DOTALL | re.MULTILINE)
    files = sorted(file.name for file in base.iterdir() if file.name.upper().startswith("LICENSE"))
    where = f"; {'its file' if adapter else 'the file'} {', '.join(files)} has the text" if files else ""
    name = f"the card names `{said[1]}`" if said else "the card names none"
    return (
        "## Licences\n\nThese weights are made from those of the base and from the training data: check the licences "
        f"of both before you use or publish them. Of the base, {name}{where}.\n"
    )


def base_card(base: Path) -> str:
    return (base / README).read_text(encoding="utf-8", errors="replace") if (base / README).exists() else ""


# ---------------------------------------------------------------- what is known when it is published


def published(text: str, name: str, results: list[tuple[dict, list[dict]]]) -> str:
    """A card with its name on the hub in the example, and with results of eval.py, where it has places for them.

    results: pairs of settings.json and the lines of answers.jsonl.
    """
    text = NAME.sub(f'checkpoint = "{name}"', text, count=1)
    return text.replace(RESULTS, measured(results), 1) if results else text


def measured(results: list[tuple[dict, list[dict]]]) -> str:
    """The section with Pass@1, its interval, and how it was measured."""
    from blockwise import scoring  # only now: a training has no use for what it imports

    lines = ["## Pass@1\n\nMeasured by `eval.py`; `sha256` is that of problems and prompts.\n\n"]
    lines += ["| problems | Pass@1 | 95 % interval | settings |\n", "| --- | --- | --- | --- |\n"]
    for settings, rows in results:
        right = sum(row["correct"] for row in rows)
        low, high = scoring.wilson(right, len(rows))
        how = [f"{key} {value}" for key, value in settings.items() if value is not None and key not in UNSAID]
        lines.append(f"| {len(rows):,} | {right / len(rows):.1%} | {low:.1%} - {high:.1%} | {', '.join(how)} |\n")
    return "".join(lines)
