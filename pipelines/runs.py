"""Run files: what a run does, with which recipes, settings and machines. Needs no kfp.

extends: tiny             another run, by name or path; what follows says only what differs
package: true             compile it to pipelines/compiled/, for the Kubeflow UI
title, description        what the UI shows; these three are not taken over from the run that is extended
stages: [...]             which of `OPTIONAL` to run; all if left out
methods: [...]            what to train (`methods.py`)
data_recipe: ...          every parameter of the pipeline (`parameters.py`)
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError
from components.common.stage.recipes import EXTENDS, merged, read_layers
from pipelines.methods import Method, read_methods, select
from pipelines.parameters import USES, Parameter, Use, check_value, parameters_of, unknown

RUNS = Path(__file__).parent / "runs"
OPTIONAL = ("sft_data", "sft", "evaluation", "report")  # data and model are in every run
_ABOUT = {"package": bool, "title": str, "description": str}
_EVERY = parameters_of(USES, evaluates=True, reports=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, read and checked.

    `values` has the default of every parameter in `parameters`. `name` is a name that KFP takes, made of the file's.
    """

    name: str
    title: str
    description: str
    package: bool
    stages: tuple[str, ...]
    methods: tuple[Method, ...]
    values: dict[str, Any]

    @functools.cached_property
    def uses(self) -> dict[str, Use]:
        """The stages that have a recipe, by what their parameters are called; methods in their order."""
        names = ["data", *(name for name in ("sft_data",) if name in self.stages), "model"]
        names += [name for name in ("sft", "evaluation") if name in self.stages]
        uses = {name: USES[name] for name in names}
        for method in self.methods:
            recipe = f"Recipe of {method.name}, for the stage {method.stage}."
            uses[method.use] = Use(method.stage, recipe, f"Settings of {method.name}, laid over its recipe.")
        return uses

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters of its pipeline; their defaults are this run."""
        declared = parameters_of(self.uses, "evaluation" in self.stages, "report" in self.stages)
        values = self.values | {
            f"{method.use}_{key}": getattr(method, key) for method in self.methods for key in ("recipe", "settings")
        }
        return {
            name: dataclasses.replace(parameter, default=values.get(name, parameter.default), required=False)
            for name, parameter in declared.items()
        }

    def only(self, names: list[str]) -> "Run":
        """The same run with some of its methods, by name or group; UserError for a name that it has not."""
        return dataclasses.replace(self, methods=tuple(select(list(self.methods), names, f"run {self.name}")))

    def as_file(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The content of a run file that repeats this run with these arguments, and extends nothing."""
        values = {name: arguments.get(name, parameter.default) for name, parameter in self.parameters.items()}
        methods = []
        for method in self.methods:
            given = {key: values.pop(f"{method.use}_{key}") for key in ("recipe", "settings")}
            methods.append(method._replace(**given).entry())
        about = {"title": self.title, "description": self.description}
        return {**about, "stages": list(self.stages), "methods": methods, **values}


def run_names() -> list[str]:
    return sorted(path.stem for path in RUNS.glob("*.yaml"))


def find_run(name: str) -> Path:
    """A run file given as a path, or by the name of one in `pipelines/runs`.

    Raises:
        UserError: there is neither; lists those that exist.
    """
    for path in (Path(name), RUNS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UserError(
        f"no run {name!r}; there are: {', '.join(run_names())}, or give the path of a run file or a package"
    )


def read_run(path: Path) -> Run:
    """Reads a run file with the files that it extends, and checks it.

    Raises:
        UserError: a file is missing, a key unknown, a value of a wrong type, or a stage needs another that is left out.
    """
    layers = read_layers(path, RUNS, "there is no such run")
    for layer in layers:
        for key in layer.settings:
            if key not in (*_ABOUT, "stages", "methods", *_EVERY):
                raise unknown(key, (EXTENDS, *_ABOUT, "stages", "methods", *_EVERY), str(layer.path), "a run file")

    about = layers[-1].settings
    for key, kind in _ABOUT.items():
        if not isinstance(about.get(key, kind()), kind):
            raise UserError(f"{path}: {key} = {about[key]!r} must be {'true or false' if kind is bool else 'text'}")

    content = merged(layers)
    values = {name: value for name, value in content.items() if name in _EVERY}
    for name, value in values.items():
        check_value(name, _EVERY[name], value, str(path))
    stages = _list(content, "stages", list(OPTIONAL), path)
    methods = read_methods(_list(content, "methods", [], path), f"{path}: methods")
    _check_stages(stages, methods, path)

    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "run"
    run = Run(
        name=name,
        title=about.get("title", name),
        description=" ".join(about.get("description", "").split()),
        package=about.get("package", False),
        stages=tuple(stage for stage in OPTIONAL if stage in stages),
        methods=tuple(methods),
        values={},
    )
    missing = [f"{use}_recipe" for use in run.uses if use in USES and f"{use}_recipe" not in values]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; set it, or begin with `{EXTENDS}: tiny`")
    return dataclasses.replace(run, values={key: value for key, value in values.items() if key in run.parameters})


def _list(content: dict[str, Any], key: str, default: list[Any], path: Path) -> list[Any]:
    value = content.get(key, default)
    if not isinstance(value, list):
        raise UserError(f"{path}: {key} = {value!r} is {type(value).__name__}, must be a list")
    return value


def _check_stages(stages: list[Any], methods: list[Method], path: Path) -> None:
    if strange := [stage for stage in stages if stage not in OPTIONAL]:
        raise UserError(f"{path}: stages: {strange[0]!r} must be one of {', '.join(OPTIONAL)}")
    for stage, needed in (("sft_data", "sft"), ("report", "evaluation")):
        if stage in stages and needed not in stages:
            raise UserError(f"{path}: stages: {stage} needs {needed}; add it, or take {stage} out")
    if "sft" not in stages:
        for method in methods:
            if method.start == "sft":
                raise UserError(f"{path}: {method.name} starts from sft, which is not in stages; add it")
