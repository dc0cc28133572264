"""A stage in several processes: what they are told, what is checked first, and that they train as one does."""

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from components.common.core.conversations import write_rows
from components.common.core.errors import TERMINATED, UserError
from components.common.training.config import TrainingStageConfig
from components.common.training.distributed import launch
from tests.conftest import chat_rows

# Of float32 sums in another order, after Adam's steps of 1e-3.
TOLERANCE = 2e-6
# The same global batch in one process. L_SFT of ORPO is a mean over the tokens of a micro-batch, so there it comes in halves.
WHOLE = {"per_device_train_batch_size": 8}
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
COMMON = {
    "max_length": "96",
    "learning_rate": "1e-3",
    "optim": "adamw_torch",
    "warmup_steps": "0",
    "max_steps": "3",
    "logging_steps": "1",
    "eval_rows": "0",
    "save_strategy": "no",
    "report_to": "none",
    "bf16": "false",
    "use_cpu": "true",
}


@pytest.fixture(scope="module")
def paired_data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    rows = chat_rows(32)
    for i, row in enumerate(rows):
        row["rejected"] = [{"role": "assistant", "content": f"Nothing at all, {rows[(i + 3) % 32]['id']}."}]
    write_rows(directory / "train.jsonl", rows)
    write_rows(directory / "test.jsonl", rows[:4])
    return directory


def command(stage, data, model, output, **settings):
    flags = {"data": data, "model": model, "output": output} | COMMON | settings
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", f"components.{stage}", *argv]


def run_here(stage, data, model, output, **settings):
    importlib.import_module(f"components.{stage}.__main__").main(command(stage, data, model, output, **settings)[3:])
    return load_file(output / "model.safetensors")


def run(stage, data, model, output, **settings):
    result = subprocess.run(command(stage, data, model, output, **settings), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return load_file(output / "model.safetensors"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parallelism"), [("sft", "zero3"), ("dpo", "ddp"), ("dpo", "zero2"), ("orpo", "fsdp2")]
)
def test_two_processes_train_as_one_does(stage, parallelism, paired_data, micro_model, tmp_path):
    alone = run_here(stage, paired_data, micro_model, tmp_path / "alone", **(HALVES if stage == "orpo" else WHOLE))
    halves = {"per_device_train_batch_size": 4, "num_processes": 2, "parallelism": parallelism}
    together, log = run(stage, paired_data, micro_model, tmp_path / "together", **halves)
    start = load_file(micro_model / "model.safetensors")
    assert set(together) == set(alone)
    assert max((alone[name] - start[name]).abs().max() for name in alone) > 1e-3
    for name, weights in alone.items():
        torch.testing.assert_close(together[name], weights, rtol=0, atol=TOLERANCE)
    assert log.count(" wrote ") == 1  # one process speaks


@pytest.mark.slow
def test_sigterm_saves_in_all_processes_and_the_same_command_goes_on(paired_data, micro_model, tmp_path):
    settings = {"num_processes": 2, "max_steps": 60, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    line = command("dpo", paired_data, micro_model, tmp_path / "out", **settings, save_steps=1000)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for text in process.stderr:
        if "0/60 steps" in text:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(60) == TERMINATED, rest
    assert rest.count("and saved; the same command goes on from there") == 1
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < 60
    alone = {"max_steps": 60, "per_device_train_batch_size": 8}
    whole = run_here("dpo", paired_data, micro_model, tmp_path / "whole", **alone)
    again, log = run("dpo", paired_data, micro_model, tmp_path / "out", **settings, save_steps=1000)
    assert f"resumes from {checkpoint}" in log
    for name, weights in whole.items():
        torch.testing.assert_close(again[name], weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("parallelism", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_environment_is_what_accelerate_makes_of_the_same_file(parallelism, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = launch.CONFIGS / f"{parallelism}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""  # which their launcher fills in between
    theirs = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    ours = launch.environment(parallelism)
    assert {name: theirs.get(name) for name in ours} == ours
    used = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    assert [name in ours for name in used] == [theirs.get(name, "false") == "true" for name in used]


def test_missing_gpus_are_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(
        UserError, match=r"8 GPUs are promised, 3 are visible \(CUDA_VISIBLE_DEVICES=0,1,2\); ask for 8"
    ):
        launch.check_devices(8, on_cpu=False)
    launch.check_devices(3, on_cpu=False)
    launch.check_devices(8, on_cpu=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_a_stage_that_was_promised_gpus_says_so(tmp_path):
    from components.sft.__main__ import main

    argv = ["--data", "nowhere", "--model", "nowhere", "--output", str(tmp_path / "out"), "--num_processes", "8"]
    with pytest.raises(UserError, match="num_processes = 8: 8 GPUs are promised, 0 are visible"):
        main(argv)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"parallelism = zero3: needs DeepSpeed, .* or take fsdp2"):
        launch.check_packages("zero3")
    launch.check_packages("fsdp2")


def test_a_launchers_own_choice_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", {"ACCELERATE_USE_FSDP": "true"})
    monkeypatch.setattr(launch, "join_on_cpu", lambda: False)
    launch.join("zero3", on_cpu=True)
    assert os.environ == {"ACCELERATE_USE_FSDP": "true"}


def test_no_gpus_are_one_process() -> None:
    places = {"data": "d", "model": "m", "output": "o"}
    assert TrainingStageConfig(**places, num_processes=0).num_processes == 1
    with pytest.raises(ValueError, match="num_processes = -1: must be 0 or more"):
        TrainingStageConfig(**places, num_processes=-1)
