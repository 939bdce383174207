"""Runs the commands of README.md and docs/ as they stand there, after demo.sh and in its environment.

Commands that need a GPU, a hub, other packages or many minutes say so in a comment `# needs ...` and are left out. The
others run in one shell, in the repository: those of the README first, then those of the pages by name.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OWN = ("bash demo.sh", "bash test.sh")  # .ci/run itself
WRITTEN = ("ckpts_mine*", "ckpts_infill*", "results", "demo_run/results_*", "film.html")


def blocks(language: str) -> list[str]:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return [part for text in texts for part in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def run(what: str, command: list, **where) -> str:
    print(f"== {what}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, **where)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nerror: {what} failed")
    return done.stdout


def main():
    lines = [line for block in blocks("bash") for line in block.splitlines() if "# needs" not in line]
    assert lines[:2] == list(OWN), "the README begins with the commands that .ci/run runs"
    script = "\n".join(lines[2:])
    print(script)
    for left in [path for name in WRITTEN for path in ROOT.glob(name)]:
        sys.exit(f"error: {left} exists; remove it, so that the commands write what they name")
    said = run("commands", ["bash", "-euxc", script], cwd=ROOT)
    performance = (ROOT / "docs/performance.md").read_text()
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \| (True|False) \| (\d+) \| (\d+) \|$", performance, re.M)
    assert table and "benchmarks.memory" in script
    for row in table:
        assert re.search(r"\s+".join(map(re.escape, row)), said), f"docs/performance.md: {row} is not what is printed"

    (ROOT / "train_infill.py").unlink()  # the example of docs/design.md
    with tempfile.TemporaryDirectory() as elsewhere:  # from any folder with the repository on PYTHONPATH
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        for code in blocks("python"):
            if "# needs" not in code:
                code = re.sub(r'"((ckpts_mine|demo)[^"]*)"', lambda name: repr(str(ROOT / name[1])), code)
                run(f"example of loading:\n{code}", [sys.executable, "-c", code], cwd=elsewhere, env=env)


if __name__ == "__main__":
    main()
