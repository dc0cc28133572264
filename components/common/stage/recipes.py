"""Recipes: YAML files of settings that ship with a stage, or lie anywhere.

A recipe may begin with `extends: OTHER` and then says only what differs. OTHER is the name of a recipe of the same stage, or a
path beside the file. A setting replaces the one it extends, also where it is a list or a mapping.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from components.common.core.errors import UserError

COMPONENTS = Path(__file__).parents[2]
EXTENDS = "extends"


class Layer(NamedTuple):
    """What one file says itself: where it is, and its settings without `extends`."""

    path: Path
    settings: dict[str, Any]


def recipe_directory(stage: str) -> Path:
    return COMPONENTS / stage / "recipes"


def recipe_names(stage: str) -> list[str]:
    return sorted(path.stem for path in recipe_directory(stage).glob("*.yaml"))


def find_recipe(stage: str, name: str) -> Path:
    """A recipe given as a path, or by the name of one that ships with the stage.

    Raises:
        UserError: there is neither; lists the recipes that exist.
    """
    shipped = recipe_directory(stage) / f"{name}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    raise UserError(f"--config {name}: no such file, and {stage} has no such recipe ({', '.join(recipe_names(stage))})")


def read_recipe(stage: str, name: str) -> dict[str, Any]:
    """The settings of a recipe, with those of the recipes that it extends below them.

    Raises:
        UserError: one of them is missing or not a mapping of settings, or they extend each other in a circle.
    """
    return merged(recipe_layers(stage, name))


def recipe_layers(stage: str, name: str) -> list[Layer]:
    """The files that a recipe is made of, the one that extends nothing first; raises as `read_recipe` does."""
    return read_layers(find_recipe(stage, name), recipe_directory(stage), f"{stage} has no such recipe")


def read_layers(path: Path, directory: Path, unknown: str) -> list[Layer]:
    """A YAML file and the files that it extends, the one that extends nothing first.

    Args:
        path: the file.
        directory: where a name after `extends` is looked up, besides the file's own folder.
        unknown: what to say of a name that is nowhere, before those that exist.

    Raises:
        UserError: a file is missing or not a mapping, or they extend each other in a circle.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    following: Path | None = path

    while following is not None:
        if following.resolve() in seen:
            circle = " -> ".join(file.name for file in [*seen[seen.index(following.resolve()) :], following])
            raise UserError(f"{path}: {EXTENDS} goes in a circle: {circle}")
        seen.append(following.resolve())

        settings = read_yaml_mapping(following)
        base = settings.pop(EXTENDS, None)
        layers.insert(0, Layer(following, settings))
        following = None if base is None else _extended(base, following, directory, unknown)
    return layers


def merged(layers: list[Layer]) -> dict[str, Any]:
    """The settings of all layers; a later one wins."""
    settings: dict[str, Any] = {}
    for layer in layers:
        settings |= layer.settings
    return settings


def _extended(base: Any, path: Path, directory: Path, unknown: str) -> Path:
    """The file that the one at `path` extends."""
    if isinstance(base, str):
        for file in (directory / f"{base}.yaml", path.parent / f"{base}.yaml", path.parent / base):
            if file.is_file():
                return file
    known = ", ".join(sorted(file.stem for file in directory.glob("*.yaml")))
    raise UserError(f"{path}: {EXTENDS} = {base!r}: no such file, and {unknown} ({known})")


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file that must be a mapping of names to values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of setting: value, is {type(content).__name__}")
    return content
