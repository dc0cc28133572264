"""A stage in several processes: all of them train, the first one writes and reports. In a single process all of this is free.

Whatever gathers or waits must be called by every process, in the same order.
"""

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
    """The items of every process, in the order of processes; each process gets them all."""
    return gather_object(items) if _are_several() else items


def barrier() -> None:
    """Returns when every process has come here."""
    if _are_several():
        dist.barrier()


def all_reduce_sum(value: int, device: torch.device | None = None) -> int:
    """The sum of a number over all processes.

    Args:
        device: where to add up; default: this process's own.
    """
    if not _are_several():
        return value
    total = torch.tensor(value, device=device or PartialState().device)
    dist.all_reduce(total)
    return int(total)


def any_process(value: bool) -> bool:
    """Whether something holds in any process."""
    return all_reduce_sum(int(value)) > 0


def prepare_output_on_main_process(directory: str, overwrite: bool) -> Path:
    """`prepare_output` in one process, once all of them have looked at the directory; returns when it is made."""
    barrier()
    return on_main_process(prepare_output, directory, overwrite)


def destroy_process_group() -> None:
    """Ends the group of processes when all are done; without it a launch may end with an error."""
    barrier()
    PartialState().destroy_process_group()


def _are_several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
