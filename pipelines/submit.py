"""Starts a compiled package on a cluster and, if told to, waits for its end. Speaks the v2beta1 API through kfp's client.

kfp's own waiting takes a cancelled run for a running one, and its command line ends with 0 for a failed one; here only
SUCCEEDED is a success. Credentials come from the environment: KF_TOKEN (a bearer token), KF_COOKIE (such as
`authservice_session=...` of Dex), or KF_PIPELINES_SA_TOKEN_PATH (a file that a pod's token is projected to). KF_CA_CERT is
a file of certificates to trust instead of the usual ones.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import urllib3
from kfp.client import Client, ServiceAccountTokenVolumeCredentials
from kfp_server_api.exceptions import ApiException

from pipelines.duration import duration
from pipelines.package import Package

ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
PATIENCE_SECONDS = 300.0  # how long the API may not answer while a run is watched
_PASSING = {0, 408, 429, 500, 502, 503, 504}


class SubmitError(Exception):
    """The run was not started, or its end is not known. The message says which, and what to do.

    `passing`: trying again may help.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True)
class Submission:
    """What to start, and where.

    With a `key`, submitting the same again finds the run that is there; two at the very same moment may still both start.
    """

    package: Package
    arguments: dict[str, Any]
    endpoint: str
    namespace: str = ""
    experiment: str = "sapo"
    service_account: str = ""
    key: str | None = None

    @property
    def name(self) -> str:
        return f"{self.package.name}-{self.key or format(datetime.now(), '%Y%m%d-%H%M%S')}"

    def body(self, experiment_id: str) -> dict[str, Any]:
        """The body of `POST /apis/v2beta1/runs`."""
        spec = {"pipeline_spec": self.package.spec, "platform_spec": self.package.platform}
        content = {"pipeline_spec": spec, "runtime_config": {"parameters": self.arguments}}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        about = {"description": f"sapo-pipelines {digest}", "service_account": self.service_account or None}
        named = {"experiment_id": experiment_id, "display_name": self.name, **content, **about}
        return {key: value for key, value in named.items() if value is not None}

    def request(self) -> dict[str, Any]:
        """What would be sent, for `--dry_run`; only the server knows the id of the experiment."""
        where = f" in namespace {self.namespace}" if self.namespace else ""
        body = self.body(f"(id of experiment {self.experiment}{where})")
        return {"POST": f"{self.endpoint.rstrip('/')}/apis/v2beta1/runs", "body": body}


class Cluster:
    """Kubeflow Pipelines behind an endpoint.

    Raises:
        SubmitError: it does not answer, or does not take the credentials.
    """

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        path = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH")
        with _explained(submission.endpoint), _quiet():
            self.client = Client(
                host=submission.endpoint,
                namespace=submission.namespace,
                existing_token=os.environ.get("KF_TOKEN"),
                cookies=os.environ.get("KF_COOKIE"),
                ssl_ca_cert=os.environ.get("KF_CA_CERT"),
                credentials=ServiceAccountTokenVolumeCredentials(path=path) if path else None,
            )

    def url(self, run_id: str) -> str:
        return f"{self.submission.endpoint.rstrip('/')}/#/runs/details/{run_id}"

    def start(self) -> tuple[Any, bool]:
        """The run, and whether it was started now; one with the same key that is there is not started again."""
        submission = self.submission
        with _explained(submission.endpoint):
            with _quiet():
                found = self.client.create_experiment(submission.experiment, namespace=submission.namespace or None)
            body = submission.body(found.experiment_id)
            if run := self._find(body):
                return run, False
            try:
                created = self.client.runs.run_service_create_run(run=self.client.api_models.V2beta1Run(**body))
            except (ApiException, urllib3.exceptions.HTTPError):
                if run := self._find(body):  # it was made, and the answer lost
                    return run, True
                raise
            return created, True

    def _find(self, body: dict[str, Any]) -> Any:
        if self.submission.key is None:
            return None
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": body["display_name"]}
        listed = self.client.list_runs(
            experiment_id=body["experiment_id"],
            filter=json.dumps({"predicates": [predicate]}),
            sort_by="created_at desc",
        )
        run = next(iter(listed.runs or []), None)
        if run is not None and run.description != body["description"]:
            raise SubmitError(
                f"run key {self.submission.key} is taken by a run with other arguments or another package: "
                f"{self.url(run.run_id)}; give another key"
            )
        return run

    def wait(self, run_id: str, timeout: float, poll: float, show: Callable[[str], None]) -> Any:
        """The run, once it has ended.

        Args:
            run_id: the run.
            timeout: seconds to wait at most; 0 for no limit.
            poll: seconds between two looks.
            show: gets the table of tasks whenever it has changed.

        Raises:
            SubmitError: time is up, or the API has not answered for `PATIENCE_SECONDS`.
        """
        started = answered = time.monotonic()
        shown = None
        while True:
            try:
                with _explained(self.submission.endpoint):
                    run = self.client.get_run(run_id)
                answered = time.monotonic()
                states = [(task.display_name, task.state) for task in tasks(run)]
                if states != shown:
                    shown = states
                    show(table(run))
                if run.state in ENDED:
                    return run
            except SubmitError as error:
                if not error.passing or time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
            if timeout and time.monotonic() - started > timeout:
                raise SubmitError(f"no end after {duration(timeout)}; the run goes on: {self.url(run_id)}")
            time.sleep(poll)


def tasks(run: Any) -> list[Any]:
    """What a person calls a task, in the order they started: without the drivers and the DAGs of KFP."""
    details = (run.run_details and run.run_details.task_details) or []
    groups = {task.parent_task_id for task in details}
    shown = [
        task
        for task in details
        if not (task.display_name or "").endswith(("-driver", "executor")) and task.display_name not in (None, "root")
    ]
    leaves = [task for task in shown if task.task_id not in groups] or shown
    return sorted(leaves, key=lambda task: (str(task.start_time or task.create_time), task.display_name))


def table(run: Any) -> str:
    """State and duration of the run and of each task."""
    rows = [("run", run.state or "PENDING", _took(run.created_at, run.finished_at))]
    rows += [(task.display_name, task.state or "PENDING", _took(task.start_time, task.end_time)) for task in tasks(run)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{name.ljust(widths[0])}  {state.ljust(widths[1])}  {took}".rstrip() for name, state, took in rows
    )


def _took(start: datetime | None, end: datetime | None) -> str:
    if start is None or start.year < 2000:  # the server writes 1970 for a time it does not know
        return ""
    ended = end if end is not None and end.year >= 2000 else datetime.now(start.tzinfo)
    return duration(max((ended - start).total_seconds(), 0))


def failure(run: Any) -> str:
    """Why a run that has ended is no success."""
    failed = [task for task in tasks(run) if task.state == "FAILED"]
    reasons = [f"{task.display_name}: {_message(task.error) or 'failed'}" for task in failed]
    return "; ".join([f"the run is {run.state}", *filter(None, [_message(run.error)]), *reasons])


def _message(error: Any) -> str:
    return " ".join(str(error.message).split()) if error is not None and error.message else ""


def live(text: str) -> Callable[[str], None]:
    """Shows a table that changes: in place on a terminal, one after the other in a log."""
    lines = 0

    def show(table: str) -> None:
        nonlocal lines
        if sys.stdout.isatty() and lines:
            print(f"\x1b[{lines}F\x1b[J", end="")
        lines = table.count("\n") + 2
        print(f"{text}, {datetime.now():%H:%M:%S}\n{table}", flush=True)

    return show


@contextlib.contextmanager
def _explained(endpoint: str) -> Iterator[None]:
    """Turns what the client raises into one line."""
    try:
        yield
    except ApiException as error:
        reason = f"{endpoint} answers {error.status} {error.reason or ''}{_server_message(error)}"
        if error.status in (401, 403):
            reason += "; set KF_TOKEN or KF_COOKIE to valid credentials of this Kubeflow, and check --namespace"
        raise SubmitError(reason, error.status in _PASSING) from error
    except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
        reason = str(getattr(error, "reason", error))
        raise SubmitError(f"{endpoint} cannot be reached: {' '.join(reason.split())}", True) from error
    except ValueError as error:  # kfp's client for what it did not expect in an answer
        raise SubmitError(f"{endpoint} does not answer as Kubeflow Pipelines does: {error}", False) from error


def _server_message(error: ApiException) -> str:
    """What the server says in the body of a refusal; a proxy's page of HTML says nothing to a person here."""
    try:
        return f": {json.loads(error.body)['message']}"
    except (TypeError, ValueError, KeyError):
        return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """kfp's client prints links and warnings of its own."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield
