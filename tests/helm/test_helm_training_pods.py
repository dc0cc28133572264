"""The policy for the pods of training stages: its objects, and its expressions on a pod as Kubeflow Pipelines makes it."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import celpy
import helm_python
import kubernetes_validate
import pytest
from celpy import celtypes
from rendered_chart import CHART, NAMESPACE, find, objects, rendered

from components.common.stage import before_stop
from pipelines.cluster import GRACE_SECONDS, NEEDS
from pipelines.package import COMPILED, read_package

NAME = f"sapo-training-{NAMESPACE}"
GROUP = "admissionregistration.k8s.io"
SERVED = {"v1": ("1.36", "1.37"), "v1beta1": ("1.34", "1.35"), "v1alpha1": ("1.32", "1.33")}


def policy(**values: Any) -> dict[str, Any]:
    """The spec of the policy."""
    return find(objects({"trainingPods": {"enabled": True, **values}}), "MutatingAdmissionPolicy", NAME)["spec"]


class Message(celtypes.MessageType):
    """An object that an expression makes."""


def evaluate(expression: str, **names: Any) -> Any:
    """The value of an expression in Kubernetes' CEL, as far as the policy uses it."""
    environment = celpy.Environment(annotations={"JSONPatch": Message})
    functions = {"indexOf": lambda items, item: celtypes.IntType(list(items).index(item))}  # Kubernetes' list library
    program = environment.program(environment.compile(expression), functions=functions)
    return program.evaluate({name: celpy.json_to_cel(value) for name, value in names.items()})


def admitted(pod: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """The pod after the policy's mutations."""
    if not all(evaluate(condition["expression"], object=pod) for condition in spec["matchConditions"]):
        return pod
    variables = {v["name"]: int(evaluate(v["expression"], object=pod)) for v in spec["variables"]}
    for mutation in spec["mutations"]:
        for patch in evaluate(mutation["jsonPatch"]["expression"], object=pod, variables=variables):
            assert patch["op"] == "add"
            *parents, last = str(patch["path"]).removeprefix("/").split("/")
            place: Any = pod
            for part in parents:
                place = place[int(part) if isinstance(place, list) else part]
            place[last] = plain(patch["value"])
    return pod


def plain(value: Any) -> Any:
    """A value of CEL as JSON has it."""
    if isinstance(value, celtypes.MapType):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, celtypes.ListType):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, celtypes.IntType) else str(value)


def pod(*names: str) -> dict[str, Any]:
    """A pod as it arrives at the policy: Kubernetes has put in its defaults, and the priority of no class."""
    spec = {"terminationGracePeriodSeconds": 30, "priority": 0, "preemptionPolicy": "PreemptLowerPriority"}
    containers = [{"name": name, "image": "x"} for name in names]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {**spec, "containers": containers}}


@pytest.mark.parametrize(("api", "version"), [(a, v) for a, versions in SERVED.items() for v in versions])
def test_the_objects_are_what_kubernetes_takes(api: str, version: str) -> None:
    made = objects({"trainingPods": {"enabled": True, "apiVersion": f"{GROUP}/{api}"}})
    for kind in ("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"):
        item = find(made, kind, NAME)
        assert kubernetes_validate.validate(item, version, strict=True) == version
        assert "namespace" not in item["metadata"]
    assert find(made, "MutatingAdmissionPolicyBinding", NAME)["spec"] == {"policyName": NAME}


@pytest.mark.parametrize(
    ("kubernetes", "api"), [("1.32.9", "v1alpha1"), ("1.34.0", "v1beta1"), ("1.36.1-gke.7", "v1"), ("1.31.4", None)]
)
def test_the_api_version_follows_the_cluster(kubernetes: str, api: str | None, tmp_path: Path) -> None:
    copy = shutil.copytree(CHART, tmp_path / "sapo-pipelines")
    helpers = copy / "templates" / "_helpers.tpl"  # the engine renders for one version of Kubernetes: stand another in
    asked = ".Capabilities.KubeVersion.Version"
    assert helpers.read_text().count(asked) == 1
    helpers.write_text(helpers.read_text().replace(asked, f'"v{kubernetes}"'))
    with helm_python.Chart.load(copy) as chart:
        if api is None:
            with pytest.raises(helm_python.HelmError, match=f"Kubernetes v{kubernetes} has no MutatingAdmissionPolicy"):
                chart.render({"trainingPods": {"enabled": True}}, name="sapo", namespace=NAMESPACE)
        else:
            texts = chart.render({"trainingPods": {"enabled": True}}, name="sapo", namespace=NAMESPACE)
            assert texts["sapo-pipelines/templates/training-pods.yaml"].count(f"apiVersion: {GROUP}/{api}\n") == 2


def test_it_is_off_by_default_and_limited_to_the_namespace() -> None:
    assert not [item for item in objects() if item["kind"].startswith("Mutating")]
    constraints = policy()["matchConstraints"]
    assert constraints["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": NAMESPACE}


def test_it_finds_the_training_stages_and_no_other() -> None:
    selector = policy()["matchConstraints"]["objectSelector"]
    (expression,) = selector["matchExpressions"]
    trains = {stage for stage, needs in NEEDS.items() if needs.trains}
    assert trains == set(expression["values"]) == {"train"}
    for path in COMPILED.glob("*.yaml"):
        executors = read_package(path).platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        labels = [executor["podMetadata"]["labels"] for executor in executors.values()]
        assert all(selector["matchLabels"].items() <= label.items() for label in labels)
        assert trains & {label[expression["key"]] for label in labels}


@pytest.mark.parametrize("names", list(itertools.permutations(["main", "wait"])))
def test_a_pod_gets_time_to_save_the_hook_and_the_class(names: tuple[str, ...]) -> None:
    spec = admitted(pod(*names), policy())["spec"]
    assert spec["terminationGracePeriodSeconds"] == GRACE_SECONDS
    main, wait = (next(c for c in spec["containers"] if c["name"] == name) for name in ("main", "wait"))
    assert main["lifecycle"]["preStop"]["exec"]["command"] == ["python3", "-m", before_stop.__name__]
    assert "lifecycle" not in wait
    assert (spec["priorityClassName"], spec["priority"], spec["preemptionPolicy"]) == ("sapo-training", 1000, "Never")


def test_what_comes_out_is_a_pod() -> None:
    made = admitted(pod("wait", "main"), policy(graceSeconds=60))
    assert kubernetes_validate.validate(made, "1.37", strict=True)
    assert made["spec"]["terminationGracePeriodSeconds"] == 60


def test_the_priority_is_that_of_the_chart_s_class() -> None:
    values = {
        "trainingPods": {"enabled": True},
        "priorityClass": {"value": 7, "preemptionPolicy": "PreemptLowerPriority"},
    }
    made = objects(values)
    there = find(made, "PriorityClass", "sapo-training")
    spec = admitted(pod("main"), find(made, "MutatingAdmissionPolicy", NAME)["spec"])["spec"]
    assert (spec["priority"], spec["preemptionPolicy"]) == (there["value"], there["preemptionPolicy"])
    without = admitted(pod("main"), policy(priorityClass=False))["spec"]
    assert (without["priority"], "priorityClassName" in without) == (0, False)


def test_another_pod_is_left_alone() -> None:
    assert admitted(pod("driver"), policy()) == pod("driver")


def test_notes_tell_how_to_see_it() -> None:
    assert "terminationGracePeriodSeconds" in rendered({"trainingPods": {"enabled": True}})["NOTES.txt"]
    assert "terminationGracePeriodSeconds" not in rendered()["NOTES.txt"]
