"""Shipped recipes load, open with their command, and hold the paper's values."""

import pytest

from components.common.stage.parser import ConfigParser
from components.common.stage.recipes import find_recipe, recipe_names
from components.spin.config import SPINSettings, SPINStageConfig
from components.spin.schedule import schedule, trainer_settings

# Section 5.1, and the SPIN code where the paper is silent.
PAPER = {
    "iterations": 4,
    "window": 2,
    "learning_rates": [5e-7, 5e-7, 1e-7, 1e-7],
    "epochs_per_iteration": 3,
    "train_rows": None,
    "max_length": 2048,
    "max_new_tokens": 256,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 42,
}
LOSSES = {
    "dpo": {
        "betas": [0.1, 0.1, 0.1, 5.0],
        "optim": "rmsprop",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    },
    "orpo": {
        "orpo_lambdas": [0.05, 0.05, 0.05, 0.05],
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 100,
    },
}


def load(recipe: str) -> tuple[SPINStageConfig, SPINSettings]:
    places = ["--data", "d", "--model", "m", "--output", "o", "--bf16", "false"]
    return ConfigParser("spin", [SPINStageConfig, SPINSettings]).parse(["--config", recipe, *places])


def test_all_models_have_both_losses():
    models = ("llama3-8b", "mistral-7b", "smollm2", "tiny")
    assert recipe_names("spin") == [f"{model}-{loss}" for model in models for loss in ("dpo", "orpo")]


@pytest.mark.parametrize("recipe", recipe_names("spin"))
def test_recipe_loads_names_its_loss_and_opens_with_its_command(recipe):
    _, settings = load(recipe)
    assert recipe.endswith(f"-{settings.loss_type}")
    opening = "\n".join(find_recipe("spin", recipe).read_text().splitlines()[:3])
    assert f"python -m components.spin --config {recipe} --data " in opening
    for iteration in schedule(settings):
        trainer_settings(settings, iteration, "unused")


@pytest.mark.parametrize("model", ["llama3-8b", "mistral-7b"])
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_paper_recipes_hold_the_papers_values(model, loss):
    stage, settings = load(f"{model}-{loss}")
    assert stage.max_prompt_length == 1792
    expected = PAPER | LOSSES[loss] | {"loss_type": loss}
    assert {name: getattr(settings, name) for name in expected} == expected
    assert (stage.num_processes, stage.parallelism) == (8, "zero3")
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps * stage.num_processes == 64


def test_defaults_are_the_papers_dpo_run():
    settings = SPINSettings(bf16=False)
    expected = PAPER | LOSSES["dpo"]
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("recipe", ["tiny-dpo", "tiny-orpo", "smollm2-dpo", "smollm2-orpo"])
def test_small_recipes_keep_what_the_paper_sets_for_any_size(recipe):
    _, settings = load(recipe)
    assert (settings.window, settings.temperature, settings.top_k, settings.top_p) == (2, 1.0, 0, 1.0)
