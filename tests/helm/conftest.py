"""Fixtures of the chart's tests."""

from pathlib import Path

import pytest
from rendered_chart import find, objects


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart's scripts as a pod finds them under /scripts: the text of the rendered config map."""
    directory = tmp_path_factory.mktemp("scripts")
    for name, text in find(objects(), "ConfigMap", "sapo-scripts")["data"].items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory
