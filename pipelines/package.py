"""Reads a compiled package: its tasks, its parameters, and whether the arguments of a run fit them. Needs no kfp."""

import difflib
import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.common.core.errors import UserError
from components.common.stage.recipes import find_recipe, read_yaml_mapping, recipe_names
from components.common.storage.locations import existing_path, scheme
from pipelines.methods import METHOD_LISTS

COMPILED = Path(__file__).parent / "compiled"
# KFP's parameter types: the Python types that fit, and what to call them in a message.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "STRING": ((str,), "text"),
    "STRUCT": ((dict,), "a mapping"),
    "LIST": ((list,), "a list"),
    "NUMBER_INTEGER": ((int,), "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": ((bool,), "true or false"),
}
# Recipes and settings that are called after their use and not after their stage.
_STAGES = {"sft_data": "data", "sapo_dpo": "sapo", "sapo_orpo": "sapo"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a pipeline, as the package declares it."""

    type: str
    description: str
    default: Any
    required: bool

    @property
    def type_name(self) -> str:
        return _TYPES[self.type][1]

    def fits(self, value: Any) -> bool:
        """Whether a value has the parameter's type; true and false are no numbers."""
        return isinstance(value, _TYPES[self.type][0]) and (self.type == "BOOLEAN" or not isinstance(value, bool))


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: KFP's pipeline spec and platform spec, and what a run needs of them.

    `tasks` maps the name of each task that runs something to its display name.
    """

    name: str
    spec: dict[str, Any]
    platform: dict[str, Any]
    parameters: dict[str, Parameter]
    tasks: dict[str, str]


def package_names() -> list[str]:
    return sorted(path.stem for path in COMPILED.glob("*.yaml"))


def read_package(name: str) -> Package:
    """Reads the committed package of that name, or a package given as a path.

    Raises:
        UserError: there is neither, or the file is not a compiled pipeline.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else COMPILED / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"no pipeline {name!r}; there are: {', '.join(package_names()) or 'none'}, or give a package's path"
        )
    try:
        spec, *platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
        parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return Package(
            name=spec["pipelineInfo"]["name"],
            spec=spec,
            platform=platform[0] if platform else {},
            parameters={name: _parameter(declared) for name, declared in parameters.items()},
            tasks=_tasks(spec),
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a compiled pipeline; make one with `python -m pipelines compile`") from error


def _parameter(declared: dict[str, Any]) -> Parameter:
    return Parameter(
        type=declared["parameterType"],
        description=" ".join(declared.get("description", "").split()),
        default=declared.get("defaultValue"),
        required=not declared.get("isOptional", False),
    )


def _tasks(spec: dict[str, Any]) -> dict[str, str]:
    """Display names of the tasks that have an executor, under the name KFP gives their component and folder."""
    components = spec["components"]
    tasks = {}
    for node in [spec["root"], *components.values()]:
        for task in node.get("dag", {}).get("tasks", {}).values():
            component = task["componentRef"]["name"]
            if "executorLabel" in components[component]:
                tasks[component.removeprefix("comp-")] = task["taskInfo"]["name"]
    return tasks


def run_arguments(package: Package, run_file: str | None, assignments: list[str]) -> dict[str, Any]:
    """The arguments of a run: a YAML file, with `key=value` assignments laid over it, checked against the package.

    `name.key=value` sets one key of a parameter that is a mapping.

    Raises:
        UserError: unknown parameter, wrong type, or a required one is missing.
    """
    arguments: dict[str, Any] = {}
    if run_file is not None:
        arguments = read_yaml_mapping(Path(run_file))
        _check(package, arguments, where=run_file)
    for assignment in assignments:
        _assign(package, arguments, assignment)
    for name, parameter in package.parameters.items():
        if parameter.required and name not in arguments:
            raise UserError(f"pipeline {package.name}: parameter {name!r} is required: {parameter.description}")
    return arguments


def check_recipes(package: Package, arguments: dict[str, Any]) -> None:
    """Refuses a run on this machine whose recipes are not there, before minutes of it have passed.

    Raises:
        UserError: naming the parameter or entry, and the recipes that the stage has.
    """
    wanted = []
    for name, parameter in package.parameters.items():
        value = arguments.get(name, parameter.default)
        if name.endswith("_recipe"):
            wanted.append((name, stage_of(name), value))
        elif name in METHOD_LISTS:
            wanted += [(f"{name}: {entry['name']}: recipe", entry["stage"], entry["recipe"]) for entry in value]
    for where, stage, recipe in wanted:
        try:
            find_recipe(stage, recipe)
        except UserError as error:
            close = difflib.get_close_matches(recipe, recipe_names(stage), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{where} = {recipe!r}{hint} {str(error).partition(': ')[2]}") from error


def check_keys(assignments: list[str]) -> None:
    """Refuses `--set STAGE_settings.KEY=...` with a key that the stage does not take, before minutes of a run have passed.

    The stage's own `--help` lists them, which takes seconds; where it cannot run, as without torch, the run will tell.

    Raises:
        UserError: naming the key, and the setting that is nearest.
    """
    for assignment in assignments:
        name, dot, key = assignment.partition("=")[0].partition(".")
        if not dot or not name.endswith("_settings"):
            continue
        stage = stage_of(name)
        known = _settings(stage)
        if known and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"--set {assignment}: unknown setting {key!r} of the {stage} stage; {hint}"
                f"`python -m components.{stage} --help` lists every setting"
            )


@functools.cache
def _settings(stage: str) -> list[str]:
    command = [sys.executable, "-m", f"components.{stage}", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return re.findall(r"^  --(\w+) ", shown.stdout, re.MULTILINE) if shown.returncode == 0 else []


def stage_of(parameter: str) -> str:
    """The stage that a parameter such as `sapo_dpo_settings` or `data_recipe` is for."""
    use = parameter.removesuffix("_recipe").removesuffix("_settings")
    return _STAGES.get(use, use)


def own_data(package: Package, place: str, command: str) -> list[str]:
    """Assignments of `run_arguments` that make a run read rows of the user's own, for SFT too.

    Args:
        place: a path, or a URI that the data stage reads.
        command: run, or submit, whose stages do not see this machine's files.

    Raises:
        UserError: there is no such file, or the run cannot see it.
    """
    if not scheme(place):
        if command == "submit":
            raise UserError(f"--data {place}: a cluster does not see this machine's files; give hf:// or s3://")
        place = str(existing_path(place, "data").resolve())
    settings = json.dumps({"source": place})
    names = [name.removesuffix("_recipe") for name in ("data_recipe", "sft_data_recipe") if name in package.parameters]
    if not names:
        raise UserError(f"--data {place}: pipeline {package.name} has no data_recipe")
    return [a for name in names for a in (f"{name}_recipe=own", f"{name}_settings={settings}")]


def _assign(package: Package, arguments: dict[str, Any], assignment: str) -> None:
    where = f"--set {assignment}"
    target, equals, text = assignment.partition("=")
    if not equals:
        raise UserError(f"{where}: must be key=value")
    name, _, key = target.partition(".")
    parameter = _declared(package, name, where)
    value = text if parameter.type == "STRING" and not key else _yaml_value(text, where)
    if key:
        outer = arguments.get(name, parameter.default)
        if not isinstance(outer, dict):
            raise UserError(f"{where}: {name} is {parameter.type_name}, it has no key {key!r}")
        value = {**outer, key: value}
    _check(package, {name: value}, where)
    arguments[name] = value


def _yaml_value(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is not valid YAML or JSON: {' '.join(str(error).split())}") from error


def _check(package: Package, arguments: dict[str, Any], where: str) -> None:
    for name, value in arguments.items():
        parameter = _declared(package, name, where)
        if not parameter.fits(value):
            raise UserError(f"{where}: {name} = {value!r} is {type(value).__name__}, must be {parameter.type_name}")
        _require_json(value, f"{where}: {name}")


def _require_json(value: Any, where: str) -> None:
    """A mapping travels as JSON; YAML has more: dates, infinity, keys that are no text."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} holds a value that JSON has not: {error}") from error
    if not same:
        raise UserError(f"{where} = {value!r} holds a key that is not text; put it in quotes")


def _declared(package: Package, name: str, where: str) -> Parameter:
    if name not in package.parameters:
        close = difflib.get_close_matches(str(name), package.parameters, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        allowed = ", ".join(package.parameters)
        raise UserError(f"{where}: unknown parameter {name!r} of pipeline {package.name}; {hint}It takes: {allowed}")
    return package.parameters[name]
