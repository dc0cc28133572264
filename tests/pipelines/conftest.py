"""Compiled pipelines of fake stages, and the command line in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp import compiler, dsl
from kfp.dsl import Artifact, Input, Output

from pipelines.__main__ import main
from pipelines.stages import named

NONE: dict[str, Any] = {}
SCRIPT = str(Path(__file__).parent / "fake_stage.py")


def _container(settings: Any, *flags: Any) -> dsl.ContainerSpec:
    args = [SCRIPT, "--executor_input", "{{$}}", "--settings", settings, *flags]
    return dsl.ContainerSpec(image="none/fake:1", command=["python3"], args=args)


@dsl.container_component
def first(settings: dict, made: Output[Artifact]) -> dsl.ContainerSpec:
    return _container(settings, "--output", made.path)


@dsl.container_component
def second(given: Input[Artifact], settings: dict, made: Output[Artifact]) -> dsl.ContainerSpec:
    return _container(settings, "--given", given.path, "--output", made.path)


@dsl.pipeline(name="fake")
def fake(
    steps: int,
    text: str = "a",
    rate: float = 0.5,
    one: dict = NONE,
    two: dict = NONE,
    three: dict = NONE,
) -> None:
    """first -> second -> second-2.

    Args:
        steps: How many.
    """
    made = first(settings=one).set_display_name("The first")
    again = second(given=made.outputs["made"], settings=two).set_display_name("The second")
    second(given=again.outputs["made"], settings=three).set_display_name("The third")


@dsl.pipeline(name="fan")
def fan(one: dict = NONE, two: dict = NONE) -> None:
    """first -> two that need not wait for each other -> last."""
    made = first(settings=NONE).set_display_name("The first").outputs["made"]
    for name, settings in (("b", one), ("a", two)):
        named(second, f"second-{name}")(given=made, settings=settings).set_display_name(f"The second {name}")


@pytest.fixture
def fan_package(tmp_path: Path) -> Path:
    """A compiled pipeline of fake stages, two of which depend on the first alone."""
    path = tmp_path / "fan.yaml"
    compiler.Compiler().compile(fan, str(path))
    return path


@pytest.fixture
def fake_package(tmp_path: Path) -> Path:
    """A compiled pipeline of three fake stages, in a row."""
    path = tmp_path / "fake.yaml"
    compiler.Compiler().compile(fake, str(path))
    return path


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m pipelines ARGV` in this process; gives exit code, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
