"""Digests of what a result was measured with: the first 12 hexadecimal digits of a SHA-256."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import components
from components.evaluation.config import EvaluationConfig

END = (
    1 << 20
)  # bytes read at either end of a weight file: all of 16 GB would take a minute, and training changes them all


def digests(config: EvaluationConfig) -> dict[str, str]:
    """Of the test split (where held_out reads one), the model directory and the code."""
    found = {"model": model_digest(Path(config.model)), "code": code_digest()}
    if config.data is not None:
        found["data"] = _digest([(Path(config.data) / "test.jsonl").read_bytes()])
    return found


def model_digest(directory: Path) -> str:
    """Of the names, sizes and contents of a model's files; of weights their first and last megabyte."""
    parts: list[bytes] = []
    for path in sorted(directory.glob("*")):
        if path.is_file():
            size = path.stat().st_size
            parts += [path.name.encode(), str(size).encode()]
            with path.open("rb") as file:
                parts.append(file.read(END))
                file.seek(max(END, size - END))
                parts.append(file.read(END))
    return _digest(parts)


def code_digest() -> str:
    """Of every Python file of this project's stages."""
    root = Path(components.__file__).parent
    files = sorted(root.rglob("*.py"))
    return _digest(part for path in files for part in (str(path.relative_to(root)).encode(), path.read_bytes()))


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:12]
