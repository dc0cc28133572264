"""What inputs hold, so that the same content is the same input wherever it lies."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.common.core.identity import Role
from components.common.storage import manifest


def contents(values: Mapping[str, Any], roles: Mapping[str, Role]) -> dict[str, Any]:
    """For each input that is given, its value with a digest in place of each location; one by name is that location.

    Args:
        values: settings by name.
        roles: of settings, by name.
    """
    names = (name for name, role in roles.items() if role == Role.INPUT)
    found = {name: mapped(values[name], content_of) for name in names if values.get(name) not in (None, [], ())}
    return {n: next(iter(v.values())) if isinstance(v, dict) and len(v) == 1 else v for n, v in found.items()}


def content_of(text: str) -> str:
    """A digest of what lies at a path or below an s3:// URI; other URIs, and paths that lead nowhere, as they are."""
    if is_remote(text):
        from components.common.storage.transfer import version

        return version(text)
    return manifest.digest_of(Path(text)) if "://" not in text and Path(text).exists() else text


def is_remote(value: Any) -> bool:
    """Whether it is a location in a bucket."""
    return isinstance(value, str) and value.startswith("s3://")


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A setting with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def without_buckets(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as they look with a path for every `s3://` URI, for a check of them alone."""
    return {name: mapped(value, lambda text: text.replace("s3://", "/", 1)) for name, value in values.items()}
