"""From raw rows to usable ones: checks, filters, ids, duplicates, and the book of what was left out."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.common.core.conversations import Message, Row, check_row
from components.common.core.errors import UserError
from components.data.config import DataConfig
from components.data.formats import LAYOUTS, PACKAGES, detect_format, known_layouts
from components.data.layout import FilteredError, Notes
from components.data.sources import Record, Source, read_records, where

ROWS_TO_DETECT_FROM = 100


@dataclass(frozen=True)
class Example:
    """A usable row, the conversation it must not be separated from, and a digest of its text."""

    row: Row
    conversation: str
    digest: str


@dataclass(frozen=True)
class Rejection:
    """A row that was left out: `broken` by its source, or `filtered` by the settings. `group` is what it counts as."""

    file: str
    line: int
    id: str
    kind: Literal["broken", "filtered"]
    reason: str
    group: str


@dataclass
class Collection:
    """What was read so far, over one or two sources."""

    config: DataConfig
    rejections: list[Rejection] = field(default_factory=list)
    notes: Notes = field(default_factory=Counter)
    held_out: set[str] = field(default_factory=set)
    _ids: set[str] = field(default_factory=set)
    _uses: Counter[str] = field(default_factory=Counter)
    _id_of_digest: dict[str, str] = field(default_factory=dict)

    def read(self, records: Iterable[Record], format: str) -> list[Example]:
        """Usable rows of a source; the others are added to `rejections`."""
        return [example for record in records for example in self._read_record(record, format)]

    def _read_record(self, record: Record, format: str) -> Iterator[Example]:
        if record.value is None:
            self._reject(record, "broken", record.problem)
            return
        try:
            for fields in LAYOUTS[format].converts(record.value, self.config, self.notes):
                yield from self._read_fields(record, fields)
        except ValueError as error:
            self._reject(record, "broken", str(error))
        except FilteredError as error:
            self._reject(record, "filtered", str(error))

    def _read_fields(self, record: Record, fields: dict[str, Any]) -> Iterator[Example]:
        identity = fields.get("id") or _identity(record)
        try:
            row = check_row({**fields, "id": identity})
            _check_unicode(row)
            if reason := filter_reason(row, self.config):
                raise FilteredError(reason)
        except (ValueError, FilteredError) as error:
            self._reject(record, "filtered" if isinstance(error, FilteredError) else "broken", str(error), identity)
            return
        # Rows with the same prompt belong to one conversation, whatever their ids: a split by id could leak.
        conversation = fields.get("conversation") or _digest(row["prompt"])
        digest = _digest([row["prompt"], row["chosen"]])
        if digest in self._id_of_digest:
            self._reject(record, "filtered", f"duplicate of {self._id_of_digest[digest]}", identity, group="duplicate")
        elif conversation in self.held_out:
            self._reject(record, "filtered", "prompt is in the held-out source", identity)
        else:
            row["id"] = self._id_of_digest[digest] = self._unique(identity)
            yield Example(row, conversation, digest)

    def _unique(self, identity: str) -> str:
        unique = identity
        while unique in self._ids:
            self._uses[identity] += 1
            unique = f"{identity}-{self._uses[identity] + 1}"
        self._ids.add(unique)
        return unique

    def _reject(
        self, record: Record, kind: Literal["broken", "filtered"], reason: str, identity: str = "", group: str = ""
    ) -> None:
        identity = identity or _identity(record)
        self.rejections.append(Rejection(record.file, record.line, identity, kind, reason, group or reason))

    def rejected(self, kind: str) -> list[Rejection]:
        return [rejection for rejection in self.rejections if rejection.kind == kind]


def _identity(record: Record) -> str:
    """The row's own id, or one made of its file and line."""
    for name in ("id", "prompt_id", "conversation_id"):
        own = (record.value or {}).get(name)
        if isinstance(own, str | int) and str(own).strip():
            return str(own).strip()
    return f"{Path(record.file).stem}-{record.line}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def _check_unicode(row: Row) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text is not valid Unicode (half of a surrogate pair)") from error


def characters(messages: list[Message]) -> int:
    """Length of all messages together."""
    return sum(len(message["content"]) for message in messages)


def turns(prompt: list[Message]) -> int:
    """Messages of a prompt without the system message."""
    return len(prompt) - (prompt[0]["role"] == "system")


def filter_reason(row: Row, config: DataConfig) -> str | None:
    """Why the settings do not want a row, or None."""
    sizes = {
        "response_characters": characters(row["chosen"]),
        "prompt_characters": characters(row["prompt"]),
        "turns": turns(row["prompt"]),
    }
    for what, size in sizes.items():
        least, most = getattr(config, f"min_{what}"), getattr(config, f"max_{what}")
        if size < least:
            return f"below min_{what} = {least}"
        if most is not None and size > most:
            return f"above max_{what} = {most}"
    return None


def records_and_format(source: Source, format: str) -> tuple[Iterator[Record], str]:
    """The raw rows of a source and their layout, detected where it is "auto".

    Raises:
        UserError: the layout cannot be told.
    """
    format = PACKAGES.get(source.uri, format)
    if format != "auto":
        return LAYOUTS[format].reads(source), format
    records = read_records(source)
    first = list(itertools.islice(records, ROWS_TO_DETECT_FROM))
    rows = [record.value for record in first if record.value is not None]
    if not first:
        raise UserError(f"{source.uri}: no usable row: it is empty")
    if not rows:
        raise UserError(f"{source.uri}: no usable row: {where(first[0].file, first[0].line)}: {first[0].problem}")
    if not (detected := detect_format(rows)):
        raise UserError(
            f"{source.uri}: its layout is none that can be read; the first row has the fields "
            f"{', '.join(map(repr, rows[0])) or '(none)'}; known are {known_layouts(told_by_fields=True)}"
        )
    return itertools.chain(first, records), detected
