"""A stage and its locations: `s3://` inputs are fetched before it runs, outputs are sent after, and the stage sees paths only.

It also keeps a stage from running twice: a complete output of the same inputs and settings ends it at once.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.core.errors import TERMINATED, UserError
from components.common.stage.kfp import bucket_of, publish, published
from components.common.storage import manifest
from components.common.storage.lease import Lease, refuse_other_run
from components.common.storage.locations import cache_directory

if TYPE_CHECKING:
    from components.common.storage.client import Location

logger = logging.getLogger(__name__)

# Settings that say where results go. All others that begin with s3:// are inputs.
DIRECTORIES = ("output", "training_log")
FILES = ("report_file", "html_file", "markdown_file")
INPUTS = ("data", "model", "source", "test_source", "evaluations", "trainings")
# Settings that do not change the result, by prefix.
FREE = (
    *(*DIRECTORIES, *FILES, "overwrite", "dry_run", "executor_input", "resume", "keep_", "start"),
    *("num_processes", "parallelism", "gpu_memory"),
    *("mirror_", "grace_seconds", "lease_seconds", "save_", "logging_", "log_", "report_to", "disable_", "dataloader_"),
    *("judge_base_url", "judge_key_variable", "judge_concurrency", "judge_retries", "judge_timeout", "judge_prices"),
    *("batch_size", "gpu_memory_utilization"),  # of the evaluation
)
# The file that a stage writes last into a checkpoint.
MARKERS = {"sapo": "manifest.json", "spin": "saved.json", "evaluation": "settings.json"}
MARKER = "trainer_state.json"
# Stages that go on from what an earlier attempt left on the disk without a checkpoint; for the others it is in the way.
GO_ON = ("spin", "evaluation")
# Those of them whose output can be sent as it is at any moment.
FOLDERS = ("evaluation",)
RELEASE_SECONDS = 5.0

_current: "Session | None" = None


def current() -> "Session | None":
    """The session of the stage that runs; None where `main` is called as a function."""
    return _current


def is_mirrored() -> bool:
    """Whether finished checkpoints in OUTPUT/checkpoints are sent to a bucket while the stage runs."""
    return _current is not None and _current.mirror is not None


def when_complete(remove: Callable[[], object], path: Path) -> None:
    """Removes what a run needs while it is under way, such as checkpoints, once its output is marked as complete.

    Done earlier, a process that is killed in between would leave an output from which nothing can go on. At once where `main`
    is called as a function.

    Args:
        remove: does it.
        path: what it removes, which does not count among the output's files.
    """
    if _current is None:
        remove()
    else:
        _current.unneeded.append((remove, path))


@contextlib.contextmanager
def session(stage: str) -> Iterator["Session"]:
    """A stage's run from its settings to its outputs."""
    global _current
    _current = Session(stage)
    try:
        yield _current
        _current.finish()
    except BaseException as error:
        _current.stop(error.code if isinstance(error, SystemExit) else 1)
        raise
    finally:
        _current.close()
        _current = None


class Session:
    """What `ConfigParser` and `run_stage` ask of storage.

    Args:
        stage: name of the stage, such as "sapo".
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.run: dict[str, Any] = {}  # digest and settings; empty until the settings are known
        self.values: dict[str, Any] = {}
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        self.sent: dict[str, tuple[str, Path]] = {}  # of each output in a bucket, its URI and the path it is made at
        self.unneeded: list[tuple[Callable[[], object], Path]] = []  # see `when_complete`
        self.lease: Lease | None = None
        self.mirror: Any = None
        self._cleanup = contextlib.ExitStack()

    # ---- Before the stage runs ------------------------------------------------------------------------------------

    def prepare(self, values: dict[str, Any], fields: dict[str, "dataclasses.Field[Any]"]) -> dict[str, Any]:
        """Checks and resolves the locations among a stage's settings.

        Args:
            values: settings by name, those that were given.
            fields: the fields of the stage's config classes.

        Returns:
            The settings with a path for every `s3://` URI.

        Raises:
            UserError: a location cannot be used, or the output is another run's.
            SystemExit: with 0, the output is complete already.
        """
        self.values, self.fields = _only_the_start(values), fields
        self._check_settings()
        values = self.values
        outputs = {name: values[name] for name in (*DIRECTORIES, *FILES) if _is_remote(values.get(name))}
        self._check_outputs(outputs)
        self.run = self._identity(values)
        self._stop_if_done(str(values["output"]))
        fetched = self._fetch(values)
        self.sent = {name: (uri, self._work(uri)) for name, uri in outputs.items()}
        fetched |= {name: str(path) for name, (_, path) in self.sent.items()}
        if not values.get("dry_run") and _is_first():
            self._open(Path(fetched["output"]), self._log_directory(fetched))
        keeps = "output" in self.sent or bucket_of(values.get("executor_input"), fetched["output"])
        if keeps and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()  # all look for the checkpoint that the first one has fetched
        return fetched

    def _check_settings(self) -> None:
        for name in ("mirror_bandwidth", "mirror_keep", "lease_seconds", "grace_seconds"):
            if (value := self._setting(name)) is not None and value <= 0:
                raise UserError(f"{name} = {value}: must be above 0")

    def _setting(self, name: str) -> Any:
        return self.values.get(name, self.fields[name].default)

    def _log_directory(self, values: dict[str, Any]) -> Path | None:
        """Where a training stage writes its curves; None for a stage that does not train."""
        if "training_log" not in self.fields:
            return None
        return Path(values.get("training_log") or Path(values["output"]) / "training")

    def _check_outputs(self, outputs: dict[str, str]) -> None:
        """Every bucket can be written to: told now, not after hours."""
        if outputs:
            from components.common.storage.client import check_write, split

            for uri in outputs.values():
                check_write(split(uri))

    def _identity(self, values: dict[str, Any]) -> dict[str, Any]:
        """Settings that differ from their defaults, with a digest for every input, and one digest of it all."""
        settings = {
            name: _mapped(value, functools.partial(_input_digest, name))
            for name, value in values.items()
            if not name.startswith(FREE) and value != self.fields[name].default
        }
        settings = json.loads(json.dumps(settings, default=str, sort_keys=True))
        text = json.dumps([self.stage, _version(), settings], sort_keys=True)
        return {"stage": self.stage, "run": hashlib.sha256(text.encode()).hexdigest(), "settings": settings}

    def _stop_if_done(self, output: str) -> None:
        if self.values.get("overwrite"):
            return
        saved = self._saved_manifest(output)
        if saved is None or "run" not in saved:
            return
        refuse_other_run(output, saved, self.run)
        if self._besides_missing():
            return
        logger.info("already done: %s is the complete output of these inputs and settings", output)
        if _is_first():
            publish(self.values.get("executor_input"), saved.get("published"))
        sys.exit(0)

    def _saved_manifest(self, output: str) -> dict[str, Any] | None:
        if not _is_remote(output):
            return manifest.read(Path(output)) if Path(output).is_dir() else None
        from components.common.storage.client import split
        from components.common.storage.transfer import read_manifest

        return read_manifest(split(output))

    def _besides_missing(self) -> bool:
        """Whether an output beside the main one is missing."""
        paths = [self.values.get(name) for name in (*DIRECTORIES, *FILES)]
        return any(path and not _is_remote(path) and not Path(path).exists() for path in paths[1:])

    def _fetch(self, values: dict[str, Any]) -> dict[str, Any]:
        """Settings with a path for each input in a bucket."""
        inputs = {name: value for name, value in values.items() if name not in (*DIRECTORIES, *FILES)}
        return values | {name: _mapped(value, self._local) for name, value in inputs.items()}

    def _local(self, text: str) -> str:
        if not _is_remote(text):
            return text
        from components.common.storage.client import split
        from components.common.storage.transfer import download, version

        place = split(text)
        if self.values.get("dry_run"):
            scratch = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sapo-dry-run-"))
            return str(download(text, Path(scratch) / (place.key.rpartition("/")[2] or place.bucket), light=True))
        target = cache_directory() / "s3" / version(text)[:16] / place.bucket / place.key
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock"), wait=True):  # processes of one launch share the cache
            return str(download(text, target))

    def _work(self, uri: str) -> Path:
        """Where an output is made before it is sent; the same for the same run, so that it goes on after a restart."""
        from components.common.storage.client import split

        place = split(uri)
        return cache_directory() / "outputs" / self.run["run"][:16] / place.bucket / place.key

    def _open(self, output: Path, log: Path | None) -> None:
        """Makes this process the only writer of the output, and gets what an earlier pod has saved."""
        with contextlib.suppress(OSError):  # the stage says in its own words why its output cannot be made
            output.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(output.with_name(f".{output.name}.lock"), wait=False, what=f"--output {self.values['output']}")
        self._cleanup.enter_context(lock)
        if "output" not in self.sent:
            self._keep_beside_artifact(output, log)
            return
        from components.common.storage import mirror
        from components.common.storage.client import Location, split
        from components.common.storage.transfer import RUN, abort_uploads, delete, objects

        self._exit_on_sigterm()
        place = split(self.sent["output"][0])
        self.lease = Lease(place, self.run, self._setting("lease_seconds"))
        overwrite = bool(self.values.get("overwrite"))
        self.lease.acquire(overwrite)
        with contextlib.suppress(UserError):  # a key that may not list them can do all the rest
            abort_uploads(place)
        if overwrite:
            delete(place, [name for name in objects(place) if name != RUN])
        elif made := manifest.read(output):
            self._send(made)  # an earlier attempt has made it, and could not send it
            sys.exit(0)
        marker, checkpoints = MARKERS.get(self.stage, MARKER), output / "checkpoints"
        goes_on = self.stage in GO_ON or self.values.get("resume") or mirror.newest(checkpoints, marker)
        if overwrite or not goes_on:
            shutil.rmtree(output, ignore_errors=True)  # what a stage left that cannot go on from it
        kept = Location(place.bucket, f"{place.prefix}checkpoints")
        if log is not None or self.stage in FOLDERS:
            self._keep_checkpoints(output, log, kept, self.lease.check)

    def _keep_checkpoints(self, output: Path, log: Path | None, kept: "Location", check: Callable[[], None]) -> None:
        """Gets the newest checkpoint that an earlier pod has sent below `kept`, and sends those to come there."""
        from components.common.storage import mirror

        marker, checkpoints = MARKERS.get(self.stage, MARKER), output / "checkpoints"
        overwrite, scratch = self.values.get("overwrite"), output.with_name(f".{output.name}.mirror")
        keep, bandwidth = self._setting("mirror_keep"), self._setting("mirror_bandwidth")
        options = (marker, keep, bandwidth and bandwidth * 1e6, check)
        if self.stage in FOLDERS:
            if not overwrite:
                mirror.restore_folder(kept, output, marker)
            snapshots = output.with_name(f".{output.name}.snapshots")
            self.mirror = mirror.FolderMirror(output, snapshots, kept, scratch, *options)
        elif log is not None:
            if not overwrite:
                mirror.restore(kept, checkpoints, log, marker)
            self.mirror = mirror.Mirror(checkpoints, kept, scratch, log, *options)

    def _keep_beside_artifact(self, output: Path, log: Path | None) -> None:
        """In a pod of KFP: its launcher sends the output when all is done, and only then. Checkpoints go beside it meanwhile.

        They are an extra: where they cannot be kept, the stage runs all the same. The newest stays after the run, because
        nothing here tells whether the launcher has got through.
        """
        bucket = bucket_of(self.values.get("executor_input"), str(output))
        if bucket is None or log is None:
            return
        from components.common.storage.client import check_write, split

        kept = split(f"{bucket}-checkpoints")
        try:
            check_write(kept)
            self._keep_checkpoints(output, log, kept, lambda: None)
        except UserError as error:
            logger.warning("a new pod would begin anew, because checkpoints cannot be kept: %s", error)

    def _exit_on_sigterm(self) -> None:
        """Outside of training, where stages stop in their own way, SIGTERM leaves through `stop` too."""
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
            self._cleanup.callback(signal.signal, signal.SIGTERM, before)

    # ---- After it -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The stage is through: its output gets a manifest, and goes to the bucket."""
        if not self.run or self.values.get("dry_run") or not _is_first():
            return
        output = self.sent["output"][1] if "output" in self.sent else Path(self.values["output"])
        if not output.is_dir():
            return
        if self.mirror:
            self.mirror.cancel()
            if "output" not in self.sent:
                self.mirror.keep_newest()
        files = manifest.describe(output, [path for _, path in self.unneeded])
        made = manifest.make(files, **self.run, published=published(self.values.get("executor_input")))
        manifest.write(output, made)
        self._send(made)
        for remove, _ in self.unneeded:
            remove()

    def _send(self, made: dict[str, Any]) -> None:
        """Sends what goes to a bucket, the main output last."""
        for name, (uri, path) in self.sent.items():
            if name != "output":
                _send_beside(uri, path)
        if "output" not in self.sent:
            return
        from components.common.storage.client import split
        from components.common.storage.transfer import RUN, delete, objects, upload

        assert self.lease is not None
        uri, path = self.sent["output"]
        content = upload(path, uri, content=made, before_manifest=self.lease.check)
        place, complete = split(uri), {manifest.NAME, RUN, *content["files"]}
        delete(place, [name for name in objects(place) if name not in complete])  # checkpoints, an older output's files
        self.lease.end()
        logger.info("sent %d files to %s", len(content["files"]), uri)
        for _, sent in self.sent.values():
            shutil.rmtree(sent, ignore_errors=True) if sent.is_dir() else sent.unlink(missing_ok=True)

    def stop(self, code: Any) -> None:
        """The stage did not get through; its last checkpoint is sent first, within the grace period."""
        in_time = True
        if self.mirror and not (self.lease and self.lease.lost.is_set()):
            in_time = self.mirror.finish(self._setting("grace_seconds"))
            if not in_time:
                logger.warning(
                    "the grace period is over: the last checkpoint is not in the bucket, an older one may be"
                )
        if self.mirror and (in_time or code != TERMINATED):
            self.mirror.cancel()
        if self.lease and self.lease.etag:
            releasing = threading.Thread(target=self.lease.release, daemon=True)
            releasing.start()
            releasing.join(RELEASE_SECONDS)  # a store that is away must not keep a process that has to go
            in_time = in_time and not releasing.is_alive()
        if not in_time and code == TERMINATED:
            logging.shutdown()
            os._exit(TERMINATED)  # threads that still send would keep the process

    def close(self) -> None:
        self._cleanup.close()


def _send_beside(uri: str, path: Path) -> None:
    """Sends an output beside the main one: a directory, or a single file."""
    from components.common.storage.client import connect, explained, split
    from components.common.storage.transfer import upload

    place = split(uri)
    if path.is_dir():
        upload(path, uri)
    elif path.is_file():
        with explained(place):
            connect().upload_file(str(path), place.bucket, place.key)


def without_buckets(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as they look with a path for every `s3://` URI, for a check of them alone."""
    return {name: _mapped(value, lambda text: text.replace("s3://", "/", 1)) for name, value in values.items()}


def _only_the_start(values: dict[str, Any]) -> dict[str, Any]:
    """Of several models the one to start from: the others need not be fetched."""
    models, start = values.get("model"), values.get("start")
    return values | {"model": {start: models[start]}} if isinstance(models, dict) and start in models else values


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A setting with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _is_remote(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("s3://")


def _input_digest(name: str, text: str) -> str:
    """A digest of what an input holds, so that it may lie elsewhere; other settings as they are."""
    if _is_remote(text):
        from components.common.storage.transfer import version

        return version(text)
    if name in INPUTS and "://" not in text and Path(text).exists():
        return manifest.digest_of(Path(text))
    return text


def _version() -> str:
    try:
        return importlib.metadata.version("sapo-pipelines")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_first() -> bool:
    """Whether this process is the first of its launch (`accelerate launch`, torchrun)."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _locked(path: Path, wait: bool, what: str = "") -> Iterator[None]:
    """Holds a lock file, which the system frees when the process dies.

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
