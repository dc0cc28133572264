"""The Dockerfile, the bake file and the constraints: linted, and at one with pyproject.toml and the pipelines."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.request import urlopen

import pytest

from pipelines.cluster import REGISTRY, VERSION
from pipelines.package import COMPILED, package_names, read_package

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
BAKE = (ROOT / "docker" / "docker-bake.hcl").read_text(encoding="utf-8")
UV = Path(sys.executable).parent / "uv"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def targets() -> dict[str, str]:
    """What each stage of the Dockerfile builds on."""
    return {name: parent for parent, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)}


def baked() -> list[str]:
    matrix = re.search(r"matrix\s*=\s*\{ stage = \[(.*)\] \}", BAKE)
    assert matrix
    return re.findall(r'"(\w+)"', matrix[1])


def own_lines(target: str) -> str:
    return DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]


def all_lines(target: str) -> str:
    """The instructions that make a target, those it inherits first."""
    parent = targets().get(target)
    return (all_lines(parent) + own_lines(target)) if parent else ""


def test_hadolint_finds_nothing() -> None:
    command = [Path(sys.executable).parent / "hadolint", ROOT / "docker" / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_image_of_a_pipeline_is_built_and_tagged() -> None:
    used = set()
    for name in package_names():
        for executor in read_package(COMPILED / f"{name}.yaml").spec["deploymentSpec"]["executors"].values():
            used.add(executor["container"]["image"])
    assert used <= {f"{REGISTRY}/{stage}:{VERSION}" for stage in baked()}
    assert set(baked()) <= targets().keys()
    assert f'default = "{REGISTRY}"' in BAKE
    assert f'default = "{VERSION}"' in BAKE


@pytest.mark.parametrize("stage", baked())
def test_an_image_runs_as_a_user_with_its_stage_as_entrypoint(stage: str) -> None:
    lines = all_lines(stage)
    assert re.findall(r"^USER (.*)$", lines, re.M)[-1] == "1000:1000"
    assert "HEALTHCHECK " in lines
    assert f'image.title="{stage}"' in own_lines(stage)
    entrypoint = '["python3", "/opt/sapo/train.py"]' if stage == "train" else f'["python3", "-m", "components.{stage}"]'
    assert re.findall(r"^ENTRYPOINT (.*)$", lines, re.M) == [entrypoint]


def test_every_extra_that_an_image_installs_is_declared() -> None:
    installed = re.findall(r"\.whl\)\[([\w,-]+)\]", DOCKERFILE)
    installed += re.findall(r"_EXTRAS=([\w,-]+)", DOCKERFILE)
    for choice in re.findall(r"_EXTRAS\s*= FLAVOUR == \S+ \? (.*)", BAKE):
        installed += re.findall(r'"([\w,-]+)"', choice)
    names = {name for group in installed for name in group.split(",")}
    assert {"data", "report", "model", "sft", "sapo", "evaluation", "vllm"} <= names <= EXTRAS.keys()


def test_the_build_sees_what_it_copies() -> None:
    seen = (ROOT / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.M)
    assert set(copied) == {"pyproject.toml", "${CONSTRAINTS}", "components", "docker/train.py"}
    for source in ("pyproject.toml", "docker/constraints*.txt", "components", "docker/train.py"):
        assert f"!{source}\n" in seen
    for file in re.findall(r"docker/constraints[\w-]*\.txt", DOCKERFILE + BAKE):
        assert (ROOT / file).is_file()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "docker" / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}


def test_both_flavours_have_the_same_versions_but_for_what_vllm_demands() -> None:
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} == {"numpy", "apache-tvm-ffi"}
    assert {"torch", "transformers", "trl", "vllm", "lm-eval", "pyarrow"} <= cuda.keys()


def test_what_goes_in_without_its_requirements_has_one_version() -> None:
    found = set(re.findall(r"nvidia-mtbench-evaluator==([\w.]+)", DOCKERFILE + (ROOT / "Makefile").read_text("utf-8")))
    assert found == {pins("constraints.txt")["nvidia-mtbench-evaluator"]}


@pytest.mark.slow
@pytest.mark.skipif(not UV.exists(), reason="uv is not installed (the extra `dev` has it)")
def test_the_cuda_flavour_resolves_to_its_constraints() -> None:
    """From metadata: no wheel of CUDA is downloaded."""
    try:
        urlopen("https://pypi.org/simple/pip/", timeout=20).close()
    except OSError as error:
        pytest.skip(f"PyPI cannot be reached: {error}")
    command = [ROOT / "docker" / "constraints-cuda.sh", "--check"]
    path = f"{UV.parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def train(*argv: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "docker" / "train.py", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )


@pytest.mark.slow
def test_train_hands_over_to_the_stage_it_is_given() -> None:
    assert "python -m components.dpo [--config RECIPE]" in train("dpo", "--help").stdout
    assert train("--help").stdout.startswith("usage: train STAGE")
    broken = train("spin", "--no_such_setting", "1")
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1)
    assert broken.stderr.startswith("spin: error: unknown argument '--no_such_setting'")


@pytest.mark.parametrize(("argv", "problem"), [([], "no stage given"), (["data"], "unknown stage 'data'")])
def test_train_refuses_what_is_no_training_stage(argv: list[str], problem: str) -> None:
    refused = train(*argv)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"train: error: {problem}\n")
