"""What a stage is on a cluster: image, machine, secrets, caches, retries, time-outs. One place for all of them.

A fork changes the registry here once and compiles again. Kubernetes names are those that the Helm chart creates. Local
runs ignore all of this but the commands: platform settings are not part of what kfp.local executes.

What takes an argument of the run: GPUs, CPU, memory, node selector and tolerations of the stages that compute, as text,
because Kubeflow Pipelines reads only text parameters there. Fixed when compiled, because it has no parameters for them:
retries, time-outs, caching, labels, volumes, environment.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from kfp import dsl, kubernetes
from kfp.dsl import PipelineConfig, PipelineTask, WorkspaceConfig
from kfp.dsl.constants import WORKSPACE_MOUNT_PATH
from kfp.dsl.pipeline_config import KubernetesWorkspaceConfig

REGISTRY = "ghcr.io/sapo-pipelines"
VERSION = "0.1.0"  # of this distribution; tests compare it with pyproject.toml

SERVICE_ACCOUNT = "sapo-runner"
QUEUE = "sapo"  # Kueue's LocalQueue; without Kueue the label means nothing
# NCCL and data loaders share memory between processes; a container's own /dev/shm has 64 MiB. It counts as memory.
SHARED_MEMORY = "32Gi"
CACHE_CLAIM = "sapo-model-cache"
# Where the images keep every cache: the hub, wheels, compiled kernels. Their user, uid 1000, must be able to write there.
CACHE = "/tmp/.cache"
CACHES = {
    "XDG_CACHE_HOME": ".cache",  # the hub, vLLM
    "SAPO_CACHE": ".cache/sapo-pipelines",
    "TORCHINDUCTOR_CACHE_DIR": ".cache/torchinductor",
    "TRITON_CACHE_DIR": ".cache/triton",
}
# Size of a volume of each run, such as "200Gi", for the caches of stages that compute; it is made and removed with the run.
# For namespaces where runs must not share the claim, or where it is slow. None: those stages use the claim too.
WORKSPACE: str | None = None
WORKSPACE_CLAIM = {"accessModes": ["ReadWriteMany"]}  # training and evaluation may run on different nodes
# Environment of a stage: from a secret's key. Every one is optional to Kubernetes; the preflight stage says what a run lacks.
SECRETS = {
    "hub": ("sapo-hub", {"token": "HF_TOKEN"}),
    "store": ("sapo-store", {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}),
    "judge": ("sapo-judge", {"key": "OPENAI_API_KEY"}),
}
STORE = ("sapo-store", {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_REGION"})
# From SIGTERM to SIGKILL where it can be set (a TrainJob, the chart's `trainingPods`): finish the step, save, and send the
# checkpoint to the store, for which a stage has SENDING_SECONDS.
GRACE_SECONDS = 900
SENDING_SECONDS = 300
_HOUR = 3600


class Machine(NamedTuple):
    """What a stage that computes asks for: parameters of the pipeline, or constants."""

    gpus: Any
    gpu_type: Any
    cpu: Any
    memory: Any
    node_selector: Any
    tolerations: Any


@dataclass(frozen=True)
class StageResources:
    """What a stage needs besides a `Machine`; `size` is (CPU, memory) of one that needs no more, request then limit.

    A cached stage gives the same for the same inputs. An attempt that takes longer than `hours` is a failed one.
    """

    hours: int
    secrets: tuple[str, ...] = ("hub", "store")
    size: tuple[tuple[str, str], tuple[str, str]] | None = None
    retries: int = 2
    cached: bool = False
    cache_volume: bool = True
    trains: bool = False


_LIGHT = (("250m", "512Mi"), ("2", "4Gi"))
NEEDS = {
    # Without the volume: a pod that waits for a missing one says nothing, and this stage is there to tell.
    "preflight": StageResources(
        1, ("hub", "store", "judge"), (("100m", "128Mi"), ("1", "512Mi")), retries=0, cache_volume=False
    ),
    "data": StageResources(4, size=(("500m", "1Gi"), ("2", "8Gi")), cached=True),
    "model": StageResources(
        4, size=(("500m", "2Gi"), ("4", "48Gi")), cached=True
    ),  # 8B parameters are loaded once, on the CPU
    "train": StageResources(hours=96, trains=True),
    "evaluation": StageResources(24, ("hub", "store", "judge")),
    "report": StageResources(1, ("store",), _LIGHT, cache_volume=False),
}


def image(stage: str) -> str:
    """The container image of a stage, such as `ghcr.io/sapo-pipelines/sapo:0.1.0`.

    `train` is an image that holds every training stage, so that a node fetches one for all methods.
    """
    return f"{REGISTRY}/{stage}:{VERSION}"


def pipeline_config() -> PipelineConfig | None:
    """What a pipeline says of itself: the volume of each run, where there is one."""
    if WORKSPACE is None:
        return None
    claim = KubernetesWorkspaceConfig(pvcSpecPatch=WORKSPACE_CLAIM)
    return PipelineConfig(workspace=WorkspaceConfig(size=WORKSPACE, kubernetes=claim))


def workspace() -> dict[str, str]:
    """The input by which a stage that computes gets the run's volume: KFP mounts it where a parameter names its path. Never for
    a stage whose steps are cached, because the volume's name, another for each run, would be part of the cache's key."""
    return {"workspace": dsl.WORKSPACE_PATH_PLACEHOLDER} if WORKSPACE else {}


def on_cluster(task: PipelineTask, stage: str, machine: Machine | None = None) -> PipelineTask:
    """Gives a task of that stage everything it needs on a cluster, and returns it.

    Args:
        task: A task of the pipeline that is being compiled.
        stage: A key of `NEEDS`.
        machine: For the stages that compute (training, evaluation); the others have a fixed size.
    """
    needs = NEEDS[stage]
    task.set_caching_options(needs.cached)
    if needs.retries:
        # Argo counts the longest wait from the start of the first attempt, and ends a later attempt that is still at work
        # then: it has to be longer than all attempts and waits together.
        deadline = f"{needs.hours * (needs.retries + 1) + 1}h"
        task.set_retry(needs.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration=deadline)
    kubernetes.set_timeout(task, needs.hours * _HOUR)
    kubernetes.set_security_context(task, run_as_non_root=True)
    for label, value in (("part-of", "sapo-pipelines"), ("component", stage), ("version", VERSION)):
        kubernetes.add_pod_label(task, f"app.kubernetes.io/{label}", value)
    for secret in needs.secrets:
        kubernetes.use_secret_as_env(task, *SECRETS[secret], optional=True)
    kubernetes.use_config_map_as_env(task, *STORE, optional=True)
    if WORKSPACE and machine:
        _use_workspace(task)
    elif needs.cache_volume:
        kubernetes.mount_pvc(task, CACHE_CLAIM, CACHE)
    if machine is None:
        _set_size(task, needs)
    else:
        _set_machine(task, machine)
    return task


def _use_workspace(task: PipelineTask) -> None:
    """Puts every cache into the run's volume; the images have them below `CACHE`."""
    for variable, directory in CACHES.items():
        task.set_env_variable(variable, f"{WORKSPACE_MOUNT_PATH}/{directory}")


def _set_size(task: PipelineTask, needs: StageResources) -> None:
    assert needs.size is not None, "a stage without a fixed size takes a machine"
    (cpu_request, memory_request), (cpu, memory) = needs.size
    task.set_cpu_request(cpu_request).set_cpu_limit(cpu)
    task.set_memory_request(memory_request).set_memory_limit(memory)


def _set_machine(task: PipelineTask, machine: Machine) -> None:
    task.set_cpu_limit(machine.cpu).set_memory_limit(machine.memory)
    task.set_accelerator_type(machine.gpu_type).set_accelerator_limit(machine.gpus)
    kubernetes.add_node_selector_json(task, machine.node_selector)
    kubernetes.add_toleration_json(task, machine.tolerations)
    kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", QUEUE)
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)
