"""What an output in a bucket keeps of a run under way: all that the run needs to go on, as it was at one moment.

OUTPUT/checkpoints/checkpoint-N holds the files of OUTPUT/spin by hard links, which cost no space; the mirror sends the newest.
On an empty disk the one that was fetched becomes OUTPUT/spin.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from components.common.storage import mirror
from components.spin.files import SAVED, RunFiles, newest_checkpoint, write_json

KEPT = 2  # the mirror may be about to hold the newest but one


def save(files: RunFiles, all_models: bool) -> None:
    """Makes a snapshot. It appears in one move, so that one of that name is always whole.

    Args:
        all_models: of every complete iteration, not just of the newest, which the next one starts from.
    """
    number = _number(files.root) + 1
    write_json(files.saved, {"number": number})
    unfinished = files.snapshots / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in _needed(files, all_models):
        target = unfinished / path.relative_to(files.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        _hold(path, target)
    unfinished.rename(files.snapshots / f"{mirror.PREFIX}{number}")
    for path in files.snapshots.glob(f"{mirror.PREFIX}*"):
        if int(path.name.removeprefix(mirror.PREFIX)) <= number - KEPT:
            shutil.rmtree(path)


def adopt(files: RunFiles) -> None:
    """Makes the newest snapshot the run, where it is newer than the run on this disk: another pod has gone further."""
    newest = mirror.newest(files.snapshots, SAVED)
    if newest is None or _number(newest) <= _number(files.root):
        return
    files.remove()
    unfinished = files.snapshots / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(newest, unfinished, copy_function=_hold, ignore=shutil.ignore_patterns(mirror.LOG))
    unfinished.rename(files.root)


def _number(root: Path) -> int:
    """How many snapshots had been made of a run by then; 0 where there is no run."""
    try:
        return int(json.loads((root / SAVED).read_text(encoding="utf-8"))["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _needed(files: RunFiles, all_models: bool) -> Iterator[Path]:
    """The files of a run that another disk needs to go on with it."""
    yield from (files.run, files.clock, files.saved)
    iterations = sorted(int(path.name.removeprefix("iteration-")) for path in files.root.glob("iteration-*"))
    complete = [index for index in iterations if files.result(index) is not None]
    for index in iterations:
        yield from files.iteration(index).glob("*.json*")
        if index in complete and (all_models or index == complete[-1]):
            yield from files.model(index).iterdir()
        elif index not in complete and (checkpoint := newest_checkpoint(files.checkpoints(index))):
            yield from (path for path in checkpoint.rglob("*") if path.is_file())


def _hold(source: str | Path, target: str | Path) -> None:
    """Another name for a file; a copy of responses, which are added to in place."""
    if str(source).endswith(".jsonl"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)
