"""The model to start from: one directory, or one of several by name."""

import dataclasses
import json
from typing import Any

import pytest

from components.common.core.errors import UserError
from components.common.stage.parser import ConfigParser
from components.common.training.config import TrainingStageConfig

MODELS = {"base": "runs/model", "sft": "runs/a, b"}


def _parse(*argv: str) -> Any:
    (stage,) = ConfigParser("sft", [TrainingStageConfig]).parse(["--data", "d", "--output", "o", *argv])
    return stage


def test_a_single_directory_is_taken_as_it_is() -> None:
    assert _parse("--model", "runs/model").model == "runs/model"


@pytest.mark.parametrize("text", [json.dumps(MODELS), '{base: runs/model, sft: "runs/a, b"}'])
@pytest.mark.parametrize("start", ["base", "sft"])
def test_start_names_one_of_several_models_in_a_flag(text: str, start: str) -> None:
    stage = _parse("--model", text, "--start", start)
    assert stage.model == MODELS[start]
    assert dataclasses.asdict(stage)["start"] == start


def test_several_models_in_settings() -> None:
    assert _parse("--settings", json.dumps({"model": MODELS}), "--start", "sft").model == MODELS["sft"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model", json.dumps(MODELS)],
            "model names several directories (base, sft): set start to one of these names",
        ),
        (
            ["--model", json.dumps(MODELS), "--start", "dpo"],
            "start = dpo: must be a name in model, which has base, sft",
        ),
        (["--model", "{}", "--start", "dpo"], "start = dpo: must be a name in model, which has nothing"),
        (["--model", "runs/model", "--start", "sft"], "start = sft: model is the single directory runs/model; leave"),
        (["--model", "{base: 3}", "--start", "base"], "command line: model = {'base': 3} is not valid: "),
    ],
)
def test_what_does_not_fit_is_one_clear_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        _parse(*argv)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_bfloat16_on_a_cpu_needs_no_other_setting(monkeypatch, tmp_path):
    """transformers refuses bfloat16 without a GPU unless use_cpu says that this is meant."""
    from components.common.training.preference import DPOSettings, ORPOSettings
    from components.sapo.config import SAPOConfig
    from components.sft.config import SFTSettings

    monkeypatch.setattr("components.common.training.config.has_fast_bfloat16", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for settings in (SFTSettings, DPOSettings, ORPOSettings, SAPOConfig):
        args = settings(output_dir=str(tmp_path), report_to="none")
        assert (args.bf16, args.use_cpu) == (True, True)
