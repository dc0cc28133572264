"""When the sampler works: `sync` before each step (Algorithm 1 to the letter), `overlap` while the step before trains.

With `overlap` the rows of step i + 1 are sampled during step i, by the weights that were served when step i began: one step
staler than `sync`, and nothing else changes. The weights that are served change between steps only, when nothing runs.
"""

import time
from collections.abc import Callable
from typing import Protocol

from components.common.generation.worker import Worker
from components.common.training.clock import Clock
from components.sapo.replay_buffer import Entry


class Schedule(Protocol):
    """Gives each step its fresh entries. The clock gets the sampler's work as `generate`, the learner's waiting as `wait`.

    Attributes:
        ahead: entries that are ready for the next step; between steps the only state.
    """

    ahead: list[Entry] | None

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
        clock: of the run.
    """

    def __init__(self, generate: Callable[[int, int], list[Entry]], clock: Clock) -> None:
        self.generate = generate
        self.clock = clock
        self.ahead: list[Entry] | None = None

    def entries(self, step: int) -> list[Entry]:
        start = time.perf_counter()
        entries = self.generate(step, step)
        seconds = time.perf_counter() - start

        # The learner waits for as long as the sampler works.
        self.clock.add_seconds("generate", seconds)
        self.clock.add_seconds("wait", seconds)
        return entries

    def settle(self) -> None:
        pass


class Overlap:
    """Samples for the next step in a thread of its own.

    Args:
        generate: as in `Sync`; runs in the thread.
        clock: of the run.
        last_step: no rows are sampled for steps after it.
        timeout: seconds that sampling for one step may take.
    """

    def __init__(
        self, generate: Callable[[int, int], list[Entry]], clock: Clock, last_step: int, timeout: float
    ) -> None:
        self.generate = generate
        self.clock = clock
        self.last_step = last_step
        self.worker = Worker("self-play", timeout)
        self.ahead: list[Entry] | None = None
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

        self.clock.add_seconds("generate", seconds)
        self.clock.add_seconds("wait", time.perf_counter() - start)
