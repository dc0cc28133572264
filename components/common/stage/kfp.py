"""What a container component tells Kubeflow Pipelines when it is done.

KFP hands a component `--executor_input '<json>'` and reads back the file that JSON names: scalar metrics and artifact
metadata. Output artifacts must be listed there, or kfp.local drops them. Without executor input (`docker run`, a
laptop) `publish` does nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError


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


def bucket_of(executor_input: str | None, path: str) -> str | None:
    """Where KFP's launcher will send the artifact that is made at a path.

    Returns:
        `s3://bucket/key`; None outside a pod of KFP, or where artifacts go to another kind of store.
    """
    try:
        listed = json.loads(executor_input or "")["outputs"]["artifacts"].values()
        uris = [artifact["uri"] for entry in listed for artifact in entry["artifacts"]]
    except (ValueError, KeyError, TypeError):
        return None
    for uri in uris:
        scheme, _, place = uri.partition("://")
        # KFP's default store has a scheme of its own; it speaks S3 at the endpoint that the environment names.
        known = scheme == "s3" or (scheme == "minio" and "AWS_ENDPOINT_URL" in os.environ)
        if known and Path(path).as_posix().endswith(f"/{scheme}/{place}"):
            return f"s3://{place}"
    return None
