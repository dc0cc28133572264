"""What a run leaves on disk while it is under way, and whether a directory is of this run.

OUTPUT/spin/
  run.json                    settings, digests of rows and start model, versions
  clock.json                  seconds so far, by part
  saved.json                  snapshots made so far, where the output is in a bucket
  iteration-0/
    generated.jsonl           a response for each training row, as token ids
    held_out.jsonl            the same for held-out rows
    checkpoints/              of the training under way
    model/                    the trained model
    result.json               written last: with it, the iteration is complete
OUTPUT/checkpoints/           see snapshots.py
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError
from components.common.core.identity import Identity, digest_of_rows, identity_of, refuse_other_run
from components.common.models.chat_templates import EncodedRow
from components.common.models.loading import model_digest
from components.common.training.log import library_versions
from components.common.training.roles import rows_per_epoch, sharded_checkpoint, spread
from components.spin.config import SAVED, SPINSettings, SPINStageConfig

CHECKPOINT_MARKER = "complete.json"


def write_json(path: Path, content: Any) -> None:
    """Writes a file in one move, so that it is never seen half-written."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


class RunFiles:
    """The places of a run.

    Args:
        output: the stage's output directory.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output / "spin"
        self.removed = output / "spin.removed"
        self.run = self.root / "run.json"
        self.clock = self.root / "clock.json"
        self.saved = self.root / SAVED
        self.snapshots = output / "checkpoints"

    def iteration(self, index: int) -> Path:
        return self.root / f"iteration-{index}"

    def generated(self, index: int) -> Path:
        return self.iteration(index) / "generated.jsonl"

    def held_out(self, index: int) -> Path:
        return self.iteration(index) / "held_out.jsonl"

    def checkpoints(self, index: int) -> Path:
        return self.iteration(index) / "checkpoints"

    def model(self, index: int) -> Path:
        return self.iteration(index) / "model"

    def result(self, index: int) -> dict[str, Any] | None:
        """What a complete iteration came to; None for one that is not complete."""
        path = self.iteration(index) / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def finish_iteration(self, index: int, result: dict[str, Any]) -> None:
        """Marks an iteration complete, and drops its checkpoints."""
        write_json(self.iteration(index) / "result.json", result)
        shutil.rmtree(self.checkpoints(index), ignore_errors=True)

    def remove(self) -> None:
        """Drops everything of the run at once: a half-removed run is not taken for an unfinished one."""
        if self.root.exists():
            self.root.rename(self.removed)
        shutil.rmtree(self.removed, ignore_errors=True)


def mark_checkpoint(directory: Path) -> None:
    """Makes a checkpoint count: notes the size of each of its files, last."""
    sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    write_json(directory / CHECKPOINT_MARKER, {"sizes": sizes})


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint; what interrupted saves left is removed."""
    complete = []
    for path in directory.glob("checkpoint-*"):
        if _is_complete(path):
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _is_complete(checkpoint: Path) -> bool:
    marker = checkpoint / CHECKPOINT_MARKER
    if not marker.is_file():
        return False
    sizes = json.loads(marker.read_text(encoding="utf-8"))["sizes"]
    files = ((checkpoint / name, size) for name, size in sizes.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def identity(
    stage: SPINStageConfig, settings: SPINSettings, train: Sequence[EncodedRow], held_out: Sequence[EncodedRow]
) -> Identity:
    """What must be equal for a directory to be of this run; and versions, for the record."""
    columns, processes = ("id", "prompt_ids", "chosen_ids"), stage.processes()
    inputs = {
        "training rows": digest_of_rows(train, columns),
        "held-out rows": digest_of_rows(held_out, columns),
        "start model": model_digest(Path(str(stage.model))),
    }
    windows = range(1, min(settings.window, settings.iterations) + 1)
    derived = spread(settings, processes) | {
        "rows_per_epoch": [rows_per_epoch(len(train) * size, settings, processes) for size in windows],
        "sharded_checkpoint": sharded_checkpoint(stage.parallelism, processes),
    }
    return identity_of([stage, settings], inputs, derived, versions=library_versions())


def check_identity(files: RunFiles, mine: Identity) -> None:
    """Raises UserError when the directory is of another run, naming every setting that differs."""
    try:
        saved = json.loads(files.run.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{files.run}: is not the record of a SPIN run; --overwrite starts anew") from error
    refuse_other_run(files.root, saved, mine)
