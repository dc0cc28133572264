"""What a container component tells Kubeflow Pipelines when it is done.

KFP hands a component `--executor_input '<json>'` and reads back the file that JSON names: scalar metrics and artifact
metadata. Output artifacts must be listed there, or kfp.local drops them. Without executor input (`docker run`, a
laptop) `publish` does nothing. No other module reads that JSON.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError

Artifact = dict[str, Any]  # KFP's RuntimeArtifact: name, uri, type, metadata


@dataclass(frozen=True)
class ExecutorInput:
    """The outputs of a task, as KFP announces them: the file to report in, and each artifact by its output's name."""

    output_file: Path | None
    artifacts: dict[str, Artifact]


def read_executor_input(text: str) -> ExecutorInput:
    """Reads what KFP passes as `--executor_input`.

    Raises:
        UserError: the JSON is not an executor input.
    """
    try:
        outputs = json.loads(text)["outputs"]
        file = outputs.get("outputFile")
        artifacts = {name: dict(listed["artifacts"][0]) for name, listed in outputs.get("artifacts", {}).items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            "--executor_input: not an executor input of Kubeflow Pipelines; leave it out by hand"
        ) from error
    return ExecutorInput(Path(file) if file else None, artifacts)


def publish(executor_input: str | None, metadata: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes the executor output file.

    Args:
        executor_input: the JSON that KFP passed, or None outside KFP.
        metadata: for an output artifact's name, its metadata; for `dsl.Metrics` these are the metrics.

    Raises:
        UserError: the JSON is not an executor input, or names no file.
    """
    if not executor_input:
        return
    given = read_executor_input(executor_input)
    if given.output_file is None:
        raise UserError("--executor_input: not an executor input of Kubeflow Pipelines; it names no outputFile")

    artifacts = {}
    for name, artifact in given.artifacts.items():
        artifact["metadata"] = {**artifact.get("metadata", {}), **(metadata or {}).get(name, {})}
        artifacts[name] = {"artifacts": [artifact]}

    given.output_file.parent.mkdir(parents=True, exist_ok=True)
    given.output_file.write_text(json.dumps({"artifacts": artifacts}), encoding="utf-8")


def published(executor_input: str | None) -> dict[str, dict[str, Any]]:
    """What `publish` wrote: the metadata of each output artifact. Empty outside KFP, and where nothing is written yet."""
    if not executor_input:
        return {}
    try:
        file = read_executor_input(executor_input).output_file
        listed = json.loads(file.read_text(encoding="utf-8"))["artifacts"] if file else {}
        return {name: entry["artifacts"][0].get("metadata", {}) for name, entry in listed.items()}
    except (UserError, OSError, ValueError, KeyError):
        return {}


def bucket_of(executor_input: str | None, path: str) -> str | None:
    """Where KFP's launcher will send the artifact that is made at a path.

    Returns:
        `s3://bucket/key`; None outside a pod of KFP, or where artifacts go to another kind of store.
    """
    try:
        artifacts = read_executor_input(executor_input or "").artifacts
    except UserError:
        return None
    for artifact in artifacts.values():
        scheme, _, place = artifact.get("uri", "").partition("://")
        # KFP's default store has a scheme of its own; it speaks S3 at the endpoint that the environment names.
        known = scheme == "s3" or (scheme == "minio" and "AWS_ENDPOINT_URL" in os.environ)
        if known and Path(path).as_posix().endswith(f"/{scheme}/{place}"):
            return f"s3://{place}"
    return None
