"""The paper's baselines: recipes of sft, dpo and orpo load, open with their command, and hold the paper's values."""

import pytest

from components.common.stage.parser import ConfigParser
from components.common.stage.recipes import find_recipe, recipe_names
from components.common.training.config import HIDDEN, TrainingStageConfig
from components.common.training.preference import DPOSettings, ORPOSettings
from components.common.training.resume import ResumableStageConfig
from components.sft.config import SFTSettings

STAGES = {
    "sft": [TrainingStageConfig, SFTSettings],
    "dpo": [ResumableStageConfig, DPOSettings],
    "orpo": [ResumableStageConfig, ORPOSettings],
}
# Section 5.1, and the authors' code where the paper is silent.
WINDOW = {"max_length": 2048, "seed": 42, "disable_dropout": True}
PAPER = {
    "sft": {
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 3,
        "max_length": 2048,
        "packing": True,
        "packing_strategy": "bfd",
    },
    "dpo": WINDOW
    | {
        "beta": 0.1,
        "learning_rate": 5e-7,
        "optim": "rmsprop",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "num_train_epochs": 3,
        "loss_type": ["sigmoid"],
    },
    "orpo": WINDOW
    | {
        "beta": 0.05,
        "learning_rate": 5e-6,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": 100,
        "num_train_epochs": 3,
    },
}
OF_LLAMA = {"orpo": {"num_train_epochs": 4}}
GLOBAL_BATCH = {"sft": 128, "dpo": 64, "orpo": 64}  # on 8 GPUs


def load(stage: str, recipe: str, **settings: str):
    flags = {"config": recipe, "data": "d", "model": "m", "output": "o", "bf16": "false"} | settings
    argv = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return ConfigParser(stage, STAGES[stage], hidden=HIDDEN).parse(argv)


@pytest.mark.parametrize(("stage", "recipe"), [(stage, recipe) for stage in STAGES for recipe in recipe_names(stage)])
def test_recipe_loads_and_opens_with_its_command(stage, recipe):
    load(stage, recipe)
    opening = "\n".join(find_recipe(stage, recipe).read_text().splitlines()[:3])
    assert f"-m components.{stage} --config {recipe} --data " in opening


@pytest.mark.parametrize("model", ["llama3-8b", "mistral-7b"])
@pytest.mark.parametrize("stage", STAGES)
def test_paper_recipes_hold_the_papers_values(stage, model):
    config, args = load(stage, model)
    assert config.max_prompt_length == 1792
    expected = PAPER[stage] | (OF_LLAMA.get(stage, {}) if model == "llama3-8b" else {})
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == GLOBAL_BATCH[stage]
    assert (config.num_processes, config.parallelism) == (8, "zero3")


@pytest.mark.parametrize("stage", ["dpo", "orpo"])
def test_defaults_are_the_papers(stage, tmp_path):
    args = STAGES[stage][1](output_dir=str(tmp_path), bf16=False)
    assert {name: getattr(args, name) for name in PAPER[stage]} == PAPER[stage]
    assert args.per_device_train_batch_size == 8


@pytest.mark.parametrize("stage", ["dpo", "orpo"])
def test_small_recipes_keep_the_papers_strength_of_preference(stage):
    for recipe in ("tiny", "smollm2"):
        assert load(stage, recipe)[1].beta == PAPER[stage]["beta"]
