"""Up- and download of a checkpoint, with its digests and its manifest, against plain boto3 on the same store."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import boto3
from botocore.config import Config

from benchmarks.harness import Result, compare, speed
from components.common.storage import client, transfer
from faults.store import ACCESS_KEY, BUCKET, SECRET_KEY, Store


def storage(quick: bool, rounds: int) -> list[Result]:
    """One file of 200 MB and a few small ones, to and from SeaweedFS on loopback."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch) / "store")
        os.environ |= store.environment()
        client.connect.cache_clear()
        try:
            return _measure(Path(scratch), store, megabytes=50 if quick else 200, repeats=2 if quick else 3)
        finally:
            store.stop()
            client.connect.cache_clear()


def _measure(scratch: Path, store: Store, megabytes: int, repeats: int) -> list[Result]:
    checkpoint = scratch / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "policy.safetensors").write_bytes(os.urandom(10**6) * megabytes)
    for name in ("manifest.json", "trainer_state.json", "settings.json"):
        (checkpoint / name).write_bytes(os.urandom(2000))
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
    plain = boto3.client("s3", endpoint_url=store.endpoint, config=Config(s3={"addressing_style": "path"}), **keys)
    names, count = [path.name for path in checkpoint.iterdir()], itertools.count()

    def plain_upload() -> None:
        number = next(count)
        for name in names:
            plain.upload_file(str(checkpoint / name), BUCKET, f"plain-{number}/{name}")

    def our_upload() -> None:
        transfer.upload(checkpoint, f"s3://{BUCKET}/ours-{next(count)}", show=False)

    def plain_download() -> None:
        (scratch / "plain").mkdir()
        for name in names:
            plain.download_file(BUCKET, f"ours/{name}", str(scratch / "plain" / name))
        shutil.rmtree(scratch / "plain")

    def our_download() -> None:
        shutil.rmtree(transfer.download(f"s3://{BUCKET}/ours", scratch / "ours"))

    transfer.upload(checkpoint, f"s3://{BUCKET}/ours", show=False)
    setting = f"{megabytes} MB, SeaweedFS on loopback"
    their_download, down = compare([plain_download, our_download], repeats)
    their_upload, up = compare([plain_upload, our_upload], repeats)
    return [
        speed("checkpoint upload", setting, "boto3", their_upload, up),
        speed("checkpoint download", setting, "boto3", their_download, down),
    ]
