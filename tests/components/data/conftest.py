"""Small sources in the shapes of the public data sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.data.__main__ import main


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or text as it is) to a .jsonl file."""

    def write(*rows: Any, name: str = "source.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


class Run:
    """Runs the stage on a source, and holds what it wrote."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def __call__(self, source: Any, **settings: Any) -> "Run":
        values = {"source": str(source), "output": str(self.output), "test_rows": 0, **settings}
        main(["--settings", json.dumps(values)])
        return self

    @property
    def train(self) -> list[dict[str, Any]]:
        return read_jsonl(self.output / "train.jsonl")

    @property
    def test(self) -> list[dict[str, Any]]:
        return read_jsonl(self.output / "test.jsonl")

    @property
    def rejected(self) -> list[dict[str, Any]]:
        return read_jsonl(self.output / "rejected_rows.jsonl")

    @property
    def statistics(self) -> dict[str, Any]:
        return json.loads((self.output / "statistics.json").read_text())

    @property
    def report(self) -> str:
        return (self.output / "report.md").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "output")
