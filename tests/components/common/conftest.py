"""A real S3 store for the tests of storage."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.common.storage import client
from faults.store import Store


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    running = Store(tmp_path_factory.mktemp("seaweedfs"))
    yield running
    running.stop(signal.SIGKILL)  # its data goes with the test: no need to wait for a farewell


@pytest.fixture
def store(seaweed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store, which this process and its children reach through the environment; with a cache of the test's own."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    client.connect.cache_clear()
    yield seaweed
    client.connect.cache_clear()
