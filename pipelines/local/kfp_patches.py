"""Every private name of kfp that this project uses or replaces, each with the upstream issue it answers.

They belong to one release, `KFP_VERSION`; a test holds their signatures. When an issue is closed and a release with its
answer is pinned, the patch goes. Numbers are those of kubeflow/pipelines.

| what kfp does | upstream | patch |
|---|---|---|
| refuses a null inside a mapping or a list | #14373, #12240 | `_nulls` |
| reads the source lines of all callers at each setting of a size | none found | `_cheap_stack` |
| hands whole numbers in mappings to a local task as floats | #11004 | `_whole_numbers` |
| runs a local package in an order that differs between processes | none found | `_in_the_order_of` |
| puts outputs below a folder with a time stamp, and names no task | none found | `_named_folders` |
| runs no container component as a process | #11793 | `process_patch` |
| replaces the text "python3" in every argument of a process | #14459 | `process_patch` |
| takes a container that failed fast for one that succeeded | #13332 | `container_patch` |
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import kfp
from google.protobuf import json_format, struct_pb2
from kfp import local
from kfp.compiler import pipeline_spec_builder
from kfp.dsl import pipeline_task
from kfp.local import (
    executor_input_utils,
    graph_utils,
    pipeline_orchestrator,
    status,
    subprocess_task_handler,
    task_dispatcher,
)
from kfp.pipeline_spec import pipeline_spec_pb2

from components.common.core.errors import UserError

KFP_VERSION = "2.17.0"
Patch = tuple[Any, str, Any]  # a module, a name in it, and what replaces it


@contextlib.contextmanager
def applied(patches: Sequence[Patch]) -> Iterator[None]:
    """Puts the patches in place, and takes them out again.

    Raises:
        UserError: the installed kfp is not the one whose internals this module knows.
    """
    if kfp.__version__ != KFP_VERSION:
        raise UserError(
            f"pipelines are written for the internals of kfp {KFP_VERSION}, installed is {kfp.__version__}; "
            f"run: pip install kfp=={KFP_VERSION}"
        )
    originals = [(module, name, getattr(module, name)) for module, name, _ in patches]
    try:
        for module, name, replacement in patches:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def compiler_patches() -> list[Patch]:
    """What compiling needs."""
    return [_nulls(), _cheap_stack()]


def local_patches(order: Sequence[str], starts: Callable[[str], None]) -> list[Patch]:
    """What a local run needs, whatever executes its tasks.

    Args:
        order: names of tasks; of two that may both run, the first one does.
        starts: is told the name of each task before it runs.
    """
    return [_nulls(), _whole_numbers(), _in_the_order_of(order), *_named_folders(starts)]


def process_patch(run: Callable[[list[str], dict[str, str]], int]) -> Patch:
    """Has every task run by a function that takes its command and environment and returns its exit code."""

    class TaskHandler:
        """Stands in for kfp.local's SubprocessTaskHandler, with the arguments that kfp.local gives it."""

        def __init__(self, full_command: list[str], env_vars: dict[str, str] | None = None, **_: Any) -> None:
            self.full_command = full_command
            self.env_vars = env_vars or {}

        def run(self) -> status.Status:
            succeeded = run(self.full_command, self.env_vars) == 0
            return status.Status.SUCCESS if succeeded else status.Status.FAILURE

    return subprocess_task_handler, "SubprocessTaskHandler", TaskHandler


def container_patch(run: Callable[..., int]) -> Patch:
    """Has every container run by a function that takes client, image, command, volumes and options.

    It returns the container's exit code.
    """
    from kfp.local import docker_task_handler  # needs the docker SDK

    return docker_task_handler, "run_docker_container", run


def run_package(spec: dict[str, Any], arguments: dict[str, Any], runner: Any, directory: str) -> None:
    """Walks the tasks of a package with kfp.local; raises whatever kfp raises when a task fails.

    Args:
        spec: the pipeline spec of a package.
        arguments: its parameters.
        runner: one of kfp.local's.
        directory: where outputs go, below `outputs`.
    """
    local.init(runner, pipeline_root=directory)
    # Not `load_component_from_file`: it takes component `comp-x` for the whole of a pipeline named x.
    parsed = json_format.ParseDict(_without_retries(spec), pipeline_spec_pb2.PipelineSpec())
    pipeline_orchestrator.run_local_pipeline(parsed, arguments)


def _nulls() -> Patch:
    to_protobuf = pipeline_spec_builder.to_protobuf_value

    def to_protobuf_or_null(value: Any) -> struct_pb2.Value:
        return struct_pb2.Value(null_value="NULL_VALUE") if value is None else to_protobuf(value)

    return pipeline_spec_builder, "to_protobuf_value", to_protobuf_or_null


def _cheap_stack() -> Patch:
    """kfp reads one caller's name of `inspect.stack()`, which looks for the source line of each caller in every module that is
    imported: half a minute of a compilation with torch among them."""

    def stack() -> list[tuple[Any, ...]]:
        frame, callers = sys._getframe(1), []
        while frame.f_back is not None:
            callers.append((frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return callers

    return pipeline_task, "inspect", SimpleNamespace(stack=stack)


def _whole_numbers() -> Patch:
    """3.0 as 3: protobuf knows floats only, and a cluster writes whole ones without a point."""
    to_dict = executor_input_utils.executor_input_to_dict

    def mended(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mended(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [mended(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return executor_input_utils, "executor_input_to_dict", lambda *args, **kwargs: mended(to_dict(*args, **kwargs))


def _in_the_order_of(names: Sequence[str]) -> Patch:
    """The order of a protobuf map differs between processes; here every run of a package takes the same."""
    sort_tasks = graph_utils.topological_sort_tasks
    place = {name: number for number, name in enumerate(names)}

    def sort_in_order(tasks: dict[str, Any]) -> list[str]:
        ordered = sorted(tasks, key=lambda name: (place.get(name, len(place)), name))
        return sort_tasks({name: tasks[name] for name in ordered})

    return graph_utils, "topological_sort_tasks", sort_in_order


def _named_folders(starts: Callable[[str], None]) -> list[Patch]:
    """`outputs/train-dpo` for the task of that name."""
    run_single_task = task_dispatcher.run_single_task_implementation

    def name_of(component: str) -> str:
        return component.removeprefix("comp-")

    def run_named_task(**arguments: Any) -> Any:
        starts(name_of(arguments["component_name"]))
        return run_single_task(**{**arguments, "pipeline_resource_name": "outputs"})

    return [
        (task_dispatcher, "run_single_task_implementation", run_named_task),
        (executor_input_utils, "get_local_pipeline_resource_name", lambda _: "outputs"),
        (executor_input_utils, "get_local_task_resource_name", name_of),
    ]


def _without_retries(value: Any) -> Any:
    """A specification whose tasks are tried once: retries, with minutes between them, are for a cluster's nodes."""
    if isinstance(value, dict):
        return {key: _without_retries(inner) for key, inner in value.items() if key != "retryPolicy"}
    return [_without_retries(inner) for inner in value] if isinstance(value, list) else value
