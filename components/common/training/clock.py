"""The clock of a run: seconds by part, and counts such as tokens, over all its interruptions.

    clock = Clock()                              # first of all: importing torch counts too
    with clock.timed("train"):                   # adds to `seconds/train`
        ...
    clock.add("tokens/trained", 1024)
    clock.first_step()                           # `seconds/first_step`; later calls change nothing
    write(clock.state_dict())                    # in a checkpoint; the next process gives it to `load_state_dict`

No torch is imported here before counts of several processes have to be added up.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict


class ClockState(TypedDict):
    """What a checkpoint keeps of a clock, as plain JSON. Names are those of the summary."""

    run: float
    first_step: float | None
    seconds: dict[str, float]
    counts: dict[str, float]  # of all processes


class Clock:
    """Adds up what a run takes; time that it is stopped does not count.

    The run begins when the clock is made. Seconds are those of the first process, counts are summed over all of them.
    Several threads may use it, each for parts of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._run_before = 0.0  # seconds of earlier processes of this run
        self._first_step: float | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of blocks that have ended, by name
        self._running: dict[tuple[str, ...], float] = {}  # names of a block under way, and when it began
        self._counts: defaultdict[str, float] = defaultdict(float)  # of this process
        self._lap: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str, of: str | None = None) -> Iterator[None]:
        """Adds the time inside the block to `seconds/PART`, and to `OF/seconds/PART` if it is one round's of several.

        Raises:
            ValueError: the same part is timed already.
        """
        names = (f"seconds/{part}",) if of is None else (f"seconds/{part}", f"{of}/seconds/{part}")
        began = time.perf_counter()
        with self._lock:
            if names in self._running:
                raise ValueError(f"{names[-1]}: is timed already")
            self._running[names] = began
        try:
            yield
        finally:
            with self._lock:
                del self._running[names]
                seconds = time.perf_counter() - began
                for name in names:
                    self._seconds[name] += seconds

    def add_seconds(self, part: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere to `seconds/PART`."""
        with self._lock:
            self._seconds[f"seconds/{part}"] += seconds

    def add(self, name: str, count: float) -> None:
        """Adds to a count of this process, such as `tokens/trained`."""
        with self._lock:
            self._counts[name] += count

    def first_step(self) -> None:
        """Notes that the first optimizer step is done; the first call of a run counts."""
        if self._first_step is None:
            self._first_step = self.run_seconds()

    def run_seconds(self) -> float:
        """Seconds since the run began: imports, loading and everything else."""
        return self._run_before + time.perf_counter() - self._started

    def lap(self) -> dict[str, float]:
        """Seconds of this process by name since the last lap, or since the clock was made or loaded."""
        now = self._seconds_now()
        lap = {name: seconds - self._lap.get(name, 0.0) for name, seconds in now.items()}
        self._lap = now
        return lap

    def summary(self) -> dict[str, float]:
        """Seconds and counts by name, for the training log; every process must call this."""
        first_step = {} if self._first_step is None else {"seconds/first_step": self._first_step}
        return self._seconds_now() | first_step | self._counts_of_all()

    def state_dict(self) -> ClockState:
        """All of it, blocks that still run too, as JSON; every process must call this."""
        return {
            "run": self.run_seconds(),
            "first_step": self._first_step,
            "seconds": self._seconds_now(),
            "counts": self._counts_of_all(),
        }

    def load_state_dict(self, state: ClockState) -> None:
        """Goes on from what an earlier process of the run had saved. The time since this clock was made comes on top."""
        from components.common.training.distributed.processes import is_main_process

        with self._lock:
            self._run_before = state["run"]
            self._first_step = state["first_step"]
            self._seconds = defaultdict(float, state["seconds"])
            # They are sums over all processes: one goes on from them.
            self._counts = defaultdict(float, state["counts"] if is_main_process() else {})
        self._lap = self._seconds_now()

    def _seconds_now(self) -> dict[str, float]:
        """Seconds by name, up to now where a block still runs."""
        with self._lock:
            seconds = self._seconds.copy()
            running = dict(self._running)
        now = time.perf_counter()
        for names, began in running.items():
            for name in names:
                seconds[name] += now - began
        return dict(seconds)

    def _counts_of_all(self) -> dict[str, float]:
        from components.common.training.distributed.processes import gather

        total: defaultdict[str, float] = defaultdict(float)
        for counts in gather([dict(self._counts)]):
            for name, count in counts.items():
                total[name] += count
        return dict(total)
