"""Wall-clock times that outlive an interruption: what a run took, not counting the time it was stopped."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.common.training.distributed.processes import is_main_process
from components.spin.files import write_json


class Clock:
    """Adds up seconds by name, in a JSON file.

    Args:
        path: the file; read if it is there.
        started: `time.perf_counter()` at the start of the process's work; "run" counts from there.
    """

    def __init__(self, path: Path, started: float) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._running = {"run": started}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Counts the time inside the block, up to the last `save` if the process is killed."""
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            self.save()
            del self._running[name]

    def mark(self, name: str) -> None:
        """Notes how long the run has worked so far, the first time that it is called with a name."""
        if name not in self.seconds:
            self._count()
            self.seconds[name] = self.seconds["run"]
            self.save()

    def save(self) -> None:
        """Writes the times so far, of blocks that still run too; the first process's count."""
        self._count()
        if is_main_process():
            write_json(self.path, self.seconds)

    def _count(self) -> None:
        now = time.perf_counter()
        for name, since in self._running.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + now - since
            self._running[name] = now
