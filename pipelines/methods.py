"""What a run trains: a list of methods, each with the stage that trains it. Needs no kfp."""

import re
from typing import Any, NamedTuple

from components.common.core.errors import UserError

STAGES = ("sapo", "dpo", "orpo", "spin", "sft")
STARTS = ("base", "sft")
# `name` is what the report calls the method; every entry gives all of these, and may give `group`, for `--only`.
KEYS = {"name": str, "stage": str, "start": str, "recipe": str, "settings": dict}


class Method(NamedTuple):
    """One entry of the list."""

    name: str
    stage: str
    start: str
    recipe: str
    settings: dict[str, Any]
    group: str | None = None

    @property
    def use(self) -> str:
        """What the names of its parameters begin with, such as `train_sapo_dpo`."""
        return f"train_{re.sub(r'[^a-z0-9]+', '_', self.name.lower())}"

    @property
    def label(self) -> str:
        """What the names of its tasks end with, such as `sapo-dpo` in `train-sapo-dpo`."""
        return self.use.removeprefix("train_").replace("_", "-")

    def entry(self) -> dict[str, Any]:
        """As a run file has it."""
        return {key: value for key, value in self._asdict().items() if value is not None}


def read_methods(entries: list[Any], where: str) -> list[Method]:
    """The methods of a list.

    Raises:
        UserError: an entry lacks a key, has an unknown one or a wrong value, or two have the same name.
    """
    for number, entry in enumerate(entries, start=1):
        _check_entry(entry, f"{where}: entry {number}")
    methods = [Method(**entry) for entry in entries]
    for number, method in enumerate(methods):
        for other in methods[:number]:
            if method.name == other.name:
                raise UserError(f"{where}: two entries are named {method.name!r}; the report needs a name for each")
            if method.use == other.use:
                raise UserError(
                    f"{where}: {other.name!r} and {method.name!r} differ in no letter or digit; tasks need names that do"
                )
    return methods


def select(methods: list[Method], only: list[str], where: str) -> list[Method]:
    """The methods whose name or group is listed, in their own order.

    Raises:
        UserError: something listed fits no method.
    """
    known = {method.name for method in methods} | {method.group for method in methods if method.group is not None}
    if missing := [name for name in only if name not in known]:
        listed = ", ".join(sorted(known)) or "none"
        raise UserError(f"--only {missing[0]}: {where} has no method or group of this name; it has {listed}")
    return [method for method in methods if {method.name, method.group} & set(only)]


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
    # It is part of the names of tasks, parameters and folders; `base` and `sft` are in every report.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry["name"]) or entry["name"] in STARTS:
        raise UserError(f"{where}: name = {entry['name']!r} must be letters, digits, '.', '_', '-', not base or sft")
