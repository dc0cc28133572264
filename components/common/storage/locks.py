"""One process at a time, among those of a machine, by a lock file."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from components.common.core.errors import UserError


@contextlib.contextmanager
def locked(path: Path, wait: bool, what: str = "") -> Iterator[None]:
    """Holds a lock file, which the system frees when the process dies.

    Args:
        path: the file; it is removed at the end. Where its directory cannot be written to, nothing is held.
        wait: for another process that holds it.
        what: what it stands for, for the message.

    Raises:
        UserError: another process holds it, and `wait` is off.
    """
    with contextlib.ExitStack() as stack:
        while os.access(path.parent, os.W_OK):
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                advice = "let it end, or give another place"
                raise UserError(f"{what}: another process is writing there now; {advice}") from None
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            # The one before has removed it: what was locked is another file.
        stack.callback(path.unlink, missing_ok=True)
        yield
