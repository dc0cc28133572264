"""The command line of every stage, made from its config dataclasses.

Flags, YAML keys and dataclass fields have the same names. What wins, from the strongest:
flags (`--beta 0.1`), `--settings '{"beta": 0.1}'` (how a pipeline passes a mapping), `--config recipe.yaml`, defaults.
A wrong name, type or value ends the run with one line on stderr and exit code 2, before anything is loaded.
"""

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import pydantic
import yaml

from components.common.core.errors import UserError
from components.common.core.identity import Role, roles_of
from components.common.stage import session
from components.common.stage.config import REQUIRED, Resumption, StageConfig
from components.common.stage.help import help_text, type_name
from components.common.stage.inputs import without_buckets
from components.common.stage.recipes import recipe_layers


class ConfigParser:
    """Builds one instance of each config class from flags, `--settings`, `--config` and defaults.

    Args:
        stage: name of the stage, such as "sapo"; recipes are looked up in `components/<stage>/recipes`.
        config_classes: dataclasses whose fields, taken together, are the stage's settings.
        hidden: inherited fields that the stage sets itself and the user must not.
    """

    def __init__(self, stage: str, config_classes: Sequence[type], hidden: Sequence[str] = ()) -> None:
        self.stage = stage
        self.config_classes = list(config_classes)
        self.hints: dict[str, Any] = {}
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        self.roles: dict[str, Role] = {}
        # Returns when every process of the launch has called it; whoever starts several puts theirs here.
        self.wait_for_others: Callable[[], None] = lambda: None
        for config_class in config_classes:
            hints, roles = typing.get_type_hints(config_class), roles_of(config_class)
            for field in dataclasses.fields(config_class):
                if field.init and field.name not in hidden:
                    self.fields[field.name] = field
                    self.hints[field.name] = hints[field.name]
                    self.roles[field.name] = roles[field.name]

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Returns the config objects in the order of the classes.

        Raises:
            UserError: naming the setting, the value and what is allowed.
        """
        values = self._values(argv)
        for config_class in self.config_classes:
            if issubclass(config_class, StageConfig):
                values = config_class.inputs_named(values)
        if (running := session.current()) is not None and "output" in self.fields:
            configs = self._build_all(without_buckets(values))  # wrong settings are told before anything is fetched
            values = self._defaults() | values
            values = running.prepare(values, configs, self.roles, self.resumption(), self.wait_for_others)
        return self._build_all(values)

    def resumption(self) -> Resumption | None:
        """What the stage's config classes say of how it goes on; the last one that says it counts."""
        saying = (c for c in reversed(self.config_classes) if hasattr(c, "resumption"))
        return next((config_class.resumption for config_class in saying), None)

    def settings(self, argv: Sequence[str]) -> dict[str, Any]:
        """Every setting by name, given or by default, before any config object is built; raises as `parse` does."""
        return self._defaults() | self._values(argv)

    def _defaults(self) -> dict[str, Any]:
        return {name: field.default for name, field in self.fields.items() if field.default is not REQUIRED}

    def _values(self, argv: Sequence[str]) -> dict[str, Any]:
        """The settings that were given."""
        try:
            namespace, rest = self._argument_parser().parse_known_args(argv)
        except argparse.ArgumentError as error:  # the only one: a flag without its value
            raise UserError(self._without_value(str(error.argument_name))) from None
        if rest:
            name = rest[0].partition("=")[0]  # without its value, which may be a secret
            suggestion = self._suggestion(name.lstrip("-") if name.startswith("--") else "")
            raise UserError(f"unknown argument {name!r}{suggestion}")
        given = vars(namespace)
        config_file, settings = given.pop("config"), given.pop("settings")
        values: dict[str, Any] = {}
        if config_file:
            for path, recipe in recipe_layers(self.stage, config_file):
                values |= self._checked(recipe, where=str(path))
        if settings and settings.strip():
            values |= self._checked(_json_mapping(settings), where="--settings")
        values |= self._checked({k: self._flag_value(k, v) for k, v in given.items()}, where="command line")
        self._refuse_missing(values)
        return values

    def _without_value(self, flag: str) -> str:
        name = flag.lstrip("-")
        if name not in self.fields:  # --config, --settings
            return f"{flag}: needs a value; `python -m components.{self.stage} --help` tells which"
        return f"{flag}: needs a value ({type_name(self.hints[name])}): {self.fields[name].metadata.get('help', '')}"

    def _build_all(self, values: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(self._build(config_class, values) for config_class in self.config_classes)

    def _argument_parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--config")
        parser.add_argument("--settings")
        for name, hint in self.hints.items():
            optional_value = {"nargs": "?", "const": "true"} if bool in _members(hint) else {}
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **optional_value)  # type: ignore[arg-type]
        return parser

    def _flag_value(self, name: str, text: str) -> Any:
        """Text of a flag as a value: JSON / YAML unless the setting is a string."""
        members = _members(self.hints[name])
        if type(None) in members and text.lower() in ("none", "null", ""):
            return None
        if not text.strip() and str not in members:
            raise UserError(self._without_value(f"--{name}"))
        structured = set(members) - {str, type(None)} and text.startswith(("{", "["))
        if str in members and not structured:
            return text
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        takes_lists = {typing.get_origin(member) for member in set(members) - {type(None)}} <= {list, tuple}
        return [value] if takes_lists and isinstance(value, str | float | int) else value  # `--names a`: a list of one

    def _checked(self, values: dict[str, Any], where: str) -> dict[str, Any]:
        checked = {}
        for name, value in values.items():
            if name not in self.fields:
                raise UserError(f"{where}: unknown setting {name!r}{self._suggestion(name)}")
            checked[name] = self._checked_value(name, value, where)
        return checked

    def _checked_value(self, name: str, value: Any, where: str) -> Any:
        adapter = pydantic.TypeAdapter(self.hints[name], config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        try:
            return adapter.validate_python(value)
        except pydantic.ValidationError as error:
            allowed = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
            raise UserError(f"{where}: {name} = {value!r} is not valid: {allowed}") from None

    def _suggestion(self, name: str) -> str:
        close = difflib.get_close_matches(name, [*self.fields, "config", "settings"], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        return f"{hint} `python -m components.{self.stage} --help` lists every setting"

    def _refuse_missing(self, values: dict[str, Any]) -> None:
        for name, field in self.fields.items():
            no_default = field.default is REQUIRED and field.default_factory is REQUIRED
            if no_default and name not in values:
                raise UserError(f"--{name} is required: {field.metadata.get('help', '')}")

    def _build(self, config_class: type, values: dict[str, Any]) -> Any:
        names = {f.name for f in dataclasses.fields(config_class)}
        try:
            return config_class(**{k: v for k, v in values.items() if k in names})
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error

    def help(self, description: str) -> str:
        """The text of `--help`."""
        return help_text(self.stage, description, self.config_classes, self.fields, self.hints)


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, with Literal choices reduced to their type."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(choice) for choice in typing.get_args(hint)})
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(hint) for m in _members(member))
    return (hint,)


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--settings: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--settings: must be a JSON object, is {type(content).__name__}")
    return content
