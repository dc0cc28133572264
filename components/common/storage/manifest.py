"""What a finished directory holds: the size and sha256 of each file, and what made it. Written last, here and in a bucket.

A directory or prefix with a manifest is complete; without one it is somebody's own files, or a run that has not ended.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError

NAME = ".manifest.json"  # hidden, so that it is not taken for data or a model's file
KIND = "sapo-pipelines"
SCHEMA = 1

Files = dict[str, dict[str, Any]]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(directory: Path) -> dict[str, Path]:
    """Every file below a directory by its name relative to it, but for the manifest."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != NAME}


def describe(directory: Path, without: Sequence[Path] = ()) -> Files:
    """Size and sha256 of each file below a directory, but for what lies below some others."""
    found = {n: p for n, p in files_in(directory).items() if not any(p.is_relative_to(other) for other in without)}
    with ThreadPoolExecutor(4) as pool:  # hashing and reading release the GIL
        digests = pool.map(sha256, found.values())
        return {n: {"size": p.stat().st_size, "sha256": d} for (n, p), d in zip(found.items(), digests, strict=True)}


def make(files: Files, **about: Any) -> dict[str, Any]:
    return {"kind": KIND, "schema": SCHEMA, **about, "files": files}


def parse(text: str | bytes, place: Any) -> dict[str, Any]:
    """A manifest from its JSON; raises UserError where it is something else."""
    try:
        content = json.loads(text)
        names = list(content["files"])
        if content["kind"] != KIND or content["schema"] != SCHEMA:
            raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}/{NAME}: is not a manifest of schema {SCHEMA}: {error}") from error
    for name in names:  # what a bucket says must not write outside the directory
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{place}/{NAME}: names a file outside of it: {name}")
    return content


def write(directory: Path, content: dict[str, Any]) -> None:
    """Puts the manifest in place in one move."""
    unfinished = directory / f"{NAME}.tmp"
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.rename(directory / NAME)


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory; None where there is none, or where its files have changed since."""
    path = directory / NAME
    if not path.is_file():
        return None
    content = parse(path.read_text(encoding="utf-8"), directory)
    return content if all(_unchanged(directory / n, f["size"], path) for n, f in content["files"].items()) else None


def _unchanged(path: Path, size: int, manifest: Path) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    return status.st_size == size and status.st_mtime_ns <= manifest.stat().st_mtime_ns


def digest(files: Files) -> str:
    """One sha256 of names and contents."""
    lines = [f"{name} {file['sha256']}" for name, file in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """One sha256 of a file, or of the names and contents of a directory; a manifest in it is believed."""
    if path.is_file():
        return sha256(path)
    content = read(path)
    return digest(content["files"] if content else describe(path))
