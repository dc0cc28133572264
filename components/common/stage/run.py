"""Runs a stage's main: logging, storage, errors of the user as one line, and exit codes."""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from components.common.core.errors import UserError
from components.common.stage import session


def run_stage(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a stage's main with logging on, and turns user errors into one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    stage = Path(inspect.getfile(main)).parent.name
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {stage} | %(message)s", datefmt="%H:%M:%S"
    )
    for chatty in (
        "httpx",
        "httpx2",
        "urllib3",
        "fsspec",
        "datasets",
        "filelock",
        "matplotlib",
        "botocore",
        "boto3",
        "s3transfer",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Warns of a kernel that it lacks on a CPU whenever a library imports it, also where nothing is in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with session.session(stage):
            main(sys.argv[1:])
    except BrokenPipeError:  # `--help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        print(f"{stage}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        print(f"{stage}: error: the disk is full: {error}; free some space and run the command again", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{stage}: interrupted", file=sys.stderr)
        sys.exit(130)
