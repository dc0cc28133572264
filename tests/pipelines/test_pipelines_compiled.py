"""The committed packages: same as run files and code, described, closed under references, and fit for a cluster."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import cluster
from pipelines.cluster import VERSION
from pipelines.compilation import compile_packages, drift, packaged_runs
from pipelines.package import COMPILED, package_names, read_package
from pipelines.runs import RUNS, Run, read_run

REPOSITORY = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]


def _spec(name: str) -> dict[str, Any]:
    return next(yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text()))


def _run_of(name: str) -> Run:
    return read_run(RUNS / f"{name}.yaml")


def test_committed_packages_are_what_run_files_and_code_say() -> None:
    assert drift() == ""
    assert set(package_names()) == {run.name for run in packaged_runs()}
    assert {"tiny", "smollm2", "llama3-8b", "mistral-7b", "mistral-7b-dpo", "ablation-llama3-8b"} <= set(
        package_names()
    )


def test_drift_is_told_and_fails_the_check(tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in compile_packages(tmp_path):
        if package.stem == "tiny":
            package.write_text(package.read_text().replace("chitchat-tiny", "changed"))
        if package.stem == "smollm2":
            package.rename(tmp_path / "other.yaml")  # a package that no run file asks for, and one that is missing
    difference = drift(tmp_path)
    assert [line.split("/")[-1] for line in difference.splitlines() if line.startswith("+++ ")] == [
        f"{name}.yaml (from the code)" for name in ("other", "smollm2", "tiny")
    ]
    assert "-      data_recipe: str [Default: 'changed']" in difference.replace("-#", "-  ")
    monkeypatch.setattr("pipelines.compilation.drift", lambda: difference)
    code, out, err = run_cli("compile", "--check")
    assert (code, out.strip()) == (1, difference)
    assert err == (
        "pipelines: error: compiled packages differ from run files and code; run `python -m pipelines compile`\n"
    )


def test_compiling_is_stable_in_every_byte_and_removes_what_no_run_asks_for(tmp_path: Path) -> None:
    """In another process, where mappings of protobuf have another order."""
    (tmp_path / "stale.yaml").write_text("a: 1")
    code = "import sys; from pathlib import Path; from pipelines.compilation import compile_packages as c; c(Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=REPOSITORY, env=environment)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in COMPILED.glob("*.yaml")
    }


def test_compile_check_passes_and_writes_nothing(run_cli: Cli) -> None:
    before = (COMPILED / "tiny.yaml").stat().st_mtime_ns
    code, out, _ = run_cli("compile", "--check")
    assert (code, out) == (0, f"{COMPILED}: up to date\n")
    assert (COMPILED / "tiny.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", package_names())
def test_the_defaults_are_the_run_file(name: str) -> None:
    run = _run_of(name)
    defaults = {key: parameter.default for key, parameter in read_package(COMPILED / f"{name}.yaml").parameters.items()}
    for method in run.methods:
        assert defaults.pop(f"{method.use}_recipe") == method.recipe
        assert defaults.pop(f"{method.use}_settings") == method.settings
    written = yaml.safe_load((RUNS / f"{name}.yaml").read_text())
    assert {key: defaults[key] for key in defaults.keys() & written.keys()} == {
        key: value for key, value in written.items() if key in defaults
    }
    assert defaults == {key: value for key, value in run.as_file({}).items() if key in defaults}
    assert all(not parameter.required for parameter in read_package(COMPILED / f"{name}.yaml").parameters.values())


@pytest.mark.parametrize("name", package_names())
def test_every_method_is_a_task_of_its_own_and_nothing_loops(name: str) -> None:
    run, text = _run_of(name), (COMPILED / f"{name}.yaml").read_text()
    # A server shows a loop as for-loop-1.0, and a limit on it keeps a run that is retried waiting for ever.
    assert not re.search(r"parallelismLimit|[iI]terator|for-loop|triggerPolicy", text)
    package = read_package(COMPILED / f"{name}.yaml")
    expected = {"preflight", "data", "model", "evaluate-base", "report"}
    expected |= {"sft", "sft-data", "evaluate-sft"} if "sft" in run.stages else set()
    for method in run.methods:
        expected |= {f"train-{method.label}", f"evaluate-{method.label}"}
        container = package.spec["deploymentSpec"]["executors"][f"exec-train-{method.label}"]["container"]
        assert container["command"] == ["python3", "-m", f"components.{method.stage}"]
        start = package.spec["root"]["dag"]["tasks"][f"train-{method.label}"]["inputs"]["artifacts"]["start"]
        assert start["taskOutputArtifact"]["producerTask"] == {"base": "model", "sft": "sft"}[method.start]
    assert set(package.tasks) == set(package.spec["root"]["dag"]["tasks"]) == expected
    assert len(package.spec["components"]) == len(expected)


@pytest.mark.parametrize("name", package_names())
def test_what_the_ui_shows_of_a_package_tells_it_from_the_others(name: str) -> None:
    info = read_package(COMPILED / f"{name}.yaml").spec["pipelineInfo"]
    assert info["name"] == name
    assert info["displayName"].startswith("SAPO: ")
    assert len(info["description"]) > 100
    others = [
        read_package(COMPILED / f"{other}.yaml").spec["pipelineInfo"] for other in package_names() if other != name
    ]
    assert info["displayName"] not in {other["displayName"] for other in others}


@pytest.mark.parametrize("name", package_names())
def test_a_package_leaves_a_server_room_for_its_run(name: str) -> None:
    """Argo keeps a run, its specification included, in an object of at most a mebibyte."""
    package = read_package(COMPILED / f"{name}.yaml")
    assert len(json.dumps([package.spec, package.platform], separators=(",", ":"))) < 400_000


@pytest.mark.parametrize("name", package_names())
def test_every_parameter_and_artifact_is_described(name: str) -> None:
    spec = _spec(name)
    for where, node in {"pipeline": spec["root"], **spec["components"]}.items():
        for group in ("inputDefinitions", "outputDefinitions"):
            for kind in ("parameters", "artifacts"):
                for key, declared in node.get(group, {}).get(kind, {}).items():
                    if key.startswith("pipelinechannel--"):  # what kfp passes into a loop
                        continue
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
            assert "Concat" not in text and "IfPresent" not in text  # not every cluster replaces these
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


def _resource_inputs(spec: dict[str, Any], platform: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    """What the machine of each task is read from: the name, and what is declared where the cluster looks it up."""
    components, executors = spec["components"], spec["deploymentSpec"]["executors"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for where, node in {"root": spec["root"], **components}.items():
        inputs = set(node.get("inputDefinitions", {}).get("parameters", {}))
        for name, task in node.get("dag", {}).get("tasks", {}).items():
            label = components[task["componentRef"]["name"]].get("executorLabel")
            if label is None:
                continue
            # Resources are read from what the task is given, platform settings from what the DAG around it has.
            given = set(task.get("inputs", {}).get("parameters", {}))
            resources = json.dumps(executors[label]["container"]["resources"])
            for key in re.findall(r"inputs\.parameters\['(.+?)'\]", resources):
                yield f"{where}: {name}", key, given
            for key in re.findall(r'"componentInputParameter": "(.+?)"', json.dumps(settings[label])):
                yield f"{where}: {name}", key, inputs


@pytest.mark.parametrize("name", package_names())
def test_every_machine_is_read_from_something_declared(name: str) -> None:
    package = read_package(COMPILED / f"{name}.yaml")
    references = list(_resource_inputs(package.spec, package.platform))
    assert len(references) > 20
    assert [(where, key) for where, key, declared in references if key not in declared] == []
    # The cluster reads only text there: a number would arrive as nothing.
    for key in {key.removeprefix("pipelinechannel--") for _, key, _ in references} - {"node_selector", "tolerations"}:
        assert package.parameters[key].type == "STRING"


@pytest.mark.parametrize("name", package_names())
def test_every_task_has_command_limits_time_out_retries_and_labels(name: str) -> None:
    package = read_package(COMPILED / f"{name}.yaml")
    executors = package.spec["deploymentSpec"]["executors"]
    platform = package.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert platform.keys() == executors.keys()
    for label, executor in executors.items():
        container, settings = executor["container"], platform[label]
        assert container["command"][:2] == ["python3", "-m"] and len(container["command"]) == 3, label
        assert {"resourceCpuLimit", "resourceMemoryLimit"} <= container["resources"].keys(), label
        assert "env" not in container  # a local run would get it too
        assert int(settings["activeDeadlineSeconds"]) > 0
        assert settings["securityContext"] == {"runAsNonRoot": True}
        stage = settings["podMetadata"]["labels"]["app.kubernetes.io/component"]
        assert stage == _stage_of(label.removeprefix("exec-"))
        on_gpu = "accelerator" in container["resources"]
        assert on_gpu == (stage in ("train", "evaluation"))
        assert on_gpu == any(mount["mountPath"] == "/dev/shm" for mount in settings.get("emptyDirMounts", []))
        assert on_gpu == ("kueue.x-k8s.io/queue-name" in settings["podMetadata"]["labels"])
    for node in [package.spec["root"], *package.spec["components"].values()]:
        for task in node.get("dag", {}).get("tasks", {}).values():
            component = task["componentRef"]["name"]
            if "executorLabel" not in package.spec["components"][component]:
                continue
            policy = task.get("retryPolicy", {"maxRetryCount": 0})
            assert policy["maxRetryCount"] == (0 if component == "comp-preflight" else 2)
            if policy["maxRetryCount"]:
                # Argo counts it from the start of the first attempt, and ends a later attempt at that moment.
                deadline = int(policy["backoffMaxDuration"].removesuffix("s"))
                attempt = int(platform[component.replace("comp-", "exec-")]["activeDeadlineSeconds"])
                assert deadline > (policy["maxRetryCount"] + 1) * attempt
            cached = task.get("cachingOptions", {}).get("enableCache", False)
            assert cached == (component in ("comp-data", "comp-sft-data", "comp-model")), component


def _stage_of(task: str) -> str:
    """The key of `cluster.NEEDS` for a task."""
    if task == "sft" or task.startswith("train-"):
        return "train"
    return "evaluation" if task.startswith("evaluate-") else task.removeprefix("sft-")


@pytest.mark.parametrize("name", package_names())
def test_two_tasks_with_the_same_recipe_have_results_of_their_own_in_the_cache(name: str) -> None:
    """KFP's key has no task's name in it: another input tells the two apart."""
    tasks = read_package(COMPILED / f"{name}.yaml").spec["root"]["dag"]["tasks"]
    cached = {task for task in tasks if tasks[task].get("cachingOptions", {}).get("enableCache")}
    uses = [tasks[task]["inputs"]["parameters"].get("use", task) for task in cached]
    assert len({json.dumps(use) for use in uses}) == len(cached) >= 2


@pytest.mark.parametrize("name", package_names())
def test_everything_waits_for_the_preflight(name: str) -> None:
    tasks = read_package(COMPILED / f"{name}.yaml").spec["root"]["dag"]["tasks"]
    assert "dependentTasks" not in tasks["preflight"]
    assert [task for task in tasks if task != "preflight" and not tasks[task].get("dependentTasks")] == []
    assert tasks["data"]["dependentTasks"] == ["preflight"]


def test_the_preflight_looks_for_what_the_pods_use() -> None:
    from components.preflight import namespace

    assert (namespace.CACHE_CLAIM, namespace.QUEUE) == (cluster.CACHE_CLAIM, cluster.QUEUE)


def test_version_of_images_is_the_version_of_the_distribution() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    for name in package_names():
        images = {e["container"]["image"] for e in _spec(name)["deploymentSpec"]["executors"].values()}
        stages = ("data", "model", "train", "evaluation", "report")
        assert images == {f"ghcr.io/sapo-pipelines/{stage}:{VERSION}" for stage in stages}


_WITH_WORKSPACE = """
import sys
from pathlib import Path
from pipelines import cluster
cluster.WORKSPACE = "50Gi"
from pipelines.compilation import compile_packages
compile_packages(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def workspace_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a fork that gives each run a volume; compiled apart, because pipelines are read when imported."""
    directory = tmp_path_factory.mktemp("workspace")
    subprocess.run([sys.executable, "-c", _WITH_WORKSPACE, str(directory)], check=True, cwd=REPOSITORY)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", package_names())
def test_a_workspace_holds_the_caches_of_stages_that_compute_and_of_no_cached_one(
    name: str, workspace_packages: Path
) -> None:
    spec, platform = yaml.safe_load_all((workspace_packages / f"{name}.yaml").read_text())
    kubernetes = platform["platforms"]["kubernetes"]
    assert kubernetes["pipelineConfig"]["workspace"] == {
        "size": "50Gi",
        "kubernetes": {"pvcSpecPatch": {"accessModes": ["ReadWriteMany"]}},
    }
    computing = set()
    for task in _tasks(spec):
        label = task["componentRef"]["name"].removeprefix("comp-")
        executor = f"exec-{label}"
        given = task.get("inputs", {}).get("parameters", {}).get("workspace")
        environment = spec["deploymentSpec"]["executors"][executor]["container"].get("env", [])
        caches = {entry["name"]: entry["value"] for entry in environment}
        mounted = "pvcMount" in kubernetes["deploymentSpec"]["executors"][executor]
        if given:
            computing.add(_stage_of(label))
            assert given == {"runtimeValue": {"constant": "{{$.workspace_path}}"}}
            assert caches == {name: f"/kfp-workspace/{where}" for name, where in cluster.CACHES.items()}
            assert not mounted
        else:
            assert caches == {}
    assert computing == {"train", "evaluation"}


def _tasks(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for component in [spec["root"], *spec["components"].values()]:
        yield from component.get("dag", {}).get("tasks", {}).values()
