"""The dpo and orpo stages, which share their code, end to end; what is killed goes on to the same weights."""

import importlib
import json
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
from components.common.models.loading import load_model, load_tokenizer
from components.common.training.resume import complete_checkpoints
from tests.conftest import chat_rows

COMMON = {
    "learning_rate": "1e-3",
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "warmup_steps": "1",
    "max_length": "96",
    "per_device_train_batch_size": "4",
    "logging_steps": "2",
    "eval_rows": "4",
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
    write_rows(directory / "train.jsonl", rows[:24])
    write_rows(directory / "test.jsonl", rows[24:])
    return directory


@pytest.fixture
def flags(paired_data, micro_model, tmp_path):
    return {"data": str(paired_data), "model": str(micro_model), "output": str(tmp_path / "out")} | COMMON


def argv(flags: dict[str, str], **changes: str) -> list[str]:
    return [part for name, value in (flags | changes).items() for part in (f"--{name}", value)]


def run(loss: str, flags: dict[str, str], **changes: str) -> None:
    importlib.import_module(f"components.{loss}.__main__").main(argv(flags, **changes))


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_trains_and_writes_model_log_and_summary(loss, flags, tmp_path):
    run(loss, flags, max_steps="10", num_train_epochs="1", gradient_accumulation_steps="2", eval_on_start="true")
    output = tmp_path / "out"
    assert (
        load_tokenizer(str(output)).eos_token_id
        in load_model(str(output), torch.float32).generation_config.eos_token_id
    )
    assert not (output / "checkpoints").exists()
    log = [json.loads(line) for line in (output / "training" / "log_history.jsonl").read_text().splitlines()]
    margins = [entry["eval_rewards/margins"] for entry in log if "eval_rewards/margins" in entry]
    assert margins[-1] > margins[0]
    summary = json.loads((output / "training" / "summary.json").read_text())
    assert (summary["stage"], summary["name"], summary["steps"]) == (loss, loss, 10)
    figures = summary["summary"]
    assert 0 < figures["seconds/train"] < figures["seconds/first_step"] + figures["seconds/train"]
    assert figures["eval_rewards/margins"] == margins[-1]
    assert figures["tokens/trained"] > 10 * 8 * 20


def test_dpo_starts_at_its_reference(flags, tmp_path):
    run("dpo", flags, max_steps="1", eval_on_start="true", logging_steps="1")
    lines = (tmp_path / "out" / "training" / "log_history.jsonl").read_text().splitlines()
    first = next(entry for line in lines if "eval_loss" in (entry := json.loads(line)))
    assert first["eval_rewards/margins"] == 0
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_resumed_equals_uninterrupted(loss, flags, tmp_path):
    """The run is cut after a checkpoint that was followed by an interrupted save."""
    settings = {
        "num_train_epochs": "2",
        "save_steps": "3",
        "gradient_accumulation_steps": "2",
        "keep_checkpoints": "true",
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(loss, flags, output=str(whole), **settings)
    run(loss, flags, output=str(cut), **settings)
    for path in cut.iterdir():  # as it was when the run was killed while it wrote checkpoint-6
        if path.is_file():
            path.unlink()
    (cut / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    run(loss, flags, output=str(cut), **settings)
    weights = [load_file(directory / "model.safetensors") for directory in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    figures = [json.loads((d / "training" / "summary.json").read_text())["summary"] for d in (whole, cut)]
    assert figures[0]["tokens/trained"] == figures[1]["tokens/trained"]
    assert figures[1]["eval_rewards/margins"] == figures[0]["eval_rewards/margins"]


def test_another_runs_checkpoint_is_refused(flags, tmp_path):
    run("dpo", flags, max_steps="2", save_steps="2", keep_checkpoints="true")
    with pytest.raises(UserError, match=r"checkpoint-2: is of another run: beta was 0.1, is 0.5; .*--overwrite"):
        run("dpo", flags, max_steps="2", save_steps="2", beta="0.5")
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        run("dpo", flags, resume_from=str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(flags, tmp_path):
    settings = {"max_steps": "80", "save_steps": "1000", "logging_steps": "50"}
    command = [sys.executable, "-m", "components.dpo", *argv(flags, **settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    for line in process.stderr:
        if "0/80 steps" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == TERMINATED
    (checkpoint,) = complete_checkpoints(tmp_path / "out" / "checkpoints")
    assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < 80
    run("dpo", flags, **settings)
    run("dpo", flags, output=str(tmp_path / "whole"), **settings)
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_dry_run_prints_the_plan_and_writes_nothing(loss, flags, tmp_path, capsys):
    run(loss, flags, num_train_epochs="3", gradient_accumulation_steps="2", dry_run="true")
    plan = capsys.readouterr().out
    assert "rows: 24 (0 dropped: prompt too long)" in plan
    assert "steps: 9 (3 an epoch) of 8 pairs, on 1 process(es)" in plan
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_help_shows_the_papers_values(loss, capsys):
    importlib.import_module(f"components.{loss}.__main__").main(["--help"])
    text = capsys.readouterr().out
    assert f"paper: {'0.1' if loss == 'dpo' else '0.05'}]" in text
    assert "tiny" in text and "--resume_from" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "test.jsonl: no such file"),
        ({"model": "nowhere"}, "--model nowhere: no such file or directory"),
        ({"max_prompt_length": "2"}, "every prompt has 2 tokens or more"),
        ({"eval_strategy": "steps", "eval_steps": "1", "eval_rows": "0"}, "eval_strategy = steps needs held-out rows"),
        ({"beta": "-1"}, "beta = -1.*: must be above 0"),
        ({"bta": "1"}, "unknown argument '--bta'; did you mean 'beta'"),
        ({"config": "huge"}, r"has no such recipe \(llama3-8b, mistral-7b, smollm2, tiny\)"),
    ],
)
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_wrong_input(loss, changes, message, flags, tmp_path):
    with pytest.raises(UserError, match=message):
        run(loss, flags, **changes)
    assert not (tmp_path / "out").exists()


def test_unpaired_data_is_refused_with_what_to_do(flags, chat_data):
    with pytest.raises(UserError, match=r"row row-0: has no `rejected` response; .*--rejected other_conversation"):
        run("dpo", flags, data=str(chat_data))
