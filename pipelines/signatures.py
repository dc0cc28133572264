"""Functions whose inputs KFP reads: it takes names, types and defaults from a signature, and meanings from a docstring.

How many inputs the report has, or a pipeline, depends on what the run trains. So their signatures are made here.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Field(NamedTuple):
    """One input or output: its annotation, what it means, and its default."""

    annotation: Any
    meaning: str
    default: Any = inspect.Parameter.empty


def with_signature(
    function: Callable[..., Any],
    name: str,
    about: str,
    inputs: Mapping[str, Field],
    outputs: Mapping[str, Field] | None = None,
) -> Callable[..., Any]:
    """A function that KFP sees with these inputs and outputs, and that hands them over by name.

    Args:
        function: takes what KFP passes, as keyword arguments.
        name: KFP names a component after it, with hyphens for underscores.
        about: what the component or pipeline does.
        inputs: by name, in order.
        outputs: of a component, each an `Output[...]`.
    """
    outputs = outputs or {}
    fields = {**inputs, **outputs}

    def declared(*given: Any) -> Any:
        return function(**dict(zip(fields, given, strict=True)))

    declared.__name__ = name
    declared.__doc__ = _docstring(about, inputs, outputs)
    # Keyword-only, because defaults may then stand in any order.
    declared.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=field.annotation, default=field.default)
            for key, field in fields.items()
        ]
    )
    return declared


def _docstring(about: str, inputs: Mapping[str, Field], outputs: Mapping[str, Field]) -> str:
    text = about
    for title, fields in (("Args", inputs), ("Returns", outputs)):
        if fields:
            text += f"\n\n{title}:\n" + "\n".join(f"    {name}: {field.meaning}" for name, field in fields.items())
    return text
