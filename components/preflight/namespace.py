"""What the namespace has: the cache volume, the queue, and a quota of GPUs that is large enough.

Asked of the Kubernetes API with the pod's own service account. What that account may not read is skipped, not failed.
"""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.preflight.checks import TIMEOUT_SECONDS, Check
from components.preflight.config import PreflightConfig

CACHE_CLAIM, QUEUE = "sapo-model-cache", "sapo"  # as in pipelines/cluster.py; a test compares them
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CHART = "install the Helm chart in this namespace"


class RefusedError(Exception):
    """The API answered with something else than the object."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"the Kubernetes API says {status or reason}")
        self.status = status


class Namespace:
    """The Kubernetes API, seen from a namespace."""

    def __init__(self, url: str, name: str, token: str, context: ssl.SSLContext | None = None) -> None:
        self.url = url
        self.name = name
        self._token = token
        self._context = context

    def get(self, path: str) -> dict[str, Any]:
        """The object at a path; `{}` in it is the namespace. Raises RefusedError."""
        address = f"{self.url}{path.format(f'namespaces/{self.name}')}"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {self._token}"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=self._context) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RefusedError(error.code, error.reason) from error
        except (OSError, ValueError) as error:
            raise RefusedError(0, str(error)) from error


def of_pod() -> Namespace | None:
    """The namespace of the pod that Kubeflow Pipelines started this process in; None anywhere else."""
    if "KFP_POD_NAME" not in os.environ or not (_ACCOUNT / "token").is_file():
        return None
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    name, token = ((_ACCOUNT / file).read_text().strip() for file in ("namespace", "token"))
    host = f"[{host}]" if ":" in host else host
    return Namespace(f"https://{host}:{port}", name, token, ssl.create_default_context(cafile=_ACCOUNT / "ca.crt"))


def check_namespace(config: PreflightConfig, namespace: Namespace | None) -> Iterator[Check]:
    """The cache volume always, queue and quota where the run uses GPUs."""
    if namespace is None:
        yield Check("cluster", "skipped", "not a pod of Kubeflow Pipelines: volume, queue and quota do not matter here")
        return
    checks = [("volume for caches", _volume), ("Kueue's queue", _queue)]
    gpus = max(config.gpus, config.evaluation_gpus)
    try:
        yield from (_guarded(what, check, namespace) for what, check in checks)
        if gpus:
            yield from _quota(namespace, config.gpu_type, gpus)
    except RefusedError as error:
        yield Check("quota of GPUs", "skipped", str(error))


def _guarded(what: str, check: Any, namespace: Namespace) -> Check:
    try:
        return check(namespace)
    except RefusedError as error:
        return Check(what, "skipped", str(error))


def _volume(namespace: Namespace) -> Check:
    what = f"volume {CACHE_CLAIM}"
    try:
        claim = namespace.get(f"/api/v1/{{}}/persistentvolumeclaims/{CACHE_CLAIM}")
    except RefusedError as error:
        if error.status != 404:
            raise
        return Check(what, "failed", f"namespace {namespace.name} has no such claim, pods would wait forever; {_CHART}")
    phase = claim.get("status", {}).get("phase", "unknown")  # Pending is fine: many classes bind at the first use
    return Check(what, "failed" if phase == "Lost" else "ok", phase)


def _queue(namespace: Namespace) -> Check:
    what = f"queue {QUEUE}"
    try:
        group = namespace.get("/apis/kueue.x-k8s.io")
    except RefusedError as error:
        if error.status != 404:
            raise
        return Check(what, "ok", "Kueue is not installed: pods start at once")
    version = group["preferredVersion"]["groupVersion"]
    try:
        queue = namespace.get(f"/apis/{version}/{{}}/localqueues/{QUEUE}")
    except RefusedError as error:
        if error.status != 404:
            raise
        found = f"Kueue is installed and namespace {namespace.name} has no such LocalQueue, pods would wait forever"
        return Check(what, "failed", f"{found}; {_CHART} with kueue enabled")
    for condition in queue.get("status", {}).get("conditions", []):
        if condition["type"] == "Active" and condition["status"] != "True":
            return Check(what, "failed", f"is not active: {condition.get('message', condition.get('reason', ''))}")
    return Check(what, "ok", f"{queue.get('status', {}).get('pendingWorkloads', 0)} workloads are waiting")


def _quota(namespace: Namespace, gpu_type: str, gpus: int) -> Iterator[Check]:
    """Every ResourceQuota that counts these GPUs against the largest stage."""
    found = False
    for quota in namespace.get("/api/v1/{}/resourcequotas")["items"]:
        hard = quota.get("spec", {}).get("hard", {}).get(f"requests.{gpu_type}")
        if hard is None:
            continue
        found = True
        what = f"quota {quota['metadata']['name']}"
        used = int(quota.get("status", {}).get("used", {}).get(f"requests.{gpu_type}", 0))
        if int(hard) < gpus:
            yield Check(what, "failed", f"allows {hard} of {gpu_type}, a stage of this run asks for {gpus}")
        else:
            waits = "" if used + gpus <= int(hard) else ": stages wait until some are free"
            yield Check(what, "ok", f"{used} of {hard} {gpu_type} in use{waits}")
    if not found:
        yield Check("quota of GPUs", "ok", f"no ResourceQuota limits {gpu_type}")
