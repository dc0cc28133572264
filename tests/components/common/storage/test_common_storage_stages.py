"""Stages on `s3://` locations against a real store: the tiny pipeline, what is done already, dry runs, secrets."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from components.common.core.conversations import write_rows
from faults import runner
from faults.campaign import ARCHITECTURE
from faults.proxy import FaultProxy
from faults.store import ACCESS_KEY, BUCKET, READER_KEY, READER_SECRET, SECRET_KEY, Store
from tests.conftest import chat_rows

pytestmark = pytest.mark.slow

SECRETS = {name: f"a-{name.lower()}-of-this-test" for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")}
SAPO = ("--max_steps", 3, "--max_length", 96, "--segment_length", 6, "--max_new_tokens", 6, "--eval_rows", 4)
SAPO += ("--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu", "true", "--bf16", "false")
SAPO += ("--logging_steps", 1, "--save_steps", 1, "--keep_checkpoints", "true", "--lease_seconds", 2)


class Pod:
    """Runs stages with a disk of its own, and remembers what they said."""

    def __init__(self, directory: Path, store: Store) -> None:
        self.directory, self.store, self.logs = directory, store, 0
        (directory / "disk").mkdir(parents=True, exist_ok=True)

    def run(self, stage: str, *arguments: object, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        self.logs += 1
        log = self.directory / f"{self.logs}-{stage}.log"
        variables = self.store.environment() | {"SAPO_CACHE": str(self.directory / "disk"), "OMP_NUM_THREADS": "1"}
        code = runner.run(stage, arguments, variables | SECRETS | {"HF_HUB_OFFLINE": "1"} | environment, log)
        return code, log.read_text()

    def must(self, stage: str, *arguments: object) -> str:
        code, said = self.run(stage, *arguments)
        assert code == 0, said
        return said

    def client(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.store.endpoint, **keys)

    def put(self, key: str, body: bytes) -> None:
        self.client().put_object(Bucket=BUCKET, Key=key, Body=body)

    def mirrored(self, name: str) -> list[str]:
        """Complete checkpoints of a run that is under way."""
        listed = self.client().list_objects_v2(Bucket=BUCKET, Prefix=f"pipe/{name}/checkpoints/").get("Contents", [])
        return [entry["Key"] for entry in listed if entry["Key"].endswith("/.manifest.json")]

    def in_checkpoints(self, name: str) -> list[str]:
        """Files of the complete checkpoints of a run that is under way."""
        from botocore.exceptions import ClientError

        files: list[str] = []
        for key in self.mirrored(name):
            with contextlib.suppress(ClientError):  # an older one may go meanwhile
                files += json.loads(self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read())["files"]
        return files

    def objects(self) -> dict[str, bytes]:
        """Every object of the pipeline's."""
        client = self.client()
        listed = [
            o["Key"] for p in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET) for o in p["Contents"]
        ]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in listed if "pipe/" in key}


def uri(name: str) -> str:
    return f"s3://{BUCKET}/pipe/{name}"


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory, seaweed: Store) -> Iterator[Pod]:
    """A pod that has run the whole tiny pipeline on the bucket."""
    directory = tmp_path_factory.mktemp("pod")
    pod = Pod(directory, seaweed)
    write_rows(directory / "rows.jsonl", chat_rows(64))
    (directory / "micro.yaml").write_text(ARCHITECTURE)
    pod.must("data", "--source", directory / "rows.jsonl", "--test_rows", 16, "--output", uri("data"))
    scratch = f"scratch://{directory / 'micro.yaml'}"
    pod.must("model", "--source", scratch, "--data", uri("data"), "--output", uri("model"))
    pod.must("sapo", "--data", uri("data"), "--model", uri("model"), "--output", uri("sapo"), *SAPO)
    pod.must("evaluation", "--data", uri("data"), "--model", uri("sapo"), "--output", uri("evaluation"), "--limit", 4)
    pod.must("report", "--trainings", f'["{uri("sapo")}"]', "--output", uri("report"), "--html_file", uri("page.html"))
    yield pod


def sapo(pod: Pod, *more: object, **environment: str) -> tuple[int, str]:
    places = ("--data", uri("data"), "--model", uri("model"), "--output", uri("sapo"))
    return pod.run("sapo", *places, *SAPO, *more, **environment)


def test_every_output_is_in_the_bucket_with_its_manifest(pod):
    objects = pod.objects()
    for name in ("data", "model", "sapo", "evaluation", "report"):
        told = json.loads(objects[f"pipe/{name}/.manifest.json"])["files"]
        below = {key.removeprefix(f"pipe/{name}/") for key in objects if key.startswith(f"pipe/{name}/")}
        assert set(told) | {".manifest.json"} == below
    assert b"<html" in objects["pipe/page.html"]
    assert objects["pipe/sapo/checkpoints/checkpoint-3/manifest.json"]
    left = [path for path in (pod.directory / "disk" / "outputs").rglob("*") if path.is_file()]
    assert left == []  # they are in the bucket now


def test_secrets_are_nowhere(pod):
    """In no argument (they are written to the manifest), log, result or checkpoint; not in the cache either."""
    files = [path for path in pod.directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files) and any(path.suffix == ".safetensors" for path in files)
    everything = {str(path): path.read_bytes() for path in files} | pod.objects()
    for secret in (SECRET_KEY, *SECRETS.values()):
        assert [name for name, content in everything.items() if secret.encode() in content] == []


def test_the_same_command_is_done_already(pod):
    before = pod.objects()
    code, said = sapo(pod)
    assert (code, "already done: " + uri("sapo") in said) == (0, True)
    assert pod.objects() == before


def test_another_setting_is_refused_and_named(pod):
    code, said = sapo(pod, "--beta", 0.3)
    assert code == 2
    assert (
        "is of another run: beta was 0.1, is 0.3; give the settings it was made with, another --output, or --overwrite"
        in said
    )


def test_where_the_inputs_lie_does_not_matter_but_what_they_hold_does(pod, tmp_path):
    rows = pod.directory / "rows.jsonl"
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows.read_bytes())
    assert "already done" in pod.must("data", "--source", moved, "--test_rows", 16, "--output", uri("data"))
    moved.write_bytes(rows.read_bytes().replace(b"my dog", b"my cow"))
    code, said = pod.run("data", "--source", moved, "--test_rows", 16, "--output", uri("data"))
    assert (code, "is of another run: other source; give" in said) == (2, True)


def test_a_checkpoint_in_the_bucket_can_be_named(pod):
    places = ("--data", uri("data"), "--model", uri("model"), "--output", uri("resumed"))
    checkpoint = uri("sapo/checkpoints/checkpoint-2")
    assert "resumes from" in pod.must("sapo", *places, *SAPO, "--resume_from", checkpoint)
    objects = pod.objects()
    assert objects["pipe/resumed/model.safetensors"] == objects["pipe/sapo/model.safetensors"]


def test_what_could_not_be_sent_is_sent_later_without_training_again(pod, tmp_path):
    proxy, other = FaultProxy(pod.store.endpoint, seed=0), Pod(tmp_path, pod.store)
    command = ("--data", uri("data"), "--model", uri("model"), "--output", uri("late"), *SAPO)
    way = {"AWS_ENDPOINT_URL": proxy.endpoint, "AWS_MAX_ATTEMPTS": "2"}
    proxy.spoil(1.0, "failed", only="/late/model.safetensors")
    code, said = other.run("sapo", *command, **way)
    assert (code, said.count("error:")) == (2, 1), said
    assert "pipe/late/.manifest.json" not in pod.objects()
    proxy.spoil(0.0)
    code, said = other.run("sapo", *command, **way)
    assert (code, "steps:" in said) == (0, False), said
    objects = pod.objects()
    assert objects["pipe/late/model.safetensors"] == objects["pipe/sapo/model.safetensors"]
    proxy.close()


def test_overwrite_replaces_all_that_was_there(pod, tmp_path):
    rows = ("--source", pod.directory / "rows.jsonl", "--output", uri("replaced"))
    pod.must("data", *rows, "--test_rows", 16)
    stray = "pipe/replaced/from-another-time.txt"
    pod.put(stray, b"x")
    pod.must("data", *rows, "--test_rows", 8, "--overwrite")
    objects = pod.objects()
    assert stray not in objects
    assert json.loads(objects["pipe/replaced/statistics.json"])["splits"]["test"]["rows"] == 8


@pytest.mark.parametrize(
    ("environment", "output", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, uri("new"), "the secret key does not match the access key"),
        ({}, "s3://nowhere/new", "there is no such bucket"),
        ({"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}, uri("new"), "no permission for"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, uri("new"), "the store does not answer at http://127.0.0.1:9"),
        ({}, uri("data"), "is of another run"),
    ],
)
def test_a_dry_run_finds_what_would_fail(pod, environment, output, message):
    places = ("--data", uri("data"), "--model", uri("model"), "--output", output)
    code, said = pod.run("sapo", *places, *SAPO, "--dry_run", **environment)
    errors = [line for line in said.splitlines() if "error:" in line]
    assert (code, len(errors)) == (2, 1), said
    assert message in errors[0]
    assert "Traceback" not in said


def test_a_dry_run_writes_nothing_and_fetches_no_weights(pod, tmp_path):
    before = set(pod.objects())
    other = Pod(tmp_path, pod.store)
    places = ("--data", uri("data"), "--model", uri("model"), "--output", uri("new"))
    assert "steps: 3" in other.must("sapo", *places, *SAPO, "--dry_run")
    assert set(pod.objects()) == before
    assert [path for path in (tmp_path / "disk").rglob("*") if path.is_file()] == []


def test_wrong_settings_are_told_before_anything_is_fetched(pod, tmp_path):
    other = Pod(tmp_path, pod.store)
    code, said = other.run(
        "sapo", "--data", uri("nowhere"), "--model", uri("model"), "--output", uri("new"), "--beta", -1
    )
    assert (code, "beta = -1.0: must be above 0" in said) == (2, True)


def test_a_trainer_of_trl_goes_on_from_the_bucket_on_an_empty_disk(pod, tmp_path):
    paired = ("--rejected", "other_conversation", "--output", uri("paired"))
    pod.must("data", "--source", pod.directory / "rows.jsonl", "--test_rows", 16, *paired)
    name = "dpo-stopped"
    command = [
        "--data",
        uri("paired"),
        "--model",
        uri("model"),
        "--max_steps",
        12,
        "--max_length",
        96,
        "--eval_rows",
        4,
    ]
    command += ["--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    command += ["--save_strategy", "steps", "--save_steps", 1, "--lease_seconds", 2, "--learning_rate", "1e-3"]
    pod.must("dpo", *command, "--output", uri("dpo"))
    command += ["--output", uri(name)]
    variables = pod.store.environment() | {"SAPO_CACHE": str(tmp_path / "lost"), "OMP_NUM_THREADS": "1"}
    process = runner.start("dpo", command, variables | {"HF_HUB_OFFLINE": "1"}, tmp_path / "first.log")
    while not pod.mirrored(name):
        assert process.is_alive(), (tmp_path / "first.log").read_text()
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143, (tmp_path / "first.log").read_text()
    said = Pod(tmp_path, pod.store).must("dpo", *command)
    assert "fetched the checkpoint of step" in said and "resumes from" in said
    objects = pod.objects()
    assert objects[f"pipe/{name}/model.safetensors"] == objects["pipe/dpo/model.safetensors"]
    assert not [key for key in objects if key.startswith(f"pipe/{name}/checkpoints/")]


def places(name: str) -> list[object]:
    """A run of SAPO that is long enough to be killed."""
    return ["--data", uri("data"), "--model", uri("model"), "--output", uri(name), *SAPO, "--max_steps", 12]


def kill_once_mirrored(pod: Pod, name: str, directory: Path) -> None:
    """Starts the run on a disk of its own, and kills it when a checkpoint of it is in the bucket."""
    variables = pod.store.environment() | {"SAPO_CACHE": str(directory / "lost"), "OMP_NUM_THREADS": "1"}
    log = directory / f"{name}.log"
    process = runner.start("sapo", places(name), variables | {"HF_HUB_OFFLINE": "1"}, log)
    while not pod.mirrored(name):
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def whole(pod: Pod) -> dict[str, Tensor]:
    """The model of the run that nobody kills."""
    pod.must("sapo", *places("whole"))
    return load(pod.objects()["pipe/whole/model.safetensors"])


def test_a_killed_run_is_refused_by_name_or_goes_on_as_if_nothing_had_changed(pod, whole, tmp_path):
    kill_once_mirrored(pod, "again", tmp_path)
    code, said = Pod(tmp_path / "refused", pod.store).run("sapo", *places("again"), "--beta", 0.3)
    assert (code, "is of another run: beta was 0.1, is 0.3; give the settings" in said) == (2, True), said

    other = [
        "--sampler_timeout",
        1200,
        "--use_cpu",
        "false",
        "--logging_steps",
        2,
        "--save_steps",
        2,
        "--name",
        "again",
    ]
    other += ["--dataloader_num_workers", 1, "--pairs_per_log", 1, "--grace_seconds", 30, "--mirror_keep", 1]
    said = Pod(tmp_path / "goes-on", pod.store).must("sapo", *places("again"), *other)
    assert "fetched the checkpoint of step" in said and "resumes from" in said
    ended = load(pod.objects()["pipe/again/model.safetensors"])
    assert [name for name in whole if not torch.equal(ended[name], whole[name])] == []


def test_one_process_of_four_pairs_goes_on_as_two_of_two(pod, whole, tmp_path):
    """Sums over processes are taken in another order: equal up to rounding."""
    kill_once_mirrored(pod, "split", tmp_path)
    two = ["--num_processes", 2, "--per_device_train_batch_size", 2]
    said = Pod(tmp_path / "goes-on", pod.store).must("sapo", *places("split"), *two)
    assert "resumes from" in said
    ended = load(pod.objects()["pipe/split/model.safetensors"])
    assert [name for name in whole if not torch.allclose(ended[name], whole[name], atol=1e-5)] == []


def test_spin_goes_on_from_the_bucket_on_an_empty_disk(pod, tmp_path):
    """Killed while it generates, while it trains and between; each time without its disk."""
    command = ["--data", uri("data"), "--model", uri("model"), "--train_rows", 16, "--eval_rows", 4, "--iterations", 2]
    command += ["--learning_rates", "[1e-3, 5e-4]", "--betas", "[0.1, 0.5]", "--max_length", 96, "--max_new_tokens", 8]
    command += ["--sampler_batch_size", 4, "--per_device_train_batch_size", 4, "--save_steps", 1, "--report_to", "none"]
    command += ["--use_cpu", "true", "--bf16", "false", "--lease_seconds", 1, "--epochs_per_iteration", 1]
    pod.must("spin", *command, "--output", uri("spin"))
    said = ""
    for attempt, part in enumerate(("generated.jsonl", "checkpoints/checkpoint-", "iteration-0/result.json")):
        variables = pod.store.environment() | {"SAPO_CACHE": str(tmp_path / f"{attempt}"), "OMP_NUM_THREADS": "1"}
        log = tmp_path / f"{attempt}.log"
        process = runner.start("spin", [*command, "--output", uri("cut")], variables | {"HF_HUB_OFFLINE": "1"}, log)
        while not any(part in name for name in pod.in_checkpoints("cut")):
            assert process.is_alive(), log.read_text()
            time.sleep(0.02)
        process.kill()
        process.join()
        said += log.read_text()
    said += Pod(tmp_path, pod.store).must("spin", *command, "--output", uri("cut"))
    assert said.count("fetched the checkpoint of step") == 3
    assert "complete already: iterations 0" in said
    objects = pod.objects()
    assert objects["pipe/cut/model.safetensors"] == objects["pipe/spin/model.safetensors"]
    assert not [key for key in objects if key.startswith(("pipe/cut/checkpoints/", "pipe/cut/spin/"))]


def test_a_complete_evaluation_goes_on_with_another_scope_where_it_is_told_to(pod, tmp_path):
    command = ["--data", uri("data"), "--model", uri("model"), "--limit", 4, "--output", tmp_path / "out"]
    pod.must("evaluation", *command)
    code, said = pod.run("evaluation", *command, "--name", "other")
    assert (code, "is of another run: name was None, is 'other'; give" in said) == (2, True), said
    pod.must("evaluation", *command, "--name", "other", "--resume")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["name"] == "other"
    assert "already done" in pod.must("evaluation", *command, "--name", "other")
    code, said = pod.run("evaluation", *command, "--limit", 5, "--resume")
    assert (code, "is of another run: limit was 4, is 5; give" in said) == (2, True), said


# ---- The same for outputs on a disk ----------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path, seaweed: Store) -> tuple[Pod, list[object], Path]:
    """A pod with a data command that has run to its end, and its output."""
    pod = Pod(tmp_path, seaweed)
    write_rows(tmp_path / "rows.jsonl", chat_rows(24))
    command: list[object] = ["--source", tmp_path / "rows.jsonl", "--test_rows", 4, "--output", tmp_path / "out"]
    pod.must("data", *command)
    return pod, command, tmp_path / "out"


def test_a_local_output_is_done_already_too(local):
    pod, command, output = local
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert "already done" in pod.must("data", *command)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert "already done" not in pod.must("data", *command, "--overwrite")


def test_a_local_output_of_other_settings_or_with_a_file_missing_is_refused(local):
    pod, command, output = local
    code, said = pod.run("data", *command, "--seed", 1)
    assert (code, "seed was 42, is 1" in said) == (2, True)
    (output / "test.jsonl").unlink()
    code, said = pod.run("data", *command)
    assert (code, "is not empty" in said) == (2, True)


def test_kfp_is_told_again_what_a_run_that_is_done_already_told_it(local):
    pod, command, _ = local
    listed = {"data": {"artifacts": [{"name": "data", "uri": "x", "metadata": {}}]}}
    told = []
    for number in (1, 2):
        file = pod.directory / f"told-{number}.json"
        given = json.dumps({"outputs": {"outputFile": str(file), "artifacts": listed}})
        pod.must("data", *command[:-1], pod.directory / "kfp", "--executor_input", given)
        told.append(json.loads(file.read_text())["artifacts"]["data"]["artifacts"][0]["metadata"])
    assert told[0] == told[1]
    assert told[0]["train_rows"] == 20


def test_two_processes_on_one_local_output(local, micro_model, chat_data):
    pod, _, _ = local
    arguments = ["--data", chat_data, "--model", micro_model, "--output", pod.directory / "sapo", *SAPO]
    first = runner.start("sapo", arguments, {"OMP_NUM_THREADS": "1"}, pod.directory / "first.log")
    while not (pod.directory / ".sapo.lock").exists():
        assert first.is_alive()
        time.sleep(0.01)
    code, said = pod.run("sapo", *arguments)
    first.join(60)
    assert first.exitcode == 0
    assert (code, "another process is writing there now" in said) in ((2, True), (0, False)), said
    assert not (pod.directory / ".sapo.lock").exists()
