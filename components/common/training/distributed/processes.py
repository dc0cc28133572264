"""A stage in several processes (`accelerate launch -m components.dpo ...`): the first one writes and reports, all train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from components.common.stage.outputs import prepare_output

Item = TypeVar("Item")


def is_main_process() -> bool:
    return PartialState().is_main_process


def process_count() -> int:
    return PartialState().num_processes


def process_index() -> int:
    return PartialState().process_index


def on_main_process(action: Callable[..., Item], *arguments: Any) -> Item:
    """Runs an action in the first process, while the others wait; all get what it gives."""
    mine: list[Any] = [action(*arguments) if is_main_process() else None]
    return gather(mine)[0]


def gather(items: list[Item]) -> list[Item]:
    """The items of every process, in the order of processes; each process must call this, and gets them all."""
    return gather_object(items) if dist.is_initialized() and dist.get_world_size() > 1 else items


def barrier() -> None:
    """Returns when every process has come here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def all_reduce_sum(value: int, device: torch.device) -> int:
    """The sum of a number over all processes; the number itself where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return int(total)


def prepare_output_on_main_process(directory: str, overwrite: bool) -> Path:
    """`prepare_output` in one process, while the others, which have looked at the directory too, wait."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        prepare_output(directory, overwrite)
    processes.wait_for_everyone()
    return Path(directory)


def destroy_process_group() -> None:
    """Ends the group of processes when all are done; without it a launch may end with an error."""
    processes = PartialState()
    processes.wait_for_everyone()
    processes.destroy_process_group()
