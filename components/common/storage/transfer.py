"""Directories to and from a bucket: in parallel, checked against sha256 end to end, and never half-done under the last name.

Uploads write the manifest last, and skip files that are there already with an equal digest. Downloads go to a directory
beside, which takes its name when every file in it is right; what an interrupted one left is used by the next.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from components.common.core.errors import UserError
from components.common.core.progress import progress
from components.common.storage import manifest
from components.common.storage.client import CONNECTIONS, Location, check_read, code_of, connect, explained, split
from components.common.storage.manifest import Files

logger = logging.getLogger(__name__)

PART = 16 * 2**20  # bytes of a part of a multipart transfer
TRIES = 3  # of a download whose digest is wrong
RUN = ".run.json"  # whose output this is, while it is not complete; see lease.py


def objects(place: Location) -> dict[str, dict[str, Any]]:
    """The objects below a prefix by their names relative to it, as the store lists them."""
    with explained(place):
        pages = connect().get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=place.prefix)
        listed = [entry for page in pages for entry in page.get("Contents", [])]
    names = {entry["Key"].removeprefix(place.prefix): entry for entry in listed}
    return {name: entry for name, entry in names.items() if name and not name.endswith("/")}


def read_object(place: Location, name: str) -> tuple[bytes, str] | None:
    """A small object below a prefix and its ETag; None where there is none."""
    from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

    for tries_left in reversed(range(TRIES)):
        with explained(place):
            try:
                answer = connect().get_object(Bucket=place.bucket, Key=place.prefix + name)
                return answer["Body"].read(), answer["ETag"]
            except ClientError as error:
                if code_of(error) in ("NoSuchKey", "404"):
                    return None
                raise
            except (HTTPClientError, IncompleteReadError):  # the body broke off, which botocore does not try again
                if not tries_left:
                    raise
    raise AssertionError("unreachable")


def read_manifest(place: Location) -> dict[str, Any] | None:
    """The manifest of a complete prefix; None where it is not one."""
    found = read_object(place, manifest.NAME)
    return None if found is None else manifest.parse(found[0], place)


def delete(place: Location, names: Iterable[str]) -> None:
    """Deletes objects below a prefix, the manifest first: what is half deleted does not look complete."""
    wanted = sorted(names, key=lambda name: name.rpartition("/")[2] != manifest.NAME)
    with explained(place):
        for name in wanted:
            connect().delete_object(Bucket=place.bucket, Key=place.prefix + name)


def abort_uploads(place: Location) -> None:
    """Gives up multipart uploads below a prefix: a store keeps, and charges for, the parts that a killed process has sent."""
    with explained(place):
        pages = connect().get_paginator("list_multipart_uploads").paginate(Bucket=place.bucket, Prefix=place.prefix)
        for upload in [entry for page in pages for entry in page.get("Uploads", [])]:
            connect().abort_multipart_upload(Bucket=place.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


class CancelledError(Exception):
    """A transfer was given up because it was told to."""


def upload(
    directory: Path,
    uri: str,
    *,
    content: dict[str, Any] | None = None,
    bandwidth: float | None = None,
    cancelled: threading.Event | None = None,
    before_manifest: Callable[[], None] = lambda: None,
    show: bool = True,
) -> dict[str, Any]:
    """Sends a directory's files, and its manifest when all of them are there.

    Args:
        content: the manifest; made of all files where it is not given. A file with `at` is not sent: it lies there, relative to
            the parent of `uri`.
        bandwidth: bytes a second, at most.
        cancelled: gives the upload up when it is set.
        before_manifest: is called when only the manifest is missing; what it raises leaves the upload incomplete.
        show: a progress bar.

    Returns:
        The manifest.

    Raises:
        UserError: the store refuses, or does not answer.
        CancelledError: `cancelled` was set.
    """
    place = split(uri)
    content = content or manifest.make(manifest.describe(directory))
    files: Files = content["files"]
    there = objects(place)
    if manifest.NAME in there:
        delete(place, [manifest.NAME])  # before the first file under it changes
    missing = _not_there(place, {name: file for name, file in files.items() if "at" not in file}, there)
    with explained(place), _transfers(bandwidth) as manager, _bar(files, missing, f"to {place}", show) as bar:
        futures = [
            manager.upload(
                str(directory / name),
                place.bucket,
                place.prefix + name,
                extra_args={"Metadata": {"sha256": files[name]["sha256"]}},
                subscribers=[bar],
            )
            for name in missing
        ]
        _wait(futures, cancelled)
    _check_sizes(place, files)
    before_manifest()
    put_json(place, manifest.NAME, content)
    return content


def put_json(place: Location, name: str, content: Any, **conditions: str) -> str:
    """Writes a small object and returns its ETag."""
    with explained(place):
        body = json.dumps(content, indent=1).encode()
        return connect().put_object(Bucket=place.bucket, Key=place.prefix + name, Body=body, **conditions)["ETag"]


def _not_there(place: Location, files: Files, there: dict[str, dict[str, Any]]) -> list[str]:
    """Files that are not in the bucket with an equal digest."""

    def differs(name: str) -> bool:
        if name not in there or there[name]["Size"] != files[name]["size"]:
            return True
        head = connect().head_object(Bucket=place.bucket, Key=place.prefix + name)
        return head["Metadata"].get("sha256") != files[name]["sha256"]

    with explained(place), ThreadPoolExecutor(8) as pool:
        return [name for name, wanted in zip(files, pool.map(differs, files), strict=True) if wanted]


def _check_sizes(place: Location, files: Files) -> None:
    there = objects(place)
    for name, file in files.items():
        if "at" not in file and (name not in there or there[name]["Size"] != file["size"]):
            raise UserError(
                f"{place}/{name}: did not arrive whole; another process may write there. Run the command again"
            )


@contextlib.contextmanager
def _transfers(bandwidth: float | None = None) -> Iterator[Any]:
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(
        multipart_threshold=PART,
        multipart_chunksize=PART,
        max_concurrency=CONNECTIONS // 2,
        max_bandwidth=None if bandwidth is None else int(bandwidth),
        num_download_attempts=10,
    )
    with create_transfer_manager(connect(), config) as manager:
        yield manager


def _wait(futures: list[Any], cancelled: threading.Event | None) -> None:
    """Waits for all; raises what the first that failed has raised."""
    while cancelled is not None:
        if cancelled.is_set():
            raise CancelledError  # the manager's exit cancels what is under way
        if all(future.done() for future in futures):
            break
        cancelled.wait(0.1)
    for future in futures:
        future.result()


class _Bar:
    """A progress bar as s3transfer's subscriber; a part that is sent again counts back."""

    def __init__(self, total: int, description: str, show: bool) -> None:
        from tqdm import tqdm

        options: dict[str, Any] = {"total": total, "desc": description, "unit": "B", "unit_scale": True}
        self.bar = progress(**options) if show else tqdm(disable=True)
        self.lock = threading.Lock()

    def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
        with self.lock:
            self.bar.update(bytes_transferred)

    def on_queued(self, future: Any, **kwargs: Any) -> None:
        """Nothing to show."""

    def on_done(self, future: Any, **kwargs: Any) -> None:
        """Nothing to show."""


@contextlib.contextmanager
def _bar(files: Files, names: list[str], description: str, show: bool) -> Iterator[_Bar]:
    total = sum(files[name]["size"] for name in names)
    bar = _Bar(total, description, show and total >= PART)
    with contextlib.closing(bar.bar):
        yield bar


WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")


def download(uri: str, target: Path, *, light: bool = False) -> Path:
    """Fetches a file, or all below a prefix, to `target`, which exists afterwards only if every byte is right.

    What has a manifest is checked against its sha256; other people's files against the sizes that the store lists and, where
    the store keeps them, its checksums.

    Args:
        light: leaves weights out; for a look at a model.

    Raises:
        UserError: there is nothing, it is the output of a run that has not ended, it is damaged, or the disk is too small.
    """
    place = split(uri)
    if target.exists():
        return target
    content = read_manifest(place)
    files = _listed(place) if content is None else content["files"]
    if not files:
        _fetch_file(place, target)
        return target
    wanted = {name: file for name, file in files.items() if not (light and name.endswith(WEIGHTS))}
    _fetch(place, wanted, target)
    return target


def _listed(place: Location) -> Files:
    """The files of a prefix without a manifest; empty where there is none."""
    there = objects(place)
    if RUN in there:
        raise UserError(f"{place}: is the output of a run that has not ended (no {manifest.NAME}); let it end first")
    return {name: {"size": entry["Size"], "etag": entry["ETag"]} for name, entry in there.items()}


def version(uri: str) -> str:
    """A digest that changes when what is at the URI does: of the manifest, or of the store's ETags.

    Raises:
        UserError: there is nothing there, or the output of a run that has not ended.
    """
    place = split(uri)
    check_read(place)
    if (content := read_manifest(place)) is not None:
        return manifest.digest(content["files"])
    files = _listed(place) or {"": {"etag": _head(place)["ETag"]}}
    return manifest.digest({name: {"sha256": file["etag"]} for name, file in files.items()})


def _head(place: Location) -> dict[str, Any]:
    from botocore.exceptions import ClientError

    with explained(place):
        try:
            return connect().head_object(Bucket=place.bucket, Key=place.key)
        except ClientError as error:
            if code_of(error) not in ("404", "NoSuchKey"):
                raise
    raise UserError(f"{place}: there is no such object, and nothing below it")


def _fetch_file(place: Location, target: Path) -> None:
    """One object as a file."""
    folder, _, name = place.key.rpartition("/")
    size = _head(place)["ContentLength"]
    partial = target.with_name(f"{target.name}.partial")
    _get(Location(place.bucket, folder), {name: {"size": size}}, partial)
    (partial / name).rename(target)
    partial.rmdir()


def _fetch(place: Location, files: Files, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    _get(place, files, partial)
    for path in set(manifest.files_in(partial).values()) - {partial / name for name in files}:
        path.unlink()  # of an interrupted download of what was there before
    if all("sha256" in file for file in files.values()):
        manifest.write(partial, manifest.make(files))
    partial.rename(target)


def _get(place: Location, files: Files, partial: Path) -> None:
    """Downloads what is not in `partial` yet, until all of it is right."""
    partial.mkdir(parents=True, exist_ok=True)
    wrong = [name for name, file in files.items() if not _right(partial / name, file)]
    for _ in range(TRIES):
        if not wrong:
            return
        _require_space(partial, sum(files[name]["size"] for name in wrong))
        wrong = _try_once(place, files, wrong, partial)
    if wrong:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{place}/{wrong[0]}: is damaged in the store (size or sha256 differ); write {place} anew")


def _try_once(place: Location, files: Files, names: list[str], partial: Path) -> list[str]:
    """Downloads some files, and returns those that are not right; each is compared while others are on their way."""
    from botocore.exceptions import ClientError

    targets = {name: _target(partial / name, files[name]) for name in names}
    with explained(place), _transfers() as manager, _bar(files, names, f"from {place}", True) as bar:
        futures = {
            name: manager.download(place.bucket, _key(place, name, files[name]), target, subscribers=[bar])
            for name, target in targets.items()
        }

        def is_right(name: str) -> bool:
            try:
                futures[name].result()
            except ClientError as error:
                if code_of(error) not in ("404", "NoSuchKey"):
                    raise
                return False
            target = targets[name]
            return target.is_right() if isinstance(target, _Arriving) else _right(partial / name, files[name])

        with ThreadPoolExecutor(4) as pool:
            return [name for name, right in zip(names, pool.map(is_right, names), strict=True) if not right]


def _key(place: Location, name: str, file: dict[str, Any]) -> str:
    """The key of a file of a prefix, which may share it with another prefix beside it."""
    if "at" not in file:
        return place.prefix + name
    return f"{place.key.rpartition('/')[0]}/{file['at']}".lstrip("/")


class _Arriving:
    """A file that is hashed while it is written: to read it again costs a third of what the download takes.

    s3transfer gives an object without `seek` the bytes in their order, from one thread, if the transfer is in parts; after a
    broken answer it would repeat bytes in one that is not.

    Args:
        path: of the file.
        wanted: its size and sha256.
    """

    def __init__(self, path: Path, wanted: dict[str, Any]) -> None:
        self.path = path
        self.wanted = wanted
        self.digest = hashlib.sha256()
        self.size = 0
        self.file: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        self.file = self.file or self.path.open("wb")  # not before: there may be more files than a process may open
        self.digest.update(data)
        self.file.write(data)
        self.size += len(data)

    def is_right(self) -> bool:
        """Whether what came is what was wanted; closes the file."""
        if self.file:
            self.file.close()
        return (self.size, self.digest.hexdigest()) == (self.wanted["size"], self.wanted["sha256"])


def _target(path: Path, file: dict[str, Any]) -> "str | _Arriving":
    path.parent.mkdir(parents=True, exist_ok=True)
    return _Arriving(path, file) if "sha256" in file and file["size"] >= PART else str(path)


def _right(path: Path, file: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != file["size"]:
        return False
    return "sha256" not in file or manifest.sha256(path) == file["sha256"]


def _require_space(directory: Path, size: int) -> None:
    if (free := shutil.disk_usage(directory).free) < size:
        raise UserError(
            f"{directory}: {size / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} are free; free some space"
        )
