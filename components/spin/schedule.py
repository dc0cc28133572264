"""Which pairs, learning rate and beta each iteration trains with. Pure: nothing here reads or writes a file."""

import math
from dataclasses import dataclass
from typing import Any

from components.common.training.preference import DPOSettings, ORPOSettings
from components.common.training.steps import steps_per_epoch
from components.spin.config import SPINSettings


@dataclass(frozen=True)
class Iteration:
    """One round of generating and training.

    Attributes:
        index: counted from 0.
        window: iterations whose pairs it trains on; the last is its own.
        learning_rate: its peak.
        weight: DPO's beta, or ORPO's lambda.
    """

    index: int
    window: tuple[int, ...]
    learning_rate: float
    weight: float


def schedule(settings: SPINSettings) -> list[Iteration]:
    """The iterations in order. With a window of two they train on {0}, {0, 1}, {1, 2}, {2, 3}."""
    weights = settings.betas if settings.loss_type == "dpo" else settings.orpo_lambdas
    return [
        Iteration(i, tuple(range(max(0, i - settings.window + 1), i + 1)), settings.learning_rates[i], weights[i])
        for i in range(settings.iterations)
    ]


def steps_of(iteration: Iteration, rows: int, settings: SPINSettings, processes: int = 1) -> int:
    """Optimizer steps of an iteration over a training set of `rows` rows, as `Trainer` counts them."""
    pairs, micro_batch = rows * len(iteration.window), settings.per_device_train_batch_size * processes
    per_epoch = steps_per_epoch(pairs, micro_batch, settings.gradient_accumulation_steps)
    return math.ceil(settings.epochs_per_iteration * per_epoch)


def first_steps(rows: int, settings: SPINSettings, processes: int = 1) -> list[int]:
    """Optimizer steps of the whole run before each iteration, and at last those of all."""
    starts = [0]
    for iteration in schedule(settings):
        starts.append(starts[-1] + steps_of(iteration, rows, settings, processes))
    return starts


def trainer_settings(settings: SPINSettings, iteration: Iteration, output_dir: str) -> DPOSettings | ORPOSettings:
    """What the trainer of one iteration is told.

    Raises:
        ValueError: a value that transformers or TRL refuse.
    """
    shared: dict[str, Any] = {
        "output_dir": output_dir,
        "learning_rate": iteration.learning_rate,
        "beta": iteration.weight,
        "num_train_epochs": settings.epochs_per_iteration,
        "max_length": settings.max_length,
        "save_strategy": "steps",
        "disable_tqdm": True,
    }
    for name in (
        *("optim", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
        *("gradient_accumulation_steps", "gradient_checkpointing", "bf16", "use_cpu", "seed", "save_steps"),
        *("save_total_limit", "logging_steps", "report_to"),
    ):
        shared[name] = getattr(settings, name)
    return DPOSettings(**shared) if settings.loss_type == "dpo" else ORPOSettings(**shared)


def describe(prompts: int, dropped: int, model: str, settings: SPINSettings, processes: int = 1) -> list[str]:
    """The plan, a line for each iteration: the text of `--dry_run`."""
    weight = "beta" if settings.loss_type == "dpo" else "lambda"
    lines = [
        f"rows: {prompts:,} ({dropped:,} dropped: prompt too long)",
        f"each iteration generates {prompts:,} responses of at most {settings.max_new_tokens} tokens with its start model",
    ]
    for iteration in schedule(settings):
        window = ", ".join(str(i) for i in iteration.window)
        start = model if iteration.index == 0 else f"iteration {iteration.index - 1}"
        lines.append(
            f"iteration {iteration.index}: from {start}; responses of {{{window}}}: "
            f"{prompts * len(iteration.window):,} pairs, {steps_of(iteration, prompts, settings, processes):,} steps, "
            f"learning rate {iteration.learning_rate:g}, {weight} {iteration.weight:g}"
        )
    return [*lines, f"steps: {first_steps(prompts, settings, processes)[-1]:,} in all, on {processes} process(es)"]
