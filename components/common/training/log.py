"""What a training run shows and writes: progress, the held-out metrics at its end, and the training log of the report."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.common.core.progress import progress
from components.common.training.distributed.processes import is_main_process


class TrainingProgress(TrainerCallback):
    """One progress bar over the steps, with the newest loss and margin beside it."""

    SHOWN = ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins")

    def __init__(self, description: str) -> None:
        self.description = description
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = progress(total=state.max_steps, initial=state.global_step, desc=self.description, unit="steps")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.shown |= {k: f"{v:.4f}" for k, v in (logs or {}).items() if k in self.SHOWN}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


def show_progress(trainer: Trainer, description: str) -> None:
    """Replaces the trainer's printed dictionaries by one progress bar, of the first process."""
    trainer.remove_callback(PrinterCallback)
    if is_main_process():
        trainer.add_callback(TrainingProgress(description))


def final_evaluation(trainer: Trainer) -> dict[str, float]:
    """Metrics on the held-out rows at the end of training; the last ones where the last step was evaluated already."""
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == trainer.state.global_step and any(name.startswith("eval_") for name in entry):
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return trainer.evaluate()


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that results may depend on, by name."""
    names = ("torch", "transformers", "trl", "accelerate", "deepspeed", "vllm")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_training_log(
    directory: Path, stage: str, name: str, state: TrainerState, settings: dict[str, Any], summary: dict[str, float]
) -> None:
    """Writes `log_history.jsonl` and, last, `summary.json`: what the report stage reads.

    Args:
        state: log entries and steps of the whole run.
        settings: all of them, for the record.
        summary: metrics at the end, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) for entry in state.log_history]
    (directory / "log_history.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {
        "schema": 1,
        "stage": stage,
        "name": name,
        "steps": state.global_step,
        "seconds": summary.get("train_runtime"),
        "settings": settings,
        "versions": library_versions(),
        "summary": summary,
    }
    (directory / "summary.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
