"""The preflight against a server that answers as the hub, a judge and the Kubernetes API do."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.common.core.errors import UserError
from components.preflight.__main__ import main
from components.preflight.namespace import Namespace, of_pod

SECRET = "a-secret-token"
CLAIM = "/api/v1/namespaces/team/persistentvolumeclaims/sapo-model-cache"
QUOTAS = "/api/v1/namespaces/team/resourcequotas"
QUEUE = "/apis/kueue.x-k8s.io/v1beta2/namespaces/team/localqueues/sapo"
KUEUE = {"preferredVersion": {"groupVersion": "kueue.x-k8s.io/v1beta2"}}
Run = Callable[..., tuple[int, str, dict[str, tuple[str, str]]]]


class Server:
    """Answers each path with a status, or with an object; what it does not know is not found."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.tokens: dict[str, str | None] = {}
        state = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = state.answers.get(self.path, 404)
                state.tokens[self.path] = self.headers.get("Authorization")
                status, content = (answer, {}) if isinstance(answer, int) else (200, answer)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True).start()
    for variable in ("HF_HUB_OFFLINE", "HF_TOKEN", "OPENAI_API_KEY", "KFP_POD_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the stage; gives the exit code, stderr, and the state and finding of each check of the report."""

    def run(*argv: object) -> tuple[int, str, dict[str, tuple[str, str]]]:
        report, code = tmp_path / "deep" / "report.md", 0
        try:
            main([*(str(a) for a in argv), "--report_file", str(report)])
        except SystemExit as ended:
            code = int(str(ended.code))
        rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in report.read_text().splitlines()[2:]]
        return code, capsys.readouterr().err, {what: (state, found) for what, state, found in rows}

    return run


@pytest.fixture
def in_cluster(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The stage believes that it runs in namespace `team`, where everything is as the Helm chart makes it."""
    namespace = Namespace(server.url, "team", SECRET)
    monkeypatch.setattr("components.preflight.__main__.of_pod", lambda: namespace)
    server.answers = {
        CLAIM: {"status": {"phase": "Bound"}},
        QUOTAS: {"items": []},
        "/apis/kueue.x-k8s.io": KUEUE,
        QUEUE: {"status": {"conditions": [{"type": "Active", "status": "True"}], "pendingWorkloads": 2}},
    }
    return server


def test_a_laptop_run_needs_nothing(run: Run, server: Server) -> None:
    stages = ["--data_recipe", "chitchat-tiny", "--model_recipe", "tiny", "--evaluation_recipe", "held-out-tiny"]
    code, err, checks = run(*stages, "--gpus", "0")
    assert (code, err, server.tokens) == (0, "", {})
    assert checks == {
        "cluster": ("skipped", "not a pod of Kubeflow Pipelines: volume, queue and quota do not matter here")
    }


@pytest.mark.parametrize(
    ("status", "token", "state", "found"),
    [
        (200, SECRET, "ok", "the hub says 200"),
        (403, SECRET, "failed", "accept its terms on the hub; HF_TOKEN does not open it"),
        (403, None, "failed", "HF_TOKEN is not set (secret sapo-hub, key token)"),
        (404, None, "failed", "there is no such model, or it is private"),
        (500, None, "failed", "the hub says 500"),
    ],
)
def test_the_hub_is_asked_for_each_source(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch, status: int, token: str | None, state: str, found: str
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    model, data = "/api/models/meta-llama/Meta-Llama-3-8B/auth-check", "/api/datasets/a/b/auth-check"
    server.answers = {model: status, data: 200}
    settings = '{"source": "hf://a/b@v1"}'
    code, err, checks = run("--model_recipe", "llama3-8b", "--data_recipe", "capybara", "--data_settings", settings)
    assert checks["dataset hf://a/b@v1"][0] == "ok"
    assert checks["model hf://meta-llama/Meta-Llama-3-8B"][0] == state
    assert found in checks["model hf://meta-llama/Meta-Llama-3-8B"][1]
    assert code == (state == "failed")
    assert ("preflight: error: model hf://meta-llama" in err) == (state == "failed")
    assert server.tokens[model] == (f"Bearer {token}" if token else None)
    assert SECRET not in err + str(checks)


def test_hub_offline_and_unreachable(run: Run, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("--model_recipe", "llama3-8b")[2]["model hf://meta-llama/Meta-Llama-3-8B"][0] == "skipped"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    code, err, _ = run("--model_recipe", "llama3-8b")
    assert code == 1
    assert "http://127.0.0.1:1 does not answer: " in err


def test_a_recipe_that_is_not_there_fails_with_all_else_checked(run: Run, server: Server) -> None:
    code, err, checks = run("--data_recipe", "capybra", "--sft_data_recipe", "deita")
    assert code == 1
    assert checks["recipe of data"][0] == "failed" and "capybara" in checks["recipe of data"][1]
    assert checks["dataset hf://HuggingFaceH4/deita-10k-v0-sft"][0] == "failed"  # the server does not know it
    assert err.count("preflight: error: ") == 2


@pytest.mark.parametrize(("status", "code"), [(200, 0), (401, 1)])
def test_the_judge_must_take_the_key(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    server.answers = {"/v1/models": status}
    settings = ["--evaluation_settings", '{"benchmarks": ["held_out", "mt_bench"]}']
    assert run(*settings)[0] == 1  # no key
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    got, err, checks = run(*settings)
    assert got == code
    assert checks[f"judge at {server.url}/v1"][0] == ("ok" if code == 0 else "failed")
    assert server.tokens["/v1/models"] == f"Bearer {SECRET}" and SECRET not in err + str(checks)


def test_a_judge_of_ones_own_wants_no_key_and_alpaca_eval_needs_its_data(run: Run, server: Server) -> None:
    data = "/api/datasets/tatsu-lab/alpaca_eval/auth-check"
    server.answers = {"/judge/models": 200, data: 200}
    settings = {"benchmarks": ["alpaca_eval"], "judge_base_url": f"{server.url}/judge", "judge_key_variable": None}
    assert run("--evaluation_settings", json.dumps(settings))[0] == 0
    assert server.tokens == {"/judge/models": None, data: None}
    settings["alpaca_eval_data"] = "/a/directory"
    server.answers = {"/judge/models": 200}
    assert run("--evaluation_settings", json.dumps(settings))[0] == 0


def test_buckets_of_sources_and_methods(run: Run, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check(place: Any, kind: str) -> None:
        asked.append((kind, str(place)))
        if place.bucket == "closed":
            raise UserError(f"{place}: no permission for PutObject")

    monkeypatch.setattr("components.preflight.checks.check_read", lambda place: check(place, "read"))
    monkeypatch.setattr("components.preflight.checks.check_write", lambda place: check(place, "write"))
    methods = [{"name": "a", "settings": {"mirror": "s3://closed/checkpoints"}}]
    code, err, _ = run("--data_settings", '{"source": "s3://open/rows"}', "--methods", json.dumps(methods))
    assert (code, asked) == (1, [("read", "s3://open/rows"), ("write", "s3://closed/checkpoints")])
    assert err == "preflight: error: s3://closed/checkpoints: s3://closed/checkpoints: no permission for PutObject\n"


def test_a_namespace_that_has_everything(run: Run, in_cluster: Server) -> None:
    in_cluster.answers[QUOTAS] = {"items": [_quota("gpus", hard="16", used="12"), {"metadata": {"name": "other"}}]}
    code, err, checks = run("--gpus", "8")
    assert (code, err) == (0, "")
    assert checks == {
        "volume sapo-model-cache": ("ok", "Bound"),
        "queue sapo": ("ok", "2 workloads are waiting"),
        "quota gpus": ("ok", "12 of 16 nvidia.com/gpu in use: stages wait until some are free"),
    }
    assert set(in_cluster.tokens.values()) == {f"Bearer {SECRET}"}


def _quota(name: str, hard: str, used: str) -> dict[str, Any]:
    key = "requests.nvidia.com/gpu"
    return {"metadata": {"name": name}, "spec": {"hard": {key: hard}}, "status": {"used": {key: used}}}


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (CLAIM, 404, "volume sapo-model-cache: namespace team has no such claim"),
        (CLAIM, {"status": {"phase": "Lost"}}, "volume sapo-model-cache: Lost"),
        (QUEUE, 404, "queue sapo: Kueue is installed and namespace team has no such LocalQueue"),
        (QUEUE, {"status": {"conditions": [{"type": "Active", "status": "False", "message": "stopped"}]}},
         "queue sapo: is not active: stopped"),
        (QUOTAS, {"items": [_quota("gpus", "4", "0")]}, "quota gpus: allows 4 of nvidia.com/gpu, a stage of this run asks "),
    ],
)  # fmt: skip
def test_what_the_namespace_lacks_fails(run: Run, in_cluster: Server, path: str, answer: Any, message: str) -> None:
    in_cluster.answers[path] = answer
    code, err, _ = run("--gpus", "2", "--evaluation_gpus", "8")
    assert code == 1
    assert err.startswith(f"preflight: error: {message}") and err.count("\n") == 1


def test_what_the_account_may_not_read_is_skipped(run: Run, in_cluster: Server) -> None:
    in_cluster.answers = dict.fromkeys(in_cluster.answers, 403)
    code, _, checks = run("--gpus", "8")
    assert code == 0
    assert {state for state, _ in checks.values()} == {"skipped"}
    in_cluster.answers = {CLAIM: {"status": {"phase": "Bound"}}}
    assert run("--gpus", "0")[2]["queue sapo"] == ("ok", "Kueue is not installed: pods start at once")


def test_only_a_pod_of_kubeflow_pipelines_asks_the_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("token", "t\n"), ("namespace", "team")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("components.preflight.namespace._ACCOUNT", tmp_path)
    monkeypatch.setattr("ssl.create_default_context", lambda cafile: str(cafile))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    assert of_pod() is None  # a notebook in the cluster is a laptop
    monkeypatch.setenv("KFP_POD_NAME", "p")
    namespace = of_pod()
    assert namespace is not None
    assert (namespace.url, namespace.name) == ("https://[fd00::1]:443", "team")


def test_kfp_gets_the_report_and_dry_run_asks_nobody(
    run: Run, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {"outputFile": str(tmp_path / "out.json"), "artifacts": {"checks": {"artifacts": [{"name": "x"}]}}}
    assert run("--executor_input", json.dumps({"outputs": outputs}))[0] == 0
    assert "checks" in json.loads((tmp_path / "out.json").read_text())["artifacts"]
    main(["--model_recipe", "llama3-8b", "--gpus", "8", "--dry_run"])
    assert "model: recipe llama3-8b" in capsys.readouterr().out
    assert server.tokens == {}
    with pytest.raises(UserError, match="gpus = -1: must be 0 or more"):
        main(["--gpus", "-1"])
