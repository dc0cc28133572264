"""The TrainJob of a method: every field is one that Kubeflow Trainer's API has, and the method's command is in it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from pipelines.cluster import GRACE_SECONDS, SENDING_SECONDS
from pipelines.package import read_package

REPOSITORY = Path(__file__).parents[2]
COMPILED = REPOSITORY / "pipelines" / "compiled" / "tiny.yaml"
PLACES = ["--data", "s3://b/data", "--model", "s3://b/sft", "--output", "s3://b/out"]
Cli = Callable[..., tuple[int, str, str]]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path, value
    for key, inner in items:
        yield from _leaves(inner, f"{path}/{key}")


def test_every_field_is_one_of_the_api(run_cli: Cli) -> None:
    code, out, err = run_cli("trainjob", "llama3-8b", "--method", "sapo-dpo", "--nodes", 4, *PLACES)
    assert (code, err) == (0, "")
    job = yaml.safe_load(out)
    # The models drop fields they do not know and refuse wrong types: what comes back is what the API would keep.
    known = TrainerV1alpha1TrainJob.from_dict(job).to_dict()
    assert dict(_leaves(known)) == dict(_leaves(job))
    misspelt = json.loads(json.dumps(job).replace("numNodes", "nodes"))
    assert dict(_leaves(TrainerV1alpha1TrainJob.from_dict(misspelt).to_dict())) != dict(_leaves(misspelt))

    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "96", "memory": "1200Gi", "nvidia.com/gpu": "8"}
    assert trainer["command"] == ["torchrun", "-m", "components.sapo"]
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    assert patch["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == GRACE_SECONDS
    stage = read_package(COMPILED).spec["deploymentSpec"]["executors"]["exec-train-sapo-dpo"]["container"]
    assert trainer["image"] == stage["image"]


def test_its_arguments_are_ones_that_the_stage_takes(run_cli: Cli) -> None:
    from components.common.stage.parser import ConfigParser
    from components.common.training.config import HIDDEN
    from components.common.training.resume import ResumableStageConfig
    from components.sapo.config import SAPOConfig

    setting = ["--set", "train_sapo_dpo_settings.beta=0.5"]
    code, out, err = run_cli("trainjob", "tiny", *setting, "--method", "sapo-dpo", "--nodes", 2, *PLACES)
    assert (code, err) == (0, "")
    arguments = yaml.safe_load(out)["spec"]["trainer"]["args"]
    extra = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    stage, config = ConfigParser("sapo", [ResumableStageConfig, SAPOConfig], hidden=HIDDEN).parse([*arguments, *extra])
    assert (stage.name, stage.model, stage.output, config.beta) == ("sapo-dpo", "s3://b/sft", "s3://b/out", 0.5)
    assert stage.grace_seconds == SENDING_SECONDS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tiny", "--method", "x", "--nodes", 2, *PLACES], "--method x: the run has sapo-dpo, sapo-orpo"),
        ([COMPILED, "--method", "x", "--nodes", 2, *PLACES], "tiny.yaml is compiled; give the run file"),
        (["tiny", "--method", "dpo", "--nodes", 0, *PLACES], "--nodes 0: must be 1 or more"),
        (
            ["tiny", "--method", "dpo", "--nodes", 2, *PLACES[:4], "--output", "out"],
            "--output out: nodes share no",
        ),
    ],
)
def test_wrong_usage_is_told(run_cli: Cli, argv: list[Any], message: str) -> None:
    code, out, err = run_cli("trainjob", *argv)
    assert (code, out) == (2, "")
    assert message in err
