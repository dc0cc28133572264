"""Checkpoints of a run under way, in a real store: newest first, whole, few, and found again by an empty disk."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.common.core.errors import UserError
from components.common.storage import client, manifest, mirror, transfer
from components.common.storage.client import Location, connect
from components.common.storage.mirror import FolderMirror, Mirror
from faults.proxy import FaultProxy
from faults.store import BUCKET

MARKER = "manifest.json"


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Location:
    return Location(BUCKET, f"mirror/{request.node.originalname}")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    root = tmp_path / "disk"
    (root / "checkpoints").mkdir(parents=True)
    return root


@pytest.fixture
def start(store, disk: Path, place: Location) -> Iterator[Callable[..., Mirror]]:
    started = []

    def begin(**options: object) -> Mirror:
        settings = {"keep": 2, "bandwidth": None, "check": lambda: None} | options
        paths = disk / "checkpoints", place, disk / "scratch", disk / "log", MARKER
        started.append(Mirror(*paths, **settings))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for running in started:
        running.cancel()


def save(disk: Path, step: int, size: int = 1000) -> Path:
    """A checkpoint as a stage writes it: the marker last."""
    directory = disk / "checkpoints" / f"checkpoint-{step}"
    directory.mkdir()
    (directory / "policy.safetensors").write_bytes(os.urandom(size))
    (directory / MARKER).write_text(json.dumps({"step": step}))
    return directory


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_an_empty_disk_gets_the_newest_checkpoint_and_the_log(start, disk, place, tmp_path):
    (disk / "log").mkdir()
    (disk / "log" / "pairs.jsonl").write_text("a pair\n")
    running = start()
    save(disk, 1)
    newest = save(disk, 20)
    assert running.finish(20)
    empty = tmp_path / "empty"
    assert mirror.restore(place, empty / "checkpoints", empty / "log", MARKER) == 20
    there = empty / "checkpoints" / "checkpoint-20"
    assert (there / "policy.safetensors").read_bytes() == (newest / "policy.safetensors").read_bytes()
    assert (empty / "log" / "pairs.jsonl").read_text() == "a pair\n"


def test_an_unfinished_checkpoint_is_left_alone(start, disk, place):
    running = start()
    (save(disk, 1) / MARKER).unlink()
    (save(disk, 2) / MARKER).write_text("{")
    assert running.finish(20)
    assert mirror.mirrored(place) == []


def test_the_bucket_keeps_the_newest_few(start, disk, place):
    running = start(keep=2)
    for step in (1, 2, 3, 10):
        save(disk, step)
        wait_for(lambda step=step: running.uploaded == step)
    assert running.finish(20)
    assert mirror.mirrored(place) == [3, 10]
    assert {name.split("/")[0] for name in transfer.objects(place)} == {"checkpoint-3", "checkpoint-10"}


@pytest.mark.slow
def test_slow_uploads_bound_bandwidth_and_backlog_and_outlive_the_stages_own_removal(start, disk, place):
    running = start(bandwidth=1e6)
    first = save(disk, 1, size=2_000_000)
    started = time.monotonic()
    wait_for(lambda: (disk / "scratch" / "checkpoint-1").is_dir())
    shutil.rmtree(first)  # the stage keeps few on its disk
    for step in (2, 3, 4):
        save(disk, step)
    wait_for(lambda: running.uploaded == 1)
    assert time.monotonic() - started > 1.0  # two megabytes at one a second
    assert running.finish(20)
    assert mirror.mirrored(place) == [1, 4]  # 2 and 3 were passed over


def test_a_grace_period_that_is_too_short_leaves_nothing_that_looks_complete(start, disk, place):
    running = start(bandwidth=2e5)
    save(disk, 1, size=3_000_000)
    started = time.monotonic()
    assert not running.finish(0.5)
    assert time.monotonic() - started < 2
    running.cancel()
    assert mirror.mirrored(place) == []


def test_who_has_lost_the_output_writes_no_manifest(start, disk, place):
    def lost() -> None:
        raise UserError("another process has taken over")

    running = start(check=lost)
    save(disk, 1)
    wait_for(lambda: any(name.endswith("policy.safetensors") for name in transfer.objects(place)))
    running.cancel()
    assert mirror.mirrored(place) == []


@pytest.mark.slow
def test_a_store_that_is_away_is_tried_again(start, store, disk, place, monkeypatch):
    proxy = FaultProxy(store.endpoint, seed=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client.connect.cache_clear()
    running = start()
    proxy.spoil(1.0, "failed")
    save(disk, 1)
    wait_for(lambda: proxy.done["failed"] >= 2)
    assert running.uploaded == -1
    proxy.spoil(0.0)
    wait_for(lambda: running.uploaded == 1)
    proxy.close()


def test_a_damaged_checkpoint_gives_way_to_an_older_one(start, disk, place, tmp_path):
    running = start()
    for step in (1, 2):
        save(disk, step)
        wait_for(lambda step=step: running.uploaded == step)
    key = f"{place.prefix}checkpoint-2/policy.safetensors"
    connect().put_object(Bucket=BUCKET, Key=key, Body=os.urandom(1000))
    assert mirror.restore(place, tmp_path / "new", tmp_path / "log", MARKER) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint-1"]


def test_a_disk_that_has_as_new_a_checkpoint_fetches_none(start, disk, place):
    running = start()
    save(disk, 5)
    assert running.finish(20)
    assert mirror.restore(place, disk / "checkpoints", disk / "log", MARKER) is None
    shutil.rmtree(disk / "checkpoints" / "checkpoint-5")
    save(disk, 4)
    assert mirror.restore(place, disk / "checkpoints", disk / "log", MARKER) == 5


def test_what_the_bucket_has_is_not_sent_again(start, disk, place):
    running = start()
    save(disk, 3)
    assert running.finish(20)
    before = transfer.objects(place)
    assert start().finish(20)
    assert transfer.objects(place) == before


def test_a_large_file_that_stays_as_it_is_is_sent_once_and_outlives_its_checkpoint(
    start, disk, place, tmp_path, monkeypatch
):
    monkeypatch.setattr(mirror, "SHARED_FROM", 5000)
    mirror_of = start(keep=1)
    model = os.urandom(5000)
    for step in (1, 2, 3):
        directory = save(disk, step)
        (directory / "start.safetensors").write_bytes(model)
        os.utime(directory / MARKER)
        wait_for(lambda step=step: mirror.mirrored(place) == [step])
    names = set(transfer.objects(place))
    assert {name for name in names if "start" in name} == {"checkpoint-1/start.safetensors"}
    assert {name.split("/")[0] for name in names} == {"checkpoint-1", "checkpoint-3"}
    mirror_of.cancel()
    assert mirror.restore(place, tmp_path / "other", tmp_path / "log", MARKER) == 3
    assert (tmp_path / "other" / "checkpoint-3" / "start.safetensors").read_bytes() == model
    transfer.delete(place, ["checkpoint-1/start.safetensors"])  # as good as damaged: nothing to go on from
    assert mirror.restore(place, tmp_path / "third", tmp_path / "log", MARKER) is None


@pytest.fixture
def folder(store, disk: Path, place: Location, monkeypatch) -> Iterator[Callable[[Path], FolderMirror]]:
    """Mirrors an output as a whole."""
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_COPIES", 0.05)
    started = []

    def begin(output: Path) -> FolderMirror:
        places = output, disk / "snapshots", place, disk / "scratch"
        started.append(FolderMirror(*places, MARKER, keep=2, bandwidth=None, check=lambda: None))
        return started[-1]

    yield begin
    for running in started:
        running.cancel()


def test_a_folder_is_sent_as_it_grows_and_found_again(folder, disk, place, tmp_path):
    output = disk / "output"
    output.mkdir()
    (output / "answers.jsonl").write_text("1\n")
    running = folder(output)
    time.sleep(0.5)
    assert mirror.mirrored(place) == []  # not before the stage has written its marker
    (output / MARKER).write_text('{"settings": 1}')
    wait_for(lambda: mirror.mirrored(place) == [0])
    (output / "answers.jsonl").write_text("1\n2\n")
    assert running.finish(20)
    assert mirror.mirrored(place) == [0, 1]
    assert mirror.restore_folder(place, output, MARKER) is None  # this disk has gone further
    assert mirror.restore_folder(place, tmp_path / "other", MARKER) == 1
    assert {p.name: p.read_text() for p in (tmp_path / "other").iterdir()} == {
        p.name: p.read_text() for p in output.iterdir()
    }
    assert manifest.read(tmp_path / "other") is None  # it is no complete output


def test_a_folder_that_stays_as_it_is_is_sent_once(folder, disk, place):
    output = disk / "output"
    output.mkdir()
    (output / MARKER).write_text('{"settings": 1}')
    running = folder(output)
    wait_for(lambda: mirror.mirrored(place) == [0])
    time.sleep(0.5)
    assert running.finish(20)
    assert mirror.mirrored(place) == [0]


@pytest.mark.slow
def test_what_changes_while_a_folder_cannot_be_sent_is_sent_in_the_end(folder, disk, place, tmp_path, monkeypatch):
    output = disk / "output"
    output.mkdir()
    (output / "answers.jsonl").write_text("1\n")
    (output / MARKER).write_text('{"settings": 1}')
    away = threading.Event()

    def upload(*arguments, **options):
        if not away.is_set():
            (output / "answers.jsonl").write_text("1\n2\n")
            away.set()
            raise UserError("the store does not answer")
        return real(*arguments, **options)

    real = transfer.upload
    monkeypatch.setattr(transfer, "upload", upload)
    running = folder(output)
    assert away.wait(20)
    assert running.finish(20)
    assert mirror.restore_folder(place, tmp_path / "other", MARKER) is not None
    assert (tmp_path / "other" / "answers.jsonl").read_text() == "1\n2\n"
