"""kfp.local runs a compiled package in containers: hand-over, logs, failure, images, what a container may do and see."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, running_engine

from pipelines.local.containers import passed_on

REPOSITORY = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    """A container engine that DOCKER_HOST names, and caches below the test's directory."""
    with running_engine() as running:
        monkeypatch.setenv("DOCKER_HOST", running.url)
        monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        yield running


def removed(engine: FakeEngine) -> bool:
    return all(f"remove {number}" in engine.events for number in range(1, len(engine.created) + 1))


def test_outputs_are_handed_over_and_containers_removed(
    engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    run = tmp_path / "run"
    arguments = ["--set", "steps=1", "--set", "two.say=lïnes of ünequal length", "--output", run]
    code, out, err = run_cli("run", fake_package, "--containers", *arguments)
    assert (code, err) == (0, "")
    flags = json.loads((run / "outputs" / "second-2" / "made" / "flags.json").read_text())
    assert flags["--given"] == str(run / "outputs" / "second" / "made")
    assert "[second] lïnes of ünequal length\n" in out
    assert (run / "logs" / "second.log").read_text() == "lïnes of ünequal length\n"
    assert len(engine.created) == 3
    assert removed(engine)
    assert not [event for event in engine.events if event.startswith(("pull", "kill"))]


def test_a_failing_container_fails_the_run(
    engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    failing = ["--set", "steps=1", "--set", "two.exit_code=3"]
    code, _, err = run_cli("run", fake_package, "--containers", *failing, "--output", tmp_path / "run")
    log = tmp_path / "run" / "logs" / "second.log"
    assert code == 1
    assert err == f"pipelines: error: task second (The second) failed with exit code 3; its log: {log}\n"
    assert log.read_text() == "hello\nabout to fail\n"
    assert len(engine.created) == 2
    assert removed(engine)


def test_only_a_missing_image_is_pulled(engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    engine.images, engine.registry = set(), {"none/fake:1"}
    code, out, _ = run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 0
    assert [event for event in engine.events if event.startswith("pull")] == ["pull none/fake:1"]
    assert out.count("pulling none/fake:1") == 1


def test_an_image_that_is_nowhere_ends_the_run(
    engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    engine.images = set()
    code, _, err = run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 1
    assert "task first (The first) failed with exit code 125" in err
    assert "cannot pull none/fake:1: manifest unknown" in (tmp_path / "run" / "logs" / "first.log").read_text()
    assert engine.created == []


def test_command_that_the_image_lacks(engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    package = tmp_path / "broken.yaml"
    package.write_text(fake_package.read_text().replace("- python3\n", "- no-such-command\n"))
    code, _, err = run_cli("run", package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 1
    assert "failed with exit code 125" in err
    assert "executable file not found" in (tmp_path / "run" / "logs" / "first.log").read_text()
    assert removed(engine)


def test_an_engine_that_dies_is_a_failure(engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    engine.loses_containers = True
    code, _, err = run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 1
    assert "failed with exit code 125" in err
    assert "the container engine is gone" in (tmp_path / "run" / "logs" / "first.log").read_text()


def test_no_engine_is_wrong_usage(
    fake_package: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    code, _, err = run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert code == 2
    assert f"no container engine answers at unix://{tmp_path}/nothing.sock" in err
    assert not (tmp_path / "run").exists()


def test_what_a_container_may_do(engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    body = engine.created[0]
    host = body["HostConfig"]
    assert (body["User"].split(":")[0] == "0", host["ReadonlyRootfs"], host["CapDrop"]) == (False, True, ["ALL"])
    assert (host["NetworkMode"], host["Tmpfs"], host.get("AutoRemove")) == ("host", {"/tmp": "rw,exec,mode=1777"}, None)
    assert body["Entrypoint"] == ["python3"]
    assert (tmp_path / "run" / "outputs").stat().st_uid == int(body["User"].split(":")[0])
    assert host["DeviceRequests"] == []


def test_gpus_are_asked_for_where_the_engine_has_them(
    engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    engine.info["Runtimes"] = {"nvidia": {}}
    run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert engine.created[0]["HostConfig"]["DeviceRequests"][0]["Capabilities"] == [["gpu"]]


def test_in_a_rootless_engine_its_root_is_the_caller(
    engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli
) -> None:
    engine.info["SecurityOptions"] = ["name=rootless"]
    run_cli("run", fake_package, "--containers", "--set", "steps=1", "--output", tmp_path / "run")
    assert engine.created[0]["User"] == "0:0"
    assert (tmp_path / "run" / "outputs").stat().st_uid == os.getuid()


def test_what_a_container_sees(
    engine: FakeEngine, fake_package: Path, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, rows, recipe = (tmp_path / name for name in ("ca.pem", "rows.jsonl", "micro.yaml"))
    for path in (bundle, rows, recipe):
        path.touch()
    monkeypatch.setenv("PIP_CERT", str(bundle))
    settings = ["--set", f"one.source={rows}", "--set", f"two.list=['scratch://{recipe}', /no/such/file]"]
    run_cli("run", fake_package, "--containers", "--set", "steps=1", *settings, "--output", tmp_path / "run")
    host = engine.created[0]["HostConfig"]
    read_only = {mount["Source"]: mount["Target"] for mount in host["Mounts"] if mount["ReadOnly"]}
    assert {str(Path.cwd()), str(bundle), str(rows), str(recipe)} <= read_only.keys()
    assert "/no/such/file" not in read_only
    assert all(source == target for source, target in read_only.items())
    written = {mount["Target"] for mount in host["Mounts"] if not mount["ReadOnly"]}
    assert written == {"/cache/sapo_cache", "/cache/hf_home"}
    assert f"{tmp_path / 'run'}:{tmp_path / 'run'}:rw" in host["Binds"]
    assert engine.created[0]["WorkingDir"] == str(Path.cwd())
    environment = engine.created[0]["Env"]
    assert f"PIP_CERT={bundle}" in environment
    assert "HF_HOME=/cache/hf_home" in environment
    assert not [entry for entry in environment if entry.startswith("PATH=")]


def test_variables_that_stages_need_are_passed_on() -> None:
    given = {
        "AWS_ENDPOINT_URL": "a",
        "HF_TOKEN": "b",
        "https_proxy": "c",
        "PATH": "d",
        "SSH_AUTH_SOCK": "e",
        "HOME": "f",
    }
    assert passed_on(given) == {"AWS_ENDPOINT_URL": "a", "HF_TOKEN": "b", "https_proxy": "c"}


def test_an_interrupted_run_ends_its_container(engine: FakeEngine, fake_package: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "run", str(fake_package), "--containers", "--set", "steps=1"]
    command += ["--set", "one.sleep=true", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "logs" / "first.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and "hello" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "pipelines: interrupted\n")
    assert engine.events == ["kill 1 SIGTERM", "remove 1"]
