"""Where the trained parameters lie: whole in every process (one process, DDP), or in parts (ZeRO-2, ZeRO-3, FSDP2).

What self-play adds to training (the EMA, the reference, their checkpoints) works on *parts*: this process's elements of each
trained parameter, as one flat float32 tensor. An update of the EMA or a refresh of the reference touches parts only, with no
collective. A whole parameter exists for as long as it is pushed to the sampler, one at a time.

    Replicated  the parameter itself
    Zero2       fragments of the float32 masters that DeepSpeed's optimizer holds; the parameters themselves are whole
    Zero3       DeepSpeed's partition: float32 masters in the optimizer, and what forward reads (bfloat16 in bf16 runs) beside
    FSDP2       the local tensor of a DTensor, in float32; forward reads a cast of it

Only parameters that are trained count: with LoRA these are the adapter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from components.common.core.errors import UserError
from components.sapo.checkpoint import Parts, SavedParts


def layout_of(policy: nn.Module, optimizer: Any) -> Replicated:
    """The layout of a policy that accelerate has prepared.

    Args:
        policy: the model without its wrapper.
        optimizer: the trainer's, which DeepSpeed has replaced by its own.

    Raises:
        UserError: the model is sharded in a way that is not known here.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    kind: type[Replicated] = Replicated
    if any(hasattr(p, "ds_id") for p in parameters):
        kind = Zero3
    elif any(hasattr(p, "_hp_mapping") for p in parameters):
        kind = Zero2
    elif any(isinstance(p, DTensor) for p in parameters):
        kind = FSDP2
        if any(not (len(p.placements) == 1 and p.placements[0].is_shard(0)) for p in parameters):  # type: ignore[attr-defined]
            raise UserError(
                "parameters are sharded over more than one dimension of devices: use ddp, zero2, zero3 or fsdp2"
            )
    return kind(policy, _innermost(optimizer))


def _innermost(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class Replicated:
    """Every process holds all of every parameter.

    Args:
        policy: the model without its wrapper.
        optimizer: torch's optimizer.

    Attributes:
        names: of the trained parameters; every list of parts is in this order.
        sharded: whether processes hold different parts.
    """

    sharded = False

    def __init__(self, policy: nn.Module, optimizer: Any) -> None:
        self.policy = policy
        self.optimizer = optimizer
        trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self.parameters: list[Any] = [parameter for _, parameter in trained]

    def parts(self) -> list[Tensor]:
        """This process's parts, flat, float32; what the optimizer updates."""
        return [parameter.data.view(-1) for parameter in self.parameters]

    def span(self, index: int) -> tuple[int, int]:
        """(first element, number of elements) of this process's part of a parameter; a part may be padded beyond."""
        return 0, self.parameters[index].numel()

    def size(self, name: str) -> int:
        """Elements of a whole parameter."""
        parameter = self.parameters[self.names.index(name)]
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    @torch.no_grad()
    def whole(self, index: int, part: Tensor) -> Tensor:
        """A whole parameter from every process's part of it; all processes must call this."""
        return part.view(self.parameters[index].shape)

    def weights(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by name, one at a time; all processes must go through them together."""
        for index, (name, part) in enumerate(zip(self.names, parts, strict=True)):
            yield name, self.whole(index, part)

    @contextmanager
    def swapped_in(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Lets the policy's forward pass run with other parts; the policy's own come back bit for bit. Not for backward."""
        mine = self._forward_tensors()
        before = [tensor.clone() for tensor in mine]
        try:
            self._write(mine, parts)
            yield
        finally:
            self._write(mine, before)

    def load(self, parts: Sequence[Tensor]) -> None:
        """Puts the policy at these parts: what the optimizer updates, and what forward reads."""
        with torch.no_grad():
            torch._foreach_copy_(self.parts(), list(parts))
            self._publish()

    def optimizer_state(self) -> dict[str, Any]:
        """This process's parts of the optimizer's state by "<parameter>/<key>", and scalars such as its step count.

        The tensors are those of the optimizer, not copies.
        """
        found: dict[str, Any] = {}
        for index, name in enumerate(self.names):
            for key, value in self._state_of(index).items():
                found[f"{name}/{key}"] = value
        return found

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores `optimizer_state`."""
        by_parameter: dict[str, dict[str, Any]] = {}
        for path, value in state.items():
            name, key = path.rsplit("/", 1)
            by_parameter.setdefault(name, {})[key] = value
        for index, name in enumerate(self.names):
            self._load_state_of(index, by_parameter.get(name, {}))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of what each has worked out from its parts."""
        if self.sharded:
            dist.all_reduce(value)
        return value

    # What differs between the layouts.

    def _forward_tensors(self) -> list[Tensor]:
        """The tensors that forward reads."""
        return self.parts()

    def _write(self, targets: list[Tensor], values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, list(values))

    def _publish(self) -> None:
        """Makes what forward reads follow what the optimizer updates."""

    def _state_of(self, index: int) -> dict[str, Any]:
        return {key: _flat(value) for key, value in self.optimizer.state.get(self.parameters[index], {}).items()}

    def _load_state_of(self, index: int, state: dict[str, Any]) -> None:
        parameter = self.parameters[index]
        placed = {key: self._placed(parameter, value) for key, value in state.items()}
        if placed:
            self.optimizer.state[parameter] = placed

    def _placed(self, parameter: Any, value: Any) -> Any:
        """A value of the optimizer's state as the optimizer keeps it."""
        if not isinstance(value, Tensor):
            return torch.tensor(value) if isinstance(value, float) else value  # a step count
        return value.view(parameter.shape).to(parameter.device) if value.numel() == parameter.numel() else value


def _flat(value: Any) -> Any:
    """A tensor of the optimizer's state as a part; a step count as a number."""
    if not isinstance(value, Tensor):
        return value
    local = value.to_local() if hasattr(value, "to_local") else value
    return float(local) if local.dim() == 0 else local.detach().reshape(-1)


class Zero(Replicated):
    """DeepSpeed's: what the optimizer updates is one flat float32 tensor per group, which holds a stretch of each parameter."""

    sharded = True

    def parts(self) -> list[Tensor]:
        places = (self._place(parameter) for parameter in self.parameters)
        return [master.narrow(0, start, length) for master, start, length in places]

    def _place(self, parameter: Any) -> tuple[Tensor, int, int]:
        """Where a parameter's part lies: (the flat tensor, first element, elements)."""
        raise NotImplementedError

    def _state_of(self, index: int) -> dict[str, Any]:
        master, start, length = self._place(self.parameters[index])
        state = self.optimizer.state.get(master, {})
        return {
            key: value.narrow(0, start, length) if _like(value, master) else float(value)
            for key, value in state.items()
        }

    def _load_state_of(self, index: int, state: dict[str, Any]) -> None:
        master, start, length = self._place(self.parameters[index])
        kept = self.optimizer.state[master]
        for key, value in state.items():
            if isinstance(value, Tensor):
                kept.setdefault(key, torch.zeros_like(master)).narrow(0, start, length).copy_(value)
            else:  # a step count, which all parameters of a group share
                kept[key] = torch.tensor(value)


def _like(value: Any, master: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == master.shape


class Zero3(Zero):
    """ZeRO-3: flat parts of equal size, the last ones padded."""

    def _place(self, parameter: Any) -> tuple[Tensor, int, int]:
        zero = parameter._z3_optimizer
        group, start, length = zero.grad_position[zero.get_param_id(parameter)]
        return zero.fp32_partitioned_groups_flat[group], start, length

    def span(self, index: int) -> tuple[int, int]:
        parameter = self.parameters[index]
        size = parameter.ds_tensor.numel()
        start = min(size * dist.get_rank(), parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    @torch.no_grad()
    def whole(self, index: int, part: Tensor) -> Tensor:
        parameter = self.parameters[index]
        joined = part.new_empty(part.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(joined, part.contiguous())
        return joined[: parameter.ds_numel].view(parameter.ds_shape)

    def _forward_tensors(self) -> list[Tensor]:
        return [parameter.ds_tensor.data for parameter in self.parameters]

    def _write(self, targets: list[Tensor], values: Sequence[Tensor]) -> None:
        super()._write(targets, values)
        for index, parameter in enumerate(self.parameters):
            if parameter.data.numel():  # DeepSpeed keeps small parameters whole beside their parts
                parameter.data.copy_(self.whole(index, targets[index]))

    def _publish(self) -> None:
        self._write(self._forward_tensors(), self.parts())


class Zero2(Zero):
    """ZeRO-2: the parameters are whole; the flat masters are cut evenly, so a part may be some of a parameter or nothing."""

    def _place(self, parameter: Any) -> tuple[Tensor, int, int]:
        mapping = parameter._hp_mapping
        masters = (master for group in self.optimizer.param_groups for master in group["params"])
        if mapping is None:
            return next(masters), 0, 0
        address, fragment = mapping.get_hp_fragment_address(), mapping.get_hp_fragment()
        return next(master for master in masters if _lies_within(fragment, master)), address.start, address.numel

    def span(self, index: int) -> tuple[int, int]:
        mapping = self.parameters[index]._hp_mapping
        return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    @torch.no_grad()
    def whole(self, index: int, part: Tensor) -> Tensor:
        parameter = self.parameters[index]
        joined = part.new_zeros(parameter.numel())
        start, length = self.span(index)
        joined[start : start + length] = part
        dist.all_reduce(joined)
        return joined.view(parameter.shape)

    def _forward_tensors(self) -> list[Tensor]:
        return [parameter.data for parameter in self.parameters]

    @contextmanager
    def swapped_in(self, parts: Sequence[Tensor]) -> Iterator[None]:
        before = [tensor.clone() for tensor in self._forward_tensors()]
        try:
            for index, tensor in enumerate(self._forward_tensors()):
                tensor.copy_(self.whole(index, parts[index]))
            yield
        finally:
            self._write(self._forward_tensors(), before)

    def _publish(self) -> None:
        for index, part in enumerate(self.parts()):
            self.parameters[index].data.copy_(self.whole(index, part))


class FSDP2(Replicated):
    """torch's fully_shard: each process holds some of a parameter's rows."""

    sharded = True

    def parts(self) -> list[Tensor]:
        return [parameter.to_local().detach().view(-1) for parameter in self.parameters]

    def span(self, index: int) -> tuple[int, int]:
        parameter = self.parameters[index]
        rows = parameter.shape[0]
        per_rank = -(-rows // dist.get_world_size())
        row_size = parameter.numel() // rows
        return min(per_rank * dist.get_rank(), rows) * row_size, parameter.to_local().numel()

    @torch.no_grad()
    def whole(self, index: int, part: Tensor) -> Tensor:
        return self._placed(self.parameters[index], part).full_tensor()

    def _write(self, targets: list[Tensor], values: Sequence[Tensor]) -> None:
        super()._write(targets, values)
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):  # gathered weights that outlive a forward pass would be the old ones
                module.reshard()

    def _placed(self, parameter: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return torch.tensor(value) if isinstance(value, float) else value
        local = value.view(parameter.to_local().shape).to(parameter.to_local().device)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )


def _lies_within(part: Tensor, whole: Tensor) -> bool:
    start, size = whole.data_ptr(), whole.numel() * whole.element_size()
    return start <= part.data_ptr() < start + size


def saved_parts(layout: Replicated, parts: Sequence[Tensor]) -> Parts:
    """Parts by name, without padding, and where they begin."""
    spans = [layout.span(index) for index in range(len(parts))]
    named = {name: part[:length] for name, part, (_, length) in zip(layout.names, parts, spans, strict=True)}
    starts = {name: start for name, (start, _) in zip(layout.names, spans, strict=True)}

    return Parts(named, starts if layout.sharded else None)


def read_parts(saved: SavedParts, layout: Replicated, like: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of saved weights, whichever processes wrote them.

    Raises:
        UserError: they are of another model.
    """
    if extra := set(saved) - set(layout.names):
        raise UserError(f"the checkpoint is of another model: it has {sorted(extra)[0]}")

    parts = []
    for index, (name, mine) in enumerate(zip(layout.names, like, strict=True)):
        start, length = layout.span(index)
        part = torch.zeros_like(mine)
        part[:length] = saved.read(name, start, length)
        parts.append(part)
    return parts


@torch.no_grad()
def relative_distance(layout: Replicated, parts: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """|theta - theta_other| / |theta_other| over all trained parameters, in the Euclidean norm."""
    # One parameter at a time: a difference of all at once would be another copy of the model.
    difference = torch.stack([(mine - theirs).norm() for mine, theirs in zip(parts, others, strict=True)])
    size = torch.stack([theirs.norm() for theirs in others])
    squares = layout.sum(torch.stack([difference.square().sum(), size.square().sum()]))
    return float((squares[0] / squares[1]).sqrt())
