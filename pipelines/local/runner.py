"""Runs a compiled package on this machine, without a cluster: every task is a process of the current environment
(`processes.py`), or a container (`containers.py`).

kfp.local walks the DAG, hands outputs over and reads the executor outputs, as far as `kfp_patches.py` lets it; kfp's own
messages go to `logs/kfp.log`. Tasks run one after the other, in the order of `Package.tasks`.

    <directory>/arguments.yaml                   what the run was given beside the package's defaults
    <directory>/outputs/<task>/<artifact>        what each task wrote
    <directory>/logs/<task>.log                  what each task said
"""

import contextlib
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

import yaml

from pipelines.duration import duration
from pipelines.local.kfp_patches import Patch, applied, local_patches, run_package
from pipelines.package import Package

GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL; a training stage finishes its step and saves
_POLL_SECONDS = 0.05
# What makes stages fast on a CPU; a variable that is already set wins. glibc gives big blocks back to the system as soon
# as they are freed, and the page faults of taking them again cost a quarter of a training step (measured: 40 s -> 30 s).
# OpenMP threads that spin while waiting slow a stage down many times when anything else needs a core; passive ones do not.
STAGE_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}


class RunError(Exception):
    """A run failed. The message names the task, how it ended, and where its log is."""


class CannotStartError(Exception):
    """A task could not be started. Carries the message for its log and the exit code that stands for it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Execution(Protocol):
    """One task that was started: a process or a container."""

    def lines(self) -> Iterable[str]:
        """What it says, until it ends; read in a thread of its own."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def terminate(self) -> None:
        """Asks it to end."""

    def kill(self) -> None:
        """Ends it, and whatever it started; nothing happens where that is gone already."""

    def close(self) -> None:
        """Removes what is left of it."""


class Executor(Protocol):
    """How tasks are executed: which runner kfp.local gets, and what replaces the part of kfp that starts a task."""

    def runner(self, run: "LocalRun", arguments: dict[str, Any]) -> Any:
        """One of kfp.local's runners."""

    def patch(self, run: "LocalRun") -> Patch:
        """What replaces the part of kfp that starts a task; it calls `run.run_task`."""


@dataclass
class TaskRun:
    """What became of one task: state "running", "done", "failed" or "interrupted"; seconds of wall clock."""

    name: str
    title: str
    log: Path
    state: str = "running"
    seconds: float = 0.0
    exit_code: int | None = None


class LocalRun:
    """One run of a package.

    Args:
        package: what to run.
        directory: an empty directory for outputs and logs.
        executor: how tasks run.
        grace_seconds: how long an interrupted stage may take to end by itself.
    """

    def __init__(
        self,
        package: Package,
        directory: Path,
        executor: Executor,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self.executor = executor
        self.package = package
        self.directory = directory
        self.grace_seconds = grace_seconds
        self.tasks: list[TaskRun] = []
        self._next = ""  # name of the task that kfp.local is about to run
        self._console: TextIO = sys.stdout
        self._started = time.monotonic()
        self._signals = 0

    def execute(self, arguments: dict[str, Any]) -> None:
        """Runs all tasks, streaming what they say.

        Raises:
            UserError: the installed kfp is not the one whose internals this module knows.
            RunError: a task failed.
            KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; no process of the run is left.
        """
        logs = self.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True)
        (self.directory / "arguments.yaml").write_text(text, encoding="utf-8")
        with (
            (logs / "kfp.log").open("w", encoding="utf-8", buffering=1) as kfp_log,
            contextlib.redirect_stdout(kfp_log),
            warnings.catch_warnings(action="ignore"),
            self._signals_counted(),
            applied([*local_patches(list(self.package.tasks), self._starts), self.executor.patch(self)]),
        ):
            self._walk(arguments, kfp_log)
        if self._signals:
            raise KeyboardInterrupt

    def _starts(self, task: str) -> None:
        self._next = task

    def _walk(self, arguments: dict[str, Any], kfp_log: IO[str]) -> None:
        runner = self.executor.runner(self, arguments)
        try:
            run_package(self.package.spec, arguments, runner, str(self.directory))
        except Exception as error:  # kfp raises all sorts; which task failed is known here
            traceback.print_exc(file=kfp_log)
            raise RunError(self._failure(error)) from error

    def _failure(self, error: Exception) -> str:
        failed = next((task for task in reversed(self.tasks) if task.state == "failed"), None)
        if failed is None or failed.exit_code is None:
            return f"kfp.local could not go on: {error}; its log: {self.directory / 'logs' / 'kfp.log'}"
        code = failed.exit_code
        how = f"failed with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        said = [line for line in failed.log.read_text(encoding="utf-8").splitlines() if ": error: " in line]
        return f"task {failed.name} ({failed.title}) {how}; its log: {failed.log}" + "".join(
            f"\n{s}" for s in said[-1:]
        )

    def raise_if_interrupted(self) -> None:
        if self._signals:
            raise KeyboardInterrupt

    def run_task(self, start: Callable[[], Execution]) -> int:
        """Starts one task, runs it to its end and returns its exit code."""
        self.raise_if_interrupted()
        if any(task.state == "failed" for task in self.tasks):
            raise RunError("a task failed: nothing else starts")
        name = self._next
        task = TaskRun(name, self.package.tasks.get(name, name), self.directory / "logs" / f"{name}.log")
        self.tasks.append(task)
        place = f"[{len({t.name for t in self.tasks})}/{len(self.package.tasks)}]"
        elapsed = time.monotonic() - self._started
        self.say(f"{place} {task.name}: {task.title} (after {duration(elapsed)}, log {task.log})")
        started = time.monotonic()
        try:
            task.exit_code = self._run_to_the_end(task, start)
        finally:
            task.seconds = time.monotonic() - started
            task.state = "interrupted" if self._signals else "failed" if task.exit_code else "done"
        self.raise_if_interrupted()
        return task.exit_code

    def _run_to_the_end(self, task: TaskRun, start: Callable[[], Execution]) -> int:
        try:
            execution = start()
        except CannotStartError as error:
            task.log.write_text(f"{error}\n", encoding="utf-8")
            return error.exit_code
        reader = threading.Thread(target=self._stream, args=(task, execution.lines()), daemon=True)
        reader.start()
        exit_code = self._wait(task, execution)
        execution.kill()  # what a stage's process left behind, as the end of a container would
        reader.join(timeout=5)
        execution.close()
        return exit_code

    def _wait(self, task: TaskRun, execution: Execution) -> int:
        deadline = None
        while (exit_code := execution.poll()) is None:
            if self._signals and deadline is None:
                deadline = time.monotonic() + self.grace_seconds
                self.say(f"stopping {task.name}; Ctrl-C again, or {duration(self.grace_seconds)}, kills it")
                execution.terminate()
            elif deadline is not None and (self._signals > 1 or time.monotonic() > deadline):
                execution.kill()
            time.sleep(_POLL_SECONDS)
        return exit_code

    def _stream(self, task: TaskRun, lines: Iterable[str]) -> None:
        with task.log.open("a", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self.say(f"[{task.name}] {line.rstrip()}")

    def say(self, text: str) -> None:
        """Writes a line to the standard output as it was before kfp.local's own was led into a file."""
        with contextlib.suppress(BrokenPipeError):  # `| head` ends the reader, not the run
            self._console.write(text + "\n")
            self._console.flush()

    @contextlib.contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Counts signals instead of raising, so that none can hit between starting a process and knowing it."""

        def count(*_: object) -> None:
            self._signals += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def table(self) -> str:
        """The tasks with state, duration and log, those that never started last."""
        rows = [(task.name, task.title, task.state, duration(task.seconds), str(task.log)) for task in self.tasks]
        ran = {task.name for task in self.tasks}
        rows += [(name, title, "not run", "", "") for name, title in self.package.tasks.items() if name not in ran]
        rows.insert(0, ("task", "", "state", "time", "log"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def times(self) -> str:
        """One line: how long the run and each task took."""
        each = ", ".join(f"{task.name} {duration(task.seconds)}" for task in self.tasks)
        return f"{len(self.tasks)} tasks in {duration(time.monotonic() - self._started)}: {each}"
