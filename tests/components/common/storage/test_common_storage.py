"""Directories to and from a real store: whole, checked, resumed; and what goes wrong told in one line."""

import datetime
import json
import os
import threading
from pathlib import Path

import botocore.auth
import pytest

from components.common.core.errors import UserError
from components.common.storage import client, manifest, transfer
from components.common.storage.client import connect, split
from faults.proxy import FaultProxy
from faults.store import BUCKET, READER_KEY, READER_SECRET

PART = transfer.PART


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with a small file, a nested one, an empty one and one of several parts."""
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    (root / "small.json").write_text("{}")
    (root / "empty").touch()
    (root / "deep" / "ünï code.txt").write_text("text")
    (root / "big.safetensors").write_bytes(os.urandom(2**20) * (PART // 2**20 + 1))
    return root


@pytest.fixture
def uri(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.originalname}"


def contents(directory: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in manifest.files_in(directory).items()}


def test_what_comes_back_is_what_was_sent(store, tree, uri, tmp_path):
    sent = transfer.upload(tree, uri)
    back = transfer.download(uri, tmp_path / "back")
    assert contents(back) == contents(tree)
    assert manifest.read(back)["files"] == sent["files"]
    assert transfer.version(uri) == manifest.digest_of(tree) == manifest.digest_of(back)


def test_a_second_upload_sends_only_what_changed(store, tree, uri, monkeypatch):
    transfer.upload(tree, uri)
    before = {name: entry["LastModified"] for name, entry in transfer.objects(split(uri)).items()}
    (tree / "small.json").write_text("[]")  # of equal size
    sent = []
    monkeypatch.setattr(
        transfer, "_bar", lambda files, names, *rest: sent.extend(names) or _real_bar(files, names, *rest)
    )
    transfer.upload(tree, uri)
    assert sent == ["small.json"]
    assert transfer.objects(split(uri))["big.safetensors"]["LastModified"] == before["big.safetensors"]


_real_bar = transfer._bar


def test_a_prefix_without_its_manifest_is_not_taken_for_complete(store, tree, uri, tmp_path):
    def die() -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        transfer.upload(tree, uri, before_manifest=die)
    assert transfer.read_manifest(split(uri)) is None
    connect().put_object(Bucket=BUCKET, Key=f"{split(uri).key}/{transfer.RUN}", Body=b"{}")
    with pytest.raises(UserError, match="is the output of a run that has not ended"):
        transfer.download(uri, tmp_path / "back")


def test_an_upload_over_a_complete_prefix_takes_its_manifest_away_first(store, tree, uri):
    transfer.upload(tree, uri)
    (tree / "small.json").write_text("[1]")
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(transfer.CancelledError):
        transfer.upload(tree, uri, cancelled=cancelled)
    assert transfer.read_manifest(split(uri)) is None


def test_other_peoples_files_are_fetched_too(store, uri, tmp_path):
    connect().put_object(Bucket=BUCKET, Key=f"{split(uri).key}/train.jsonl", Body=b"a row")
    assert contents(transfer.download(uri, tmp_path / "all")) == {"train.jsonl": b"a row"}
    assert transfer.download(f"{uri}/train.jsonl", tmp_path / "one.jsonl").read_bytes() == b"a row"
    before = transfer.version(uri)
    connect().put_object(Bucket=BUCKET, Key=f"{split(uri).key}/train.jsonl", Body=b"2 row")
    assert transfer.version(uri) != before


def test_a_changed_object_is_found_out(store, tree, uri, tmp_path):
    transfer.upload(tree, uri)
    connect().put_object(Bucket=BUCKET, Key=f"{split(uri).key}/small.json", Body=b"[]")
    with pytest.raises(UserError, match=r"small\.json: is damaged in the store"):
        transfer.download(uri, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "back.partial").exists()


def test_an_interrupted_download_goes_on_and_trusts_nothing(store, tree, uri, tmp_path, monkeypatch):
    transfer.upload(tree, uri)
    partial = tmp_path / "back.partial"
    partial.mkdir()
    (partial / "big.safetensors").write_bytes((tree / "big.safetensors").read_bytes())
    (partial / "small.json").write_text("[]")  # right size, wrong content
    (partial / "of-an-older-version").touch()
    fetched = []
    monkeypatch.setattr(
        transfer, "_bar", lambda files, names, *rest: fetched.extend(names) or _real_bar(files, names, *rest)
    )
    transfer.download(uri, tmp_path / "back")
    assert "big.safetensors" not in fetched and "small.json" in fetched
    assert contents(tmp_path / "back") == contents(tree)


@pytest.mark.slow
def test_answers_that_break_off_spoil_neither_small_nor_large_files(store, tree, uri, tmp_path, monkeypatch):
    (tree / "huge.safetensors").write_bytes(os.urandom(2**20) * (3 * PART // 2**20))
    transfer.upload(tree, uri)
    proxy = FaultProxy(store.endpoint, seed=5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    client.connect.cache_clear()
    try:
        for name in ("small.json", "big.safetensors", "huge.safetensors"):
            proxy.spoil(0.5, "truncated", only=name)
            back = transfer.download(uri, tmp_path / name)
            assert contents(back) == contents(tree)
        assert proxy.done["truncated"] >= 3
    finally:
        proxy.close()


@pytest.mark.slow
def test_a_large_object_that_was_changed_is_found_out_without_reading_it_again(store, tree, uri, tmp_path, monkeypatch):
    content = transfer.upload(tree, uri)
    body = bytearray((tree / "big.safetensors").read_bytes())
    body[PART + 7] ^= 1
    connect().put_object(Bucket=BUCKET, Key=f"{split(uri).key}/big.safetensors", Body=bytes(body))
    with pytest.raises(UserError, match=r"big\.safetensors: is damaged in the store"):
        transfer.download(uri, tmp_path / "back")
    transfer.upload(tree, uri, content=content)
    read = []
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path.name) or _real_sha256(path))
    transfer.download(uri, tmp_path / "back")
    assert "small.json" in read and "big.safetensors" not in read


_real_sha256 = manifest.sha256


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(store, tree, uri, tmp_path, monkeypatch):
    transfer.upload(tree, uri)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(UserError, match="17 MiB are needed and 1 are free"):
        transfer.download(uri, tmp_path / "back")


def test_a_manifest_cannot_write_outside_of_its_directory(store, uri, tmp_path):
    evil = manifest.make({"../evil": {"size": 1, "sha256": "0"}})
    transfer.put_json(split(uri), manifest.NAME, evil)
    with pytest.raises(UserError, match="names a file outside of it"):
        transfer.download(uri, tmp_path / "back")


def test_nothing_there(store, uri, tmp_path):
    with pytest.raises(UserError, match="there is no such object, and nothing below it"):
        transfer.download(uri, tmp_path / "back")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://bucket/a//b", "s3://bucket/../b"])
def test_a_wrong_uri(uri):
    with pytest.raises(UserError, match="must be s3://bucket/key"):
        split(uri)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not know this access key"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret-it-should-be"}, "the secret key does not match the access key"),
        ({"AWS_ACCESS_KEY_ID": ""}, "no credentials for the store"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the store does not answer at http://127.0.0.1:9"),
        ({"AWS_ENDPOINT_URL": "http://me:my-password@127.0.0.1:9"}, "does not answer at http://127.0.0.1:9; check"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9"}, "Invalid endpoint"),
        (
            {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET},
            "no permission for CreateMultipartUpload",
        ),
    ],
)
def test_wrong_settings_are_one_clear_line(store, uri, change, message, monkeypatch):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    client.connect.cache_clear()
    with pytest.raises(UserError, match=message) as caught:
        client.check_write(split(uri))
    text = str(caught.value)
    assert "\n" not in text
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "nothing") not in text


def test_a_bucket_that_is_not_there(store):
    with pytest.raises(UserError, match="s3://nowhere/x: there is no such bucket"):
        client.check_write(split("s3://nowhere/x"))


def test_a_clock_that_is_wrong(store, uri, monkeypatch):
    right = botocore.auth.get_current_datetime
    wrong = datetime.timedelta(hours=2)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: right(*a, **k) + wrong)
    with pytest.raises(UserError, match=r"this machine's clock is .* the store's; set it right"):
        client.check_write(split(uri))


def test_checking_leaves_nothing_behind(store, uri):
    client.check_write(split(uri))
    assert transfer.objects(split(uri)) == {}
    listed = connect().list_multipart_uploads(Bucket=BUCKET, Prefix=split(uri).key)
    assert not listed.get("Uploads")


def test_parts_of_a_killed_upload_are_removed_and_others_stay(store, uri):
    inside, outside = f"{split(uri).key}/model.safetensors", f"{split(uri).key}-of-another-run/model.safetensors"
    for key in (inside, outside):
        begun = connect().create_multipart_upload(Bucket=BUCKET, Key=key)
        connect().upload_part(Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"a part")
    transfer.abort_uploads(split(uri))
    listed = connect().list_multipart_uploads(Bucket=BUCKET, Prefix=split(uri).key)
    assert [upload["Key"] for upload in listed["Uploads"]] == [outside]


def test_a_local_manifest_is_not_believed_when_files_have_changed(tree):
    manifest.write(tree, manifest.make(manifest.describe(tree)))
    assert manifest.read(tree) is not None
    (tree / "small.json").write_text("[]")
    assert manifest.read(tree) is None
    assert json.loads((tree / manifest.NAME).read_text())["schema"] == 1
