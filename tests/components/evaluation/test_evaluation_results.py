"""results.json: the average, the names that KFP shows, the table, digests, and what a resume reads back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.common.core.errors import UserError
from components.evaluation.benchmark import Metric, Outcome
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context
from components.evaluation.provenance import END, digests
from components.evaluation.registry import HEADLINES
from components.evaluation.results import (
    assemble,
    check_resumable,
    finished_outcome,
    flat_metrics,
    leaderboard_average,
    save_outcome,
    start,
    table,
)
from components.evaluation.standard_errors import influence_stderr, influences
from components.report.artifacts import read_evaluation


def metric(benchmark: str, name: str, value: float, stderr: float | None = 0.1, **more: Any) -> Metric:
    entry = {"benchmark": benchmark, "metric": name, "value": value, "stderr": stderr, "interval": None, "n": 10}
    return {**entry, "higher_is_better": True, "description": "", **more}  # type: ignore[typeddict-item]


def test_the_average_is_of_the_six_headline_metrics_and_needs_all():
    six = [metric(name, headline, i / 10, 0.01 * i) for i, (name, headline) in enumerate(HEADLINES.items(), start=1)]
    other = metric("gsm8k", "exact_match_flexible", 0.99)
    (average,) = leaderboard_average([*six, other])
    assert average["value"] == pytest.approx(0.35)
    assert average["stderr"] == pytest.approx(math.sqrt(0.0001 + 0.0004 + 0.0009 + 0.0016 + 0.0025 + 0.0036) / 6)
    assert average["n"] == 60
    assert leaderboard_average([*six[1:], other]) == []
    assert leaderboard_average([*six[1:], six[0] | {"stderr": None}])[0]["stderr"] is None  # type: ignore[list-item]


def test_influences_give_the_standard_error_of_a_mean():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    expected = math.sqrt(sum((v - 0.6) ** 2 for v in values) / 4 / 5)
    assert influence_stderr(influences([(v, 1) for v in values])) == pytest.approx(expected)
    assert influence_stderr([0.0]) is None


def outcomes() -> dict[str, tuple[Outcome, float]]:
    chance = {"benchmark": "held_out", "name": "chance", "metric": "accuracy", "value": 0.25, "description": ""}
    held_out = Outcome([metric("held_out", "accuracy", 0.5)], {"window": 256}, {}, [chance])
    turns = metric("mt_bench", "score", 7.25, None, interval=[6.5, 7.9])
    return {"held_out": (held_out, 1.5), "mt_bench": (Outcome([turns], {}, {"numpy": "2"}), 2.0)}


def test_the_report_reads_what_is_written(tmp_path: Path):
    content = assemble("m", outcomes(), {"seed": 1}, {"code": "c" * 12}, 4.0)
    (tmp_path / "results.json").write_text(json.dumps(content))
    evaluation = read_evaluation(str(tmp_path))
    assert [(m.benchmark, m.value, m.interval) for m in evaluation.results] == [
        ("held_out", 0.5, None),
        ("mt_bench", 7.25, (6.5, 7.9)),
    ]
    assert evaluation.benchmarks["held_out"] == {"seconds": 1.5, "details": {"window": 256}}
    assert evaluation.versions["numpy"] == "2" and evaluation.provenance == {"code": "c" * 12}


def test_names_in_kubeflow_and_in_the_table():
    content = assemble("m", outcomes(), {}, {}, 4.0)
    assert flat_metrics(content) == {"accuracy": 0.5, "mt_bench/score": 7.25, "chance_accuracy": 0.25}
    lines = [line.split() for line in table(content).splitlines()]
    assert lines[1:] == [
        ["accuracy", "0.5", "0.1", "m", "(10", "samples)"],
        ["0.25", "chance", "baseline"],
        ["mt_bench/score", "7.25", "m", "(10", "samples)"],
    ]


def test_a_finished_benchmark_is_read_back_whole(tmp_path: Path):
    outcome, seconds = outcomes()["held_out"]
    assert finished_outcome(tmp_path) is None
    save_outcome(tmp_path, outcome, seconds)
    assert finished_outcome(tmp_path) == (outcome, seconds)
    (tmp_path / "outcome.json").write_text("{")
    with pytest.raises(UserError, match=r"outcome\.json: not valid JSON .*; --overwrite starts anew"):
        finished_outcome(tmp_path)


def test_a_resume_may_change_what_does_not_matter(tmp_path: Path):
    def config(**more: Any) -> EvaluationConfig:
        return EvaluationConfig(output=str(tmp_path), model="m", **more)

    start(tmp_path, config(limit=5), "float32")
    check_resumable(config(limit=5, batch_size=2, benchmarks=("ifeval",), judge_concurrency=1), "float32")
    with pytest.raises(UserError, match=r"limit was 5, is None; seed was 42, is 1; give the settings"):
        check_resumable(config(seed=1), "float32")


def test_a_run_in_another_precision_is_another_run_also_where_auto_chose_it(tmp_path: Path):
    config = EvaluationConfig(output=str(tmp_path), model="m")
    start(tmp_path, config, "bfloat16")  # on a GPU
    with pytest.raises(UserError, match="dtype was 'bfloat16', is 'float32'"):
        check_resumable(config, "float32")


def test_digests_follow_the_data_and_both_ends_of_the_weights(tmp_path: Path):
    (tmp_path / "test.jsonl").write_text("{}\n")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * (3 * END))
    config = EvaluationConfig(output="o", model=str(tmp_path), data=str(tmp_path))
    first = digests(config)
    assert set(first) == {"data", "model", "code"} and all(len(digest) == 12 for digest in first.values())
    assert digests(config) == first
    weights.write_bytes(b"a" * (3 * END - 1) + b"b")
    changed = digests(config)
    assert changed["model"] != first["model"] and (changed["data"], changed["code"]) == (first["data"], first["code"])


def test_one_engine_is_held_at_a_time(tmp_path: Path):
    closed: list[str] = []
    context = Context("m", tmp_path, "cpu", "float32")
    assert context.hold("a", lambda: "A", closed.append) == "A"
    assert context.hold("a", lambda: "never built", closed.append) == "A"
    assert context.hold("b", lambda: "B", closed.append) == "B"
    assert closed == ["A"]
    context.free()
    assert closed == ["A", "B"]


def test_the_leaderboard_is_spelled_out_once():
    config = EvaluationConfig(output="o", model="m", benchmarks=("gsm8k", "leaderboard", "ifeval"))
    assert config.benchmarks[0] == "gsm8k" and set(config.benchmarks) == {*HEADLINES, "ifeval"}
    assert len(config.benchmarks) == 7
    with pytest.raises(ValueError, match="overwrite = True and resume = True: choose one"):
        EvaluationConfig(output="o", model="m", overwrite=True, resume=True)
