"""What a layout of rows is. The layouts there are stand in `formats.py`; a new one is an entry there."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from components.data.sources import Record, Source, read_records

Fields = dict[str, Any]
Notes = Counter[str]


class FilteredError(Exception):
    """A row that is whole, but that the settings do not want; the message is the reason."""


class Limits(Protocol):
    """The stage's settings that decide how a layout cuts a conversation into rows; lengths in characters."""

    min_response_characters: int
    max_response_characters: int | None
    max_prompt_characters: int | None
    max_turns: int | None


@dataclass(frozen=True)
class Layout:
    """A layout that conversations are published in.

    Attributes:
        fields: what a raw row has, in one line, with field names in backticks: for `--help`, the README and error messages.
        response: what becomes the response, in one line.
        converts: from a raw row, the limits and a counter of notes (what it changed, for the statistics) to the fields of
            rows, several where a conversation is cut. It raises ValueError with the reason where the row is broken, and
            FilteredError where the settings do not want it. Roles and contents are checked afterwards, by `check_row`.
        detects: whether a raw row has this layout; None where fields do not tell.
        package: URI of the one package whose rows have this layout.
        reads: from a source's files to raw rows.
    """

    fields: str
    response: str
    converts: Callable[[Fields, Limits, Notes], Iterator[Fields]]
    detects: Callable[[Fields], bool] | None = None
    package: str | None = None
    reads: Callable[[Source], Iterator[Record]] = read_records


def one_row(convert: Callable[[Fields, Notes], Fields]) -> Callable[[Fields, Limits, Notes], Iterator[Fields]]:
    """`converts` of a layout whose rows stay one row each, whatever the limits."""

    def converts(row: Fields, limits: Limits, notes: Notes) -> Iterator[Fields]:
        yield convert(row, notes)

    return converts
