"""The chart: lint and render by the Helm engine, objects against Kubernetes' schemas, and what must hold in all of them."""

import base64
import importlib.util
import itertools
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from rendered_chart import CHART, CI, NAMESPACE, chart, ci_values, find, objects, rendered

from pipelines import cluster
from pipelines.package import COMPILED

KUBERNETES = ("1.29", "1.37")  # the oldest that Chart.yaml allows, and the newest whose schemas are there
# Kueue's own: spec of LocalQueue in kueue.x-k8s.io/v1beta1 and v1beta2, as far as users write it.
LOCAL_QUEUE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"enum": ["kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2"]},
        "kind": {"const": "LocalQueue"},
        "metadata": {"type": "object", "required": ["name", "namespace"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["clusterQueue"],
            "properties": {
                "clusterQueue": {
                    "type": "string",
                    "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
                },
                "stopPolicy": {"enum": ["None", "Hold", "HoldAndDrain"]},
                "fairSharing": {"type": "object"},
            },
        },
    },
}


def pods(made: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, metadata, spec) of every pod that these objects start."""
    for item in made:
        if item["kind"] == "Pod":
            yield item["metadata"]["name"], item["metadata"], item["spec"]
        elif "template" in item.get("spec", {}):
            template = item["spec"]["template"]
            yield item["metadata"]["name"], template["metadata"], template["spec"]


def test_the_five_installations_are_there() -> None:
    assert CI == ["air-gapped", "default", "kueue", "minimal", "multi-tenant"]


@pytest.mark.parametrize("name", CI)
def test_lint(name: str) -> None:
    for version in KUBERNETES:
        report = helm_python.lint(
            CHART, ci_values(name), strict=True, namespace=NAMESPACE, kube_version=f"v{version}.0"
        )
        assert not report["errors"]
        # severity 1: an icon is recommended
        assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(("name", "version"), list(itertools.product(CI, KUBERNETES)))
def test_every_object_is_what_kubernetes_takes(name: str, version: str) -> None:
    made = objects(ci_values(name))
    assert len(made) > 5
    for item in made:
        if item["apiVersion"].startswith("kueue.x-k8s.io/"):
            jsonschema.validate(item, LOCAL_QUEUE)
        else:
            assert kubernetes_validate.validate(item, version, strict=True) == version
        cluster_wide = item["kind"] == "PriorityClass"
        assert item["metadata"].get("namespace") == (None if cluster_wide else NAMESPACE)
    names = [(item["kind"], item["metadata"]["name"]) for item in made]
    assert len(names) == len(set(names))


def test_validation_can_fail() -> None:
    job = find(objects(), "Job", "sapo-upload")
    job["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)


WRONG = {
    "a key that is not there": ({"modelCashe": {"create": True}}, "modelCashe"),
    "a nested key that is not there": ({"hub": {"tokn": "x"}}, "tokn"),
    "text for a number": ({"priorityClass": {"value": "high"}}, "priorityClass"),
    "text for a switch": ({"tensorboard": {"enabled": "yes"}}, "tensorboard"),
    "a size without a unit": ({"modelCache": {"size": "200"}}, "modelCache"),
    "an access mode that Kubernetes has not": ({"modelCache": {"accessModes": ["ReadWrite"]}}, "accessModes"),
    "a queue without its cluster queue": ({"kueue": {"enabled": True}}, "clusterQueue"),
    "an endpoint without http": ({"store": {"endpoint": "s3.example.com"}}, "endpoint"),
    "an endpoint with a path": ({"kfp": {"endpoint": "https://kfp.example.com/pipeline"}}, "endpoint"),
    "a bucket that is a URL": ({"store": {"bucket": "s3://training"}}, "bucket"),
    "a priority that is the system's": ({"priorityClass": {"value": 2000000000}}, "priorityClass"),
    "root": ({"podSecurityContext": {"runAsUser": 0}}, "runAsUser"),
    "a network that is none": ({"networkPolicy": {"store": {"cidrs": ["s3.example.com"]}}}, "cidrs"),
    "a pod without a memory limit": ({"upload": {"resources": {"limits": {"cpu": "1"}, "requests": {}}}}, "limits"),
    "a grace period in words": ({"trainingPods": {"graceSeconds": "15m"}}, "graceSeconds"),
    "an API version that Kubernetes has not": ({"trainingPods": {"apiVersion": "v1"}}, "apiVersion"),
    "a port out of range": ({"networkPolicy": {"judge": {"port": 70000}}}, "port"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused(case: str) -> None:
    values, word = WRONG[case]
    if case == "a pod without a memory limit":  # values are laid over the defaults, so take it away as a user would
        values["upload"]["resources"]["limits"]["memory"] = None  # type: ignore[index]
    with pytest.raises(helm_python.HelmError, match=word):
        rendered(values)


def test_half_a_key_pair_is_refused() -> None:
    with pytest.raises(helm_python.HelmError, match=r"store\.accessKey and store\.secretKey go together"):
        rendered({"store": {"accessKey": "one"}})


def test_names_are_those_that_the_pipelines_have_compiled_in() -> None:
    values = {"hub": {"token": "t"}, "judge": {"key": "k"}, "store": {"accessKey": "a", "secretKey": "s"}}
    made = objects(values | {"kueue": {"enabled": True, "clusterQueue": "gpus"}})
    for secret, keys in cluster.SECRETS.values():
        assert find(made, "Secret", secret)["stringData"].keys() == keys.keys()
    name, keys = cluster.STORE
    assert find(made, "ConfigMap", name)["data"].keys() == keys.keys()
    find(made, "PersistentVolumeClaim", cluster.CACHE_CLAIM)
    find(made, "ServiceAccount", cluster.SERVICE_ACCOUNT)
    find(made, "LocalQueue", cluster.QUEUE)
    find(made, "PriorityClass", "sapo-training")
    # `helm test` reads the variables that a stage reads.
    (container,) = find(made, "Pod", "sapo-check")["spec"]["containers"]
    read = {
        (source[kind]["name"], source[kind]["key"]): variable["name"]
        for variable in container["env"]
        for source in [variable.get("valueFrom", {})]
        for kind in source
    }
    mounted = {
        (s, key): variable for s, keys in [*cluster.SECRETS.values(), cluster.STORE] for key, variable in keys.items()
    }
    assert read == mounted


def test_secret_values_are_in_secrets_only() -> None:
    sentinels = {
        "token": "hf_s3ntinel",
        "accesskey": "acc3ss-s3ntinel",
        "secretkey": "s3cr3t-s3ntinel",
        "key": "jud9e-s3ntinel",
    }
    values = {
        "hub": {"token": sentinels["token"]},
        "store": {"accessKey": sentinels["accesskey"], "secretKey": sentinels["secretkey"]},
        "judge": {"key": sentinels["key"]},
        "seaweedfs": {"enabled": True},
        "tensorboard": {"enabled": True},
        "kfpLauncher": {"create": True},
        "kfp": {"multiUser": True},
    }
    made = objects(values)
    found = {key: value for item in made if item["kind"] == "Secret" for key, value in item["stringData"].items()}
    assert found == sentinels
    elsewhere = json.dumps([item for item in made if item["kind"] != "Secret"]) + rendered(values)["NOTES.txt"]
    for value in sentinels.values():
        assert value not in elsewhere
        assert base64.b64encode(value.encode()).decode() not in elsewhere


@pytest.mark.parametrize("name", CI)
def test_every_pod_is_restricted(name: str) -> None:
    """Kubernetes' `restricted` pod security standard, and a read-only root file system on top."""
    started = list(pods(objects(ci_values(name))))
    assert {"sapo-upload", "sapo-check"} <= {title for title, _, _ in started}
    for title, _, spec in started:
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0, title
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, title
        assert spec["automountServiceAccountToken"] is False, title
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, title
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"], title
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], title
        assert all(volume.keys() & {"configMap", "emptyDir", "projected"} for volume in spec["volumes"]), title


def test_a_platform_may_choose_the_user() -> None:
    values = {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}
    for title, _, spec in pods(objects(values)):
        assert spec["securityContext"].keys() == {"runAsNonRoot", "seccompProfile"}, title


def test_packaged_pipelines_are_the_compiled_ones(tmp_path: Path) -> None:
    compiled = {path.name: path.read_text(encoding="utf-8") for path in COMPILED.glob("*.yaml")}
    assert compiled
    archive = helm_python.package(CHART, destination=tmp_path)
    with helm_python.Chart.load(archive) as packaged:
        texts = packaged.render({}, name="sapo", namespace=NAMESPACE)
    made = [item for item in yaml.safe_load_all(texts["sapo-pipelines/templates/upload.yaml"]) if item]
    maps = [item for item in made if item["metadata"]["name"].startswith("sapo-package-")]
    uploaded = {file: text for item in maps for file, text in item["data"].items()}
    assert uploaded == compiled
    for item in maps:
        assert len(json.dumps(item)) < 1_000_000, "Kubernetes holds 1 MiB in a config map"


def test_a_copy_that_lost_its_pipelines_is_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(CHART, tmp_path / "sapo-pipelines", ignore=shutil.ignore_patterns("packages"))
    (copy / "files" / "packages").write_text("../../../pipelines/compiled")  # what a checkout without links has
    with helm_python.Chart.load(copy) as broken, pytest.raises(helm_python.HelmError, match="holds no pipeline"):
        broken.render({}, name="sapo", namespace=NAMESPACE)


def test_uploaded_pipelines_pull_from_the_registry_of_the_installation() -> None:
    values = ci_values("air-gapped") | {
        "image": {"registry": "registry.example.internal:5000/sapo", "tag": "0.1.0-cuda"}
    }
    made = objects(values)
    images = [container["image"] for _, _, spec in pods(made) for container in spec["containers"]]
    packages = [item["data"] for item in made if item["metadata"]["name"].startswith("sapo-package-")]
    for text in itertools.chain.from_iterable(data.values() for data in packages):
        assert "ghcr.io" not in text
        images += re.findall(r"^ +image: (\S+)$", text, re.M)
    assert len(images) > 10
    assert {re.sub(r"/[a-z-]+:", "/STAGE:", image) for image in images} == {
        "registry.example.internal:5000/sapo/STAGE:0.1.0-cuda"
    }
    stages = {Path(image).name.partition(":")[0] for image in images}
    assert {"data", "model", "train", "evaluation", "report"} <= stages


def egress(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return find(made, "NetworkPolicy", "sapo-stages")["spec"]["egress"]


def reached(rules: list[dict[str, Any]], port: int) -> list[Any]:
    """Peers that these rules let through on a TCP port."""
    ports = [rule for rule in rules if any(p["port"] == port and p["protocol"] == "TCP" for p in rule.get("ports", []))]
    return [peer for rule in ports for peer in rule["to"]]


def test_air_gapped_stages_reach_no_public_address() -> None:
    rules = egress(objects(ci_values("air-gapped")))
    blocks = {peer["ipBlock"]["cidr"] for rule in rules for peer in rule["to"] if "ipBlock" in peer}
    private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"}
    assert blocks == {"169.254.20.10/32", "10.20.0.0/16"} | private
    assert {"ipBlock": {"cidr": "10.20.0.0/16"}} in reached(rules, 443)
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "serving"}}} in reached(rules, 8000)


def test_stages_do_not_reach_the_cloud_s_metadata_service() -> None:
    rules = egress(objects())
    (public,) = [peer for peer in reached(rules, 443) if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"]
    assert "169.254.0.0/16" in public["ipBlock"]["except"]


@pytest.mark.parametrize(
    ("values", "port", "peer"),
    [
        ({}, 9000, {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}}),
        (
            {"seaweedfs": {"enabled": True}},
            8333,
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}},
        ),
        (
            {"store": {"endpoint": "http://minio.infra.svc:9001"}},
            9001,
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "infra"}}},
        ),
        ({"store": {"endpoint": "http://store.example.internal:9002"}}, 9002, {"ipBlock": {"cidr": "0.0.0.0/0"}}),
        ({"store": {"endpoint": "http://store.example.internal"}}, 80, {"ipBlock": {"cidr": "0.0.0.0/0"}}),
    ],
)
def test_stages_reach_the_store(values: dict[str, Any], port: int, peer: dict[str, Any]) -> None:
    assert peer in reached(egress(objects(values)), port)


def test_network_policy_is_about_the_stages_pods() -> None:
    made = objects(ci_values("kueue"))
    policy = find(made, "NetworkPolicy", "sapo-stages")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "sapo-pipelines"}
    labels = [label for path in COMPILED.glob("*.yaml") for label in stage_labels(path)]
    assert labels and all(label["app.kubernetes.io/part-of"] == "sapo-pipelines" for label in labels)
    for title, metadata, _ in pods(made):
        assert "app.kubernetes.io/part-of" not in metadata["labels"], title
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    assert (
        find(objects({"networkPolicy": {"podToPod": False}}), "NetworkPolicy", "sapo-stages")["spec"]["ingress"] == []
    )


def stage_labels(package: Path) -> list[dict[str, str]]:
    """Pod labels of every stage of a compiled package."""
    _, platform = yaml.safe_load_all(package.read_text(encoding="utf-8"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return [executor["podMetadata"]["labels"] for executor in executors.values()]


def test_profile_namespace_keeps_to_itself() -> None:
    made = objects(ci_values("multi-tenant"))
    kinds = {item["kind"] for item in made}
    assert not kinds & {"PriorityClass", "ClusterRole", "ClusterRoleBinding", "Namespace"}
    assert [item["metadata"]["name"] for item in made if item["kind"] == "ServiceAccount"] == ["sapo-upload"]
    assert find(made, "RoleBinding", "sapo-runner")["subjects"][0]["name"] == "default-editor"
    assert find(made, "Role", "sapo-upload")["rules"] == [
        {
            "apiGroups": ["pipelines.kubeflow.org"],
            "resources": ["pipelines", "pipelineversions"],
            "verbs": ["get", "list", "create"],
        }
    ]
    for title, metadata, spec in pods(made):
        assert metadata["labels"]["sidecar.istio.io/inject"] == "false", title
        assert metadata["annotations"]["sidecar.istio.io/inject"] == "false", title
        tokens = [
            source
            for v in spec["volumes"]
            for source in v.get("projected", {}).get("sources", [])
            if "configMap" not in source
        ]
        audiences = [source["serviceAccountToken"]["audience"] for source in tokens]
        assert audiences == ([] if title == "sapo-tensorboard" else ["pipelines.kubeflow.org"]), title
    # Kubeflow's profile controller owns this one.
    assert "kfp-launcher" not in [item["metadata"]["name"] for item in made]


def test_runs_may_read_two_secrets_and_nothing_by_wildcard() -> None:
    rules = find(objects(), "Role", "sapo-runner")["rules"]
    assert not any("*" in rule[part] for rule in rules for part in ("apiGroups", "resources", "verbs"))
    (secrets,) = [rule for rule in rules if "secrets" in rule["resources"]]
    assert secrets["resourceNames"] == ["sapo-store", "mlpipeline-minio-artifact"] and secrets["verbs"] == ["get"]


@pytest.mark.parametrize(
    ("values", "root", "host", "plain"),
    [
        ({}, "s3://mlpipeline/sapo", "seaweedfs.kubeflow.svc.cluster.local:9000", True),
        (
            {"seaweedfs": {"enabled": True}},
            "s3://mlpipeline/sapo",
            f"sapo-seaweedfs.{NAMESPACE}.svc.cluster.local:8333",
            True,
        ),
        (
            {"store": {"endpoint": "https://s3.example.com", "bucket": "b-1", "prefix": ""}},
            "s3://b-1",
            "s3.example.com",
            False,
        ),
    ],
)
def test_pipeline_root(values: dict[str, Any], root: str, host: str, plain: bool) -> None:
    data = find(objects(values | {"kfpLauncher": {"create": True}}), "ConfigMap", "kfp-launcher")["data"]
    assert data["defaultPipelineRoot"] == root
    store = yaml.safe_load(data["providers"])["s3"]["default"]
    assert (store["endpoint"], store["disableSSL"], store["forcePathStyle"]) == (host, plain, True)
    assert store["credentials"] == {
        "fromEnv": False,
        "secretRef": {"secretName": "sapo-store", "accessKeyKey": "accesskey", "secretKeyKey": "secretkey"},
    }


def test_trial_store_gets_keys_that_nobody_can_guess() -> None:
    values = {"seaweedfs": {"enabled": True}}
    one, two = (find(objects(values), "Secret", "sapo-store")["data"] for _ in range(2))
    assert len(base64.b64decode(one["secretkey"])) == 40 and one != two
    given = values | {"store": {"accessKey": "mine", "secretKey": "mine too"}}
    assert find(objects(given), "Secret", "sapo-store")["stringData"] == {"accesskey": "mine", "secretkey": "mine too"}


@pytest.mark.parametrize("name", CI)
def test_notes_name_the_next_command(name: str) -> None:
    notes = rendered(ci_values(name))["NOTES.txt"]
    assert f"helm test sapo -n {NAMESPACE} --logs" in notes
    assert "python -m pipelines submit tiny" in notes
    assert ("secret generic sapo-store" in notes) == (name in ("default", "minimal", "multi-tenant"))
    assert ("--service_account default-editor" in notes) == ("KF_TOKEN" in notes) == (name == "multi-tenant")
    assert ("svc/sapo-tensorboard" in notes) == (name in ("kueue", "multi-tenant"))


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else [f"{path}{key}"]


def schema_leaves(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in schema["properties"].items():
        yield from schema_leaves(value, f"{path}{key}.") if "properties" in value else [f"{path}{key}"]


def test_every_value_is_documented_and_in_the_schema() -> None:
    spec = importlib.util.spec_from_file_location("values_table", CHART.parent / "values_table.py")
    assert spec is not None and spec.loader is not None
    values_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(values_table)
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    documented = [key for key, about in values_table.documented(text) if about]
    assert len(documented) == len(set(documented))
    for key in leaves(yaml.safe_load(text)):
        assert [known for known in documented if key == known or key.startswith(f"{known}.")], f"{key} has no comment"
    assert set(schema_leaves(chart().schema or {})) == {*documented, "global"}
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    assert values_table.with_table(readme, text) == readme, "run `python helm/values_table.py`"


def test_schema_is_strict_everywhere() -> None:
    def check(schema: Any, where: str) -> None:
        if isinstance(schema, dict):
            if "properties" in schema and where.rpartition("/")[2] not in ("if", "then"):
                assert schema["additionalProperties"] is False, where
            for key, value in schema.items():
                check(value, f"{where}/{key}")

    check(chart().schema, "")


def test_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart().metadata["appVersion"] == chart().version == project["version"] == cluster.VERSION
