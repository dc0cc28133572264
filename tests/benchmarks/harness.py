"""Interleaved timing of ours against a peer, and the table and file of results."""

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Result:
    """One comparison. `ratio` above 1 means that ours is that many times faster, or smaller; `limit_ratio` is ours against
    a limit of the hardware (1 is as fast as it can be)."""

    case: str
    setting: str
    peer: str
    peer_value: float
    ours_value: float
    unit: str
    ratio: float
    limit_ratio: float | None = None


@dataclass
class Measured:
    """Medians over repeats: seconds, and the most memory held beyond what was held before, in GiB."""

    seconds: float
    extra_gib: float


def compare(functions: list[Callable[[], object]], repeats: int, warm_up: bool = True) -> list[Measured]:
    """Measures each function; runs take turns, so that a busy moment hits all alike. A first round warms up, unless runs
    are so long that it makes no difference."""
    samples: list[list[Measured]] = [[] for _ in functions]
    for repeat in range(0 if warm_up else 1, repeats + 1):
        for function, taken in zip(functions, samples, strict=True):
            measured = _once(function)
            if repeat:
                taken.append(measured)
    return [
        Measured(statistics.median(m.seconds for m in taken), statistics.median(m.extra_gib for m in taken))
        for taken in samples
    ]


def _once(function: Callable[[], object]) -> Measured:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier run freed must not count as held before this one
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak (VmHWM)
    before = _status("VmRSS")
    start = time.perf_counter()
    function()
    return Measured(time.perf_counter() - start, _status("VmHWM") - before)


def _status(name: str) -> float:
    """A line of the kernel's account of this process, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def speed(case: str, setting: str, peer: str, theirs: Measured, ours: Measured, limit: float | None = None) -> Result:
    """A result in milliseconds; `limit` is the seconds that the hardware needs at least."""
    values = (1000 * theirs.seconds, 1000 * ours.seconds)
    return Result(case, setting, peer, *values, "ms", values[0] / values[1], limit and limit / ours.seconds)


def memory(case: str, setting: str, peer: str, theirs: Measured, ours: Measured) -> Result:
    """A result in GiB of extra peak memory."""
    ratio = theirs.extra_gib / max(ours.extra_gib, 1e-9)
    return Result(case, setting, peer, theirs.extra_gib, ours.extra_gib, "GiB", ratio)


def table(results: list[Result]) -> str:
    rows = [("case", "setting", "peer", "peer", "ours", "", "ratio", "of the limit")]
    for r in results:
        limit = "" if r.limit_ratio is None else f"{r.limit_ratio:.2f}"
        numbers = (f"{r.peer_value:.3g}", f"{r.ours_value:.3g}", r.unit, f"{r.ratio:.1f}x", limit)
        rows.append((r.case, r.setting, r.peer, *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def write(results: list[Result], path: Path) -> None:
    """Writes results as JSON; those of cases that were not measured this time stay."""
    measured = {result.case for result in results}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [row for row in before if row["case"] not in measured]
    path.write_text(json.dumps(kept + [asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
