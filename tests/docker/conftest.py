"""Podman, the images built with it, and its service."""

import os
import subprocess
import time
from collections.abc import Iterator

import pytest
from podman_images import LIMITED, SKIP, base_image, build, last_line, run


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Podman that can run containers, with BASE_IMAGE set; skips where none runs."""
    if SKIP:
        pytest.skip(SKIP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_IMAGE", os.environ.get("BASE_IMAGE") or base_image())
        probe = ["podman", "run", "--rm", "--network", "none", os.environ["BASE_IMAGE"], "true"]
        if run(*probe).returncode != 0:
            limited = tmp_path_factory.mktemp("podman") / "containers.conf"
            limited.write_text(LIMITED)
            patch.setenv("CONTAINERS_CONF", os.environ.get("CONTAINERS_CONF", str(limited)))
        done = run(*probe)
        if done.returncode != 0:
            pytest.skip(f"Podman runs no container here: {last_line(done.stderr)}")
        yield


@pytest.fixture(scope="session")
def images(podman: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All images, for the CPU. One that does not build is a failure."""
    done = build(tmp_path_factory.mktemp("pip"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, images: None) -> Iterator[str]:
    """Podman's service; gives what DOCKER_HOST has to be."""
    socket = tmp_path_factory.mktemp("podman") / "podman.sock"
    service = subprocess.Popen(["podman", "system", "service", "--time", "0", f"unix://{socket}"])
    deadline = time.monotonic() + 30
    while not socket.exists():
        assert time.monotonic() < deadline and service.poll() is None
        time.sleep(0.1)
    yield f"unix://{socket}"
    service.terminate()
    service.wait(timeout=30)
