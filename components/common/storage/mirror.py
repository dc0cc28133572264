"""Checkpoints of a run under way, kept in the bucket of its output so that a pod with an empty disk goes on from there.

A background thread looks for the newest finished checkpoint, holds it by hard links (so that the stage may remove it
meanwhile) and uploads it, manifest last. Training never waits for it: while an upload lasts, older checkpoints are passed over,
so the backlog is one. Beside each checkpoint go the training log's files as they were.
"""

import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.common.core.errors import UserError
from components.common.storage import manifest, transfer
from components.common.storage.client import Location

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
LOG = "training-log"  # what a mirrored checkpoint holds besides the stage's files
SECONDS_BETWEEN_LOOKS = 0.2
# Bytes; smaller files are sent with each checkpoint, so that damage to one object spoils one checkpoint.
SHARED_FROM = 2**24
SECONDS_BETWEEN_COPIES = 10.0  # of an output as a whole
LONGEST_PAUSE = 30.0  # seconds between attempts while the store is away


def newest(directory: Path, marker: str) -> Path | None:
    """The newest checkpoint whose marker, which its stage writes last, can be read."""
    found = [path for path in directory.glob(f"{PREFIX}*") if _step(path.name) >= 0 and _is_json(path / marker)]
    return max(found, key=lambda path: _step(path.name), default=None)


def _step(name: str) -> int:
    number = name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def mirrored(place: Location) -> list[int]:
    """Steps of the complete checkpoints below a prefix, oldest first."""
    names = [name.split("/") for name in transfer.objects(place)]
    return sorted(_step(parts[0]) for parts in names if len(parts) == 2 and parts[1] == manifest.NAME)


def _lies_at(step: int, name: str, file: dict[str, Any]) -> str:
    """Where a file of a mirrored checkpoint is, relative to the checkpoints."""
    return str(file.get("at", f"{PREFIX}{step}/{name}"))


def restore(place: Location, checkpoints: Path, log: Path, marker: str) -> int | None:
    """Fetches the newest complete checkpoint that is not damaged, unless the disk has one as new.

    Args:
        place: the prefix that `Mirror` writes to.
        checkpoints: where the stage looks for checkpoints.
        log: the training log's directory; filled where it is missing.
        marker: the file that the stage writes last.

    Returns:
        Its step; None where nothing was fetched.
    """
    here = newest(checkpoints, marker)
    step = _fetch_newest(place, lambda step: checkpoints / f"{PREFIX}{step}", -1 if here is None else _step(here.name))
    if step is not None and (saved_log := checkpoints / f"{PREFIX}{step}" / LOG).is_dir() and not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(saved_log, log)
    return step


def _fetch_newest(place: Location, target: Callable[[int], Path], than: int) -> int | None:
    """Fetches the newest complete checkpoint of a step above `than` that is not damaged; returns its step."""
    for step in reversed(mirrored(place)):
        if step <= than:
            return None
        shutil.rmtree(target(step), ignore_errors=True)  # an interrupted save
        try:
            transfer.download(f"{place}/{PREFIX}{step}", target(step))
        except UserError as error:
            if "is damaged" not in str(error):
                raise
            logger.warning("%s; an older checkpoint is tried", error)
            continue
        logger.info("fetched the checkpoint of step %d from %s", step, place)
        return step
    return None


def restore_folder(place: Location, output: Path, marker: str) -> int | None:
    """Makes the newest folder that `FolderMirror` has sent the output, where the disk has none of this run."""
    if (output / marker).is_file():
        return None
    fetched = output.with_name(f".{output.name}.fetched")
    step = _fetch_newest(place, lambda _: fetched, -1)
    if step is not None:
        (fetched / manifest.NAME).unlink()  # what it marks as complete is the checkpoint, not the output
        shutil.rmtree(output, ignore_errors=True)
        fetched.rename(output)
    return step


class Mirror:
    """Uploads finished checkpoints in the background.

    Args:
        checkpoints: where the stage writes them.
        place: the prefix to keep them below.
        scratch: a directory on the same disk for hard links; what an interrupted upload left there is removed.
        log: the training log's directory.
        marker: the file that the stage writes last.
        keep: complete checkpoints kept in the bucket.
        bandwidth: bytes a second, at most.
        check: is called before each manifest; what it raises ends the upload.
    """

    def __init__(
        self,
        checkpoints: Path,
        place: Location,
        scratch: Path,
        log: Path,
        marker: str,
        keep: int,
        bandwidth: float | None,
        check: Callable[[], None],
    ) -> None:
        self.checkpoints = checkpoints
        self.place = place
        self.scratch = scratch
        self.log = log
        self.marker = marker
        self.keep = keep
        self.bandwidth = bandwidth
        self.check = check
        shutil.rmtree(scratch, ignore_errors=True)
        self.uploaded = max(mirrored(place), default=-1)
        self._stop = threading.Event()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failures = 0
        while True:
            stopping = self._stop.is_set()  # asked before the look, so that the last look comes after the last save
            try:
                if self._upload_newest():
                    failures = 0
                elif stopping:
                    return
            except transfer.CancelledError:
                return
            except (UserError, OSError) as error:
                failures += 1
                logger.warning("checkpoint not mirrored yet: %s", error)
            pause = min(LONGEST_PAUSE, 2.0**failures) * random.uniform(0.5, 1.0) if failures else SECONDS_BETWEEN_LOOKS
            if self._cancelled.wait(min(pause, 1.0) if stopping else pause):
                return

    def _upload_newest(self) -> bool:
        """Uploads the newest finished checkpoint; False where the bucket has it."""
        path = newest(self.checkpoints, self.marker)
        if path is None or _step(path.name) <= self.uploaded:
            return False
        held = self._hold(path)
        started = time.monotonic()
        uri = f"{self.place}/{path.name}"
        content = manifest.make(self._shared(manifest.describe(held)))
        options = {"bandwidth": self.bandwidth, "cancelled": self._cancelled, "before_manifest": self.check}
        transfer.upload(held, uri, content=content, show=False, **options)  # type: ignore[arg-type]
        self.uploaded = _step(path.name)
        logger.info("mirrored %s to %s in %.1f s", path.name, self.place, time.monotonic() - started)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._remove_old(self.keep)
        return True

    def _shared(self, files: manifest.Files) -> manifest.Files:
        """The files; large ones that the newest checkpoint in the bucket has too say where they lie, and are not sent again."""
        before = transfer.read_manifest(self._at(self.uploaded)) if self.uploaded >= 0 else None
        there = transfer.objects(self.place)
        known = {
            f["sha256"]: _lies_at(self.uploaded, name, f) for name, f in (before or {"files": {}})["files"].items()
        }
        for file in files.values():
            at = known.get(file["sha256"])
            if file["size"] >= SHARED_FROM and at in there and there[at]["Size"] == file["size"]:
                file["at"] = at
        return files

    def _at(self, step: int) -> Location:
        return Location(self.place.bucket, f"{self.place.prefix}{PREFIX}{step}")

    def _hold(self, path: Path) -> Path:
        """The checkpoint under another name by hard links, with a copy of the log."""
        held = self.scratch / path.name
        if held.is_dir():
            return held  # of an attempt that failed
        shutil.rmtree(self.scratch, ignore_errors=True)
        unfinished = self.scratch / "unfinished"
        shutil.copytree(path, unfinished, copy_function=os.link)
        if self.log.is_dir():
            shutil.copytree(self.log, unfinished / LOG, dirs_exist_ok=True)
        unfinished.rename(held)
        return held

    def _remove_old(self, keep: int) -> None:
        """Keeps the newest complete checkpoints; removes older ones, but for files that are shared, and interrupted uploads."""
        kept = mirrored(self.place)[-keep:]
        if not kept:
            return
        manifests = [transfer.read_manifest(self._at(step)) or {"files": {}} for step in kept]
        shared = {file["at"] for content in manifests for file in content["files"].values() if "at" in file}
        names = [n for n in transfer.objects(self.place) if 0 <= _step(n.split("/")[0]) < kept[0]]
        transfer.delete(self.place, [name for name in names if name not in shared])

    def keep_newest(self) -> None:
        """Removes all but the newest complete checkpoint, or leaves them where the store is away. After `cancel`."""
        try:
            self._remove_old(1)
        except (UserError, OSError) as error:
            logger.warning("older checkpoints are left in %s: %s", self.place, error)

    def finish(self, seconds: float) -> bool:
        """Waits until the newest checkpoint is in the bucket, or the time is over; whether it is."""
        self._stop.set()
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Gives up what is under way; the newest complete checkpoint in the bucket stays."""
        self._cancelled.set()
        self._stop.set()
        self._thread.join(timeout=60)
        shutil.rmtree(self.scratch, ignore_errors=True)


class FolderMirror(Mirror):
    """Sends what a stage has written so far, when it has changed; for stages that go on from any state of their output.

    Args:
        output: the stage's output; files in it are appended to, or replaced in one move.
        snapshots: where copies of it are made; on the same disk, outside of it.
    """

    def __init__(
        self,
        output: Path,
        snapshots: Path,
        place: Location,
        scratch: Path,
        marker: str,
        keep: int,
        bandwidth: float | None,
        check: Callable[[], None],
    ) -> None:
        self.output = output
        self._next = 0.0
        self._sent: dict[str, tuple[int, int]] = {}
        shutil.rmtree(snapshots, ignore_errors=True)  # of a process before; the output has gone further since
        super().__init__(snapshots, place, scratch, snapshots / "none", marker, keep, bandwidth, check)

    def _upload_newest(self) -> bool:
        if self._stop.is_set() or time.monotonic() >= self._next:
            self._copy()
        return super()._upload_newest()

    def _copy(self) -> None:
        """Copies the output as the next checkpoint, if it is another than the last and that one has been sent."""
        target = self.checkpoints / f"{PREFIX}{self.uploaded + 1}"
        if target.exists():
            return
        state = {name: (p.stat().st_size, p.stat().st_mtime_ns) for name, p in manifest.files_in(self.output).items()}
        if state == self._sent or self.marker not in state:
            return
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        unfinished = self.checkpoints / "unfinished"
        shutil.copytree(self.output, unfinished)
        unfinished.rename(target)
        self._sent = state
        self._next = time.monotonic() + SECONDS_BETWEEN_COPIES

    def cancel(self) -> None:
        super().cancel()
        shutil.rmtree(self.checkpoints, ignore_errors=True)
