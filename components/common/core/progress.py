"""Progress with rate and ETA: a bar on a terminal, a line every few seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class _Lines:
    """A stream that ends every refresh of a bar with a newline, so that line-buffered logs show it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.replace("\r", "").strip():
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """`tqdm` with defaults for both a terminal and a log file; takes tqdm's options (total, desc, unit)."""
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    # `mininterval` and `maxinterval` make a log line rare; the format has no bar because a log has no cursor.
    layout = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    lines: Any = _Lines(sys.stderr)
    return tqdm(iterable, file=lines, mininterval=SECONDS_BETWEEN_LINES, bar_format=layout, **options)
