"""The trained model as a plain Hugging Face directory."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from components.common.training.distributed.processes import is_main_process


def save_model(trainer: Trainer, output: Path) -> None:
    """Writes the trained weights and tokenizer as a plain Hugging Face directory."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)  # type: ignore[union-attr]


def save_model_on_main_process(trainer: Any, output: Path) -> None:
    """Writes the model as `save_model` does; shards of it that lie in several processes are gathered first."""
    if trainer.args.world_size == 1:
        save_model(trainer, output)
        return
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_main_process():
        model = trainer.accelerator.unwrap_model(trainer.model)
        for copy in model.all_tied_weights_keys:  # gathered, a tied weight is there twice
            weights.pop(copy, None)
        model.save_pretrained(output, state_dict=weights)
        trainer.processing_class.save_pretrained(output)
