"""What the pod of a training stage does before Kubernetes stops it: it tells the stage, and waits until it has saved.

    python3 -m components.common.stage.before_stop

In a pod of Kubeflow Pipelines a SIGTERM is not enough. Argo's `emissary`, process 1, passes it to the stage and to KFP's
launcher, which started the stage, at the same time; the launcher ends at once, `emissary` within a second after it, and the
stage is killed long before it has saved. As the container's preStop hook this command runs earlier than that SIGTERM. It sends
one to the stage alone, and ends when the stage and the launcher have: the stage has saved and sent its checkpoint, and the
launcher has told Kubeflow Pipelines. Kubernetes gives all of it the pod's grace period. Needs Linux, and nothing installed.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.2
# A stage's command line begins so. Argo's and KFP's processes have the same words further on.
STAGE = re.compile(r"[^\0]*python[^\0/]*\0-m\0components\.\w+\0")


@dataclass(frozen=True)
class Process:
    """A line of the process table; `started` tells it from a later one with the same number."""

    pid: int
    started: int
    parent: int = field(compare=False)  # changes when the parent ends


def processes() -> dict[int, Process]:
    """Every process but those that have ended and wait for their parent to notice."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid = int(path.parent.name)
            # The name, in parentheses, may hold anything; then come state, parent and, as the 20th, the time of the start.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[pid] = Process(pid, started=int(fields[19]), parent=int(fields[1]))
    return found


def stages(root: int) -> list[Process]:
    """The stages below a process, without the processes that a stage has started itself: it passes signals on."""
    table = processes()

    def below(pid: int) -> Iterator[Process]:
        for process in table.values():
            if process.parent == pid:
                yield from [process] if _is_stage(process.pid) else below(process.pid)

    return list(below(root))


def _is_stage(pid: int) -> bool:
    """Whether it was started as `python -m components.<stage>`."""
    try:
        return bool(STAGE.match(Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return False


def stop(root: int) -> int:
    """Sends SIGTERM to the stages below a process, and waits for their end and for that of what started them.

    Returns:
        How many there were.
    """
    told = stages(root)
    for stage in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stage.pid, signal.SIGTERM)
    table = processes()
    launchers = [table[stage.parent] for stage in told if stage.parent != root and stage.parent in table]
    awaited = {*told, *launchers}
    while awaited & set(processes().values()):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return len(told)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=int, default=1, help="process whose descendants to look at; default: the first")
    print(f"stopped {stop(parser.parse_args(argv).root)} stages", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
