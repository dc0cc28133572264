"""The committed packages: same as the code, described, closed under references, and wired as meant."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.cli import find_recipe
from pipelines.cluster import VERSION
from pipelines.compilation import PIPELINES, compile_pipelines, drift
from pipelines.package import COMPILED, package_names, read_package, run_arguments

REPOSITORY = Path(__file__).parents[2]
RUNS = sorted((REPOSITORY / "pipelines" / "runs").glob("*.yaml"))
Cli = Callable[..., tuple[int, str, str]]


def _spec(name: str) -> dict[str, Any]:
    return next(yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text()))


def test_committed_packages_are_the_code() -> None:
    assert drift() == ""
    assert package_names() == sorted(PIPELINES)


def test_drift_is_told_and_fails_the_check(tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (package,) = compile_pipelines(tmp_path)
    package.write_text(package.read_text().replace("chitchat-tiny", "changed"))
    difference = drift(tmp_path)
    assert "-      data_recipe: str [Default: 'changed']" in difference.replace("-#", "-  ")
    monkeypatch.setattr("pipelines.compilation.drift", lambda: difference)
    code, out, err = run_cli("compile", "--check")
    assert (code, out.strip()) == (1, difference)
    assert err == "pipelines: error: compiled packages differ from the code; run `python -m pipelines compile`\n"


def test_compile_check_passes_and_writes_nothing(run_cli: Cli) -> None:
    before = (COMPILED / "sapo.yaml").stat().st_mtime_ns
    code, out, _ = run_cli("compile", "--check")
    assert (code, out) == (0, f"{COMPILED}: up to date\n")
    assert (COMPILED / "sapo.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", package_names())
def test_every_parameter_and_artifact_is_described(name: str) -> None:
    spec = _spec(name)
    for where, node in {"pipeline": spec["root"], **spec["components"]}.items():
        for group in ("inputDefinitions", "outputDefinitions"):
            for kind in ("parameters", "artifacts"):
                for key, declared in node.get(group, {}).get(kind, {}).items():
                    description = declared.get("description", "")
                    assert description.endswith("."), f"{where}: {key} is not described"
                    assert "\n" not in description


def _references(spec: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    """Each reference of a package: where it is, what it names, what is declared there."""
    components = spec["components"]
    for where, node in {"root": spec["root"], **components}.items():
        inputs, outputs = node.get("inputDefinitions", {}), node.get("outputDefinitions", {})
        if "executorLabel" in node:
            container = spec["deploymentSpec"]["executors"][node["executorLabel"]]["container"]
            text = " ".join([*container["command"], *container["args"]])
            for side, kind, key in re.findall(r"\{\{\$\.(inputs|outputs)\.(\w+)\['(.+?)'\]", text):
                yield where, key, set((inputs if side == "inputs" else outputs).get(kind, {}))
        tasks = node.get("dag", {}).get("tasks", {})
        for task in tasks.values():
            component = components[task["componentRef"]["name"]]
            for kind in ("parameters", "artifacts"):
                given = task.get("inputs", {}).get(kind, {})
                for key, declared in component.get("inputDefinitions", {}).get(kind, {}).items():
                    if not declared.get("isOptional"):
                        yield f"{where}: {task['taskInfo']['name']}", key, set(given)
                for source in given.values():
                    if "componentInputParameter" in source:
                        yield where, source["componentInputParameter"], set(inputs.get("parameters", {}))
                    if produced := source.get("taskOutputArtifact"):
                        producer = components[tasks[produced["producerTask"]]["componentRef"]["name"]]
                        yield where, produced["outputArtifactKey"], set(producer["outputDefinitions"]["artifacts"])
                        yield where, produced["producerTask"], set(task["dependentTasks"])


@pytest.mark.parametrize("name", package_names())
def test_every_reference_is_declared(name: str) -> None:
    references = list(_references(_spec(name)))
    assert len(references) > 50
    assert [(where, key) for where, key, declared in references if key not in declared] == []


def test_version_of_images_is_the_version_of_the_distribution() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    images = {e["container"]["image"] for e in _spec("sapo")["deploymentSpec"]["executors"].values()}
    stages = ("data", "model", "sft", "sapo", "evaluation", "report")
    assert images == {f"ghcr.io/sapo-pipelines/{stage}:{VERSION}" for stage in stages}


@pytest.mark.parametrize("run_file", RUNS, ids=lambda path: path.stem)
def test_run_files_fit_and_name_recipes_that_exist(run_file: Path) -> None:
    package = read_package("sapo")
    arguments = run_arguments(package, str(run_file), [])
    assert set(arguments) == set(package.parameters)  # a run file shows everything
    for name, value in arguments.items():
        if name.endswith("_recipe"):
            find_recipe(name.partition("_")[0], value)


def test_defaults_are_the_tiny_run() -> None:
    package = read_package("sapo")
    tiny = run_arguments(package, str(REPOSITORY / "pipelines" / "runs" / "tiny.yaml"), [])
    assert {name: parameter.default for name, parameter in package.parameters.items()} == tiny


@pytest.fixture
def fake_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose `components` package holds fake stages; `python -m` finds it first."""
    for stage in ("data", "model", "sft", "sapo", "evaluation", "report"):
        folder = tmp_path / "components" / stage
        folder.mkdir(parents=True)
        shutil.copy(Path(__file__).parent / "fake_stage.py", folder / "__main__.py")
    (tmp_path / "components" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sapo_wires_the_stages_as_meant(fake_stages: Path, run_cli: Cli) -> None:
    settings = ["--set", "sapo_orpo_settings.beta=0.3", "--set", "report_settings.title=T"]
    tiny = REPOSITORY / "pipelines" / "runs" / "tiny.yaml"
    code, out, err = run_cli("run", "sapo", "--run", tiny, *settings, "--output", "out")
    assert (code, err) == (0, "")
    order = re.findall(r"^\[\d+/10\] (\S+):", out, re.M)
    assert " ".join(order) == ("data model evaluation sft evaluation-2 sapo evaluation-3 sapo-2 evaluation-4 report")
    root = Path.cwd() / "out" / "outputs"
    flags = {path.relative_to(root).as_posix(): json.loads(path.read_text()) for path in root.glob("*/*/flags.json")}
    for given in flags.values():
        assert given.get("--data") in (None, str(root / "data" / "data"))

    assert flags["sft/tuned/flags.json"]["--model"] == str(root / "model" / "model")
    dpo, orpo = flags["sapo/aligned/flags.json"], flags["sapo-2/aligned/flags.json"]
    assert [run["--model"] for run in (dpo, orpo)] == [str(root / "sft" / "tuned")] * 2
    assert [run["--name"] for run in (dpo, orpo)] == ["sapo-dpo", "sapo-orpo"]
    assert [run["--config"] for run in (dpo, orpo)] == ["tiny-dpo", "tiny-orpo"]
    assert [run["--settings"] for run in (dpo, orpo)] == ["{}", '{"beta": 0.3}']

    evaluations = [flags[f"evaluation{number}/results/flags.json"] for number in ("", "-2", "-3", "-4")]
    assert {run["--name"]: run["--model"].removeprefix(f"{root}/") for run in evaluations} == {
        "base": "model/model",
        "sft": "sft/tuned",
        "sapo-dpo": "sapo/aligned",
        "sapo-orpo": "sapo-2/aligned",
    }
    report = flags["report/report/flags.json"]
    assert yaml.safe_load(report["--evaluations"]) == [run["--output"] for run in evaluations]
    assert yaml.safe_load(report["--trainings"]) == [run["--training_log"] for run in (
        flags["sft/tuned/flags.json"], dpo, orpo)]  # fmt: skip
    assert report["--settings"] == '{"title": "T"}'
    assert (root / "report" / "html").is_file()
    assert (root / "data" / "rejected_rows").is_file()
