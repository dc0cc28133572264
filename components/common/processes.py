"""A stage in several processes (`accelerate launch -m components.dpo ...`): the first one writes and reports, all train."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback

from components.common.cli import prepare_output
from components.common.training import save_model, show_progress


def is_first() -> bool:
    return PartialState().is_main_process


def prepare_output_once(directory: str, overwrite: bool) -> Path:
    """`prepare_output` in one process, while the others, which have looked at the directory too, wait."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        prepare_output(directory, overwrite)
    processes.wait_for_everyone()
    return Path(directory)


def show_progress_once(trainer: Any, description: str) -> None:
    """One progress bar, of the first process."""
    if is_first():
        show_progress(trainer, description)
    else:
        trainer.remove_callback(PrinterCallback)


def save_model_once(trainer: Any, output: Path) -> None:
    """Writes the model as `save_model` does; shards of it that lie in several processes are gathered first."""
    if trainer.args.world_size == 1:
        save_model(trainer, output)
        return
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output, state_dict=weights)
        trainer.processing_class.save_pretrained(output)


def leave() -> None:
    """Ends the group of processes when all are done; without it a launch may end with an error."""
    processes = PartialState()
    processes.wait_for_everyone()
    processes.destroy_process_group()
