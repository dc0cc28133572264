"""The images, built with Podman and run: minutes and gigabytes, so only with SAPO_TEST_PODMAN=1.

Environment: what docker/podman.sh reads (BASE_IMAGE, PIP_CONFIG, PODMAN_BUILD_ARGS, ...), and Podman's own CONTAINERS_CONF.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
REGISTRY = "ghcr.io/sapo-pipelines"
STAGES = ["data", "report", "model", "sft", "sapo", "train", "evaluation"]
STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 3, "eval_rows": 8}
RUN = {
    "data_settings": {"max_rows": 400},
    "sft_data_settings": {"max_rows": 400},
    "sft_settings": STEPS,
    "evaluation_settings": {"limit": 12},
    "methods": [{"name": "sapo-dpo", "stage": "sapo", "start": "sft", "recipe": "tiny-dpo", "settings": STEPS}],
}

if not shutil.which("podman"):
    REASON = "Podman is not installed"
elif os.environ.get("SAPO_TEST_PODMAN") != "1":
    REASON = "builds images of gigabytes for minutes: set SAPO_TEST_PODMAN=1"
else:
    REASON = ""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


def podman(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["podman", *argv], capture_output=True, text=True)


@pytest.fixture(scope="module")
def images() -> None:
    """All images, for the CPU."""
    done = subprocess.run([ROOT / "docker" / "podman.sh", "build", *STAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
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


def run_comparison(engine: str, directory: Path, **changed: object) -> "subprocess.CompletedProcess[str]":
    run_file = directory / "run.yaml"
    run_file.write_text(yaml.safe_dump(RUN | changed))
    command = [sys.executable, "-m", "pipelines", "run", "comparison", "--containers", "--run", str(run_file)]
    command += ["--output", str(directory / "output")]
    environment = os.environ | {"DOCKER_HOST": engine, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def reachable(path: Path) -> Path:
    """pytest's own directories are for the caller alone, and for root the stages run as another user."""
    for directory in (path, *path.parents):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)
    return path


def test_a_comparison_runs_in_containers(engine: str, tmp_path: Path) -> None:
    done = run_comparison(engine, reachable(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(set(re.findall(r"^\[\d+/\d+\] (\S+):", done.stdout, re.M))) == 10
    outputs = tmp_path / "output" / "outputs"
    assert (outputs / "train-sapo-dpo" / "model" / "model.safetensors").stat().st_uid != 0 or os.getuid() != 0
    results = json.loads((outputs / "evaluation-sapo-dpo" / "results" / "results.json").read_text())
    assert results["name"] == "sapo-dpo"
    assert "sapo-dpo" in (outputs / "comparison-report" / "report" / "report.md").read_text()
    assert podman("ps", "--all", "--quiet", "--filter", f"label=sapo-pipelines.run={tmp_path / 'output'}").stdout == ""


def test_a_failing_container_fails_the_run(engine: str, tmp_path: Path) -> None:
    done = run_comparison(engine, reachable(tmp_path), model_settings={"chat_template": "no-such"})
    assert done.returncode == 1
    assert re.search(r"task model \(.*\) failed with exit code 2; its log: ", done.stderr)
    assert not (tmp_path / "output" / "outputs" / "sft").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_helps_and_runs_as_no_root_on_a_read_only_root(images: None, stage: str) -> None:
    image = f"{REGISTRY}/{stage}:0.1.0"
    flags = ["--rm", "--read-only", "--cap-drop", "all", "--network", "none", "--no-healthcheck"]
    helped = podman("run", *flags, image, "--help")
    assert (helped.returncode, stage in helped.stdout) == (0, True), helped.stderr
    code = "import os, shutil; print(os.getuid(), os.access('/opt', os.W_OK), shutil.which('gcc'), os.listdir('/tmp'))"
    inside = podman("run", *flags, "--entrypoint", "python3", image, "-c", code)
    assert inside.stdout.startswith("1000 False None ["), inside.stderr
    shape = json.loads(podman("image", "inspect", image).stdout)[0]
    assert shape["User"] == "1000:1000"
    assert shape["Labels"]["org.opencontainers.image.title"] == stage
    assert shape["Healthcheck"]["Test"][0] == "CMD"
