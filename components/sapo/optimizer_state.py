"""The optimizer and the learning rate schedule, as a part of a checkpoint."""

from typing import Any

import torch
from torch import Tensor

from components.sapo.checkpoint import Parts, SavedParts
from components.sapo.sharding import Replicated


class OptimizerState:
    """Saves and restores the optimizer, and the learning rate schedule with it.

    Args:
        layout: where the trained parameters lie, and their optimizer.
        scheduler: torch's, or what accelerate has wrapped around it.
    """

    def __init__(self, layout: Replicated, scheduler: Any) -> None:
        self.layout = layout
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """This process's parts of the optimizer's tensors, and what is no tensor."""
        layout = self.layout
        spans = {name: layout.span(index) for index, name in enumerate(layout.names)}
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        plain: dict[str, Any] = {}

        for key, value in layout.optimizer_state().items():
            if isinstance(value, Tensor):
                start, length = spans[_parameter(key)]
                tensors[key] = value[:length] if layout.sharded else value
                starts[key] = start
            else:
                plain[key] = value

        groups = [{k: v for k, v in group.items() if k != "params"} for group in layout.optimizer.param_groups]
        return {
            "optimizer": Parts(tensors, starts if layout.sharded else None),
            "plain": plain,
            "param_groups": groups,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Restores `state_dict`, whichever processes it is of."""
        layout = self.layout
        saved: SavedParts = state["optimizer"]
        parts = dict(zip(layout.names, layout.parts(), strict=True))
        spans = {name: layout.span(index) for index, name in enumerate(layout.names)}
        mine: dict[str, Any] = dict(state["plain"])

        for key in saved:
            name = _parameter(key)
            start, length = spans[name]
            if saved.size(key) == layout.size(name):
                part = saved.read(key, start, length)
                mine[key] = torch.nn.functional.pad(part, (0, len(parts[name]) - length))
            else:
                mine[key] = saved.read_whole(key)

        layout.load_optimizer_state(mine)
        for group, values in zip(layout.optimizer.param_groups, state["param_groups"], strict=True):
            group.update(values)
        self.scheduler.load_state_dict(state["scheduler"])


def _parameter(key: str) -> str:
    """The parameter of an entry "<parameter>/<key>" of the optimizer's state."""
    return key.rsplit("/", 1)[0]
