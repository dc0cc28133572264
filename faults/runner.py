"""Stages as processes of their own that start in a moment: forked from a server that has imported torch already."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SECONDS = 300.0  # a run takes a few, on a busy machine ten times as many

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "faults.runner",
        "boto3",
        "components.sapo.__main__",
        "components.sapo.trainer",
        "components.sapo.planning.describe",
    ]
)


def start(stage: str, argv: Sequence[object], environment: Mapping[str, str], log: Path) -> BaseProcess:
    """`python -m components.STAGE ARGV` with its output appended to `log`; `.kill()`, `.terminate()`, `.exitcode` as usual."""
    arguments = (stage, [str(part) for part in argv], dict(environment), str(log))
    process = _context.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process


def run(stage: str, argv: Sequence[object], environment: Mapping[str, str], log: Path, seconds: float = SECONDS) -> int:
    """Runs it to its end; the exit code."""
    return wait(start(stage, argv, environment, log), log, seconds)


def wait(process: BaseProcess, log: Path, seconds: float = SECONDS) -> int:
    """The exit code of a process; one that does not end is killed.

    Raises:
        TimeoutError: it took too long.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"a stage took more than {seconds} s; see {log}")
    return process.exitcode


def _run(stage: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    import importlib

    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [stage, *argv]
    from components.common.stage.run import run_stage

    run_stage(importlib.import_module(f"components.{stage}.__main__").main)
