"""What a container component tells Kubeflow Pipelines when it is done.

KFP hands a component `--executor_input '<json>'` and reads back the file that JSON names: scalar metrics and artifact
metadata. Output artifacts must be listed there, or kfp.local drops them. Without executor input (`docker run`, a
laptop) `publish` does nothing.
"""

import json
from pathlib import Path
from typing import Any

from components.common.errors import UserError


def publish(executor_input: str | None, metadata: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes the executor output file.

    Args:
        executor_input: the JSON that KFP passed, or None outside KFP.
        metadata: for an output artifact's name, its metadata; for `dsl.Metrics` these are the metrics.

    Raises:
        UserError: the JSON is not an executor input.
    """
    if not executor_input:
        return
    try:
        outputs = json.loads(executor_input)["outputs"]
        output_file = Path(outputs["outputFile"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            "--executor_input: not an executor input of Kubeflow Pipelines; leave it out by hand"
        ) from error
    artifacts = {}
    for name, listed in outputs.get("artifacts", {}).items():
        artifact = dict(listed["artifacts"][0])
        artifact["metadata"] = {**artifact.get("metadata", {}), **(metadata or {}).get(name, {})}
        artifacts[name] = {"artifacts": [artifact]}
    output_file.parent.mkdir(parents=True, exist_ok=True)
    output_file.write_text(json.dumps({"artifacts": artifacts}), encoding="utf-8")
