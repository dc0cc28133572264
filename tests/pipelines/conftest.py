"""Compiled pipelines of fake stages, and the command line in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp import compiler, dsl
from kfp.dsl import Artifact, Input, Output

from pipelines.__main__ import main

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


@dsl.container_component
def second_of_item(given: Input[Artifact], settings: str, made: Output[Artifact]) -> dsl.ContainerSpec:
    return _container(settings, "--given", given.path, "--output", made.path)


@dsl.container_component
def last(given: Input[list[Artifact]], settings: dict, made: Output[Artifact]) -> dsl.ContainerSpec:
    return _container(settings, "--output", made.path)


@dsl.pipeline(name="loop")
def loop(items: list, steps: int = 1) -> None:
    """first -> second for each item -> last."""
    made = first(settings=NONE).set_display_name("The first")
    with dsl.ParallelFor(items, parallelism=1) as item:
        again = second_of_item(given=made.outputs["made"], settings=item.settings).set_display_name("The second")
    last(given=dsl.Collected(again.outputs["made"]), settings=NONE).set_display_name("The last")


@pytest.fixture
def loop_package(tmp_path: Path) -> Path:
    """A compiled pipeline of fake stages with a loop."""
    path = tmp_path / "loop.yaml"
    compiler.Compiler().compile(loop, str(path))
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
