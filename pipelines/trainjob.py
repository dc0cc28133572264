"""One method of a run as a TrainJob of Kubeflow Trainer: the same stage on N nodes, for a model that outgrows one.

Not a task of the pipeline: Kubeflow Pipelines runs a task in one pod. Data, model and output are locations in an object
store, because the nodes share no disk. The method's recipe and settings, the machine and the image are those of the run.
"""

import json
from typing import Any

from components.common.core.errors import UserError
from pipelines import cluster
from pipelines.methods import Method
from pipelines.runs import Run

RUNTIME = "torch-distributed"  # a ClusterTrainingRuntime that comes with Kubeflow Trainer; it tells torchrun its peers
PART_OF = {"app.kubernetes.io/part-of": "sapo-pipelines"}  # the network policy lets such pods reach each other


def train_job(
    run: Run, arguments: dict[str, Any], method: str, nodes: int, data: str, model: str, output: str
) -> dict[str, Any]:
    """The TrainJob (trainer.kubeflow.org/v1alpha1) that trains one method on `nodes` machines of the run.

    Args:
        run: the run.
        arguments: parameters of its pipeline, checked; what is left out is as in the run.
        method: name of one of its methods.
        nodes: how many pods, each with all the GPUs of a training stage.
        data, model, output: where the data stage's output is, the model to start from, and where the result goes.

    Raises:
        UserError: no such method, or a location that other nodes cannot reach.
    """
    values = {name: arguments.get(name, parameter.default) for name, parameter in run.parameters.items()}
    chosen = _method(run, method)
    for name, location in (("data", data), ("model", model), ("output", output)):
        if "://" not in location:
            raise UserError(f"--{name} {location}: nodes share no disk; give an s3:// location")
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: must be 1 or more")
    locations = ["--data", data, "--model", model, "--output", output, "--grace_seconds", str(cluster.SENDING_SECONDS)]
    recipe, settings = values[f"{chosen.use}_recipe"], values[f"{chosen.use}_settings"]
    configured = ["--config", recipe, "--settings", json.dumps(settings)]
    labels = {**PART_OF, "kueue.x-k8s.io/queue-name": cluster.QUEUE}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"generateName": f"{method.lower().replace('_', '-').replace('.', '-')}-", "labels": labels},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": RUNTIME},
            "activeDeadlineSeconds": cluster.NEEDS["train"].hours * 3600,
            "trainer": {
                "image": cluster.image("train"),
                "command": ["torchrun", "-m", f"components.{chosen.stage}"],
                "args": ["--name", method, *configured, *locations],
                "numNodes": nodes,
                "numProcPerNode": max(int(values["gpus"]), 1),
                "resourcesPerNode": {"limits": _limits(values)},
                "env": _environment(),
            },
            "runtimePatches": [{"manager": "sapo-pipelines/trainjob", "trainingRuntimeSpec": _pods(values)}],
        },
    }


def _method(run: Run, name: str) -> Method:
    for method in run.methods:
        if method.name == name:
            return method
    raise UserError(f"--method {name}: the run has {', '.join(method.name for method in run.methods) or 'none'}")


def _limits(values: dict[str, Any]) -> dict[str, str]:
    gpus = {values["gpu_type"]: values["gpus"]} if int(values["gpus"]) else {}
    return {"cpu": values["cpu"], "memory": values["memory"], **gpus}


def _environment() -> list[dict[str, Any]]:
    """The same secrets as in a pod of the pipeline, and time to save."""
    sources = [("secretKeyRef", *cluster.SECRETS[secret]) for secret in cluster.NEEDS["train"].secrets]
    sources.append(("configMapKeyRef", *cluster.STORE))
    # torchrun passes SIGTERM on, and by itself kills its processes 30 seconds later.
    patience = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(cluster.GRACE_SECONDS - 60)}
    return [patience] + [
        {"name": variable, "valueFrom": {kind: {"name": name, "key": key, "optional": True}}}
        for kind, name, keys in sources
        for key, variable in keys.items()
    ]


def _pods(values: dict[str, Any]) -> dict[str, Any]:
    """What the pods have besides the container: the patch of the runtime's replicated job `node`."""
    volumes = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.SHARED_MEMORY}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": cluster.CACHE_CLAIM}},
    ]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "cache", "mountPath": cluster.CACHE}]
    pod = {
        "serviceAccountName": cluster.SERVICE_ACCOUNT,
        "terminationGracePeriodSeconds": cluster.GRACE_SECONDS,
        "nodeSelector": values["node_selector"],
        "tolerations": values["tolerations"],
        "securityContext": {"runAsNonRoot": True, "fsGroup": 1000},
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"metadata": {"labels": PART_OF}, "spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
