"""Model cards, and their way to the hub: against a server on this machine that takes what huggingface_hub sends."""

import ast
import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from conftest import ROOT, TRAINING, run

from blockwise import cli
from blockwise.models import card, hub, push
from blockwise.run import files

TOKEN = "hf_of_this_test"
REPO = "someone/a-model"
SHORT = ("--limit", 4, "--gen_length", 8, "--block_length", 8, "--steps", 1)


class Hub(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes for create_repo and create_commit, without xet."""

    def log_message(self, *args):
        pass

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        data, oid = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self.answer({})

    def do_POST(self):
        server, body = self.server, self.body()
        server.calls.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != "someone":
                return self.answer({"error": "You don't have the rights to create a model there"}, 403)
            known = name in server.repos
            server.repos.setdefault(name, {})
            server.visibility.setdefault(name, wanted.get("visibility"))
            return self.answer({"url": f"{server.url}/{name}", "name": name}, 409 if known else 200)
        if self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer({"errors": [], "warnings": []} if head["library_name"] else {}, 200)
        if self.path == f"/api/models/{REPO}/preupload/main":
            named = [entry["path"] for entry in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in named}
            return self.answer(
                {"files": [{"path": k, "uploadMode": v, "shouldIgnore": False} for k, v in kinds.items()]}
            )
        if self.path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path == f"/api/models/{REPO}/commit/main" and not server.full:
            self.commit([json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{server.url}/{REPO}/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": "storage is full"}, 507)

    def commit(self, lines):
        repo = self.server.repos[REPO]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                repo[value["path"]] = self.server.large[value["oid"]]
            else:
                repo[value["path"]] = base64.b64decode(value["content"])


@pytest.fixture
def server(monkeypatch):
    """The hub on this machine, to which huggingface_hub in this process and its children turns."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.large, server.visibility, server.calls, server.full = {}, {}, {}, [], False
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its storage has no stand-in
    for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(uninterrupted):
    """The last checkpoint of a run on one rank."""
    return uninterrupted(ranks=1) / "out/run ö_step0004"


@pytest.fixture
def pushed(monkeypatch, capsys):
    """pushed(*flags) -> exit code or sentence, stdout: push in this process."""

    def pushed(*flags):
        monkeypatch.setattr(sys, "argv", ["push", *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            cli.run_script(push.main)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return pushed


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def knobs_in(text):
    return {
        name: ast.literal_eval(value) for name, value in re.findall(r"^\| `([A-Z_0-9]+)` \| `(.*)` \|$", text, re.M)
    }


# ---------------------------------------------------------------- the card


def test_checkpoint_and_adapters_carry_their_cards(trained, base, pt_file):
    constants = json.loads((trained.parent / "run ö_logs/ablation_config.json").read_text())
    for folder, library in ((trained, "transformers"), (trained / "adapter", "peft")):
        text = (folder / "README.md").read_text(encoding="utf-8")
        files.check(folder, "README.md", files.read_manifest(folder))
        # a local base has no name that the hub could link to
        assert head(text) == {
            "library_name": library, "pipeline_tag": "text-generation",
            "tags": ["masked-diffusion", "blockwise-sft", "lora"],
        }  # fmt: skip
        assert huggingface_hub.ModelCard(text).data.library_name == library
        assert f"{base.name}, fine-tuned with `train_blockwise.py`" in text and "arxiv.org/abs/2508.19529" in text
        assert hub.fingerprint(base) in text and files.sha256(pt_file) in text and f"{pt_file.name}, sha256" in text
        assert "| step | 4 of 4 |" in text and "| 4 = 2 MICRO_BSIZE x 2 GRAD_ACC x 1 ranks |" in text
        assert f"torch {constants['derived']['torch']}, transformers" in text
        unsaid = {"MODEL_NAME", "DATA_PT", "CKPT_DIR", "RESUME", "RESUME_EVERY", "MAX_BAD_STEPS", "SAVE_DTYPE"}
        unsaid |= {"TRACKER"}
        wanted = {name: value for name, value in constants.items() if name not in {"derived", *unsaid}}
        assert knobs_in(text) == wanted and wanted["LORA_RANK"] == TRAINING["LORA_RANK"]
        assert str(base.parent) not in text and str(pt_file.parent) not in text and str(trained.parent) not in text
    assert text.count("4 steps of train_blockwise.py\n") == 1
    assert "which are rounded to bfloat16" in (trained / "README.md").read_text(encoding="utf-8")


def test_the_commit_of_the_code_is_known(trained):
    """Where there is a clone, and git: that of its last commit, marked if files differ from it."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    text = (trained / "README.md").read_text(encoding="utf-8")
    logged = json.loads((trained.parent / "run ö_logs/ablation_config.json").read_text())["derived"]["commit"]
    if git.returncode == 0 and (ROOT / ".git").exists():
        assert logged.removesuffix("-dirty") == git.stdout.strip() and f"commit `{logged}` of Blockwise SFT" in text
    else:
        assert logged is None and "commit unknown" in text


def test_the_examples_of_the_cards_run(trained, base, tmp_path, monkeypatch, capsys):
    """In the folder itself; a local base is named as it was called. They give the answers of generate.py."""
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (adapter / base.name).symlink_to(base)
    said = []
    for folder in (trained, adapter):
        monkeypatch.chdir(folder)
        (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
        capsys.readouterr()
        assert code.count(": 192") == 2
        code = code.replace(": 192", ": 32").replace("checkpoint)", 'checkpoint, dtype="float32", device="cpu")')
        exec(compile(code, "README.md", "exec"), {})
        said.append(capsys.readouterr().out)
    import generate

    how = ("--gen_length", "32", "--block_length", "16", "--steps", "32", "--dtype", "float32")
    for flags in (["--model", trained], ["--model", base, "--adapter", trained / "adapter"]):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags), "--prompt", "What is 3 + 4?", *how])
        generate.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] and said[1] == said[3] and said[0].strip() and said[1].strip()


CONSTANTS = TRAINING | {"MODEL_NAME": "GSAI-ML/LLaDA-8B-Instruct", "DATA_PT": "/home/me/MathQA_256.pt"}
CONSTANTS |= {"SAVE_DTYPE": "float16", "OTHER": "/home/me/x|y.txt", "derived": {
    "script": "train_fullseq.py", "ranks": 8, "total_steps": 25, "data": "d" * 64, "model": "f" * 64, "commit": None,
    "torch": "2", "transformers": "5", "deepspeed": "0", "peft": "1",
}}  # fmt: skip


def test_a_base_of_the_hub_is_named_with_its_licence_and_its_card_is_replaced(tmp_path):
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\ntags: []\n---\n# LLaDA\n")
    (tmp_path / "LICENSE.txt").write_text("MIT")
    text = card.card(CONSTANTS, 25, tmp_path, adapter=True)
    assert (
        head(text)["base_model"] == "GSAI-ML/LLaDA-8B-Instruct"
        and 'blockwise.load("GSAI-ML/LLaDA-8B-Instruct", adapter=checkpoint)' in text
    )
    assert "the card names `mit`; its file LICENSE.txt has the text" in text and "commit unknown" in text
    assert "32 = 2 MICRO_BSIZE x 2 GRAD_ACC x 8 ranks" in text and "/home/me" not in text
    assert "| `OTHER` | `'x\\|y.txt'` |" in text and "arxiv.org/abs/2502.09992" in text
    assert 'tokenizer, "Once upon a time", raw=True, **settings)' in text  # this base has no chat template
    full = card.card(CONSTANTS | {"LORA_RANK": 0}, 25, tmp_path)
    assert "All weights were trained; they are saved in float16." in full and "lora" not in head(full)["tags"]
    (tmp_path / "README.md").write_text("# no licence here\n\n---\nlicense: mit\n---\n")
    assert "the card names none" in card.card(CONSTANTS, 25, tmp_path)


# ---------------------------------------------------------------- the hub


@pytest.fixture(scope="module")
def results(trained, base, dataset_folder, tmp_path_factory):
    """A working directory with results of eval.py, of the checkpoint and of its adapters, and their names."""
    import eval

    folder, data = tmp_path_factory.mktemp("working"), dataset_folder / "train.jsonl"
    for flags in (["--model", trained], ["--model", base, "--adapter", trained / "adapter"]):
        with pytest.MonkeyPatch.context() as patch:
            argv = ["eval.py", *flags, "--data", data, "--output", folder / "results", *SHORT]
            patch.setattr(sys, "argv", [*map(str, argv)])
            eval.main()
    merged = f"{trained.name}-gsm8k"
    (adapters,) = {path.name for path in (folder / "results").iterdir()} - {merged}
    return folder, merged, adapters


def by_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_uploaded_whole(trained, server, results, pushed, monkeypatch):
    """By the real command into a new repository, and once more into the one that is there then."""
    before = by_bytes(trained)
    done = run("blockwise.models.push", trained, REPO, "--private", cwd=results[0])
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {server.url}/{REPO}" in done.stdout and "results of eval.py: 1" in done.stdout
    server.repos[REPO]["README.md"] = b"of an earlier time"
    monkeypatch.chdir(results[0])
    assert pushed(trained, REPO)[0] == 0
    found = server.repos[REPO]
    assert server.visibility == {REPO: "private"} and by_bytes(trained) == before
    assert found.keys() == before.keys() and sum(name.endswith(".safetensors") for name in found) == 6
    assert {name for name in found if found[name] != before[name]} == {"README.md", "manifest.json"}
    manifest = json.loads(found["manifest.json"])
    said = manifest.pop("sha256")
    assert said == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    for name, line in manifest["files"].items():
        assert line == {"bytes": len(found[name]), "sha256": hashlib.sha256(found[name]).hexdigest()}
    text, old = found["README.md"].decode(), before["README.md"].decode()
    assert f'\ncheckpoint = "{REPO}"\n' in text and "## Pass@1" in text
    section = re.search(r"## Pass@1.*?\n(?=\n## )", text, re.DOTALL)[0]
    assert text.replace(section, card.RESULTS).replace(f'"{REPO}"', '"."  # this folder') == old


def test_a_dry_run_shows_the_card_and_uploads_nothing(trained, server, results, pushed, monkeypatch):
    """Also for adapters, and without a token; Pass@1 is that of the answers of these weights."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(results[0])
    for folder, name in zip((trained, trained / "adapter"), results[1:]):
        before = by_bytes(folder)
        code, out = pushed(folder, REPO, "--dry-run")
        assert code == 0 and "nothing was uploaded" in out and not server.calls and by_bytes(folder) == before
        rows = [json.loads(line) for line in Path("results", name, "answers.jsonl").read_text().splitlines()]
        right = sum(row["correct"] for row in rows) / len(rows)
        assert f"| 4 | {right:.1%} |" in out and "task gsm8k" in out and "gen_length 8, block_length 8" in out
        listed = {
            file: int(size.replace(",", "")) for size, file in re.findall(r"^ *([\d,]+) bytes  (\S+)$", out, re.M)
        }
        assert listed.keys() == before.keys()
        (text,) = re.findall(r"^---$.*?^## Licences\n\n.*?\n", out, re.M | re.S)
        assert listed["README.md"] == len(text.encode()) and f'\ncheckpoint = "{REPO}"\n' in text
        same = listed.keys() - {"README.md", "manifest.json"}
        assert {file: listed[file] for file in same} == {file: len(before[file]) for file in same}


def test_an_edited_card_is_kept_and_other_changes_are_refused(trained, server, results, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(results[0])
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "README.md").write_text("---\nlibrary_name: transformers\n---\nMy own words.\n")
    (copy / "notes.txt").write_text("not named by the manifest")
    code, out = pushed(copy, REPO)
    assert code == 0 and "has no place for them any more" in out
    assert server.repos[REPO]["README.md"].endswith(b"My own words.\n") and "notes.txt" not in server.repos[REPO]
    calls = len(server.calls)
    shard = sorted(copy.glob("*.safetensors"))[0].name
    for name, data, said in (
        (shard, (copy / shard).read_bytes()[:-1] + b"x", f"{shard} is not what was written"),
        ("adapter/adapter_config.json", b"{}", "adapter_config.json has 2 bytes, its manifest says"),
        ("config.json", None, "config.json is missing"),
        ("manifest.json", b"{}", "its manifest is not what was written"),
    ):
        whole = (copy / name).read_bytes()
        (copy / name).unlink() if data is None else (copy / name).write_bytes(data)
        code, out = pushed(copy, REPO)
        assert str(code).startswith("error: ") and said in code and "\n" not in code, code
        (copy / name).write_bytes(whole)
    manifest = files.read_manifest(copy)
    manifest["files"]["../secret"] = files.line(b"")
    (copy / "manifest.json").write_bytes(files.manifest(manifest))
    assert "its manifest names ../secret, which is not in it" in pushed(copy, REPO)[0]
    assert len(server.calls) == calls


def test_what_cannot_be_published_is_one_sentence(trained, server, results, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = trained.parent / "run ö_logs"
    merged, adapters = (results[0] / "results" / name for name in results[1:])
    half = shutil.copytree(merged, tmp_path / "half")
    lines = (half / "answers.jsonl").read_text().splitlines(keepends=True)
    (half / "answers.jsonl").write_text("".join(lines[:3]))
    for flags, said in (
        ((tmp_path / "missing", REPO), "missing cannot be published: manifest.json is missing"),
        ((logs, REPO), "manifest.json is missing; give the folder of a checkpoint"),
        ((trained, "a b/c"), "'a b/c' cannot be a name on the hub"),
        ((trained, "model"), "as in my-name/model"),
        ((trained, REPO, "--results", adapters), "they are of other weights"),
        ((trained, REPO, "--results", half), "3 of 4 problems are answered"),
        ((trained, REPO, "--results", tmp_path / "no"), "settings.json is not of eval.py's results"),
        ((trained, "other/model"), "nothing was published as other/model: 403"),
    ):
        code, _ = pushed(*flags)
        assert str(code).startswith("error: ") and said in code and "\n" not in code, code
    server.full = True
    assert "nothing was published" in pushed(trained, REPO)[0] and not server.repos[REPO]
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "someone/a-model: Client error '401 Unauthorized'" in pushed(trained, REPO)[0]
    monkeypatch.delenv("HF_TOKEN")
    assert "the hub needs a token that may write" in pushed(trained, REPO)[0]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _ = pushed(trained, REPO)
    assert code.startswith("error: nothing was published") and "\n" not in code, code


def test_resume_points_are_refused(tmp_path, pushed):
    """They are whole, with a manifest, too."""
    written = {"rank0.safetensors": files.write(tmp_path / "rank0.safetensors", [b"x"])}
    files.write_manifest(tmp_path, {"files": written})
    assert "is neither a checkpoint nor the adapters of one" in pushed(tmp_path, REPO, "--dry-run")[0]
