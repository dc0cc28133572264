"""A JSON Lines file that is only ever appended to, so that an interrupted run goes on where it stopped."""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError


class Journal:
    """Entries that are on disk before `append` returns. Threads may append; one process owns the file.

    Args:
        path: the file; what an interrupted write left of its last line is dropped.

    Attributes:
        entries: all of them, oldest first.

    Raises:
        UserError: a line is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_entries(path) if path.exists() else []
        self._lock = threading.Lock()
        if path.exists():
            whole = path.read_bytes().rfind(b"\n") + 1
            with path.open("r+b") as file:
                file.truncate(whole)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            self.entries += entries


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Entries of the lines that were written whole.

    Raises:
        UserError: the file cannot be read, or a line of it is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number}: is damaged (not a JSON object); remove the line to have it made again")
        entries.append(entry)
    return entries


def digest(*parts: Any) -> str:
    """Identifies what an entry answers, by everything that decides on the answer; the parts must be JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
