"""The executor output is what KFP expects: artifacts with their metadata, and nothing outside KFP."""

import json

import pytest

from components.common.errors import UserError
from components.common.kfp_outputs import publish


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


@pytest.mark.parametrize("text", ["{", "[]", '{"inputs": {}}'])
def test_what_is_no_executor_input_is_refused(text):
    with pytest.raises(UserError, match="not an executor input of Kubeflow Pipelines"):
        publish(text)
