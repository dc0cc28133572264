"""One thread that owns an engine: calls run in turn, and a caller can go on meanwhile, or stop waiting for one that hangs."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class SamplerTimeout(RuntimeError):  # noqa: N818  (the name states what happened, as TimeoutError's does)
    """A call of the engine took too long; the sampler can no longer be used."""


class Worker:
    """A thread that runs calls in turn.

    Args:
        name: of the engine, for messages.
        timeout: seconds a caller waits.

    Attributes:
        broken: the call that took too long, if one did; no more are taken then.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name = name
        self.timeout = timeout
        self.broken: str | None = None
        self.stopped = False
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        # A daemon: a thread that hangs must not keep the process alive.
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    def submit(self, call: str, function: Callable[[], T]) -> Callable[[], T]:
        """Begins the function; what is returned waits for its result.

        The function's exception is raised to who waits, with the traceback it had in the thread.

        Raises:
            RuntimeError: an earlier call took too long, or the worker was stopped.
            SamplerTimeout: from waiting; names the call.
        """
        if self.broken or self.stopped:
            raise RuntimeError(f"the {self.name} sampler takes no calls: {self.broken or 'it is closed'}")
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((function, answer))

        def wait() -> T:
            try:
                result, error = answer.get(timeout=self.timeout)
            except queue.Empty:
                self.broken = f"{call} took longer than {self.timeout:g} s"
                raise SamplerTimeout(f"{self.name} {self.broken}") from None
            if error is not None:
                raise error
            return result

        return wait

    def call(self, call: str, function: Callable[[], T]) -> T:
        """`submit`, and wait."""
        return self.submit(call, function)()

    def stop(self) -> None:
        self.stopped = True
        self._calls.put(None)

    def _loop(self) -> None:
        while (item := self._calls.get()) is not None:
            function, answer = item
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))
