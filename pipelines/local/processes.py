"""Runs the tasks of a local run as processes of this environment."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from kfp import local
from kfp.dsl.constants import WORKSPACE_MOUNT_PATH

from pipelines.local.kfp_patches import Patch, process_patch
from pipelines.local.runner import STAGE_ENVIRONMENT, CannotStartError, LocalRun


class Processes:
    """Tells LocalRun to run tasks as processes."""

    def runner(self, run: LocalRun, arguments: dict[str, Any]) -> local.SubprocessRunner:
        return local.SubprocessRunner(use_venv=False)

    def patch(self, run: LocalRun) -> Patch:
        return process_patch(lambda command, env: run.run_task(lambda: _Process(command, env)))


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


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group that has ended
        os.killpg(group, number)
