"""The command line of every stage, made from its config dataclasses.

Flags, YAML keys and dataclass fields have the same names. What wins, from the strongest:
flags (`--beta 0.1`), `--settings '{"beta": 0.1}'` (how a pipeline passes a mapping), `--config recipe.yaml`, defaults.
A wrong name, type or value ends the run with one line on stderr and exit code 2, before anything is loaded.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import logging
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from components.common.errors import UserError
from components.common.storage import session

REQUIRED: Any = dataclasses.MISSING


def setting(default: Any, help: str, paper: str | None = None) -> Any:
    """A config field: its default (`REQUIRED` for none), what it means with its unit, and the paper's value."""
    metadata = {"help": help, "paper": paper}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


@dataclasses.dataclass(kw_only=True)
class StageConfig:
    """Settings that every stage has."""

    output: str = setting(REQUIRED, "Directory to write to, or s3://; made if missing, refused if it holds files.")
    overwrite: bool = setting(False, "Empty the output directory first instead of refusing it.")
    dry_run: bool = setting(False, "Check inputs and settings, print the plan, write nothing.")
    executor_input: str | None = setting(None, "KFP's executor input (JSON, `{{$}}` in a component); set by KFP.")
    mirror_bandwidth: float | None = setting(
        None, "Output in s3://: most MB a second for checkpoints sent while training goes on; none: no limit."
    )
    mirror_keep: int = setting(2, "Output in s3://: complete checkpoints kept in the bucket while the run lasts.")
    grace_seconds: float = setting(20.0, "Output in s3://: seconds for sending the last checkpoint after a SIGTERM.")
    lease_seconds: float = setting(60.0, "Output in s3://: a process that is silent this long (s) has lost the output.")


Config = TypeVar("Config")


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
        for config_class in config_classes:
            hints = typing.get_type_hints(config_class)
            for field in dataclasses.fields(config_class):
                if field.init and field.name not in hidden:
                    self.fields[field.name] = field
                    self.hints[field.name] = hints[field.name]

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Returns the config objects in the order of the classes.

        Raises:
            UserError: naming the setting, the value and what is allowed.
        """
        values = self._values(argv)
        if (running := session.current()) is not None and "output" in self.fields:
            self._build_all(session.without_buckets(values))  # wrong settings are told before anything is fetched
            values = running.prepare(values, self.fields)
        return self._build_all(values)

    def settings(self, argv: Sequence[str]) -> dict[str, Any]:
        """Every setting by name, given or by default, before any config object is built; raises as `parse` does."""
        defaults = {name: field.default for name, field in self.fields.items() if field.default is not REQUIRED}
        return defaults | self._values(argv)

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
            path = find_recipe(self.stage, config_file)
            values |= self._checked(read_yaml_mapping(path), where=str(path))
        if settings and settings.strip():
            values |= self._checked(_json_mapping(settings), where="--settings")
        values |= self._checked({k: self._flag_value(k, v) for k, v in given.items()}, where="command line")
        self._refuse_missing(values)
        return values

    def _without_value(self, flag: str) -> str:
        name = flag.lstrip("-")
        if name not in self.fields:  # --config, --settings
            return f"{flag}: needs a value; `python -m components.{self.stage} --help` tells which"
        return f"{flag}: needs a value ({_type_name(self.hints[name])}): {self.fields[name].metadata.get('help', '')}"

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
        """The text of `--help`: own settings first, then those inherited from a library's arguments."""
        own: dict[str, list[str]] = {}
        inherited: dict[str, list[str]] = {}
        for config_class in self.config_classes:
            for field in sorted(dataclasses.fields(config_class), key=lambda f: _place(config_class, f.name)):
                if self.fields.get(field.name) is not field:
                    continue
                owner = _owner(config_class, field.name)
                is_ours = owner.__module__.startswith("components.")
                text = _help_entry(field, self.hints[field.name], brief=not is_ours)
                (own if is_ours else inherited).setdefault(owner.__name__, []).append(text)
        lines = [
            description.strip(),
            "",
            f"usage: python -m components.{self.stage} [--config RECIPE] [--NAME VALUE ...]",
        ]
        lines += ["", "  --config RECIPE", "      A YAML file, or the name of a recipe that ships with the stage:"]
        lines += [f"      {', '.join(recipe_names(self.stage)) or '(none)'}."]
        lines += ["  --settings JSON", "      A mapping of settings laid over the recipe; flags win over it."]
        for title, entries in own.items():
            lines += ["", f"{title}:", *entries]
        for title, entries in inherited.items():
            lines += ["", f"Inherited from {title} (all accepted, in recipes too):", *entries]
        return "\n".join(lines)


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, with Literal choices reduced to their type."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(choice) for choice in typing.get_args(hint)})
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(m for member in typing.get_args(hint) for m in _members(member))
    return (hint,)


def _owner(config_class: type, name: str) -> type:
    """The class that last (re)defined a field."""
    return next(c for c in config_class.__mro__ if name in inspect.get_annotations(c))


def _place(config_class: type, name: str) -> int:
    """Where a field stands in its owner, so that `--help` lists settings as the class does, overridden ones too."""
    return list(inspect.get_annotations(_owner(config_class, name))).index(name)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(_type_name(m) for m in typing.get_args(hint))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _help_entry(field: "dataclasses.Field[Any]", hint: Any, brief: bool) -> str:
    if field.default is not REQUIRED:
        default = f"default: {field.default}"
    else:
        default = "default: empty" if field.default_factory is not REQUIRED else "required"
    notes = [default] + ([f"paper: {field.metadata['paper']}"] if field.metadata.get("paper") else [])
    text = " ".join(str(field.metadata.get("help") or "").split())
    if brief:
        text = text.partition(". ")[0].rstrip(".")
        text = text if len(text) <= 100 else text[:97] + "..."
    body = textwrap.fill(f"{text} [{'; '.join(notes)}]", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  --{field.name} {_type_name(hint)}\n{body}"


def recipe_directory(stage: str) -> Path:
    return Path(__file__).parent.parent / stage / "recipes"


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


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--settings: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--settings: must be a JSON object, is {type(content).__name__}")
    return content


def prepare_output(directory: str, overwrite: bool) -> Path:
    """Makes the output directory, or empties it when told to.

    Raises:
        UserError: it is a file, cannot be made, or holds files and `overwrite` is off.
    """
    path = check_output(directory, overwrite)
    try:
        if path.exists() and overwrite:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory}: cannot be made: {error.strerror}") from error
    return path


def check_output(directory: str, overwrite: bool) -> Path:
    """`prepare_output` without touching the disk, for `--dry_run`."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {directory}: is a file; give a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--output {directory}: is not empty; give another directory, or --overwrite to replace it")
    return path


def run_stage(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a stage's main with logging on, and turns user errors into one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    stage = Path(inspect.getfile(main)).parent.name
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {stage} | %(message)s", datefmt="%H:%M:%S"
    )
    for chatty in (
        "httpx",
        "httpx2",
        "urllib3",
        "fsspec",
        "datasets",
        "filelock",
        "matplotlib",
        "botocore",
        "boto3",
        "s3transfer",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Warns of a kernel that it lacks on a CPU whenever a library imports it, also where nothing is in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with session.session(stage):
            main(sys.argv[1:])
    except BrokenPipeError:  # `--help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        print(f"{stage}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        print(f"{stage}: error: the disk is full: {error}; free some space and run the command again", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{stage}: interrupted", file=sys.stderr)
        sys.exit(130)
