"""The committed packages: same as the code, described, closed under references, and wired as meant."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.stage.parser import ConfigParser
from components.common.stage.recipes import find_recipe, read_yaml_mapping
from components.report.collected import collected_paths
from pipelines import cluster
from pipelines.cluster import VERSION
from pipelines.compilation import PIPELINES, compile_pipelines, drift
from pipelines.methods import METHOD_LISTS, check_methods
from pipelines.package import COMPILED, package_names, read_package, run_arguments

REPOSITORY = Path(__file__).parents[2]
RUNS = sorted((REPOSITORY / "pipelines" / "runs").glob("*.yaml"))
Cli = Callable[..., tuple[int, str, str]]


def _spec(name: str) -> dict[str, Any]:
    return next(yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text()))


def test_committed_packages_are_the_code() -> None:
    assert drift() == ""
    assert package_names() == sorted(PIPELINES)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_drift_is_told_and_fails_the_check(
    name: str, tmp_path: Path, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = next(path for path in compile_pipelines(tmp_path) if path.stem == name)
    package.write_text(package.read_text().replace("chitchat-tiny", "changed"))
    difference = drift(tmp_path)
    assert f"{name}.yaml" in difference
    assert difference.count("+++ ") == 1
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
        for collected in node.get("dag", {}).get("outputs", {}).get("artifacts", {}).values():
            for selector in collected["artifactSelectors"]:
                producer = components[tasks[selector["producerSubtask"]]["componentRef"]["name"]]
                yield where, selector["outputArtifactKey"], set(producer["outputDefinitions"]["artifacts"])
        for task in tasks.values():
            component = components[task["componentRef"]["name"]]
            for kind in ("parameters", "artifacts"):
                given = task.get("inputs", {}).get(kind, {})
                item = {task.get("parameterIterator", {}).get("itemInput")}
                for key, declared in component.get("inputDefinitions", {}).get(kind, {}).items():
                    if not declared.get("isOptional"):
                        yield f"{where}: {task['taskInfo']['name']}", key, set(given) | item
                for source in given.values():
                    if "componentInputParameter" in source:
                        yield where, source["componentInputParameter"], set(inputs.get("parameters", {}))
                    if produced := source.get("taskOutputArtifact"):
                        producer = components[tasks[produced["producerTask"]]["componentRef"]["name"]]
                        yield where, produced["outputArtifactKey"], set(producer["outputDefinitions"]["artifacts"])
                        yield where, produced["producerTask"], set(task["dependentTasks"])
                    if chosen := source.get("componentInputArtifact"):
                        yield where, chosen, set(inputs.get("artifacts", {}))


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
    package = read_package(name)
    references = list(_resource_inputs(package.spec, package.platform))
    assert len(references) > 20
    assert [(where, key) for where, key, declared in references if key not in declared] == []
    # The cluster reads only text there: a number would arrive as nothing.
    for key in {key.removeprefix("pipelinechannel--") for _, key, _ in references} - {"node_selector", "tolerations"}:
        assert package.parameters[key].type == "STRING"


@pytest.mark.parametrize("name", package_names())
def test_every_task_has_command_limits_time_out_retries_and_labels(name: str) -> None:
    package = read_package(name)
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
        assert settings["podMetadata"]["labels"]["app.kubernetes.io/component"] in label
        on_gpu = "accelerator" in container["resources"]
        assert on_gpu == any(stage in label for stage in ("sft", "sapo", "train", "evaluation"))
        assert on_gpu == any(mount["mountPath"] == "/dev/shm" for mount in settings.get("emptyDirMounts", []))
        assert on_gpu == ("kueue.x-k8s.io/queue-name" in settings["podMetadata"]["labels"])
    for node in [package.spec["root"], *package.spec["components"].values()]:
        for task in node.get("dag", {}).get("tasks", {}).values():
            component = task["componentRef"]["name"]
            if "executorLabel" not in package.spec["components"][component]:
                continue
            retries = task.get("retryPolicy", {"maxRetryCount": 0})["maxRetryCount"]
            assert retries == (0 if component == "comp-preflight" else 2)
            cached = task.get("cachingOptions", {}).get("enableCache", False)
            assert cached == component.startswith(("comp-data", "comp-model")), component


@pytest.mark.parametrize("name", package_names())
def test_everything_waits_for_the_preflight(name: str) -> None:
    tasks = read_package(name).spec["root"]["dag"]["tasks"]
    assert "dependentTasks" not in tasks["preflight"]
    assert [task for task in tasks if task != "preflight" and not tasks[task].get("dependentTasks")] == []
    assert tasks["data"]["dependentTasks"] == ["preflight"]


def test_the_preflight_looks_for_what_the_pods_use() -> None:
    from components.preflight import namespace

    assert (namespace.CACHE_CLAIM, namespace.QUEUE) == (cluster.CACHE_CLAIM, cluster.QUEUE)


def test_version_of_images_is_the_version_of_the_distribution() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    for pipeline, trainer in (("sapo", "sapo"), ("comparison", "train"), ("ablation", "train")):
        images = {e["container"]["image"] for e in _spec(pipeline)["deploymentSpec"]["executors"].values()}
        stages = ("data", "model", "sft", trainer, "evaluation", "report")
        assert images == {f"ghcr.io/sapo-pipelines/{stage}:{VERSION}" for stage in stages}


def _pipeline_of(run_file: Path) -> str:
    prefix = run_file.stem.partition("-")[0]
    return prefix if prefix in PIPELINES else "comparison"


@pytest.mark.parametrize("run_file", RUNS, ids=lambda path: path.stem)
def test_run_files_fit_and_name_recipes_that_exist(run_file: Path) -> None:
    package = read_package(_pipeline_of(run_file))
    arguments = run_arguments(package, str(run_file), [])
    assert set(arguments) == set(package.parameters)  # a run file shows everything
    assert f"pipelines run {package.name} --run pipelines/runs/{run_file.name}" in run_file.read_text()
    for name, value in arguments.items():
        if name.endswith("_recipe"):
            find_recipe("data" if name == "sft_data_recipe" else name.partition("_")[0], value)


@pytest.mark.parametrize("run_file", RUNS, ids=lambda path: path.stem)
def test_methods_of_run_files_have_recipes_and_settings_that_their_stages_take(run_file: Path) -> None:
    arguments = run_arguments(read_package(_pipeline_of(run_file)), str(run_file), [])
    for name in METHOD_LISTS & arguments.keys():
        check_methods(arguments[name], name)
        for entry in arguments[name]:
            settings = read_yaml_mapping(find_recipe(entry["stage"], entry["recipe"])) | entry["settings"]
            # Only what depends on the machine is left out.
            settings = {key: value for key, value in settings.items() if not key.startswith(("fsdp", "bf16"))}
            settings |= {"use_cpu": True, "bf16": False, "report_to": "none"} | _SAMPLER.get(entry["stage"], {})
            argv = ["--data", "d", "--output", "o", "--model", '{"base": "b", "sft": "s"}', "--start", entry["start"]]
            stage, _ = _parser_of(entry["stage"]).parse([*argv, "--settings", json.dumps(settings)])
            assert stage.model == {"base": "b", "sft": "s"}[entry["start"]]


_SAMPLER = {"spin": {"sampler": "hf"}}


def _parser_of(stage: str) -> ConfigParser:
    from components.common.training.config import HIDDEN, TrainingStageConfig
    from components.common.training.preference import DPOSettings, ORPOSettings
    from components.common.training.resume import ResumableStageConfig
    from components.sapo.config import SAPOConfig
    from components.sft.config import SFTSettings
    from components.spin.config import SPINSettings, SPINStageConfig

    classes: dict[str, list[type]] = {
        "sapo": [ResumableStageConfig, SAPOConfig],
        "dpo": [ResumableStageConfig, DPOSettings],
        "orpo": [ResumableStageConfig, ORPOSettings],
        "spin": [SPINStageConfig, SPINSettings],
        "sft": [TrainingStageConfig, SFTSettings],
    }
    return ConfigParser(stage, classes[stage], hidden=() if stage == "spin" else HIDDEN)


@pytest.mark.parametrize(("name", "run"), [("sapo", "sapo-tiny"), ("comparison", "tiny")])
def test_defaults_are_the_tiny_run(name: str, run: str) -> None:
    package = read_package(name)
    tiny = run_arguments(package, str(REPOSITORY / "pipelines" / "runs" / f"{run}.yaml"), [])
    assert {name: parameter.default for name, parameter in package.parameters.items()} == tiny


def test_ablation_has_every_group_and_the_paper_rows_are_names_of_variants() -> None:
    runs = REPOSITORY / "pipelines" / "runs"
    groups = {"default", "table3", "table4", "table5", "figure2", "ema", "sft_chosen", "spin_ema"}
    tiny, paper = (
        yaml.safe_load((runs / f"ablation-{name}.yaml").read_text())["variants"] for name in ("tiny", "llama3-8b")
    )
    assert {entry["group"] for entry in tiny} == {entry["group"] for entry in paper} == groups
    assert read_package("ablation").parameters["variants"].default == tiny
    names = {entry["name"] for entry in paper}
    tables = yaml.safe_load((REPOSITORY / "components" / "report" / "paper.yaml").read_text())
    ablations = [table for table in tables if "metrics" not in table]  # the others are of the comparison
    assert [row["label"] for table in ablations for row in table["rows"] if not names & set(row["runs"])] == []


@pytest.fixture
def fake_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose `components` package holds fake stages; `python -m` finds it first."""
    for stage in ("preflight", "data", "model", "sft", "sapo", "dpo", "orpo", "spin", "evaluation", "report"):
        folder = tmp_path / "components" / stage
        folder.mkdir(parents=True)
        shutil.copy(Path(__file__).parent / "fake_stage.py", folder / "__main__.py")
    (tmp_path / "components" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sapo_wires_the_stages_as_meant(fake_stages: Path, run_cli: Cli) -> None:
    settings = ["--set", "sapo_orpo_settings.beta=0.3", "--set", "report_settings.title=T"]
    tiny = REPOSITORY / "pipelines" / "runs" / "sapo-tiny.yaml"
    code, out, err = run_cli("run", "sapo", "--run", tiny, *settings, "--output", "out")
    assert (code, err) == (0, "")
    order = re.findall(r"^\[\d+/11\] (\S+):", out, re.M)
    assert " ".join(order) == (
        "preflight data model evaluation sft evaluation-2 sapo evaluation-3 sapo-2 evaluation-4 report"
    )
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


METHODS = [
    {"name": "a", "stage": "sapo", "start": "sft", "recipe": "tiny-dpo", "settings": {"beta": 0.5, "steps": 3}},
    {"name": "b", "stage": "spin", "start": "base", "recipe": "tiny-orpo", "settings": {}},
    {"name": "c", "stage": "dpo", "start": "sft", "recipe": "tiny", "settings": {"none": None, "text": 'it\'s "q"'}},
]


def _run_comparison(run_cli: Cli, methods: Any, *more: object, pipeline: str = "comparison") -> tuple[int, str, str]:
    parameter = "variants" if pipeline == "ablation" else "methods"
    run_file = Path.cwd() / "run.yaml"
    run_file.write_text(yaml.safe_dump({parameter: methods, "report_settings": {"title": "T"}}))
    return run_cli("run", pipeline, "--run", run_file, "--output", "out", *more)


def _flags(task: str, artifact: str) -> dict[str, str]:
    return json.loads((Path.cwd() / "out" / "outputs" / task / artifact / "flags.json").read_text())


@pytest.mark.parametrize("pipeline", ["comparison", "ablation"])
def test_every_method_is_trained_evaluated_and_reported(fake_stages: Path, run_cli: Cli, pipeline: str) -> None:
    code, out, err = _run_comparison(run_cli, METHODS, pipeline=pipeline)
    assert (code, err) == (0, "")
    first = ["preflight", "data", "model", "evaluation", "data-2", "sft", "evaluation-2"]
    loop = [f"{task}-{name}" for name in "abc" for task in ("train", "evaluation")]
    assert re.findall(r"^\[\d+/14\] (\S+):", out, re.M) == [*first, *loop, "comparison-report"]
    assert "train-b: Training of b (" in out and "[train-b] hello" in out
    root = Path.cwd() / "out" / "outputs"
    for method in METHODS:
        trained, evaluated = (
            _flags(f"train-{method['name']}", "model"),
            _flags(f"evaluation-{method['name']}", "results"),
        )
        assert json.loads(trained["--model"]) == {"base": f"{root}/model/model", "sft": f"{root}/sft/tuned"}
        assert {key: trained[f"--{key}"] for key in ("name", "start")} == {k: method[k] for k in ("name", "start")}
        assert trained["--config"] == method["recipe"]
        assert trained["--num_processes"] == "0"  # as many as GPUs
        assert json.loads(trained["--settings"]) == method["settings"]
        assert (evaluated["--model"], evaluated["--name"]) == (trained["--output"], method["name"])
        assert evaluated["--data"] == trained["--data"] == f"{root}/data/data"
    settings = json.loads(_flags("train-a", "model")["--settings"])  # its keys come in any order
    assert isinstance(settings["steps"], int), "3 was handed over as 3.0"
    assert _flags("sft", "tuned")["--data"] == f"{root}/data-2/data"
    commands = json.loads(_flags("train-b", "model")["--executor_input"])["inputs"]["parameterValues"]
    assert commands["stage"] == "spin"
    _check_report(root, ["a", "b", "c"])


def _check_report(root: Path, names: list[str]) -> None:
    report = _flags("comparison-report", "report")
    executor_input = report["--executor_input"]
    evaluations, trainings = report["--collected_evaluations"], report["--collected_trainings"]
    assert yaml.safe_load(report["--evaluations"]) == [f"{root}/evaluation/results", f"{root}/evaluation-2/results"]
    assert yaml.safe_load(report["--trainings"]) == [f"{root}/sft/training_log"]
    assert collected_paths(executor_input, evaluations) == [f"{root}/evaluation-{name}/results" for name in names]
    assert collected_paths(executor_input, trainings) == [f"{root}/train-{name}/training_log" for name in names]
    assert report["--settings"] == '{"title": "T"}'


def test_a_training_has_a_process_for_each_gpu(fake_stages: Path, run_cli: Cli) -> None:
    code, _, err = _run_comparison(run_cli, METHODS[:1], "--set", "gpus=8")
    assert (code, err) == (0, "")
    assert _flags("train-a", "model")["--num_processes"] == _flags("sft", "tuned")["--num_processes"] == "8"
    assert run_cli("run", "sapo", "--set", "gpus=2", "--output", "out-sapo")[0] == 0
    outputs = Path.cwd() / "out-sapo" / "outputs"
    for task in ("sft/tuned", "sapo/aligned", "sapo-2/aligned"):
        assert json.loads((outputs / task / "flags.json").read_text())["--num_processes"] == "2"


def test_train_runs_the_stage_that_the_method_names(fake_stages: Path, run_cli: Cli) -> None:
    for stage in ("sapo", "spin", "dpo"):
        module = fake_stages / "components" / stage / "__main__.py"
        module.write_text(f'print("I am {stage}")\n' + module.read_text())
    code, out, _ = _run_comparison(run_cli, METHODS)
    assert code == 0
    assert re.findall(r"\[train-(.)\] I am (\w+)", out) == [("a", "sapo"), ("b", "spin"), ("c", "dpo")]


@pytest.mark.parametrize(
    ("methods", "only", "names"),
    [(METHODS[::2], [], ["a", "c"]), (METHODS, ["--only", "c,b"], ["b", "c"]), ([], [], [])],
)
def test_a_method_left_out_is_not_run_and_not_reported(
    fake_stages: Path, run_cli: Cli, methods: Any, only: list[str], names: list[str]
) -> None:
    code, out, err = _run_comparison(run_cli, methods, *only)
    assert (code, err) == (0, "")
    assert re.findall(r"^\[\d+/\d+\] train-(\S+):", out, re.M) == names
    assert out.startswith(f"pipeline comparison: {8 + 2 * len(names)} tasks")
    assert yaml.safe_load((Path.cwd() / "out" / "arguments.yaml").read_text())["methods"] == [
        method for method in METHODS if method["name"] in names
    ]
    _check_report(Path.cwd() / "out" / "outputs", names)


def test_a_training_that_fails_ends_the_run(fake_stages: Path, run_cli: Cli) -> None:
    failing = [METHODS[0], METHODS[1] | {"settings": {"exit_code": 3}}, METHODS[2]]
    code, out, err = _run_comparison(run_cli, failing)
    assert code == 1
    assert (
        err == "pipelines: error: task train-b (Training of b) failed with exit code 3; its log: out/logs/train-b.log\n"
    )
    ran = re.findall(r"^\[\d+/14\] (\S+):", out, re.M)
    assert ran[-1] == "train-b"  # neither c nor the report started
    not_run = re.findall(r"^(\S+) .* not run$", out, re.M)
    assert sorted(not_run) == ["comparison-report", "evaluation-b", "evaluation-c", "train-c"]


def test_wrong_methods_end_the_command_before_anything_starts(fake_stages: Path, run_cli: Cli) -> None:
    code, out, err = _run_comparison(run_cli, [METHODS[0], METHODS[0]])
    assert (code, out) == (2, "")
    assert err == "pipelines: error: methods: two entries are named 'a'; the report needs a name for each\n"
    code, _, err = run_cli("run", "sapo", "--only", "dpo")
    assert (code, err) == (2, "pipelines: error: --only dpo: pipeline sapo has no list of methods\n")


_WITH_WORKSPACE = """
import sys
from pathlib import Path
from pipelines import cluster
cluster.WORKSPACE = "50Gi"
from pipelines.compilation import compile_pipelines
compile_pipelines(Path(sys.argv[1]))
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
        if executor not in spec["deploymentSpec"]["executors"]:
            continue  # a loop
        given = task.get("inputs", {}).get("parameters", {}).get("workspace")
        environment = spec["deploymentSpec"]["executors"][executor]["container"].get("env", [])
        caches = {entry["name"]: entry["value"] for entry in environment}
        mounted = "pvcMount" in kubernetes["deploymentSpec"]["executors"][executor]
        if given:
            computing.add(re.sub(r"-\d+$", "", label))
            assert given == {"runtimeValue": {"constant": "{{$.workspace_path}}"}}
            assert caches == {name: f"/kfp-workspace/{where}" for name, where in cluster.CACHES.items()}
            assert not mounted
        else:
            assert caches == {}
    assert computing == {"sft", "evaluation"} | ({"sapo"} if name == "sapo" else {"train"})


def _tasks(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for component in [spec["root"], *spec["components"].values()]:
        yield from component.get("dag", {}).get("tasks", {}).values()
