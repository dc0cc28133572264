"""Shipped recipes load, open with their command, and hold the paper's values."""

import re

import pytest
from transformers import LlamaConfig, MistralConfig

from components.common.models.chat_templates import EncodedRow
from components.common.stage.parser import ConfigParser
from components.common.stage.recipes import find_recipe, recipe_names
from components.common.training.config import HIDDEN
from components.common.training.resume import ResumableStageConfig
from components.sapo.config import SAPOConfig
from components.sapo.planning.describe import Node, memory_lines

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


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    """A recipe is read, and its memory planned, whether or not the package is there."""
    monkeypatch.setattr("components.sapo.config.is_bitsandbytes_available", lambda: True)


def load(recipe: str) -> tuple[ResumableStageConfig, SAPOConfig]:
    parser = ConfigParser("sapo", [ResumableStageConfig, SAPOConfig], hidden=(*HIDDEN, "log_dir"))
    return parser.parse(["--config", recipe, "--data", "d", "--model", "m", "--output", "o"])


@pytest.mark.parametrize("recipe", recipe_names("sapo"))
def test_recipe_loads_names_its_loss_and_opens_with_its_command(recipe):
    _, args = load(recipe)
    assert recipe.removesuffix("-lora").removesuffix("-24gb").endswith(f"-{args.loss_type}")
    assert recipe.endswith(("-lora", "-24gb")) == args.use_peft
    assert recipe.endswith("-24gb") == args.load_in_4bit
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


@pytest.mark.parametrize("recipe", [name for name in recipe_names("sapo") if name.endswith(("-lora", "-24gb"))])
def test_lora_recipes_differ_from_the_papers_in_what_lora_is(recipe):
    stage, args = load(recipe)
    loss = args.loss_type
    expected = PAPER | LOSSES[loss] | {"learning_rate": 10 * LOSSES[loss]["learning_rate"]}
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)
    assert stage.num_processes == 1
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64


SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MODELS = {"llama3": LlamaConfig(vocab_size=128256, **SIZES), "mistral": MistralConfig(vocab_size=32000, **SIZES)}


@pytest.mark.parametrize("recipe", [name for name in recipe_names("sapo") if name.startswith(tuple(MODELS))])
def test_a_recipe_fits_its_gpu_and_says_how_much_of_it_it_takes(recipe):
    """With pairs that fill the window; the figures in a recipe's first lines are those of the plan."""
    stage, args = load(recipe)
    rows = [EncodedRow(id="0", prompt_ids=[1] * 1348, chosen_ids=[1] * 700)]
    node = Node(stage.num_processes, stage.parallelism, gpu_memory=24 if recipe.endswith("-24gb") else 80)
    lines = memory_lines(rows, MODELS[recipe.partition("-")[0]], args, node)
    planned = re.search(r"it fits: (\d+\.\d) of", lines[-1])
    assert planned, lines[-1]
    assert f"by `--dry_run`'s arithmetic {float(planned[1]):.0f} " in find_recipe("sapo", recipe).read_text()


def test_defaults_are_the_papers_dpo_run(tmp_path):
    args = SAPOConfig(output_dir=str(tmp_path))
    expected = PAPER | LOSSES["dpo"]
    assert {name: getattr(args, name) for name in expected} == expected


def test_small_recipes_keep_what_the_paper_sets_for_any_size():
    for recipe in ("tiny-dpo", "tiny-orpo", "smollm2-dpo", "smollm2-orpo"):
        _, args = load(recipe)
        assert (args.ema_decay, args.ema_interval, args.responses_per_prompt) == (0.5, 2, 1)
        assert (args.temperature, args.top_k, args.top_p) == (0.7, 50, 0.95)
