"""Small artifacts, as the evaluation and training stages write them."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_samples import WriteEvaluation, WriteTraining


@pytest.fixture
def write_evaluation(tmp_path: Path) -> WriteEvaluation:
    """Writes an evaluation directory and returns its path."""

    def write(name: str, results: list[dict[str, Any]], folder: str | None = None, **more: Any) -> str:
        directory = tmp_path / (folder or f"evaluation-{name}")
        directory.mkdir()
        content = {"schema": 1, "name": name, "results": results, "seconds": 12.3, **more}
        (directory / "results.json").write_text(json.dumps(content))
        return str(directory)

    return write


@pytest.fixture
def write_training(tmp_path: Path) -> WriteTraining:
    """Writes a training log and returns its path; without `history` or `pairs` that file is left out."""

    def write(
        name: str,
        stage: str = "sapo",
        history: list[dict[str, Any]] | None = None,
        pairs: list[dict[str, Any]] | None = None,
        folder: str | None = None,
    ) -> str:
        directory = tmp_path / (folder or f"training-{name}")
        directory.mkdir(parents=True)
        summary = {"schema": 1, "stage": stage, "name": name, "steps": 100, "seconds": 81.2, "settings": {"beta": 0.1}}
        (directory / "summary.json").write_text(json.dumps({**summary, "versions": {"torch": "2.13.0"}}))
        for file, lines in (("log_history.jsonl", history), ("pairs.jsonl", pairs)):
            if lines is not None:
                (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(directory)

    return write
