"""Interleaved timing of ours against a peer, and the table and file of results."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Result:
    """One comparison. `ratio` above 1 means that ours is that many times faster; `limit_ratio` is ours against a limit of
    the hardware (1 is as fast as it can be)."""

    case: str
    setting: str
    peer: str
    peer_value: float
    ours_value: float
    unit: str
    ratio: float
    limit_ratio: float | None = None


def compare(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each function; runs take turns, so that a busy moment hits all alike."""
    samples: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in samples]


def table(results: list[Result]) -> str:
    rows = [("case", "setting", "peer", "peer", "ours", "", "ratio", "of the limit")]
    for r in results:
        limit = "" if r.limit_ratio is None else f"{r.limit_ratio:.2f}"
        numbers = (f"{r.peer_value:.3g}", f"{r.ours_value:.3g}", r.unit, f"{r.ratio:.1f}x", limit)
        rows.append((r.case, r.setting, r.peer, *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def write(results: list[Result], path: Path) -> None:
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
