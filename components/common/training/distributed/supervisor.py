"""Runs one command in several processes of this machine, as torchrun does, and ends as they end.

It is not torchrun because that ends with 1 whatever its processes say, and kills them a fixed time after SIGTERM: a stage's 143
("saved; the same command goes on") and 2 ("your input is wrong") must come out, and a save takes as long as it takes.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_FOLLOW = (
    2.0  # a failure that all processes see, such as wrong input, ends them all by itself within this time
)
TAIL = 20  # lines shown of the log of a process that failed


def supervise(command: Sequence[str], processes: int, patience: float) -> int:
    """Runs the command in `processes` processes ("ranks") to their end.

    The output of the first is this process's own; that of another is shown, its last lines, when it fails. When one fails,
    the others get SIGTERM, and SIGKILL if they do not end. SIGTERM and SIGINT go to all of them, and they take the time they
    need; a second signal kills them. None outlives this process.

    Args:
        patience: seconds from the first failure (a stop that was asked for is one) to SIGKILL for the others.

    Returns:
        0 when all end with 0; else the exit code of the one that failed first, 128 + N where signal N ended it.
    """
    with tempfile.TemporaryDirectory(prefix="sapo-ranks-") as logs, _signals() as received:
        ranks = Ranks(Path(logs), received, patience)
        try:
            ranks.start(command, processes)
            ranks.wait()
            return ranks.exit_code()
        finally:
            ranks.clear()


class Ranks:
    """The processes of one launch.

    Args:
        logs: directory for the output of all but the first.
        received: numbers of the signals that this process has got; grows.
        patience: as in `supervise`.
    """

    def __init__(self, logs: Path, received: list[int], patience: float) -> None:
        self.logs = logs
        self.received = received
        self.patience = patience
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: int | None = None  # the first rank that ended with anything but 0
        self.failed_at = 0.0
        self.asked: set[int] = set()  # ranks that had not ended when they were told to

    def start(self, command: Sequence[str], processes: int) -> None:
        """One process a rank, each in a process group of its own, so that a terminal's Ctrl-C reaches this process alone."""
        shared = environment(os.environ, processes)
        logger.info("starting %d processes; those after the first log to %s", processes, self.logs)
        for rank in range(processes):
            variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(self._log(rank).open("wb")) if rank else None
                options: dict[str, Any] = {
                    "stdin": subprocess.DEVNULL,
                    "stdout": log,
                    "stderr": log,
                    "process_group": 0,
                }
                self.processes.append(subprocess.Popen(command, env=variables, preexec_fn=_die_with_parent, **options))

    def wait(self) -> None:
        """Waits for the end of all, hands signals on, and sees to it that one failure ends them all."""
        handed_on = 0
        while any(process.poll() is None for process in self.processes):
            for number in self.received[handed_on:]:
                self.send(signal.SIGKILL if handed_on else number)
                handed_on += 1
            if self.failed is None and (failures := [i for i, p in enumerate(self.processes) if p.poll()]):
                self.failed = failures[0]
                self.failed_at = time.monotonic()
            if self.failed is not None:
                self._hurry(time.monotonic() - self.failed_at)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _hurry(self, seconds: float) -> None:
        """Makes the others go, this long after the first failure."""
        if seconds > self.patience:
            self.send(signal.SIGKILL)
        elif seconds > SECONDS_TO_FOLLOW and not self.asked:
            self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        """Sends a signal to every process that has not ended."""
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.asked.add(rank)
                process.send_signal(number)
                if number == signal.SIGKILL:
                    process.wait()

    def clear(self) -> None:
        """Kills what is left, children that a process has started and not waited for too."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def exit_code(self) -> int:
        """What all of them came to; says which one failed, with the end of its log where that was not to be seen."""
        codes = [128 - code if (code := process.returncode) < 0 else code for process in self.processes]
        if self.received:  # the first one says how the stop went
            return codes[0] or max(codes)
        failed = next((rank for rank, code in enumerate(codes) if code), None) if self.failed is None else self.failed
        if failed is None:
            return 0
        seen = codes[0] and 0 not in self.asked  # the first process has said why on its own
        if not seen:
            logger.error("process %d of %d %s", failed, len(codes), _ending(self.processes[failed].returncode))
            print(self._tail(failed), end="", file=sys.stderr)
        return codes[failed]

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def _tail(self, rank: int) -> str:
        if not rank:
            return ""
        lines = self._log(rank).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        return "".join(f"  rank {rank} | {line}\n" for line in lines)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = "; out of memory?" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def environment(given: Mapping[str, str], processes: int) -> dict[str, str]:
    """The variables that all processes share, as torchrun sets them; threads are divided among them."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    defaults = {"OMP_NUM_THREADS": str(threads), "NCCL_DEBUG": "WARN", "TOKENIZERS_PARALLELISM": "false"}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return defaults | dict(given) | sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the new process, on Linux: has it killed when the supervisor is killed."""
    set_parent_death_signal = 1  # as sys/prctl.h numbers it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that come within the block."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
