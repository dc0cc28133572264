"""When the sampler works: `sync` before each step (Algorithm 1 to the letter), `overlap` while the step before trains.

With `overlap` the rows of step i + 1 are sampled during step i, by the weights that were served when step i began: one step
staler than `sync`, and nothing else changes. The weights that are served change between steps only, when nothing runs.
"""

import time
from collections.abc import Callable
from typing import Protocol

from components.common.generation.worker import Worker
from components.sapo.replay_buffer import Entry


class Schedule(Protocol):
    """Gives each step its fresh entries.

    Attributes:
        ahead: entries that are ready for the next step; between steps the only state.
        sampled: seconds that the sampler has worked.
        waited: seconds that the learner has waited for it.
    """

    ahead: list[Entry] | None
    sampled: float
    waited: float

    def entries(self, step: int) -> list[Entry]:
        """The fresh entries of a step."""
        ...

    def settle(self) -> None:
        """Waits until nothing runs; raises what the sampler raised."""
        ...


class Sync:
    """Samples when asked.

    Args:
        generate: (step whose rows are taken, optimizer steps done) -> their entries.
    """

    def __init__(self, generate: Callable[[int, int], list[Entry]]) -> None:
        self.generate = generate
        self.ahead: list[Entry] | None = None
        self.sampled = self.waited = 0.0

    def entries(self, step: int) -> list[Entry]:
        start = time.perf_counter()
        entries = self.generate(step, step)
        seconds = time.perf_counter() - start
        self.sampled, self.waited = self.sampled + seconds, self.waited + seconds
        return entries

    def settle(self) -> None:
        pass


class Overlap:
    """Samples for the next step in a thread of its own.

    Args:
        generate: as in `Sync`; runs in the thread.
        last_step: no rows are sampled for steps after it.
        timeout: seconds that sampling for one step may take.
    """

    def __init__(self, generate: Callable[[int, int], list[Entry]], last_step: int, timeout: float) -> None:
        self.generate = generate
        self.last_step = last_step
        self.worker = Worker("self-play", timeout)
        self.ahead: list[Entry] | None = None
        self.sampled = self.waited = 0.0
        self._running: Callable[[], tuple[list[Entry], float]] | None = None

    def entries(self, step: int) -> list[Entry]:
        """The entries sampled during the step before (now, for the first step); begins those of the next one."""
        if self.ahead is None:
            self._begin(step, step)
            self.settle()
        entries, self.ahead = self.ahead or [], None
        if step < self.last_step:
            self._begin(step + 1, step)
        return entries

    def _begin(self, step: int, steps_done: int) -> None:
        def timed() -> tuple[list[Entry], float]:
            start = time.perf_counter()
            entries = self.generate(step, steps_done)
            return entries, time.perf_counter() - start

        self._running = self.worker.submit(f"sampling for step {step + 1}", timed)

    def settle(self) -> None:
        if self._running is None:
            return
        start = time.perf_counter()
        wait, self._running = self._running, None
        self.ahead, seconds = wait()
        self.sampled += seconds
        self.waited += time.perf_counter() - start
