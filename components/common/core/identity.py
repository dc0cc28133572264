"""Whether two runs are the same: what their results depend on, and how that is compared.

Each setting has a role, given where it is declared. A run's identity is a record in JSON: the values of the settings that
count, as they are after defaults are filled in and machine-dependent ones settled, and a digest of each input. It lies in
checkpoints, in an output's manifest and in the lease of an output in a bucket. All are compared here, with one
wording for the refusal.
"""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from components.common.core.errors import UserError

SCHEMA = 1
ADVICE = "give the settings it was made with, another --output, or --overwrite to start anew"
LONGEST = 60  # characters of a value in a refusal


class Role(enum.StrEnum):
    """What the result of a run has to do with a setting."""

    # The result depends on it. What nobody has given a role has this one.
    RESULT = "result"
    # What is made, and what it is called; the rest of the result does not depend on it. A run that is under way may go on with
    # another value; a complete output of another value is another output.
    SCOPE = "scope"
    # It counts through something that it makes up with others, such as the pairs of a step, which several processes share.
    INDIRECT = "indirect"
    # The result does not depend on it: how fast, how often saved or logged, where it runs, how long to wait.
    OPERATION = "operation"
    # A location whose content the result depends on, wherever it lies.
    INPUT = "input"
    # Where results go.
    OUTPUT_DIRECTORY = "output directory"
    OUTPUT_FILE = "output file"


OUTPUTS = (Role.OUTPUT_DIRECTORY, Role.OUTPUT_FILE)


class Identity(TypedDict):
    """A run's record.

    Attributes:
        schema: of the record.
        settings: by name, those that the result depends on, and what indirect ones come to.
        contents: of each input, by name, what tells its content from another's; None where it was not looked at.
        scope: by name, settings that count once the output is complete.
        versions: of packages, by name; written down, never compared.
    """

    schema: int
    settings: dict[str, Any]
    contents: dict[str, Any]
    scope: dict[str, Any]
    versions: dict[str, str]


# ---- The roles of settings ----------------------------------------------------------------------------------------------


def roles_of(config_class: type) -> dict[str, Role]:
    """The role of each field of a config class.

    That of a field is given by `setting(role=...)`; else by the class's `inherited_roles`, a table for fields that a library
    has declared, or that have the name of one; else it is RESULT.
    """
    inherited: Mapping[str, Role] = getattr(config_class, "inherited_roles", {})
    return {
        field.name: field.metadata.get("role") or inherited.get(field.name, Role.RESULT)
        for field in dataclasses.fields(config_class)
        if field.init
    }


def values_of(config: Any, role: Role) -> dict[str, Any]:
    """The settings of a role, as plain JSON."""
    return {name: plain(getattr(config, name)) for name, mine in roles_of(type(config)).items() if mine == role}


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that equal ones compare as equal: lists for tuples, 2 for 2.0, text for the rest."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# ---- The record ---------------------------------------------------------------------------------------------------------


def identity_of(
    configs: Sequence[Any],
    contents: Mapping[str, Any],
    derived: Mapping[str, Any] | None = None,
    scope: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Identity:
    """The record of a run.

    Args:
        configs: its config objects, as they are built.
        contents: a digest for each input.
        derived: what indirect settings come to, by name; it takes the place of a setting of that name.
        scope: what counts once the output is complete, besides settings.
        versions: of packages.
    """
    settings: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for config in configs:
        settings |= values_of(config, Role.RESULT)
        asked |= values_of(config, Role.SCOPE)

    return {
        "schema": SCHEMA,
        "settings": settings | plain(derived or {}),
        "contents": plain(contents),
        "scope": asked | plain(scope or {}),
        "versions": dict(versions or {}),
    }


def digest_of_rows(rows: Iterable[Any], columns: Sequence[str] | None = None) -> str:
    """A digest of rows in their order; of some columns, or of all."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row[name] for name in columns or sorted(row)]).encode())
    return digest.hexdigest()


def digest(mine: Identity) -> str:
    """One sha256 of all that counts."""
    counted = [mine["schema"], mine["settings"], mine["contents"], mine["scope"]]
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


# ---- The comparison -----------------------------------------------------------------------------------------------------


def differences(saved: Identity, mine: Identity, complete: bool = False) -> list[str]:
    """What tells two runs apart, in words; nothing for the same run.

    Args:
        saved: the record that was found.
        mine: that of this run.
        complete: whether what was found is a complete output; then the scope counts too.
    """
    found = list(_changed(saved["settings"], mine["settings"]))
    if complete:
        found += _changed(saved["scope"], mine["scope"])
    before, now = saved["contents"], mine["contents"]
    known = [name for name in sorted({*before, *now}) if None not in (before.get(name, ""), now.get(name, ""))]
    return found + [f"other {name}" for name in known if before.get(name) != now.get(name)]


def refuse_other_run(place: Any, saved: Any, mine: Identity, complete: bool = False) -> None:
    """Raises UserError when a record is of another run, naming all that differs; arguments as of `differences`.

    Args:
        place: where the record was found, for the message.
        saved: what was found there, whatever it is.
    """
    if not _is_record(saved):
        raise UserError(f"{place}: has no record of its run that this version can compare; {ADVICE}")
    if differing := differences(saved, mine, complete):
        raise UserError(f"{place}: is of another run: {'; '.join(differing)}; {ADVICE}")


def _is_record(saved: Any) -> bool:
    """Whether it is a record of this schema."""
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA:
        return False
    return all(isinstance(saved.get(name), dict) for name in ("settings", "contents", "scope"))


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        was, now_is = (_short(values[name]) if name in values else "not known" for values in (before, now))
        if name not in before or name not in now or before[name] != now[name]:
            yield f"{name} was {was}, is {now_is}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
