"""The trained model as a plain Hugging Face directory."""

from pathlib import Path

from transformers import Trainer

from components.common.training.distributed.processes import is_main_process


def save_model(trainer: Trainer, output: Path) -> None:
    """Writes trained weights and tokenizer; all processes call this, and the first one writes.

    Weights that lie in shards are gathered first.
    """
    several = trainer.args.world_size > 1
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if several else None
    if not is_main_process():
        return

    model = trainer.accelerator.unwrap_model(trainer.model)
    if weights is not None:
        for copy in model.all_tied_weights_keys:  # gathered, a tied weight is there twice
            weights.pop(copy, None)
    model.save_pretrained(output, state_dict=weights)
    trainer.processing_class.save_pretrained(output)  # type: ignore[union-attr]
