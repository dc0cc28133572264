"""The executor output is what KFP expects: artifacts with their metadata, and nothing outside KFP."""

import json

import pytest

from components.common.core.errors import UserError
from components.common.stage.kfp import bucket_of, publish, published


def test_artifacts_are_listed_with_metadata(tmp_path):
    output_file = tmp_path / "deep" / "output.json"
    artifact = {"name": "m", "uri": "/x/metrics", "type": {"schemaTitle": "system.Metrics"}, "metadata": {"kept": 1}}
    executor_input = {"outputs": {"outputFile": str(output_file), "artifacts": {"metrics": {"artifacts": [artifact]}}}}
    publish(json.dumps(executor_input), {"metrics": {"loss": 0.5}})
    written = json.loads(output_file.read_text())["artifacts"]["metrics"]["artifacts"][0]
    assert written["metadata"] == {"kept": 1, "loss": 0.5}
    assert (written["uri"], written["type"]) == ("/x/metrics", {"schemaTitle": "system.Metrics"})


def test_outside_kfp_nothing_happens():
    publish(None, {"metrics": {"loss": 0.5}})


def test_what_was_published_can_be_read_again(tmp_path):
    outputs = {"outputFile": str(tmp_path / "output.json"), "artifacts": {"metrics": {"artifacts": [{"uri": "/x"}]}}}
    text = json.dumps({"outputs": outputs})
    assert published(text) == {}
    publish(text, {"metrics": {"loss": 0.5}})
    assert published(text) == {"metrics": {"loss": 0.5}}
    assert published(None) == published("{") == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"inputs": {}}', '{"outputs": []}', '{"outputs": {}}',
                                  '{"outputs": {"outputFile": "f", "artifacts": {"a": {"artifacts": []}}}}'])  # fmt: skip
def test_what_is_no_executor_input_is_refused(text):
    with pytest.raises(UserError, match="not an executor input of Kubeflow Pipelines"):
        publish(text)


@pytest.mark.parametrize(
    ("uri", "path", "bucket"),
    [
        ("s3://b/runs/1/aligned", "/s3/b/runs/1/aligned", "s3://b/runs/1/aligned"),
        ("minio://mlpipeline/v2/aligned", "/minio/mlpipeline/v2/aligned", "s3://mlpipeline/v2/aligned"),
        ("gs://b/runs/1/aligned", "/gcs/b/runs/1/aligned", None),
        ("/work/outputs/aligned", "/work/outputs/aligned", None),  # a local run
        ("s3://b/runs/1/other", "/s3/b/runs/1/aligned", None),
    ],
)
def test_where_kfp_sends_an_artifact(uri, path, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    outputs = {"outputs": {"artifacts": {"a": {"artifacts": [{"uri": uri}]}}}}
    assert bucket_of(json.dumps(outputs), path) == bucket
    assert bucket_of(None, path) is None
    assert bucket_of("{}", path) is None


def test_the_default_store_of_kfp_needs_an_endpoint(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    outputs = {"outputs": {"artifacts": {"a": {"artifacts": [{"uri": "minio://m/a"}]}}}}
    assert bucket_of(json.dumps(outputs), "/minio/m/a") is None
