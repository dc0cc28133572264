"""A stage in a pod of Kubeflow Pipelines that is stopped: the hook saves it, and a pod with an empty disk goes on.

The pod's processes stand as there: Argo's `emissary` starts KFP's launcher in a process group of its own, and that the stage.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.common.stage import before_stop, session
from components.common.stage.config import Resumption, StageConfig
from components.common.storage import client
from components.common.storage.mirror import mirrored
from faults.store import BUCKET

ROOT = Path(__file__).parents[4]
STEPS = 40
SETTINGS = {"max_length": 96, "segment_length": 6, "max_new_tokens": 6, "per_device_train_batch_size": 4}
SETTINGS |= {"max_steps": STEPS, "eval_rows": 4, "report_to": "none", "use_cpu": True, "bf16": False, "save_steps": 4}

LAUNCHER = """
import subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:  # it tells Kubeflow Pipelines how the stage ended
    file.write(str(code))
sys.exit(1 if code else 0)
"""
EMISSARY = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], process_group=0).wait())
"""


class Pod:
    """Runs a command as the main container of a pod does."""

    def __init__(self, directory: Path, command: list[str], environment: dict[str, str]) -> None:
        self.told, self.log = directory / "told", directory / "log"
        words = [sys.executable, "-c", EMISSARY, LAUNCHER, str(self.told), *command]
        with self.log.open("w") as log:
            self.emissary = subprocess.Popen(
                words, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, condition: Callable[[], Any], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.emissary.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> str:
        """What the preStop hook says."""
        command = [sys.executable, "-m", "components.common.stage.before_stop", "--root", str(self.emissary.pid)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=400).stdout


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    pods: list[Pod] = []

    def new(command: list[str], **environment: str) -> Pod:
        directory = tmp_path / f"pod-{len(pods)}"
        directory.mkdir()
        pods.append(Pod(directory, command, environment))
        return pods[-1]

    yield new
    for pod in pods:
        for stage in before_stop.stages(pod.emissary.pid):
            os.kill(stage.pid, 9)
        pod.emissary.kill()


def kept(run: str) -> list[int]:
    """Steps of the complete checkpoints beside the artifact."""
    return mirrored(client.split(f"s3://{BUCKET}/{run}/aligned-checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pod_that_is_stopped_saves_and_the_next_one_goes_on(
    start, store, tmp_path, micro_model, chat_data, processes
):
    run = f"run-{processes}"
    disk = tmp_path / "s3" / BUCKET / run
    aligned = {"name": "aligned", "uri": f"s3://{BUCKET}/{run}/aligned"}
    outputs = {"artifacts": {"aligned": {"artifacts": [aligned]}}, "outputFile": str(disk / "output.json")}
    command = [sys.executable, "-m", "components.sapo", "--executor_input", json.dumps({"outputs": outputs})]
    command += ["--config", "tiny-dpo", "--settings", json.dumps(SETTINGS)]
    command += ["--data", str(chat_data), "--model", str(micro_model)]
    command += ["--output", str(disk / "aligned"), "--training_log", str(disk / "training_log")]
    command += ["--grace_seconds", "60", "--num_processes", str(processes)]

    first = start(command, OMP_NUM_THREADS="1")
    first.wait_for(lambda: kept(run))
    assert first.stop() == "stopped 1 stages\n"
    assert first.told.read_text() == "143"
    assert first.emissary.wait(10) == 1
    stopped_at = kept(run)[-1]
    assert f"stopped after step {stopped_at} and saved" in first.log.read_text()
    assert stopped_at < STEPS

    shutil.rmtree(disk)
    second = start(command, OMP_NUM_THREADS="1")
    assert second.emissary.wait(400) == 0, second.log.read_text()[-3000:]
    said = second.log.read_text()
    assert f"fetched the checkpoint of step {stopped_at} from s3://{BUCKET}/{run}/aligned-checkpoints" in said
    assert json.loads((disk / "training_log" / "summary.json").read_text())["steps"] == STEPS
    assert (disk / "aligned" / "model.safetensors").is_file()
    assert not (disk / "aligned" / "checkpoints").exists()
    assert len(kept(run)) == 1  # until somebody removes it: the launcher may not get through


def test_a_stage_runs_where_its_checkpoints_cannot_be_kept(tmp_path, monkeypatch, caplog):
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client.connect.cache_clear()
    outputs = {"artifacts": {"aligned": {"artifacts": [{"uri": "s3://nowhere/run/aligned"}]}}}
    output = tmp_path / "s3" / "nowhere" / "run" / "aligned"
    stage = session.Session("sapo")
    stage.config = StageConfig(output=str(output))
    stage.values = {"executor_input": json.dumps({"outputs": outputs})}
    stage.resumption = Resumption(marker="manifest.json")
    stage._keep_beside_artifact(output, output / "training")
    client.connect.cache_clear()
    assert stage.mirror is None
    assert "a new pod would begin anew, because checkpoints cannot be kept" in caplog.text


def test_where_there_is_no_stage_nothing_is_stopped(start):
    pod = start([sys.executable, "-c", "import time; time.sleep(60)"])
    pod.wait_for(lambda: len([p for p in before_stop.processes().values() if p.parent == pod.emissary.pid]) == 1)
    assert pod.stop() == "stopped 0 stages\n"
    assert pod.emissary.poll() is None
