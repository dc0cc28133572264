"""A stage and its locations: `s3://` inputs are fetched before it runs, outputs are sent after, and the stage sees paths only.

It also keeps a stage from running twice: a complete output of the same inputs and settings ends it at once.
"""

import contextlib
import importlib.metadata
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.core import identity
from components.common.core.errors import TERMINATED, UserError
from components.common.core.identity import OUTPUTS, Role, refuse_other_run
from components.common.stage.config import Resumption, StageConfig
from components.common.stage.inputs import contents, is_remote, mapped
from components.common.stage.kfp import bucket_of, publish, published
from components.common.storage import manifest
from components.common.storage.lease import Lease
from components.common.storage.locations import cache_directory
from components.common.storage.locks import locked

if TYPE_CHECKING:
    from components.common.storage.client import Location

logger = logging.getLogger(__name__)

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
        self.run: dict[str, Any] = {}  # stage, digest and identity; empty until the settings are known
        self.values: dict[str, Any] = {}
        self.roles: dict[str, Role] = {}
        self.resumption: Resumption | None = None
        self.config: StageConfig  # for settings that are no text: in its texts no bucket is named (`without_buckets`)
        self.sent: dict[str, tuple[str, Path]] = {}  # of each output in a bucket, its URI and the path it is made at
        self.unneeded: list[tuple[Callable[[], object], Path]] = []  # see `when_complete`
        self.lease: Lease | None = None
        self.mirror: Any = None
        self._cleanup = contextlib.ExitStack()

    # ---- Before the stage runs ------------------------------------------------------------------------------------

    def prepare(
        self,
        values: dict[str, Any],
        configs: Sequence[Any],
        roles: dict[str, Role],
        resumption: Resumption | None,
        wait_for_others: Callable[[], None],
    ) -> dict[str, Any]:
        """Checks and resolves the locations among a stage's settings.

        Args:
            values: settings by name, as they were given, and defaults.
            configs: the stage's config objects with paths in place of buckets; the first one is a `StageConfig`.
            roles: of settings, by name.
            resumption: what the stage says of how it goes on.
            wait_for_others: returns when every process of the launch has called it.

        Returns:
            The settings with a path for every `s3://` URI.

        Raises:
            UserError: a location cannot be used, or the output is another run's.
            SystemExit: with 0, the output is complete already.
        """
        self.values = values
        self.config = configs[0]
        self.roles = roles
        self.resumption = resumption
        self._check_settings()
        outputs = {name: values[name] for name in self._output_names() if is_remote(values.get(name))}
        self._check_outputs(outputs)
        self.run = self._identify(configs)
        self._stop_if_done(str(values["output"]))

        fetched = self._fetch(values)
        self.sent = {name: (uri, self._work(uri)) for name, uri in outputs.items()}
        fetched |= {name: str(path) for name, (_, path) in self.sent.items()}
        if not self.config.dry_run and _is_first():
            self._open(Path(fetched["output"]), self._log_directory(fetched))
        if "output" in self.sent or bucket_of(self.values.get("executor_input"), fetched["output"]):
            wait_for_others()  # all look for the checkpoint that the first one has fetched
        return fetched

    def _check_settings(self) -> None:
        for name in ("mirror_bandwidth", "mirror_keep", "lease_seconds", "grace_seconds"):
            if (value := getattr(self.config, name)) is not None and value <= 0:
                raise UserError(f"{name} = {value}: must be above 0")

    def _output_names(self) -> list[str]:
        """Settings that say where results go; `output` is the main one."""
        return [name for name, role in self.roles.items() if role in OUTPUTS]

    def _log_directory(self, values: dict[str, Any]) -> Path | None:
        """Where a stage writes its curves; None for one that has none."""
        if self.resumption is None or self.resumption.log is None:
            return None
        name, default = self.resumption.log
        return Path(values.get(name) or Path(values["output"]) / default)

    def _check_outputs(self, outputs: dict[str, str]) -> None:
        """Every bucket can be written to: told now, not after hours."""
        if outputs:
            from components.common.storage.client import check_write, split

            for uri in outputs.values():
                check_write(split(uri))

    def _identify(self, configs: Sequence[Any]) -> dict[str, Any]:
        """What the run is, and one digest of it."""
        derived = {"stage": self.stage}
        for config in configs:
            if compare := getattr(config, "derived", None):
                derived |= compare(configs[0])
        mine = identity.identity_of(
            configs, contents(self.values, self.roles), derived, scope={"version of this program": _version()}
        )
        return {"stage": self.stage, "run": identity.digest(mine), "identity": mine}

    def _stop_if_done(self, output: str) -> None:
        if self.config.overwrite:
            return
        saved = self._saved_manifest(output)
        if saved is None or "run" not in saved:
            return
        mine = self.run["identity"]
        refuse_other_run(f"--output {output}", saved.get("identity"), mine, complete=not self._extends(output))
        if identity.differences(saved["identity"], mine, complete=True) or self._besides_missing():
            return
        logger.info("already done: %s is the complete output of these inputs and settings", output)
        if _is_first():
            publish(self.values.get("executor_input"), saved.get("published"))
        sys.exit(0)

    def _extends(self, output: str) -> bool:
        """Whether the stage is told to go on in a complete output; in a bucket it cannot."""
        name = self.resumption.extends if self.resumption else None
        return name is not None and bool(self.values[name]) and not is_remote(output)

    def _saved_manifest(self, output: str) -> dict[str, Any] | None:
        if not is_remote(output):
            return manifest.read(Path(output)) if Path(output).is_dir() else None
        from components.common.storage.client import split
        from components.common.storage.transfer import read_manifest

        return read_manifest(split(output))

    def _besides_missing(self) -> bool:
        """Whether an output beside the main one is missing."""
        paths = [self.values.get(name) for name in self._output_names() if name != "output"]
        return any(path and not is_remote(path) and not Path(path).exists() for path in paths)

    def _fetch(self, values: dict[str, Any]) -> dict[str, Any]:
        """Settings with a path for each input in a bucket."""
        outputs = self._output_names()
        return values | {name: mapped(value, self._local) for name, value in values.items() if name not in outputs}

    def _local(self, text: str) -> str:
        if not is_remote(text):
            return text
        from components.common.storage.client import split
        from components.common.storage.transfer import download, version

        place = split(text)
        if self.config.dry_run:
            scratch = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sapo-dry-run-"))
            return str(download(text, Path(scratch) / (place.key.rpartition("/")[2] or place.bucket), light=True))
        target = cache_directory() / "s3" / version(text)[:16] / place.bucket / place.key
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f"{target.name}.lock"), wait=True):  # processes of one launch share the cache
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
        lock = locked(output.with_name(f".{output.name}.lock"), wait=False, what=f"--output {self.values['output']}")
        self._cleanup.enter_context(lock)
        if "output" not in self.sent:
            self._keep_beside_artifact(output, log)
            return
        from components.common.storage import mirror
        from components.common.storage.client import Location, split
        from components.common.storage.transfer import RUN, abort_uploads, delete, objects

        self._exit_on_sigterm()
        place = split(self.sent["output"][0])
        self.lease = Lease(place, self.run, self.config.lease_seconds)
        overwrite = self.config.overwrite
        self.lease.acquire(overwrite)
        with contextlib.suppress(UserError):  # a key that may not list them can do all the rest
            abort_uploads(place)
        if overwrite:
            delete(place, [name for name in objects(place) if name != RUN])
        elif made := manifest.read(output):
            self._send(made)  # an earlier attempt has made it, and could not send it
            sys.exit(0)
        how = self.resumption
        goes_on = how and (how.from_output or mirror.newest(output / "checkpoints", how.marker))
        if overwrite or not goes_on:
            shutil.rmtree(output, ignore_errors=True)  # what a stage left that cannot go on from it
        if how:
            kept = Location(place.bucket, f"{place.prefix}checkpoints")
            self._keep_checkpoints(how, output, log, kept, self.lease.check)

    def _keep_checkpoints(
        self, how: Resumption, output: Path, log: Path | None, kept: "Location", check: Callable[[], None]
    ) -> None:
        """Gets the newest checkpoint that an earlier pod has sent below `kept`, and sends those to come there."""
        from components.common.storage import mirror

        checkpoints, scratch = output / "checkpoints", output.with_name(f".{output.name}.mirror")
        bandwidth = self.config.mirror_bandwidth
        options = (how.marker, self.config.mirror_keep, bandwidth and bandwidth * 1e6, check)
        if how.at_any_moment:
            if not self.config.overwrite:
                mirror.restore_folder(kept, output, how.marker)
            snapshots = output.with_name(f".{output.name}.snapshots")
            self.mirror = mirror.FolderMirror(output, snapshots, kept, scratch, *options)
        elif log is not None:
            if not self.config.overwrite:
                mirror.restore(kept, checkpoints, log, how.marker)
            self.mirror = mirror.Mirror(checkpoints, kept, scratch, log, *options)

    def _keep_beside_artifact(self, output: Path, log: Path | None) -> None:
        """In a pod of KFP: its launcher sends the output when all is done, and only then. Checkpoints go beside it meanwhile.

        They are an extra: where they cannot be kept, the stage runs all the same. The newest stays after the run, because
        nothing here tells whether the launcher has got through.
        """
        bucket = bucket_of(self.values.get("executor_input"), str(output))
        if bucket is None or log is None or self.resumption is None:
            return
        from components.common.storage.client import check_write, split

        kept = split(f"{bucket}-checkpoints")
        try:
            check_write(kept)
            self._keep_checkpoints(self.resumption, output, log, kept, lambda: None)
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
        if not self.run or self.config.dry_run or not _is_first():
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
            in_time = self.mirror.finish(self.config.grace_seconds)
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


def _version() -> str:
    try:
        return importlib.metadata.version("sapo-pipelines")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_first() -> bool:
    """Whether this process is the first of its launch (`accelerate launch`, torchrun)."""
    return os.environ.get("RANK", "0") == "0"
