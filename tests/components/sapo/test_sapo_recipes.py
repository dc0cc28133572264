"""Shipped recipes load, open with their command, and hold the paper's values."""

import pytest

from components.common.cli import ConfigParser, find_recipe, recipe_names
from components.common.resume import ResumableStageConfig
from components.common.training import HIDDEN
from components.sapo.config import SAPOConfig

# Section 5.1, and the authors' code where the paper is silent.
PAPER = {
    "max_length": 2048,
    "segment_length": 256,
    "no_segment": False,
    "on_policy": False,
    "responses_per_prompt": 1,
    "replay_buffer_size": 2000,
    "ema_decay": 0.5,
    "ema_interval": 2,
    "num_train_epochs": 4,
    "max_new_tokens": 256,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "on_eos": "truncate",
    "seed": 42,
}
LOSSES = {
    "dpo": {
        "beta": 0.1,
        "learning_rate": 5e-7,
        "optim": "rmsprop",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "reference": "ema",
        "reference_interval": "epoch",
    },
    "orpo": {
        "orpo_lambda": 0.05,
        "learning_rate": 5e-6,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 100,
        "nll_scope": "response",
    },
}


def load(recipe: str) -> tuple[ResumableStageConfig, SAPOConfig]:
    parser = ConfigParser("sapo", [ResumableStageConfig, SAPOConfig], hidden=(*HIDDEN, "log_dir"))
    return parser.parse(["--config", recipe, "--data", "d", "--model", "m", "--output", "o"])


@pytest.mark.parametrize("recipe", recipe_names("sapo"))
def test_recipe_loads_names_its_loss_and_opens_with_its_command(recipe):
    _, args = load(recipe)
    assert recipe.removesuffix("-lora").endswith(f"-{args.loss_type}")
    assert recipe.endswith("-lora") == args.use_peft
    opening = "\n".join(find_recipe("sapo", recipe).read_text().splitlines()[:3])
    assert f"python -m components.sapo --config {recipe} --data " in opening


@pytest.mark.parametrize("model", ["llama3-8b", "mistral-7b"])
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_paper_recipes_hold_the_papers_values(model, loss):
    stage, args = load(f"{model}-{loss}")
    assert stage.max_prompt_length == 1792
    expected = PAPER | LOSSES[loss] | {"loss_type": loss}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (stage.num_processes, stage.parallelism) == (8, "zero3")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * stage.num_processes == 64


@pytest.mark.parametrize("model", ["llama3-8b", "mistral-7b"])
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_lora_recipes_differ_from_the_papers_in_what_lora_is(model, loss):
    stage, args = load(f"{model}-{loss}-lora")
    expected = PAPER | LOSSES[loss] | {"learning_rate": 10 * LOSSES[loss]["learning_rate"]}
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)
    assert stage.num_processes == 1
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64


def test_defaults_are_the_papers_dpo_run(tmp_path):
    args = SAPOConfig(output_dir=str(tmp_path))
    expected = PAPER | LOSSES["dpo"]
    assert {name: getattr(args, name) for name in expected} == expected


def test_small_recipes_keep_what_the_paper_sets_for_any_size():
    for recipe in ("tiny-dpo", "tiny-orpo", "smollm2-dpo", "smollm2-orpo"):
        _, args = load(recipe)
        assert (args.ema_decay, args.ema_interval, args.responses_per_prompt) == (0.5, 2, 1)
        assert (args.temperature, args.top_k, args.top_p) == (0.7, 50, 0.95)
