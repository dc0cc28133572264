"""Submitting: kfp's client against a server that answers the v2beta1 calls as Kubeflow Pipelines does."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import yaml

from pipelines.package import COMPILED

Cli = Callable[..., tuple[int, str, str]]
TIME = "2026-01-02T03:04:05Z"
TOKEN = "a-secret-token"


class KubeflowPipelines:
    """Experiments and runs in memory. A new run goes through `states`, one more each time it is asked for."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = [{"state": "RUNNING"}, {"state": "SUCCEEDED"}]
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.calls: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.cookies: set[str | None] = set()
        self.looks = 0
        self.refuse: dict[str, list[int]] = {}  # of "METHOD path", the statuses of the next answers
        self.lose_answer = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if statuses := self.refuse.get(f"{method} {path}"):
            return statuses.pop(0), {"error": "no", "code": 7, "message": "you may not"}
        if path == "/apis/v2beta1/healthz":
            return 200, {"multi_user": False}
        if path == "/apis/v2beta1/experiments":
            return self._listed(self.experiments, query, "experiments") if method == "GET" else self._experiment(body)
        if path == "/apis/v2beta1/runs":
            return self._listed(self.runs, query, "runs") if method == "GET" else self._run(body)
        if path.startswith("/apis/v2beta1/runs/"):
            run = next(run for run in self.runs if run["run_id"] == path.rsplit("/", 1)[1])
            self.looks += 1
            return 200, run | self.states[min(self.looks, len(self.states)) - 1]
        return 404, {"message": f"no {path}"}

    def _listed(self, rows: list[dict[str, Any]], query: dict[str, list[str]], name: str) -> tuple[int, Any]:
        for predicate in json.loads(query.get("filter", ["{}"])[0]).get("predicates", []):
            assert predicate["operation"] in ("EQUALS", 1)
            rows = [row for row in rows if row[predicate["key"]] == predicate["stringValue"]]
        for key in ("namespace", "experiment_id"):
            rows = [row for row in rows if row.get(key, "") == query.get(key, [row.get(key, "")])[0]]
        return 200, {name: rows, "total_size": len(rows)} if rows else {}

    def _experiment(self, body: Any) -> tuple[int, Any]:
        self.experiments.append(body | {"experiment_id": f"e{len(self.experiments)}", "created_at": TIME})
        return 200, self.experiments[-1]

    def _run(self, body: Any) -> tuple[int, Any]:
        self.created.append(body)
        kept = {key: value for key, value in body.items() if key != "pipeline_spec"}
        self.runs.append(kept | {"run_id": f"r{len(self.runs)}", "created_at": TIME, "state": "PENDING"})
        return (502, {}) if self.lose_answer else (200, self.runs[-1])

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        state = self

        class Handler(BaseHTTPRequestHandler):
            def respond(self) -> None:
                url, length = urlparse(self.path), int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                state.calls.append((self.command, url.path))
                state.tokens.add(self.headers.get("authorization"))
                state.cookies.add(self.headers.get("cookie"))
                status, content = state.answer(self.command, url.path, parse_qs(url.query), body)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = respond  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubeflowPipelines]:
    monkeypatch.setattr("kfp.client.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "none.json"))
    monkeypatch.setenv("KF_TOKEN", TOKEN)
    server = KubeflowPipelines()
    thread = threading.Thread(target=server.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def submit(run_cli: Cli, kubeflow: KubeflowPipelines) -> Cli:
    return lambda *argv: run_cli("submit", "tiny", "--endpoint", kubeflow.url, "--poll", "0.01", *argv)


@pytest.mark.slow
def test_a_run_that_succeeds(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    data = {"display_name": "data", "task_id": "1", "start_time": TIME, "end_time": "2026-01-02T03:05:10Z"}
    driver = {"display_name": "data-driver", "task_id": "2", "state": "SUCCEEDED"}
    for state in kubeflow.states:
        state["run_details"] = {"task_details": [driver, data | {"state": state["state"]}]}
    code, out, err = submit("--set", "sft_settings.max_steps=5", "--set", "gpus=8", "--wait")
    assert (code, err) == (0, "")
    url = f"{kubeflow.url}/#/runs/details/r0"
    assert out.splitlines()[0] == f"started {kubeflow.created[0]['display_name']}: {url}"
    assert out.splitlines()[-1] == f"SUCCEEDED: {url}"
    assert "data  RUNNING  1 min 5 s" in out and "data-driver" not in out
    assert "data  SUCCEEDED  1 min 5 s" in out
    (sent,) = kubeflow.created
    assert sent["runtime_config"]["parameters"] == {"sft_settings": {"max_steps": 5}, "gpus": "8"}
    assert sent["service_account"] == "sapo-runner"
    spec, platform = yaml.safe_load_all((COMPILED / "tiny.yaml").read_text())
    assert sent["pipeline_spec"] == {"pipeline_spec": spec, "platform_spec": platform}
    assert kubeflow.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in out + json.dumps(sent)


def test_dry_run_prints_what_is_sent_and_sends_nothing(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    arguments = ["--set", "memory=16Gi", "--key", "k", "--namespace", "team"]
    code, out, _ = submit(*arguments, "--dry_run")
    printed = json.loads(out)
    assert (code, kubeflow.calls) == (0, [])
    assert submit(*arguments)[0] == 0
    (sent,) = kubeflow.created
    assert sent.pop("experiment_id") == "e0"
    assert printed["body"].pop("experiment_id") == "(id of experiment sapo in namespace team)"
    assert printed == {"POST": f"{kubeflow.url}/apis/v2beta1/runs", "body": sent}
    assert kubeflow.experiments[0]["namespace"] == "team"


@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "SKIPPED"])
def test_any_other_end_is_told_and_fails(submit: Cli, kubeflow: KubeflowPipelines, state: str) -> None:
    task = {"display_name": "sft", "task_id": "1", "state": "FAILED", "error": {"code": 2, "message": "out of\nmemory"}}
    details = {"task_details": [task]} if state == "FAILED" else {}
    kubeflow.states = [{"state": "RUNNING"}, {"state": state, "run_details": details}]
    code, out, err = submit("--wait")
    why = "; sft: out of memory" if state == "FAILED" else ""
    assert code == 1
    assert err == f"pipelines: error: the run is {state}{why}; see {kubeflow.url}/#/runs/details/r0\n"
    assert "SUCCEEDED" not in out


def test_time_out_fails_and_leaves_the_run(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    kubeflow.states = [{"state": "RUNNING"}]
    code, _, err = submit("--wait", "--timeout", "0.05")
    assert (code, err) == (
        1,
        f"pipelines: error: no end after 0.1 s; the run goes on: {kubeflow.url}/#/runs/details/r0\n",
    )
    assert not [path for method, path in kubeflow.calls if ":terminate" in path or method == "DELETE"]


def test_the_same_key_finds_the_run(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    first, second = (submit("--key", "ci-7", "--set", "gpus=8") for _ in range(2))
    assert [code for code, _, _ in (first, second)] == [0, 0]
    assert first[1].startswith("started tiny-ci-7: ") and second[1].startswith("found tiny-ci-7: ")
    assert len(kubeflow.created) == 1
    code, _, err = submit("--key", "ci-7", "--set", "gpus=4")
    assert (code, len(kubeflow.created)) == (1, 1)
    assert "run key ci-7 is taken by a run with other arguments" in err
    assert submit("--key", "ci-8")[1].startswith("started tiny-ci-8")


def test_a_cookie_instead_of_a_token(submit: Cli, kubeflow: KubeflowPipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KF_TOKEN")
    monkeypatch.setenv("KF_COOKIE", "authservice_session=abc")
    assert submit()[0] == 0
    assert (kubeflow.tokens, kubeflow.cookies) == ({None}, {"authservice_session=abc"})


def test_without_a_key_every_submit_starts_a_run(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    assert [submit()[0], submit()[0], len(kubeflow.created)] == [0, 0, 2]


def test_a_lost_answer_does_not_start_a_second_run(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    kubeflow.lose_answer = True
    code, out, err = submit("--key", "k", "--wait")
    assert (code, err, len(kubeflow.created)) == (0, "", 1)
    assert out.startswith("started tiny-k: ")


def test_unreachable_is_told(run_cli: Cli, kubeflow: KubeflowPipelines) -> None:
    closed = KubeflowPipelines()
    closed.server.server_close()
    code, out, err = run_cli("submit", "tiny", "--endpoint", closed.url, "--namespace", "n")
    assert (code, out) == (1, "")
    assert err.startswith(f"pipelines: error: {closed.url} cannot be reached: ") and "Connection refused" in err


def test_refusals_are_told_and_passing_faults_are_waited_out(
    submit: Cli, kubeflow: KubeflowPipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.refuse = {"POST /apis/v2beta1/runs": [403]}
    code, _, err = submit()
    assert code == 1
    assert "answers 403 Forbidden: you may not; set KF_TOKEN or KF_COOKIE" in err
    kubeflow.refuse = {"GET /apis/v2beta1/runs/r0": [503, 502]}
    assert submit("--wait")[0] == 0
    monkeypatch.setattr("pipelines.submit.PATIENCE_SECONDS", 0.0)
    kubeflow.refuse = {"GET /apis/v2beta1/runs/r1": [503] * 9}
    code, _, err = submit("--wait")
    assert code == 1
    assert "answers 503 Service Unavailable" in err


def test_wrong_arguments_never_reach_the_cluster(submit: Cli, kubeflow: KubeflowPipelines) -> None:
    code, _, err = submit("--set", "sft_settings=5")
    assert (code, kubeflow.calls) == (2, [])
    assert "must be a mapping" in err


@pytest.mark.slow
def test_kfps_own_command_line_as_the_readme_uses_it(kubeflow: KubeflowPipelines, tmp_path: Path) -> None:
    """What the README says of `kfp run create`: it ends with 0 for a failed run, and its output holds the state."""
    kubeflow.states = [{"state": "RUNNING"}, {"state": "FAILED"}]
    create = ["run", "create", "--experiment-name", "sapo", "--run-name", "tiny", "--package-file"]
    values = [
        str(COMPILED / "tiny.yaml"),
        "--timeout",
        "60",
        'gpus="8"',
        'sft_settings={"max_steps": 5}',
        "cpu=4",
    ]
    command = [
        str(Path(sys.executable).with_name("kfp")),
        "--endpoint",
        kubeflow.url,
        "--output",
        "json",
        *create,
        *values,
    ]
    environment = os.environ | {"KFP_EXISTING_TOKEN": TOKEN, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert not text.startswith("{")
    assert json.loads(text[text.index("\n{") :])["state"] == "FAILED"
    sent = kubeflow.created[0]["runtime_config"]["parameters"]
    assert sent == {"gpus": "8", "sft_settings": {"max_steps": 5}, "cpu": 4}  # a number where the pipeline wants text
    assert kubeflow.tokens == {f"Bearer {TOKEN}"}


def test_the_workflow_uses_flags_that_exist(run_cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    workflow = yaml.safe_load((COMPILED.parents[1] / ".github" / "workflows" / "submit.yaml").read_text())
    script = workflow["jobs"]["submit"]["steps"][-1]["run"]
    flags = set(re.findall(r"--\w+", script))
    assert flags >= {"--endpoint", "--key", "--wait"}
    assert script.startswith('python -m pipelines submit "$RUN" ')
    with pytest.raises(SystemExit):
        run_cli("submit", "--help")
    assert flags <= set(re.findall(r"--\w+", capsys.readouterr().out))
    assert "${{" not in script  # an input must not become part of the script
