"""Recipes: YAML files of settings that ship with a stage, or lie anywhere."""

from pathlib import Path
from typing import Any

import yaml

from components.common.core.errors import UserError

COMPONENTS = Path(__file__).parents[2]


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
