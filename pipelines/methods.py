"""What a comparison trains: a list of methods, each with the stage that trains it. Needs no kfp."""

import re
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError
from components.common.stage.recipes import read_yaml_mapping

STAGES = ("sapo", "dpo", "orpo", "spin", "sft")
STARTS = ("base", "sft")
# `name` is what the report calls the method; every entry gives all of these, and may give `group`, for `--only`.
KEYS = {"name": str, "stage": str, "start": str, "recipe": str, "settings": dict}
METHOD_LISTS = {"methods", "variants"}  # the parameters of pipelines that loop over such a list


def methods_of_run(name: str, parameter: str) -> list[dict[str, Any]]:
    """The list in `runs/NAME.yaml`: the default of a pipeline is its smallest run."""
    return read_yaml_mapping(Path(__file__).parent / "runs" / f"{name}.yaml")[parameter]


def check_methods(methods: list[Any], where: str) -> None:
    """Refuses a list that would fail in the middle of a run.

    Raises:
        UserError: an entry lacks a key, has an unknown one or a wrong value, or two have the same name.
    """
    for number, entry in enumerate(methods, start=1):
        _check_entry(entry, f"{where}: entry {number}")
    names = [entry["name"] for entry in methods]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: two entries are named {repeated[0]!r}; the report needs a name for each")


def select(methods: list[dict[str, Any]], only: list[str], where: str) -> list[dict[str, Any]]:
    """The entries whose name or group is listed, in their own order.

    Raises:
        UserError: something listed fits no entry.
    """
    known = {entry["name"] for entry in methods} | {entry["group"] for entry in methods if "group" in entry}
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]}: {where} has no entry or group of this name; it has {_listed(known)}")
    return [entry for entry in methods if {entry["name"], entry.get("group")} & set(only)]


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, must be a mapping with the keys {', '.join(KEYS)}")
    if unknown := [key for key in entry if key not in (*KEYS, "group")]:
        raise UserError(f"{where} has the unknown key {unknown[0]!r}; it takes {', '.join(KEYS)} and group")
    for key, kind in KEYS.items():
        if key not in entry:
            raise UserError(f"{where} has no {key!r}; it needs {', '.join(KEYS)}")
        if not isinstance(entry[key], kind):
            raise UserError(f"{where}: {key} = {entry[key]!r} must be {'a mapping' if kind is dict else 'text'}")
    for key, allowed in (("stage", STAGES), ("start", STARTS)):
        if entry[key] not in allowed:
            raise UserError(f"{where}: {key} = {entry[key]!r}, must be one of {', '.join(allowed)}")
    # Locally it is part of a folder's name; `base` and `sft` are in every report.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry["name"]) or entry["name"] in STARTS:
        raise UserError(f"{where}: name = {entry['name']!r} must be letters, digits, '.', '_', '-', not base or sft")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
