"""Flags whose text looks like JSON."""

import dataclasses

import pytest

from components.common.stage.config import StageConfig, setting
from components.common.stage.parser import ConfigParser


@dataclasses.dataclass(kw_only=True)
class _Config(StageConfig):
    text: str | None = setting(None, "Text.")
    either: dict | str | None = setting(None, "A mapping or a text.")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("executor_input", '{"inputs": {}}', '{"inputs": {}}'),
        ("text", "[draft] title", "[draft] title"),
        ("either", '{"a": 1}', {"a": 1}),
        ("either", "plain", "plain"),
    ],
)
def test_text_stays_text_unless_the_setting_takes_structure(flag: str, value: str, expected: object) -> None:
    (config,) = ConfigParser("data", [_Config]).parse(["--output", "x", f"--{flag}", value])
    assert getattr(config, flag) == expected
