"""SFT trains on response tokens only, learns, and writes what later stages read."""

import json

import pytest
import torch
from safetensors.torch import load_file

from components.common.core.conversations import read_rows
from components.common.core.errors import UserError
from components.common.models.loading import load_model, load_tokenizer
from components.sft.__main__ import main

SETTINGS = [
    "--max_length",
    "96",
    "--per_device_train_batch_size",
    "8",
    "--learning_rate",
    "5e-3",
    "--report_to",
    "none",
]
SETTINGS += ["--logging_steps", "5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, chat_data, micro_model):
    output = tmp_path_factory.mktemp("sft") / "out"
    main(
        ["--data", str(chat_data), "--model", str(micro_model), "--output", str(output), "--max_steps", "40", *SETTINGS]
    )
    return output


def test_loss_falls_and_is_logged(trained):
    log = [json.loads(line) for line in (trained / "training" / "log_history.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert any("eval_loss" in entry for entry in log)


def test_summary_names_the_stage_its_settings_and_versions(trained):
    summary = json.loads((trained / "training" / "summary.json").read_text())
    assert (summary["schema"], summary["stage"], summary["name"], summary["steps"]) == (1, "sft", "sft", 40)
    assert summary["seconds"] > 0
    assert summary["settings"]["learning_rate"] == 5e-3
    assert "torch" in summary["versions"]


def test_output_is_a_model_with_template_and_stop_tokens(trained):
    tokenizer = load_tokenizer(str(trained))
    model = load_model(str(trained), torch.float32)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert not list(trained.glob("*.bin"))


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path, chat_data, micro_model):
    """The run is cut after step 3, as a kill before step 6 was saved leaves it."""
    flags = ["--data", str(chat_data), "--model", str(micro_model), "--keep_checkpoints", "true"]
    flags += [*SETTINGS, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output in (whole, cut):
        main([*flags, "--output", str(output)])
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
    (cut / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    main([*flags, "--output", str(cut)])
    resumed, expected = (load_file(output / "model.safetensors") for output in (cut, whole))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    summaries = [json.loads((d / "training" / "summary.json").read_text())["summary"] for d in (cut, whole)]
    assert summaries[0]["tokens/trained"] == summaries[1]["tokens/trained"] > 0
    with pytest.raises(UserError, match=r"is of another run: learning_rate was 0.005, is 0.001"):
        (cut / "model.safetensors").unlink()
        main([*flags, "--output", str(cut), "--learning_rate", "1e-3"])


def test_prompt_tokens_carry_no_loss(chat_data, micro_model):
    from components.sft.stage import masked_rows

    tokenizer = load_tokenizer(str(micro_model))
    (row,), _ = masked_rows(tokenizer, read_rows(str(chat_data), "train")[:1], max_prompt_length=96, max_length=96)
    text = tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m])
    assert text == "I heard that my dog likes the old car, and we laughed.<|im_end|>"


def test_dry_run_prints_rows_tokens_and_steps_and_writes_nothing(tmp_path, chat_data, micro_model, capsys):
    argv = ["--data", str(chat_data), "--model", str(micro_model), "--output", str(tmp_path / "out"), *SETTINGS]
    main([*argv, "--num_train_epochs", "2", "--dry_run"])
    assert "48 rows (0 dropped: prompt too long)" in (plan := capsys.readouterr().out)
    assert "12 steps" in plan  # 48 / 8 x 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "nowhere"}, "test.jsonl: no such file; --data must be a directory that the data stage wrote"),
        ({"--model": "nowhere"}, "--model nowhere: no such file or directory"),
        ({"--max_prompt_length": "2"}, "every prompt has 2 tokens or more"),
        ({"--eval_rows": "-1"}, "eval_rows = -1: must be 0 or more"),
        (
            {"--config": "huge"},
            r"--config huge: .* sft has no such recipe \(llama3-8b, mistral-7b, smollm2, tiny\)",
        ),
        ({"--learning_rte": "1"}, "unknown argument '--learning_rte'; did you mean 'learning_rate'"),
    ],
)
def test_wrong_input(change, message, tmp_path, chat_data, micro_model):
    flags = {"--data": str(chat_data), "--model": str(micro_model), "--output": str(tmp_path / "out")} | change
    with pytest.raises(UserError, match=message):
        main([part for flag in flags.items() for part in flag])
    assert not (tmp_path / "out").exists()
