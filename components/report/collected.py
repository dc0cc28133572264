"""Artifacts that a loop of a pipeline collected: KFP hands their list over in the executor input alone."""

import json

from components.common.core.errors import UserError

# Where KFP's launcher puts what it fetched from object storage.
_MOUNTS = {"minio://": "/minio/", "s3://": "/s3/", "gs://": "/gcs/"}


def collected_paths(executor_input: str | None, name: str) -> list[str]:
    """Local paths of the artifacts of one input, in the order of the loop; none where the loop had no items.

    Args:
        executor_input: KFP's executor input as JSON.
        name: Name of the input, such as "evaluations".

    Raises:
        UserError: there is no executor input, it is not one, or an artifact lies where no local path leads to.
    """
    if not executor_input:
        raise UserError(f"the artifacts collected as {name!r} are named in --executor_input, which was not given")
    try:
        artifacts = json.loads(executor_input)["inputs"].get("artifacts", {})
        uris = [artifact["uri"] for artifact in artifacts.get(name, {}).get("artifacts", [])]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--executor_input is not KFP's executor input (inputs, artifacts, {name}): {error}") from error
    return [local_path(uri) for uri in uris]


def local_path(uri: str) -> str:
    """The path that stands for an artifact's URI inside a task."""
    for scheme, folder in _MOUNTS.items():
        if uri.startswith(scheme):
            return folder + uri.removeprefix(scheme)
    if "://" in uri:
        raise UserError(f"{uri}: only {', '.join(_MOUNTS)} and paths have a place inside a task")
    return uri
