"""The SAPO stage as a command: outputs, dry run, wrong input, shipped recipes."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from components.common.core.errors import UserError
from components.common.models.loading import load_model, load_tokenizer
from components.sapo.__main__ import main

SETTINGS = ["--max_steps", "4", "--max_length", "96", "--segment_length", "6", "--max_new_tokens", "6"]
SETTINGS += [
    "--per_device_train_batch_size",
    "4",
    "--logging_steps",
    "1",
    "--eval_rows",
    "8",
    "--report_to",
    "tensorboard",
]


def flags(**named: object) -> list[str]:
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def trained(request, tmp_path_factory, chat_data, micro_model):
    directory = tmp_path_factory.mktemp("sapo")
    places = flags(data=chat_data, model=micro_model, output=directory / "out", training_log=directory / "log")
    main([*places, "--loss_type", request.param, *SETTINGS])
    return directory


def test_output_is_a_plain_model_that_has_changed(trained, micro_model):
    after, before = (load_model(str(d), torch.float32).state_dict() for d in (trained / "out", micro_model))
    assert any(not torch.equal(after[name], before[name]) for name in before)
    load_tokenizer(str(trained / "out"))
    assert not list(trained.rglob("*.bin"))  # no pickle


def test_training_log_has_curves_pairs_summary_and_tensorboard(trained):
    log = trained / "log"
    assert {"log_history.jsonl", "pairs.jsonl", "summary.json", "tensorboard"} <= {p.name for p in log.iterdir()}
    summary = json.loads((log / "summary.json").read_text())
    assert summary["name"] in ("sapo-dpo", "sapo-orpo")
    assert list((log / "tensorboard").rglob("events.out.tfevents*"))


def test_generation_still_stops_at_every_end_of_turn(trained, micro_model):
    after, before = (load_model(str(d)).generation_config.eos_token_id for d in (trained / "out", micro_model))
    assert set(before) <= set(after)


def test_dry_run_prints_steps_tokens_and_memory_and_writes_nothing(tmp_path, chat_data, micro_model, capsys):
    places = flags(data=chat_data, model=micro_model, output=tmp_path / "out")
    main([*places, *SETTINGS[2:], "--num_train_epochs", "2", "--dry_run"])
    plan = capsys.readouterr().out
    assert "steps: 24 (12 an epoch), 4 rows in and 4 pairs out of each" in plan
    assert "at most 24 generated" in plan
    parameters = sum(p.numel() for p in load_model(str(micro_model)).parameters())
    assert f" GiB ({parameters / 1e6:,.1f}M parameters, float32, 1 process)" in plan
    assert "it fits: " in plan
    assert not (tmp_path / "out").exists()


def untemplated(micro_model, tmp_path):
    copy = tmp_path / "untemplated"
    shutil.copytree(micro_model, copy)
    (copy / "chat_template.jinja").unlink()
    return copy


def test_model_without_a_chat_template(tmp_path, chat_data, micro_model):
    model = untemplated(micro_model, tmp_path)
    with pytest.raises(UserError, match="has no chat template; run the model stage with --chat_template chatml"):
        main(flags(data=chat_data, model=model, output=tmp_path / "out"))


def test_empty_data_set(tmp_path, micro_model):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl: holds no row"):
        main(flags(data=tmp_path, model=micro_model, output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "no such file; --data must be"),
        ({"model": "nowhere"}, "--model nowhere: no such file or directory"),
        ({"max_prompt_length": 2}, "every prompt has 2 tokens or more; raise max_prompt_length"),
        ({"segment_length": 0}, "segment_length = 0: must be 1 or more"),
        ({"ema_decay": 2}, r"ema_decay = 2.0: must be within \[0, 1\]"),
        ({"loss_type": "kto"}, "loss_type = 'kto' is not valid: .*'dpo', 'orpo', 'ipo', 'cdpo', 'rpo' or 'simpo'"),
        ({"settings": '{"emadecay": 1}'}, "--settings: unknown setting 'emadecay'; did you mean 'ema_decay'"),
        ({"output_dir": "x"}, "unknown argument '--output_dir'"),
        ({"hub_token": "hf_x"}, "unknown argument '--hub_token'"),
        ({"eval_strategy": "steps", "eval_rows": 0}, "eval_strategy = steps needs held-out rows; raise eval_rows"),
        ({"nll_scope": "sequence"}, "`sequence` is for loss_type = orpo"),
        ({"optim": "adamm"}, "adamm is not a valid OptimizerNames, please select one of"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag is not a valid SchedulerType, please select one of"),
        ({"fp16": "true"}, "fp16 = True: is not offered; use bf16"),
        ({"save_total_limit": 0}, "save_total_limit = 0: must be 1 or more"),
        ({"resume_from": "nowhere"}, "nowhere: is not a complete checkpoint"),
    ],
)
def test_wrong_input(change, message, tmp_path, chat_data, micro_model):
    places = {"data": chat_data, "model": micro_model, "output": tmp_path / "out"} | change
    with pytest.raises(UserError, match=message):
        main(flags(**places))
    assert not (tmp_path / "out").exists()


def test_what_needs_bitsandbytes_says_so(tmp_path, chat_data, micro_model, monkeypatch):
    monkeypatch.setattr("components.sapo.config.is_bitsandbytes_available", lambda: False)
    places = {"data": chat_data, "model": micro_model, "output": tmp_path / "out"}
    for setting in ({"optim": "adamw_8bit"}, {"use_peft": "true", "load_in_4bit": "true"}):
        with pytest.raises(UserError, match=r"needs the package bitsandbytes \(pip install"):
            main(flags(**places, **setting))


def start(directory, chat_data, micro_model, *more: str) -> subprocess.Popen:
    """The stage as a process of its own, as a pod runs it."""
    places = flags(data=chat_data, model=micro_model, output=directory / "out", training_log=directory / "log")
    command = [sys.executable, "-m", "components.sapo", *places, *SETTINGS[2:], "--max_steps", "40", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(directory, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (directory / "out" / "checkpoints" / f"checkpoint-{step}" / "manifest.json").exists():
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)


def state(model) -> dict[str, torch.Tensor]:
    return load_model(str(model), torch.float32).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_goes_on_to_the_same_weights(number, tmp_path, chat_data, micro_model):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, chat_data, micro_model).wait(300) == 0
    process = start(cut, chat_data, micro_model, "--save_steps", "1", "--save_total_limit", "3")
    wait_for_checkpoint(cut, step=random.Random(number).randrange(3, 20))
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert "the same command goes on from there" in said
    again = start(cut, chat_data, micro_model, "--save_steps", "1", "--save_total_limit", "3")
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    assert "resumes from" in said
    mine, theirs = state(cut / "out"), state(whole / "out")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (cut / "log" / "pairs.jsonl").read_text() == (whole / "log" / "pairs.jsonl").read_text()
    losses = [json.loads((run / "log" / "summary.json").read_text())["summary"]["train_loss"] for run in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not (cut / "out" / "checkpoints").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path, chat_data, micro_model):
    (tmp_path / "out" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    main([*flags(data=chat_data, model=micro_model, output=tmp_path / "out"), *SETTINGS])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_finished_output_is_not_overwritten(trained, chat_data, micro_model):
    with pytest.raises(UserError, match="is not empty"):
        main(flags(data=chat_data, model=micro_model, output=trained / "out"))


def test_output_that_is_not_empty(tmp_path, chat_data, micro_model):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="is not empty; give another directory, or --overwrite"):
        main(flags(data=chat_data, model=micro_model, output=tmp_path))
