"""The Job that uploads the pipelines: its own script, as rendered, against a server that speaks KFP's API."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kfp_upload_server import KfpServer, serve
from rendered_chart import CHART, ci_values, find, objects, plain_environment

COMPILED = CHART.parents[1] / "pipelines" / "compiled"
PACKAGE = """# PIPELINE DEFINITION
# Name: toy
# Description: Aligns a toy.
#              In two lines.
# Inputs:
#    a: int
pipelineInfo: {name: toy}
"""


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a Python that has the standard library only."""
    command = [sys.executable, "-I", "-S", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def upload(scripts: Path, server: KfpServer, packages: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--endpoint", server.url, "--packages", str(packages), "--release", "0.1.0", "--wait", "5")
    return run_script(scripts / "upload.py", *arguments, *more)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    directory = tmp_path / "packages"
    directory.mkdir()
    (directory / "toy.yaml").write_text(PACKAGE, encoding="utf-8")
    return directory


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def mounted(made: list[dict[str, Any]], kind: str, name: str, places: dict[str, Path]) -> list[str]:
    """Arguments of a pod's container, with the directories of a test in place of its mounts."""
    item = find(made, kind, name)
    spec = item["spec"]["template"]["spec"] if kind == "Job" else item["spec"]
    arguments = [*spec["containers"][0]["command"][1:], *spec["containers"][0]["args"]]
    for mount, place in places.items():
        arguments = [argument.replace(mount, str(place)) for argument in arguments]
    return arguments


def test_the_job_puts_every_compiled_pipeline_into_the_ui_once(scripts: Path, tmp_path: Path) -> None:
    made = objects()
    volume = next(
        v for v in find(made, "Job", "sapo-upload")["spec"]["template"]["spec"]["volumes"] if "projected" in v
    )
    for source in volume["projected"]["sources"]:
        for file, text in find(made, "ConfigMap", source["configMap"]["name"])["data"].items():
            (tmp_path / file).write_text(text, encoding="utf-8")
    with serve() as server:
        endpoint = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
        places = {"/scripts": scripts, "/packages": tmp_path}
        command = [part.replace(endpoint, server.url) for part in mounted(made, "Job", "sapo-upload", places)]
        first = run_script(Path(command[0]), *command[1:])
        assert first.returncode == 0, first.stderr
        expected = {path.stem: path.read_bytes() for path in COMPILED.glob("*.yaml")}
        assert sorted(pipeline["name"] for pipeline in server.pipelines) == sorted(expected)
        assert sorted(server.packages.values()) == sorted(expected.values())
        writes = len(server.writes())

        second = run_script(Path(command[0]), *command[1:])
        assert second.returncode == 0 and len(server.writes()) == writes
        assert second.stdout.count("is there already") == len(expected)


def test_kfps_own_client_finds_what_was_uploaded(scripts: Path, packages: Path) -> None:
    import kfp

    with serve() as server:
        assert upload(scripts, server, packages).returncode == 0
        client = kfp.Client(host=server.url, verify_ssl=False)
        pipeline_id = client.get_pipeline_id("toy")
        assert pipeline_id == "pipeline-0"
        versions = client.list_pipeline_versions(pipeline_id).pipeline_versions
        assert [version.display_name for version in versions] == [f"0.1.0-{digest(PACKAGE)}"]
        assert client.list_pipelines().pipelines[0].description == "Aligns a toy. In two lines."


def test_the_description_begins_with_the_title(scripts: Path, packages: Path) -> None:
    titled = PACKAGE + "pipelineInfo:\n  displayName: 'SAPO: the paper''s runs'\n  name: toy\n"
    (packages / "toy.yaml").write_text(titled, encoding="utf-8")
    with serve() as server:
        assert upload(scripts, server, packages).returncode == 0
        assert server.pipelines[0]["description"] == "SAPO: the paper's runs. Aligns a toy. In two lines."


def test_only_new_content_makes_a_version(scripts: Path, packages: Path) -> None:
    with serve(KfpServer(page_size=1)) as server:
        texts = [PACKAGE, PACKAGE + "root: 1\n", PACKAGE + "root: 2\n"]
        for text in [*texts, texts[0]]:
            (packages / "toy.yaml").write_text(text, encoding="utf-8")
            last = upload(scripts, server, packages)
            assert last.returncode == 0, last.stderr
        assert [version["name"] for version in server.versions] == [f"0.1.0-{digest(text)}" for text in texts]
        assert len(server.pipelines) == 1
        # Gone back to the oldest content: the version is found on the last page, and the user is told what the UI shows.
        assert f"is there already; the UI offers the newer 0.1.0-{digest(texts[2])} first" in last.stdout
        again = run_script(  # a new release of the same content
            scripts / "upload.py", "--endpoint", server.url, "--packages", str(packages), "--release", "0.2.0"
        )
        assert again.returncode == 0 and len(server.versions) == 3


def test_a_job_that_died_between_two_calls_is_carried_on(scripts: Path, packages: Path) -> None:
    with serve() as server:
        server.pipelines.append({"name": "toy", "namespace": "", "pipeline_id": "pipeline-0"})
        assert upload(scripts, server, packages).returncode == 0
        assert len(server.pipelines) == len(server.versions) == 1


def test_lost_answers_make_nothing_twice(scripts: Path, packages: Path) -> None:
    with serve(KfpServer(lost_answers=2)) as server:
        result = upload(scripts, server, packages)
        assert result.returncode == 0, result.stderr
        assert len(server.pipelines) == len(server.versions) == 1
        assert result.stdout.count("trying again") == 2


def test_waits_for_an_api_that_is_still_starting(scripts: Path, packages: Path) -> None:
    with serve(KfpServer(failures=[503, 502])) as server:
        result = upload(scripts, server, packages)
        assert result.returncode == 0 and len(server.versions) == 1
        assert "HTTP 503: upstream connect error; trying again" in result.stdout


def test_unreachable_api_ends_with_the_reason(scripts: Path, packages: Path) -> None:
    with serve() as server:
        pass  # its port is closed now
    result = upload(scripts, server, packages, "--wait", "0")
    assert result.returncode == 1
    assert "toy.yaml" in result.stderr and "no answer from the KFP API" in result.stderr
    assert "kfp.endpoint" in result.stderr


def test_a_refusal_is_not_tried_again(scripts: Path, packages: Path) -> None:
    with serve(KfpServer(failures=[400])) as server:
        result = upload(scripts, server, packages)
        assert result.returncode == 1 and len(server.requests) == 1
        assert "HTTP 400: upstream connect error" in result.stderr


def test_multi_user_api_gets_token_and_namespace(scripts: Path, packages: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t0ken-of-the-pod\n", encoding="utf-8")
    with serve(KfpServer(token="t0ken-of-the-pod", namespace="team-a")) as server:
        refused = upload(scripts, server, packages)
        assert refused.returncode == 1 and "kfp.multiUser" in refused.stderr and not server.pipelines
        made = objects(ci_values("multi-tenant"))
        places = {"/scripts": scripts, "/packages": packages, "/var/run/secrets/kubeflow/pipelines": tmp_path}
        command = mounted(made, "Job", "sapo-upload", places)
        command = [part.replace("http://ml-pipeline.kubeflow.svc.cluster.local:8888", server.url) for part in command]
        result = run_script(Path(command[0]), *command[1:])
        assert result.returncode == 0, result.stderr
        assert server.pipelines[0]["namespace"] == "team-a" and len(server.versions) == 1
        assert "t0ken" not in result.stdout + result.stderr + refused.stderr


def test_a_file_that_is_no_package_ends_the_job(scripts: Path, packages: Path, tmp_path: Path) -> None:
    with serve() as server:
        (packages / "toy.yaml").write_text("apiVersion: v1\n", encoding="utf-8")
        result = upload(scripts, server, packages)
        assert result.returncode == 1 and "toy.yaml: not a package" in result.stderr and not server.requests
        empty = upload(scripts, server, tmp_path)
        assert empty.returncode == 1 and "no *.yaml" in empty.stderr


def test_helm_test_says_what_is_missing_and_prints_no_secret(
    scripts: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_never-print-this")
    monkeypatch.setenv("OPENAI_API_KEY", "never-print-this-either\n")
    with serve() as server:
        made = objects(ci_values("default"))
        command = mounted(made, "Pod", "sapo-check", {"/scripts": scripts})
        assert command[-1] == "--required=sapo-store"
        command = [part.replace("http://ml-pipeline.kubeflow.svc.cluster.local:8888", server.url) for part in command]
        # -S would hide boto3, which the image has.
        container = find(made, "Pod", "sapo-check")["spec"]["containers"][0]
        env = os.environ | plain_environment(container, {"/scripts": scripts})
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60, env=env, check=False
        )
    assert result.returncode == 1
    lines = {line[8:].partition(":")[0]: line for line in result.stdout.splitlines()}
    assert lines["HF_TOKEN"] == "ok      HF_TOKEN: there"
    assert lines["OPENAI_API_KEY"].startswith("FAILED  OPENAI_API_KEY: begins or ends with white space")
    assert lines["AWS_ACCESS_KEY_ID"].startswith("FAILED") and "create secret sapo-store" in lines["AWS_ACCESS_KEY_ID"]
    assert lines["KFP API"].startswith("ok")
    assert lines["pipeline tiny"] == "FAILED  pipeline tiny: not uploaded; see `kubectl logs job/sapo-upload`"
    assert "never-print" not in result.stdout + result.stderr
