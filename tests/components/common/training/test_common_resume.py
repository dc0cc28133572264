"""sft, dpo and orpo stopped by SIGTERM, or killed when training was done: the same command ends as an uninterrupted one."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.common.core.conversations import write_rows
from components.common.core.errors import TERMINATED
from components.common.training import stop as stop_module
from tests.conftest import chat_rows

STAGES = ("sft", "dpo", "orpo")
# An epoch has 6 steps, so that the last step is in the middle of the second.
SETTINGS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "per_device_train_batch_size": 4,
    "max_length": 96,
}
SETTINGS |= {"learning_rate": "1e-3", "optim": "adamw_torch", "logging_steps": 3, "eval_rows": 4, "report_to": "none"}
SETTINGS |= {"use_cpu": "true", "keep_checkpoints": "true"}


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
def run(paired_data, micro_model, monkeypatch):
    def go(stage: str, output: Path, stop_at: int | None = None) -> None:
        """The stage, told to stop while it takes that step."""
        steps = iter(range(1, 100))
        monkeypatch.setattr(stop_module, "any_process", lambda mine: next(steps) == stop_at)
        flags = {"data": paired_data, "model": micro_model, "output": output} | SETTINGS
        argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        importlib.import_module(f"components.{stage}.__main__").main(argv)

    return go


def assert_equal_outputs(mine: Path, theirs: Path) -> None:
    weights, expected = (load_file(output / "model.safetensors") for output in (mine, theirs))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    summaries = [json.loads((output / "training" / "summary.json").read_text()) for output in (mine, theirs)]
    assert [summary["steps"] for summary in summaries] == [8, 8]
    a, b = (summary["summary"] for summary in summaries)
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
    for name in ("tokens/trained", "eval_loss"):
        assert a[name] == b[name]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_the_middle_and_after_the_last_step(stage, run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(stage, whole)
    for at, step in ((2, 2), (3, 5), (3, 8)):  # within the process, and of the run
        with pytest.raises(SystemExit) as ended:
            run(stage, cut, stop_at=at)
        assert ended.value.code == TERMINATED
        assert (cut / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").exists()
        assert not (cut / "model.safetensors").exists()
    run(stage, cut)
    assert_equal_outputs(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_when_all_steps_are_done(stage, run, tmp_path):
    """While it evaluated or wrote: the checkpoint of the last step is there, and not one step more is taken."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output in (whole, cut):
        run(stage, output)
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
    before = json.loads((cut / "training" / "summary.json").read_text())["summary"]
    run(stage, cut)
    assert_equal_outputs(cut, whole)
    after = json.loads((cut / "training" / "summary.json").read_text())["summary"]
    assert after["seconds/first_step"] == before["seconds/first_step"]
    assert after["train_runtime"] == after["seconds/train"] > 0.5 * before["seconds/train"]
