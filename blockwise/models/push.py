"""Publishes a checkpoint, or the adapters of one, on the hub.

    python -m blockwise.models.push ckpts_stagewise_sft_32_step0025 my-name/my-model --dry-run
    python -m blockwise.models.push ckpts_stagewise_sft_32_step0025/adapter my-name/my-adapters --private

Uploaded are the files that the folder's manifest names, in one commit, so that the repository on the hub has all of
them or none. They must be what was written; only README.md, the model card, may have been edited. It gets the name on
the hub, and Pass@1 if eval.py has left results of these weights. Nothing in the folder is changed.
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from blockwise.cli import InputError, read_jsonl, run_script
from blockwise.models import card, hub
from blockwise.models.hub import ADAPTER_CONFIG
from blockwise.run import files

ADAPTER = "adapter"  # folder in a checkpoint; see checkpoint.py, whose import takes seconds


def main():
    parser = argparse.ArgumentParser(
        prog="python -m blockwise.models.push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a checkpoint, or its folder adapter/")
    parser.add_argument("repo_id", help="its name on the hub, such as my-name/my-model; made if there is none")
    parser.add_argument("--private", action="store_true", help="a repository that is made is seen by its owner only")
    parser.add_argument("--dry-run", action="store_true", help="print the card and what would be uploaded, and end")
    parser.add_argument(
        "--results", type=Path, help="a folder of eval.py's results (default: those in results/ of these weights)"
    )
    args = parser.parse_args()
    check_name(args.repo_id)
    contents = to_upload(args.folder)
    text = finished_card(args.folder, args.repo_id, args.results)
    if args.dry_run:
        print(text)
    elif not get_token():
        raise InputError("the hub needs a token that may write: run `hf auth login`, or set HF_TOKEN.")
    contents |= with_card(args.folder, text)
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>16,} bytes  {name}")
    if args.dry_run:
        print(f"nothing was uploaded; without --dry-run, these {len(contents)} files go to {args.repo_id}")
    else:
        print(f"uploaded to {upload(args.repo_id, contents, args.private)}")


def check_name(repo_id: str) -> None:
    """Refuses what is no name of a repository. Raises InputError."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} cannot be a name on the hub: {hub.reason(error)}") from error
    if "/" not in repo_id:
        raise InputError(f"{repo_id!r} needs an owner on the hub in front of it, as in my-name/{repo_id}.")


def to_upload(folder: Path) -> dict[str, Path | bytes]:
    """The files of a checkpoint or of adapters, {name on the hub: file}, as their manifests name them.

    Raises InputError if the folder is neither of these, or if a file other than the card is not what was written.
    """
    names = checked(folder)
    if not {"config.json", ADAPTER_CONFIG} & names:
        raise InputError(f"{folder} is neither a checkpoint nor the adapters of one: it has no config.json.")
    found = {name: folder / name for name in names}
    if (folder / ADAPTER).is_dir():
        adapter = {*checked(folder / ADAPTER), files.MANIFEST}
        found |= {f"{ADAPTER}/{name}": folder / ADAPTER / name for name in adapter}
    return dict(sorted(found.items()))


def checked(folder: Path) -> set[str]:
    """The names in a folder's manifest, once all files but the card are what was written. Raises InputError."""
    try:
        manifest = files.read_manifest(folder)
        for name in manifest["files"]:
            if Path(name).name != name:
                raise ValueError(f"its manifest names {name}, which is not in it")
            if name != card.README:
                files.check(folder, name, manifest)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} cannot be published: {Path(error.filename).name} is missing; give the folder of a checkpoint."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} cannot be published: {hub.reason(error)}.") from error
    return set(manifest["files"])


def finished_card(folder: Path, repo_id: str, results: Path | None) -> str:
    """The card of the folder as it will be on the hub. Raises InputError if there is none."""
    try:
        text = (folder / card.README).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}/{card.README}, the model card, cannot be read: {hub.reason(error)}") from error
    found = find_results(folder, results)
    if found and card.RESULTS not in text:
        print(f"{folder}/{card.README} has no place for them any more and stays as it is")
    return card.published(text, repo_id, found)


def with_card(folder: Path, text: str) -> dict[str, bytes]:
    """The card, and the manifest with its line for that card."""
    manifest, data = files.read_manifest(folder), text.encode()
    manifest["files"][card.README] = files.line(data)
    return {card.README: data, files.MANIFEST: files.manifest(manifest)}


def find_results(folder: Path, wanted: Path | None) -> list[tuple[dict, list[dict]]]:
    """Settings and answers of the finished evaluations of these weights. wanted: the only folder to look at.

    Raises InputError if that one has other weights or is not finished.
    """
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    weights = [files.sha256(file) for file in hub.adapter_files(folder)] if is_adapter else [hub.fingerprint(folder)]
    found = []
    for path in [wanted / "settings.json"] if wanted else sorted(Path("results").glob("*/settings.json")):
        try:
            settings = json.loads(path.read_text())
            same = settings["weights"][-len(weights) :] == weights and bool(settings["adapter"]) == is_adapter
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not of eval.py's results: {hub.reason(error)}") from error
        rows = [row for _, row in read_jsonl(path.with_name("answers.jsonl"))] if same else []
        if same and len(rows) == settings["problems"]:
            found.append((settings, rows))
        elif wanted:
            what = (
                f"{len(rows)} of {settings['problems']} problems are answered" if same else "they are of other weights"
            )
            raise InputError(f"--results {wanted} is not what the card of {folder} needs: {what}.")
    print(f"results of eval.py: {len(found)} of these weights")
    return found


def upload(repo_id: str, contents: dict[str, Path | bytes], private: bool) -> str:
    """Makes the repository if there is none, and commits the files. Returns its address. Raises InputError."""
    api, operations = HfApi(), [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload of a checkpoint of Blockwise SFT")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        why = hub.reason(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
        raise InputError(f"nothing was published as {repo_id}: {why}") from error
    return str(address)


if __name__ == "__main__":
    run_script(main)
