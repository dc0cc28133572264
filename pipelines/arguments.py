"""The arguments of a run: `--set` and `--data`, held against what a package declares. Needs no kfp."""

import difflib
import functools
import json
import re
import subprocess
import sys
from typing import Any

import yaml

from components.common.core.errors import UserError
from components.common.stage.recipes import find_recipe, recipe_names
from components.common.storage.locations import existing_path, scheme
from pipelines.package import Package
from pipelines.parameters import Parameter, check_value, unknown


def run_arguments(package: Package, assignments: list[str]) -> dict[str, Any]:
    """What `key=value` assignments give a run beside its package's defaults.

    `name.key=value` sets one key of a parameter that is a mapping.

    Raises:
        UserError: unknown parameter, wrong type, or a required one is missing.
    """
    arguments: dict[str, Any] = {}
    for assignment in assignments:
        _assign(package, arguments, assignment)
    for name, parameter in package.parameters.items():
        if parameter.required and name not in arguments:
            raise UserError(f"pipeline {package.name}: parameter {name!r} is required: {parameter.description}")
    return arguments


def check_recipes(package: Package, arguments: dict[str, Any]) -> None:
    """Refuses a run on this machine whose recipes are not there, before minutes of it have passed.

    Raises:
        UserError: naming the parameter, and the recipes that the stage has.
    """
    for name, stage in package.stages.items():
        if not name.endswith("_recipe"):
            continue
        recipe = arguments.get(name, package.parameters[name].default)
        try:
            find_recipe(stage, recipe)
        except UserError as error:
            close = difflib.get_close_matches(recipe, recipe_names(stage), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{name} = {recipe!r}{hint} {str(error).partition(': ')[2]}") from error


def check_keys(package: Package, assignments: list[str]) -> None:
    """Refuses `--set NAME_settings.KEY=...` with a key that the stage does not take, before minutes of a run have passed.

    The stage's own `--help` lists them, which takes seconds; where it cannot run, as without torch, the run will tell.

    Raises:
        UserError: naming the key, and the setting that is nearest.
    """
    for assignment in assignments:
        name, dot, key = assignment.partition("=")[0].partition(".")
        stage = package.stages.get(name)
        if not dot or stage is None or not name.endswith("_settings"):
            continue
        known = settings_of(stage)
        if known and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"--set {assignment}: unknown setting {key!r} of the {stage} stage; {hint}"
                f"`python -m components.{stage} --help` lists every setting"
            )


@functools.cache
def settings_of(stage: str) -> list[str]:
    """The settings that a stage takes, by its `--help`; none where that cannot run here."""
    command = [sys.executable, "-m", f"components.{stage}", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return re.findall(r"^  --(\w+) ", shown.stdout, re.MULTILINE) if shown.returncode == 0 else []


def own_data(package: Package, place: str, command: str) -> list[str]:
    """Assignments of `run_arguments` that make a run read rows of the user's own, for SFT too.

    Args:
        package: what runs.
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

    value = text if parameter.type == "STRING" and not key else _value(text, where)
    if key:
        outer = arguments.get(name, parameter.default)
        if not isinstance(outer, dict):
            raise UserError(f"{where}: {name} is {parameter.type_name}, it has no key {key!r}")
        value = {**outer, key: value}

    check_value(name, parameter, value, where)
    arguments[name] = value


def _value(text: str, where: str) -> Any:
    """JSON first: YAML takes 1e-05 for text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is not valid YAML or JSON: {' '.join(str(error).split())}") from error


def _declared(package: Package, name: str, where: str) -> Parameter:
    if name not in package.parameters:
        raise unknown(name, list(package.parameters), where, f"pipeline {package.name}")
    return package.parameters[name]
