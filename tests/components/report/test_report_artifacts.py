"""What is read, what is refused and in which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_samples import WriteEvaluation, WriteTraining, measurement, pair

from components.common.core.errors import UserError
from components.report.artifacts import (
    early_and_late_pairs,
    read_evaluation,
    read_evaluations,
    read_training,
    read_trainings,
)


def test_curves_skip_lines_without_the_key_and_values_that_are_not_finite(write_training: WriteTraining) -> None:
    history: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 2, "eval_loss": 3},
    ]
    history += [
        {"step": 3, "loss": "broken"},
        {"loss": 9.0},
        {"step": 4, "loss": 1.5},
        {"step": 4, "train_runtime": 7.0},
    ]
    training = read_training(write_training("sft", "sft", history))
    assert training.curve("loss") == [(1, 2.0), (4, 1.5)]
    assert training.last("loss") == 1.5
    assert training.last("rewards/margins") is None


def test_a_model_directory_stands_for_the_log_it_holds(write_training: WriteTraining, tmp_path: Path) -> None:
    write_training("sapo", folder="model/training")
    assert read_training(str(tmp_path / "model")).folder == tmp_path / "model" / "training"


def test_half_of_the_pairs_are_from_the_first_steps_and_half_from_the_last(write_training: WriteTraining) -> None:
    steps = [5, 1, 2, 3, 4, 9, 8, 7, 6, 10]
    training = read_training(write_training("sapo", pairs=[pair(step) for step in steps]))
    early, late = early_and_late_pairs(training, 5)
    assert ([p.step for p in early], [p.step for p in late]) == ([1, 2, 3], [9, 10])


def test_few_pairs_are_split_without_showing_one_twice(write_training: WriteTraining) -> None:
    training = read_training(write_training("sapo", pairs=[pair(1, row_id=f"r{i}") for i in range(3)]))
    early, late = early_and_late_pairs(training, 24)
    assert ([p.row_id for p in early], [p.row_id for p in late]) == (["r0", "r1"], ["r2"])


def test_no_pairs(write_training: WriteTraining) -> None:
    assert early_and_late_pairs(read_training(write_training("sapo")), 4) == ([], [])


def test_missing_directory_and_missing_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--evaluations .*nowhere: no such file or directory"):
        read_evaluation(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"results\.json: no such file; .* is not an evaluation directory"):
        read_evaluation(str(tmp_path))
    with pytest.raises(UserError, match=r"summary\.json: no such file; .* is not a training log directory"):
        read_training(str(tmp_path))


def test_malformed_json_is_named_with_its_position(tmp_path: Path, write_training: WriteTraining) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1,\n "name": }')
    with pytest.raises(UserError, match=r"results\.json: not valid JSON: .*line 2 column 10"):
        read_evaluation(str(tmp_path))
    training = Path(write_training("sapo", history=[{"step": 1}]))
    (training / "log_history.jsonl").write_text('{"step": 1}\n\n{"step": 2')
    with pytest.raises(UserError, match=r"log_history\.jsonl, line 3: not valid JSON"):
        read_training(str(training))
    (training / "log_history.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"line 1: must be a JSON object, is list"):
        read_training(str(training))


def test_unknown_schema(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 3, "name": "x", "results": []}))
    with pytest.raises(UserError, match=r"results\.json: has schema 3, this report reads schema 1 and 2"):
        read_evaluation(str(tmp_path))


def test_wrong_field_is_named(write_evaluation: WriteEvaluation, write_training: WriteTraining) -> None:
    wrong = write_evaluation("a", [{**measurement("accuracy", 0.5, 0.1), "value": "high"}])
    with pytest.raises(UserError, match=r"results\.json: results\.0\.value: input should be a valid number"):
        read_evaluation(wrong)
    training = read_training(write_training("sapo", pairs=[pair(1), {"step": 2}]))
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2: row_id: field required"):
        early_and_late_pairs(training, 4)


def test_duplicates(write_evaluation: WriteEvaluation, write_training: WriteTraining) -> None:
    twice = write_evaluation("a", [measurement("accuracy", 0.5, 0.1)] * 2)
    with pytest.raises(UserError, match="lists held_out / accuracy twice"):
        read_evaluation(twice)
    same = [write_evaluation("sft", [], folder=folder) for folder in ("one", "two")]
    with pytest.raises(UserError, match="--evaluations: two are named 'sft'"):
        read_evaluations(same)
    runs = [write_training("sapo", folder=folder) for folder in ("three", "four")]
    with pytest.raises(UserError, match="--trainings: two are named 'sapo'"):
        read_trainings(runs)
