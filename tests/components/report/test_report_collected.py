"""Artifacts of a loop, from KFP's executor input, on a cluster and locally."""

import json
import re
from pathlib import Path

import pytest
from report_samples import WriteEvaluation, WriteTraining, measurement

from components.common.core.errors import UserError
from components.report.__main__ import main
from components.report.collected import collected_paths, local_path


def executor_input(**inputs: list[str]) -> str:
    """As KFP writes it: an artifact has a name, a type, a URI and metadata."""
    lists = {
        name: {"artifacts": [{"name": "results", "uri": uri, "type": {}, "metadata": {}} for uri in uris]}
        for name, uris in inputs.items()
    }
    return json.dumps({"inputs": {"artifacts": lists, "parameterValues": {}}, "outputs": {"outputFile": "unused"}})


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("minio://mlpipeline/v2/artifacts/a b/results", "/minio/mlpipeline/v2/artifacts/a b/results"),
        ("s3://bucket/key", "/s3/bucket/key"),
        ("gs://bucket/key", "/gcs/bucket/key"),
        ("/runs/outputs/train-dpo/training_log", "/runs/outputs/train-dpo/training_log"),
    ],
)
def test_uris_map_to_paths_as_the_launcher_does(uri: str, path: str) -> None:
    assert local_path(uri) == path


def test_an_uri_without_a_place_is_refused() -> None:
    with pytest.raises(UserError, match=r"oci://x: only minio://, s3://, gs:// and paths have a place"):
        local_path("oci://x")


def test_paths_come_in_the_order_of_the_loop() -> None:
    text = executor_input(evaluations=["s3://b/2", "s3://b/1"], trainings=["/t"])
    assert collected_paths(text, "evaluations") == ["/s3/b/2", "/s3/b/1"]
    assert collected_paths(text, "trainings") == ["/t"]


@pytest.mark.parametrize("text", [executor_input(), executor_input(evaluations=[]), '{"inputs": {}}',
                                  '{"inputs": {"artifacts": {"evaluations": {}}}}'])  # fmt: skip
def test_a_loop_without_items_collects_nothing(text: str) -> None:
    assert collected_paths(text, "evaluations") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "collected as 'x' are named in --executor_input, which was not given"),
        ("", "which was not given"),
        ("{", "is not KFP's executor input"),
        ("[]", "is not KFP's executor input"),
        ("{}", "is not KFP's executor input"),
        ('{"inputs": {"artifacts": {"x": {"artifacts": [{"name": "a"}]}}}}', "is not KFP's executor input"),
    ],
)
def test_what_is_no_executor_input_is_refused(text: str | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        collected_paths(text, "x")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_collected_artifacts_follow_the_listed_ones(
    write_evaluation: WriteEvaluation, write_training: WriteTraining, tmp_path: Path
) -> None:
    paths = {name: write_evaluation(name, [measurement("accuracy", 0.5, 0.1)]) for name in ("base", "dpo", "spin")}
    trainings = [write_training(name, name) for name in ("sft", "dpo")]
    given = json.loads(executor_input(many=[paths["spin"], paths["dpo"]], logs=trainings[1:]))
    given["outputs"] = {"outputFile": str(tmp_path / "kfp.json"), "artifacts": {"metrics": {"artifacts": [{}]}}}
    argv = ["--evaluations", json.dumps([paths["base"]]), "--trainings", json.dumps(trainings[:1])]
    argv += ["--collected_evaluations", "many", "--collected_trainings", "logs"]
    main([*argv, "--executor_input", json.dumps(given), "--output", str(tmp_path / "out")])
    report = (tmp_path / "out" / "report.md").read_text()
    rows = [line.split(" | ")[0] for line in report.splitlines() if re.match(r"\| \w", line)]
    assert rows == ["| model", "| base", "| spin", "| dpo", "| run", "| sft", "| dpo"]
