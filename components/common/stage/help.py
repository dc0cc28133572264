"""The text of `--help`, made from the fields of a stage's config classes."""

import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

from components.common.stage.config import REQUIRED
from components.common.stage.recipes import recipe_names


def help_text(
    stage: str,
    description: str,
    config_classes: Sequence[type],
    fields: dict[str, "dataclasses.Field[Any]"],
    hints: dict[str, Any],
) -> str:
    """Own settings first, then those inherited from a library's arguments."""
    own: dict[str, list[str]] = {}
    inherited: dict[str, list[str]] = {}
    for config_class in config_classes:
        for field in sorted(dataclasses.fields(config_class), key=lambda f: _place(config_class, f.name)):
            if fields.get(field.name) is not field:
                continue
            owner = _owner(config_class, field.name)
            is_ours = owner.__module__.startswith("components.")
            text = _help_entry(field, hints[field.name], brief=not is_ours)
            (own if is_ours else inherited).setdefault(owner.__name__, []).append(text)
    lines = [
        description.strip(),
        "",
        f"usage: python -m components.{stage} [--config RECIPE] [--NAME VALUE ...]",
    ]
    lines += ["", "  --config RECIPE", "      A YAML file, or the name of a recipe that ships with the stage:"]
    lines += [f"      {', '.join(recipe_names(stage)) or '(none)'}."]
    lines += ["      A file may begin with `extends: RECIPE`, and then says only what differs."]
    lines += ["  --settings JSON", "      A mapping of settings laid over the recipe; flags win over it."]
    for title, entries in own.items():
        lines += ["", f"{title}:", *entries]
    for title, entries in inherited.items():
        lines += ["", f"Inherited from {title} (all accepted, in recipes too):", *entries]
    return "\n".join(lines)


def _owner(config_class: type, name: str) -> type:
    """The class that last (re)defined a field."""
    return next(c for c in config_class.__mro__ if name in inspect.get_annotations(c))


def _place(config_class: type, name: str) -> int:
    """Where a field stands in its owner, so that `--help` lists settings as the class does, overridden ones too."""
    return list(inspect.get_annotations(_owner(config_class, name))).index(name)


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(type_name(m) for m in typing.get_args(hint))
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
    return f"  --{field.name} {type_name(hint)}\n{body}"
