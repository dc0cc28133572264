"""Runs a compiled package on this machine, without a cluster: every task is a process of the current environment, or a
container (`containers.py`).

kfp.local walks the DAG, hands outputs over and reads the executor outputs. Its SubprocessRunner refuses container
components, replaces the text "python3" in every argument, and mends neither null nor whole numbers in mappings; a loop
over an empty list leaves nothing to collect, and after a failure the other tasks go on. So `_hooked` replaces private
names of kfp while a run lasts. `KFP_VERSION` is the release in which they are what this module expects. kfp's own
messages go to `logs/kfp.log`.

    <directory>/arguments.yaml                   what the run was given; works as a run file again
    <directory>/outputs/<task>/<artifact>        what each task wrote
    <directory>/logs/<task>.log                  what each task said

A task in a loop is called after the item: `train-dpo` for the item named dpo.
"""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

import kfp
import yaml
from google.protobuf import json_format, struct_pb2
from kfp import local
from kfp.compiler import pipeline_spec_builder
from kfp.dsl.constants import WORKSPACE_MOUNT_PATH
from kfp.local import (
    executor_input_utils,
    graph_utils,
    pipeline_orchestrator,
    status,
    subprocess_task_handler,
    task_dispatcher,
)
from kfp.local.orchestrator import enhanced_dag_orchestrator, task_spec_utils
from kfp.pipeline_spec import pipeline_spec_pb2

from components.common.core.errors import UserError
from pipelines.package import Package

KFP_VERSION = "2.17.0"
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

    def hook(self, run: "LocalRun") -> tuple[Any, str, Any]:
        """Module, name in it, and replacement, which calls `run.run_task`."""


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
        grace_seconds: how long an interrupted stage may take to end by itself.
        executor: how tasks run; as processes if left out.
    """

    def __init__(
        self,
        package: Package,
        directory: Path,
        grace_seconds: float = GRACE_SECONDS,
        executor: Executor | None = None,
    ) -> None:
        self.executor = executor or Processes()
        self.package = package
        self.directory = directory
        self.grace_seconds = grace_seconds
        self.tasks: list[TaskRun] = []
        self.plan = dict(package.tasks)  # title of each task, with those of loops once the arguments are known
        self.current = threading.local()  # .name of the task that kfp.local is about to run; a loop has its own thread
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
        _require_kfp_version()
        self.plan = planned_tasks(self.package, arguments)
        logs = self.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True)
        (self.directory / "arguments.yaml").write_text(text, encoding="utf-8")
        with (
            (logs / "kfp.log").open("w", encoding="utf-8", buffering=1) as kfp_log,
            contextlib.redirect_stdout(kfp_log),
            warnings.catch_warnings(action="ignore"),
            self._signals_counted(),
            _hooked(self),
        ):
            self._walk(arguments, kfp_log)
        if self._signals:
            raise KeyboardInterrupt

    def _walk(self, arguments: dict[str, Any], kfp_log: IO[str]) -> None:
        local.init(self.executor.runner(self, arguments), pipeline_root=str(self.directory))
        try:
            # Not `load_component_from_file`: it takes component `comp-sapo` for the whole of a pipeline named sapo.
            spec = json_format.ParseDict(_without_retries(self.package.spec), pipeline_spec_pb2.PipelineSpec())
            pipeline_orchestrator.run_local_pipeline(spec, arguments)
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
        name = self.current.name
        task = TaskRun(name, self.plan.get(name, name), self.directory / "logs" / f"{name}.log")
        self.tasks.append(task)
        place = f"[{len({t.name for t in self.tasks})}/{len(self.plan)}]"
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
        rows += [(name, title, "not run", "", "") for name, title in self.plan.items() if name not in ran]
        rows.insert(0, ("task", "", "state", "time", "log"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def times(self) -> str:
        """One line: how long the run and each task took."""
        each = ", ".join(f"{task.name} {duration(task.seconds)}" for task in self.tasks)
        return f"{len(self.tasks)} tasks in {duration(time.monotonic() - self._started)}: {each}"


def planned_tasks(package: Package, arguments: dict[str, Any]) -> dict[str, str]:
    """Names and titles of the tasks of a run, those of a loop once for each item of its list.

    Only loops over a parameter of the pipeline are known beforehand; any other task of a loop is counted once.
    """
    components = package.spec["components"]
    tasks = dict(package.tasks)
    for task in package.spec["root"]["dag"]["tasks"].values():
        source = task.get("parameterIterator", {}).get("items", {}).get("inputParameter", "")
        looped_over = source.removeprefix("pipelinechannel--")
        if looped_over not in package.parameters:
            continue
        inner = components[task["componentRef"]["name"]]["dag"]["tasks"].values()
        in_order = sorted(inner, key=lambda entry: len(entry.get("dependentTasks", [])))
        names = [entry["componentRef"]["name"].removeprefix("comp-") for entry in in_order]
        titles = {name: tasks.pop(name) for name in names if name in tasks}
        for index, item in enumerate(arguments.get(looped_over, package.parameters[looped_over].default) or []):
            label = item_label(item, index)
            tasks |= {loop_task_name(name, label): f"{title} of {label}" for name, title in titles.items()}
    return tasks


def item_label(item: Any, index: int) -> str:
    """What tells an item of a loop from the others: its `name`, else its place."""
    name = item.get("name") if isinstance(item, dict) else None
    return name if isinstance(name, str) else str(index)


def loop_task_name(component: str, label: str) -> str:
    """`train` and `dpo` give `train-dpo`.

    The number that KFP puts after a component used twice is left out, so a loop must not use a component twice itself.
    """
    return f"{re.sub(r'-[0-9]+$', '', component)}-{label}"


class Processes:
    """Runs every task as a process of this environment."""

    def runner(self, run: LocalRun, arguments: dict[str, Any]) -> local.SubprocessRunner:
        return local.SubprocessRunner(use_venv=False)

    def hook(self, run: LocalRun) -> tuple[Any, str, Any]:
        return subprocess_task_handler, "SubprocessTaskHandler", functools.partial(_TaskHandler, run)


class _TaskHandler:
    """Stands in for kfp.local's SubprocessTaskHandler, with the arguments and the `run` that kfp.local uses."""

    def __init__(self, run: LocalRun, full_command: list[str], env_vars: dict[str, str] | None, **_: Any) -> None:
        self._run, self._command, self._env_vars = run, full_command, env_vars or {}

    def run(self) -> status.Status:
        succeeded = self._run.run_task(lambda: _Process(self._command, self._env_vars)) == 0
        return status.Status.SUCCESS if succeeded else status.Status.FAILURE


class _Process:
    """One task as a process.

    Raises:
        CannotStartError: there is no such command.
    """

    def __init__(self, command: list[str], env_vars: dict[str, str]) -> None:
        # Caches in a run's volume are for a cluster: here every run has the caches of its user.
        here = {name: value for name, value in env_vars.items() if not value.startswith(WORKSPACE_MOUNT_PATH)}
        # Its own session: a terminal's Ctrl-C reaches only us, and the whole tree of a stage can be stopped at once.
        try:
            self._process = subprocess.Popen(
                [sys.executable if command[0] == "python3" else command[0], *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env={**STAGE_ENVIRONMENT, **os.environ, "PYTHONUNBUFFERED": "1", **here},
                start_new_session=True,
            )
        except OSError as error:  # 127 is what a shell says of a command it cannot find
            raise CannotStartError(f"cannot start {command[0]}: {error.strerror}", 127) from error

    def lines(self) -> Iterable[str]:
        return self._process.stdout or ()

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        _signal_group(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        _signal_group(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """A process leaves nothing behind."""


def _naming_hooks(run: LocalRun) -> list[tuple[Any, str, Any]]:
    """Names of tasks and of their folders: kfp.local would make `for-loop-1-iteration-0/train` of `train-dpo`."""
    run_single_task = task_dispatcher.run_single_task_implementation
    make_iteration = task_spec_utils.create_parameter_loop_iteration_task_spec
    labels: dict[tuple[str, int], str] = {}  # of the items of each loop

    def name_iteration(task_spec: Any, item: Any, loop: str) -> Any:
        index = sum(known == loop for known, _ in labels)
        labels[loop, index] = item_label(item, index)
        return make_iteration(task_spec, item, loop)

    def run_named_task(**arguments: Any) -> Any:
        run.current.name = arguments["component_name"].removeprefix("comp-")
        for loop, index in re.findall(r"([^/]+)-iteration-([0-9]+)", arguments["pipeline_resource_name"]):
            run.current.name = loop_task_name(run.current.name, labels[loop, int(index)])
        return run_single_task(**{**arguments, "pipeline_resource_name": "outputs"})

    return [
        (task_dispatcher, "run_single_task_implementation", run_named_task),
        (task_spec_utils, "create_parameter_loop_iteration_task_spec", name_iteration),
        (executor_input_utils, "get_local_pipeline_resource_name", lambda _: "outputs"),
        (executor_input_utils, "get_local_task_resource_name", lambda _: run.current.name),
    ]


def _loop_or_nothing_collected() -> Callable[..., bool]:
    """kfp.local's loop; where it had no items, its outputs are empty lists rather than missing."""
    run_loop = enhanced_dag_orchestrator._run_parallel_for_task

    def run_and_collect(**arguments: Any) -> bool:
        failed = run_loop(**arguments)
        outputs = arguments["components"][arguments["task_spec"].component_ref.name].output_definitions
        for key in () if failed else (*outputs.artifacts, *outputs.parameters):
            try:
                arguments["io_store"].get_task_output(arguments["task_name"], key)
            except ValueError:
                arguments["io_store"].put_task_output(arguments["task_name"], key, [])
        return failed

    return run_and_collect


@contextlib.contextmanager
def _hooked(run: LocalRun) -> Iterator[None]:
    """Gives kfp.local what it lacks: container components as processes, and mappings as a cluster passes them on."""
    to_protobuf = pipeline_spec_builder.to_protobuf_value
    to_dict = executor_input_utils.executor_input_to_dict
    sort_tasks = graph_utils.topological_sort_tasks

    def to_protobuf_or_null(value: Any) -> struct_pb2.Value:
        return struct_pb2.Value(null_value="NULL_VALUE") if value is None else to_protobuf(value)

    hooks = [
        *_naming_hooks(run),
        (enhanced_dag_orchestrator, "_run_parallel_for_task", _loop_or_nothing_collected()),
        run.executor.hook(run),
        (executor_input_utils, "executor_input_to_dict", lambda *args, **kw: _whole_numbers(to_dict(*args, **kw))),
        (pipeline_spec_builder, "to_protobuf_value", to_protobuf_or_null),
        # The order of a protobuf map differs between processes; with names sorted, every run takes the same order.
        (graph_utils, "topological_sort_tasks", lambda tasks: sort_tasks(dict(sorted(tasks.items())))),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in hooks]
    try:
        for module, name, replacement in hooks:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _without_retries(value: Any) -> Any:
    """A specification whose tasks are tried once: retries, with minutes between them, are for a cluster's nodes."""
    if isinstance(value, dict):
        return {key: _without_retries(inner) for key, inner in value.items() if key != "retryPolicy"}
    return [_without_retries(inner) for inner in value] if isinstance(value, list) else value


def _whole_numbers(value: Any) -> Any:
    """3.0 as 3, at any depth: protobuf knows floats only, and a cluster writes whole ones without a point."""
    if isinstance(value, dict):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_kfp_version() -> None:
    if kfp.__version__ != KFP_VERSION:
        raise UserError(
            f"local runs are written for the internals of kfp {KFP_VERSION}, installed is {kfp.__version__}; "
            f"run: pip install kfp=={KFP_VERSION}"
        )


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group that has ended
        os.killpg(group, number)


def duration(seconds: float) -> str:
    """Seconds for people: "2.1 s", "3 min 12 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
