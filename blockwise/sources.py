"""Data sets: from the hub, from folders and from files. Imports nothing heavy but inside its functions."""

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

from blockwise.cli import InputError

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}  # -> loader


def load_rows(name: str, split: str, config: str | None = None):
    """The rows of a data set: a hub id, a folder, or a json, jsonl, csv, tsv or parquet file, perhaps with .gz.

    config: which of the hub's configurations. Returns a datasets.Dataset. All columns of csv and tsv files are texts.
    Raises InputError.
    """
    path = Path(name)
    kinds = {kind for file in path.iterdir() if (kind := suffix(file)) in FILES} if path.is_dir() else set()
    if path.is_file():
        if suffix(path) not in FILES:
            raise InputError(f"--dataset {name}: its name must end in {', '.join(FILES)}, perhaps with .gz behind it.")
        kinds, more = {suffix(path)}, {"data_files": str(path)}
    else:
        more = {"data_dir": str(path)}
    for file in [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []:
        check_encoding(file)
    tables = kinds & {".csv", ".tsv"}
    if tables and len(kinds) > 1:
        raise InputError(f"--dataset {name} holds files of several kinds ({', '.join(sorted(kinds))}); name one.")
    if tables:
        return load_split("csv", split, **more, **as_texts(path, *tables))
    if path.is_file():
        return load_split(FILES[suffix(path)], split, **more)
    return load_split(name, split, config)


def suffix(file: Path) -> str:
    """The end of a file's name that says what it holds: .jsonl of rows.jsonl and of rows.jsonl.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def check_encoding(file: Path) -> None:
    """Refuses a file of texts that is not in UTF-8: datasets meets that only when it gives out the row. InputError."""
    if suffix(file) not in FILES.keys() - {".parquet"}:
        return
    number = 0
    try:
        with (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, _ in enumerate(lines, start=1):  # noqa: B007
                pass
    except UnicodeDecodeError:
        how = "convert it, as in: iconv -f latin1 -t utf-8 FILE > NEW_FILE"
        raise InputError(f"--dataset {file}: near line {number + 1}, it is not in UTF-8; {how}") from None
    except (OSError, EOFError) as error:
        raise InputError(f"--dataset {file} cannot be read: {error}") from error


def as_texts(path: Path, kind: str) -> dict:
    """Arguments for load_dataset with which nothing in csv or tsv files becomes a number or a missing value."""
    import pandas as pd
    from datasets import Features, Value

    separator = "," if kind == ".csv" else "\t"
    first = path if path.is_file() else min(file for file in path.iterdir() if suffix(file) == kind)
    try:
        columns = pd.read_csv(first, sep=separator, nrows=0).columns
    except (OSError, ValueError) as error:  # also of pandas, for an empty file
        raise InputError(f"--dataset {first} cannot be read: {error}") from error
    return {"sep": separator, "na_filter": False, "features": Features(dict.fromkeys(columns, Value("string")))}


def load_texts(name: str, split: str, column: str, streaming: bool) -> Iterator[list[str]]:
    """The texts of a column of a data set, some at a time. Raises InputError.

    name: see load_rows; or a folder of .txt files, or one of them. A .txt file is one text.
    """
    path = Path(name)
    if path.suffix == ".txt" or path.is_dir() and any(path.glob("*.txt")):
        texts = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        dataset = load_split("text", split, streaming=streaming, sample_by="document", data_files=[*map(str, texts)])
    else:
        dataset = load_split(name, split, streaming=True) if streaming else load_rows(name, split)
    number = 0
    for batch in dataset.iter(1000):
        if column not in batch:
            raise InputError(f"--text {column}: {name} has no such column; its columns are {', '.join(batch)}.")
        for row, text in enumerate(batch[column], start=number):
            if not isinstance(text, str):
                raise InputError(f"--text {column}: row {row} of {name} holds no text but {text!r:.200}")
        number += len(batch[column])
        yield batch[column]


def load_split(name: str, split: str, config: str | None = None, **more):
    """A split of a hub dataset or of a local folder. more: for load_dataset. Raises InputError."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    from blockwise.models.hub import reason

    if not sys.stderr.isatty():  # a bar that is redrawn would fill the file
        disable_progress_bars()
    unloadable = (DatasetGenerationError, DatasetNotFoundError, DataFilesNotFoundError)
    unloadable += (ValueError, OSError, LookupError, StopIteration)  # also raised, for empty files and empty names
    try:
        return load_dataset(name, config, split=split, **more)
    except unloadable as error:
        source = more.get("data_files") or more.get("data_dir") or name
        why = reason(error.__cause__ or error)
        raise InputError(f"dataset {source!r}, split {split!r}, cannot be loaded: {why}") from error
