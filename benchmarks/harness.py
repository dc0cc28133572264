"""Interleaved timing of ours against a peer, and the table and file of results."""

import contextlib
import ctypes
import gc
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from components.common.kernels.cpu.malloc import keep_freed_memory


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


@dataclass(frozen=True)
class Side:
    """What one side runs, built in a process of its own.

    Attributes:
        build: returns the function to measure, given `arguments`.
        ours: whether it runs as our stages do, keeping freed memory; peers run as their users run them.
    """

    build: Callable[..., Callable[[], object]]
    arguments: tuple[Any, ...]
    ours: bool


def compare(functions: list[Callable[[], object]], repeats: int) -> list[Measured]:
    """Measures each function in this process; runs take turns, so that a busy moment hits all alike. A first round warms up."""
    samples: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                taken.append(time.perf_counter() - start)
    return [Measured(statistics.median(taken), 0.0) for taken in samples]


def compare_apart(sides: list[Side], repeats: int) -> list[Measured]:
    """The same with a process for each side, so that neither lives on memory that the other has warmed.

    The first round, from a heap without free memory, tells the memory; the rounds after it the seconds.
    """
    # Each process is a fork of one that has done nothing but import, which takes longer than many a case.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers"])
    pipes, processes = [], []
    for side in sides:
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(side, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a process that dies is an EOFError here
        pipes.append(mine)
        mine.recv()  # one is built after the other
    try:
        rounds = [[_ask(pipe) for pipe in pipes] for _ in range(repeats + 1)]
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            with contextlib.suppress(BrokenPipeError):  # it has died
                pipe.send(False)
            process.join()
    columns = zip(*rounds, strict=True)
    return [Measured(statistics.median(m.seconds for m in taken[1:]), taken[0].extra_gib) for taken in columns]


def _ask(pipe: Connection) -> Measured:
    pipe.send(True)
    return pipe.recv()


def quiet() -> None:
    """No warnings of peers about how they are called, and no bars but our own."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()


def _serve(side: Side, pipe: Connection) -> None:
    quiet()
    if side.ours:
        keep_freed_memory()
    function = side.build(*side.arguments)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pipe.send(True)
    while pipe.recv():
        pipe.send(_once(function))


def _once(function: Callable[[], object]) -> Measured:
    gc.collect()
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
