"""A data stage that holds nothing out (`test_rows: 0`) leaves data that every stage takes, or refuses for a reason."""

import importlib
from pathlib import Path

import pytest

from components.common.core.conversations import write_rows
from components.common.core.errors import UserError
from components.data.__main__ import main as prepare
from tests.conftest import chat_rows

SHORT = ["--max_length", "96", "--max_steps", "1", "--per_device_train_batch_size", "2", "--report_to", "none"]
OF_STAGE = {
    "sft": SHORT,
    "dpo": SHORT,
    "orpo": SHORT,
    "sapo": [*SHORT, "--segment_length", "6", "--max_new_tokens", "4"],
    "spin": ["--config", "tiny-dpo", "--max_length", "96", "--dry_run"],
}


@pytest.fixture(scope="module")
def all_for_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rows")
    write_rows(directory / "rows.jsonl", chat_rows(12))
    rows = ["--source", str(directory / "rows.jsonl"), "--test_rows", "0", "--rejected", "other_conversation"]
    prepare([*rows, "--output", str(directory / "data")])
    assert (directory / "data" / "test.jsonl").read_text() == ""
    return directory / "data"


def run(stage: str, data: Path, model: Path, output: Path, *more: str) -> None:
    places = ["--data", str(data), "--model", str(model), "--output", str(output)]
    importlib.import_module(f"components.{stage}.__main__").main([*places, *OF_STAGE.get(stage, []), *more])


@pytest.mark.slow
@pytest.mark.parametrize("stage", OF_STAGE)
def test_stages_train_without_held_out_rows(stage: str, all_for_training: Path, micro_model: Path, tmp_path: Path):
    run(stage, all_for_training, micro_model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() or stage == "spin"  # whose run takes longer: its plan


@pytest.mark.parametrize("stage", ["sft", "dpo", "orpo", "sapo"])
def test_what_would_evaluate_is_refused(stage: str, all_for_training: Path, micro_model: Path, tmp_path: Path):
    message = "eval_strategy = steps needs held-out rows; raise the data stage's test_rows, or set it to no"
    with pytest.raises(UserError, match=message):
        run(stage, all_for_training, micro_model, tmp_path / "out", "--eval_strategy", "steps", "--eval_steps", "1")
    assert not (tmp_path / "out").exists()


def test_the_evaluation_says_what_it_needs(all_for_training: Path, micro_model: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"held no row out \(test_rows: 0\), and held_out scores held-out rows"):
        run("evaluation", all_for_training, micro_model, tmp_path / "out", "--benchmarks", "held_out")
