"""Reads a compiled package: its tasks and its parameters. Needs no kfp."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.common.core.errors import UserError
from pipelines.parameters import Parameter

COMPILED = Path(__file__).parent / "compiled"


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: KFP's pipeline spec and platform spec, and what a run needs of them.

    `tasks` maps the name of each task that runs something to its display name, in an order in which they can run.
    `stages` maps a parameter that is a recipe, or settings, to the stage that reads it.
    """

    name: str
    spec: dict[str, Any]
    platform: dict[str, Any]
    parameters: dict[str, Parameter]
    tasks: dict[str, str]
    stages: dict[str, str]


def package_names() -> list[str]:
    return sorted(path.stem for path in COMPILED.glob("*.yaml"))


def is_package(path: Path) -> bool:
    """Whether a file is a compiled pipeline, by the comment with which kfp opens one."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().startswith("# PIPELINE DEFINITION")


def read_package(path: Path) -> Package:
    """Reads a package.

    Raises:
        UserError: the file is not a compiled pipeline.
    """
    try:
        # libyaml's loader, where PyYAML has it, reads a package in a tenth of the time.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        spec, *platform = yaml.load_all(path.read_text(encoding="utf-8"), Loader=loader)
        declared = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return Package(
            name=spec["pipelineInfo"]["name"],
            spec=spec,
            platform=platform[0] if platform else {},
            parameters={name: _parameter(parameter) for name, parameter in declared.items()},
            tasks=_tasks(spec),
            stages=_stages(spec),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a compiled pipeline; make one with `python -m pipelines compile`") from error


def _parameter(declared: dict[str, Any]) -> Parameter:
    return Parameter(
        type=declared["parameterType"],
        description=" ".join(declared.get("description", "").split()),
        default=declared.get("defaultValue"),
        required=not declared.get("isOptional", False),
    )


def _tasks(spec: dict[str, Any]) -> dict[str, str]:
    """Display names of the tasks, by the name that KFP gives their component, in the order of their dependencies."""
    tasks = spec["root"]["dag"]["tasks"]
    in_order: dict[str, None] = {}

    def add(name: str) -> None:
        for needed in sorted(tasks[name].get("dependentTasks", [])):
            if needed not in in_order:
                add(needed)
        in_order[name] = None

    for name in sorted(tasks):
        if name not in in_order:
            add(name)
    named = ((tasks[name]["componentRef"]["name"], tasks[name]["taskInfo"]["name"]) for name in in_order)
    return {component.removeprefix("comp-"): title for component, title in named}


def _stages(spec: dict[str, Any]) -> dict[str, str]:
    """The stage behind each parameter that a task takes as its `recipe` or `settings`."""
    stages = {}
    for task in spec["root"]["dag"]["tasks"].values():
        executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        command = spec["deploymentSpec"]["executors"][executor]["container"]["command"] if executor else []
        stage = re.search(r"-m components\.(\w+)$", " ".join(command))
        for key in ("recipe", "settings"):
            source = task.get("inputs", {}).get("parameters", {}).get(key, {}).get("componentInputParameter")
            if stage and source:
                stages[source] = stage[1]
    return stages
