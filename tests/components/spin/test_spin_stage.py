"""The SPIN stage as a command: outputs, dry run, going on with a run, wrong input."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from spin_runs import equal_weights, weights

from components.common.core.errors import UserError
from components.common.models.loading import load_tokenizer
from components.report.artifacts import early_and_late_pairs, read_training
from components.spin import iterations
from components.spin.__main__ import main

pytestmark = pytest.mark.slow

SETTINGS = ["--settings", '{"iterations": 2, "learning_rates": [1e-3, 5e-4], "betas": [0.1, 0.5]}']
SETTINGS += ["--orpo_lambdas", "[0.1, 0.2]", "--epochs_per_iteration", "1", "--train_rows", "12", "--eval_rows", "6"]
SETTINGS += ["--max_length", "96", "--max_new_tokens", "8", "--sampler_batch_size", "5", "--logging_steps", "1"]
SETTINGS += ["--per_device_train_batch_size", "4", "--bf16", "false", "--report_to", "tensorboard"]


def flags(**named: object) -> list[str]:
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module", params=["dpo", "orpo"])
def trained(request, tmp_path_factory, chat_data, micro_model):
    directory = tmp_path_factory.mktemp("spin")
    places = flags(data=chat_data, model=micro_model, output=directory / "out", training_log=directory / "log")
    main([*places, "--loss_type", request.param, *SETTINGS])
    return directory


def test_output_is_a_plain_model_that_has_changed(trained, micro_model):
    assert not equal_weights(trained / "out", micro_model)
    load_tokenizer(str(trained / "out"))
    assert not (trained / "out" / "spin").exists()
    assert not list(trained.rglob("*.bin")) and not list(trained.rglob("*.unfinished"))


def test_training_log_is_one_run_for_the_report(trained):
    training = read_training(str(trained / "log"))
    assert (training.stage, training.steps) == ("spin", 9)
    assert training.name in ("spin-dpo", "spin-orpo")
    assert [step for step, _ in training.curve("loss")] == list(range(1, 10))
    assert training.last("eval_rewards/margins") is not None
    assert training.seconds > 0
    early, late = early_and_late_pairs(training, 4)
    assert [pair.step for pair in (*early, *late)] == [0, 0, 3, 3]
    assert len(list((trained / "log" / "tensorboard").rglob("events.out.tfevents*"))) >= 2


def test_a_finished_output_is_not_overwritten(trained, chat_data, micro_model):
    with pytest.raises(UserError, match="is not empty; give another directory, or --overwrite"):
        main([*flags(data=chat_data, model=micro_model, output=trained / "out"), *SETTINGS])


def test_dry_run_prints_the_iterations_and_writes_nothing(tmp_path, chat_data, micro_model, capsys):
    main([*flags(data=chat_data, model=micro_model, output=tmp_path / "out"), *SETTINGS, "--dry_run"])
    plan = capsys.readouterr().out
    assert f"iteration 0: from {micro_model}; responses of {{0}}: 12 pairs, 3 steps, learning rate 0.001" in plan
    assert "iteration 1: from iteration 0; responses of {0, 1}: 24 pairs, 6 steps, learning rate 0.0005" in plan
    assert not (tmp_path / "out").exists()


@pytest.fixture
def interrupted(tmp_path, chat_data, micro_model, monkeypatch):
    """A run whose process died after the first iteration."""
    with monkeypatch.context() as patched:

        def die(self, iteration):
            if iteration.index == 1:
                raise RuntimeError("killed")

        train = iterations.SPINRun.train
        patched.setattr(iterations.SPINRun, "train", lambda self, it: die(self, it) or train(self, it))
        with pytest.raises(RuntimeError, match="killed"):
            main([*flags(data=chat_data, model=micro_model, output=tmp_path / "out"), *SETTINGS])
    return tmp_path / "out"


def test_same_command_goes_on_and_may_keep_the_iterations(interrupted, chat_data, micro_model, capsys):
    argv = [*flags(data=chat_data, model=micro_model, output=interrupted), *SETTINGS, "--keep_iterations"]
    main([*argv, "--dry_run"])
    assert "complete already: iterations 0" in capsys.readouterr().out
    main(argv)
    for index in range(2):
        assert (interrupted / "spin" / f"iteration-{index}" / "generated.jsonl").read_text().count("\n") == 12
    assert equal_weights(interrupted, interrupted / "spin" / "iteration-1" / "model")
    assert not list(interrupted.rglob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--betas", "[0.1, 0.7]"], r"is of another run: betas was \[0.1, 0.5\], is \[0.1, 0.7\]; give the settings"),
        (["--train_rows", "11"], "train_rows was 12, is 11; other training rows"),
        (["--eval_rows", "5"], "eval_rows was .*, is 5; other held-out rows"),
    ],
)
def test_directory_of_a_run_with_other_settings(changed, message, interrupted, chat_data, micro_model):
    with pytest.raises(UserError, match=message):
        main([*flags(data=chat_data, model=micro_model, output=interrupted), *SETTINGS, *changed])
    assert (interrupted / "spin" / "iteration-0" / "result.json").exists()


def test_directory_of_a_run_from_another_model(interrupted, chat_data, micro_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(micro_model, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x00\x40")  # 2.0: norms start at 1
    with pytest.raises(UserError, match="other start model"):
        main([*flags(data=chat_data, model=other, output=interrupted), *SETTINGS])
    main([*flags(data=chat_data, model=other, output=interrupted), *SETTINGS, "--overwrite"])
    assert not (interrupted / "spin").exists()


def test_free_settings_may_change(interrupted, chat_data, micro_model):
    main([*flags(data=chat_data, model=micro_model, output=interrupted, save_steps=1), *SETTINGS])
    assert (interrupted / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, "no such file; --data must be"),
        ({"model": "nowhere"}, "--model nowhere: no such file or directory"),
        ({"max_prompt_length": 2}, "every prompt has 2 tokens or more; raise max_prompt_length"),
        ({"loss_type": "ipo"}, "loss_type = 'ipo' is not valid: .*'dpo' or 'orpo'"),
        ({"sampler": "sglang"}, "sampler = 'sglang' is not valid: .*'hf' or 'vllm'"),
        ({"iterations": 3}, "learning_rates = .*: must list 3 values, one an iteration"),
        ({"optim": "adamm"}, "adamm is not a valid OptimizerNames"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag is not a valid SchedulerType"),
        ({"betaz": 1}, "unknown argument '--betaz'; did you mean 'betas'"),
    ],
)
def test_wrong_input(change, message, tmp_path, chat_data, micro_model):
    places = {"data": chat_data, "model": micro_model, "output": tmp_path / "out"} | change
    with pytest.raises(UserError, match=message):
        main([*SETTINGS, *flags(**places)])
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_empty(tmp_path, chat_data, micro_model):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="is not empty; give another directory, or --overwrite"):
        main([*flags(data=chat_data, model=micro_model, output=tmp_path), *SETTINGS])
    assert (tmp_path / "precious").exists()


def test_damaged_record_of_a_run(tmp_path, chat_data, micro_model):
    (tmp_path / "spin").mkdir()
    (tmp_path / "spin" / "run.json").write_text("[]")
    with pytest.raises(UserError, match="has no record of its run that this version can compare"):
        main([*flags(data=chat_data, model=micro_model, output=tmp_path), *SETTINGS])


def test_a_terminated_process_goes_on_to_the_same_weights(tmp_path, chat_data, micro_model):
    def start(output):
        places = flags(data=chat_data, model=micro_model, output=tmp_path / output)
        command = [sys.executable, "-m", "components.spin", *places, *SETTINGS, "--epochs_per_iteration", "10"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def await_file(name):
        deadline = time.monotonic() + 120
        while not (tmp_path / "cut" / "spin" / name).exists():
            assert time.monotonic() < deadline, f"no {name} came"
            time.sleep(0.01)

    whole = start("whole")
    said = whole.communicate(timeout=300)[1]
    assert whole.returncode == 0, said
    for name in ("iteration-0/generated.jsonl", "iteration-0/model", "iteration-1/held_out.jsonl"):
        process = start("cut")
        await_file(name)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 143, said
        assert "the same command goes on from there" in said
    last = start("cut")
    said = last.communicate(timeout=300)[1]
    assert last.returncode == 0, said
    assert equal_weights(tmp_path / "whole", tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "training" / "summary.json").read_text())["steps"] == 90


def test_two_processes_end_with_the_weights_of_one(tmp_path, chat_data, micro_model):
    """Responses are the same whichever process writes them, and each step has the same pairs."""
    same = [*SETTINGS, *flags(train_rows=16, eval_rows=0, use_cpu="true", optim="adamw_torch")]
    places = {"data": chat_data, "model": micro_model}
    alone = flags(output=tmp_path / "one", per_device_train_batch_size=8, sampler_batch_size=8)
    main([*flags(**places), *same, *alone])
    halves = flags(output=tmp_path / "two", per_device_train_batch_size=4, sampler_batch_size=4, num_processes=2)
    command = [sys.executable, "-m", "components.spin", *flags(**places), *same, *halves, "--parallelism", "zero3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not equal_weights(tmp_path / "one", micro_model)
    mine, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, expected in theirs.items():
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=2e-6)
