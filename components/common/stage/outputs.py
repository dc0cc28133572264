"""A stage's output directory: made, emptied when told to, and never overwritten by chance."""

import shutil
from pathlib import Path

from components.common.core.errors import UserError


def prepare_output(directory: str, overwrite: bool) -> Path:
    """Makes the output directory, or empties it when told to.

    Raises:
        UserError: it is a file, cannot be made, or holds files and `overwrite` is off.
    """
    path = check_output(directory, overwrite)
    try:
        if path.exists() and overwrite:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory}: cannot be made: {error.strerror}") from error
    return path


def check_output(directory: str, overwrite: bool) -> Path:
    """`prepare_output` without touching the disk, for `--dry_run`."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {directory}: is a file; give a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--output {directory}: is not empty; give another directory, or --overwrite to replace it")
    return path
