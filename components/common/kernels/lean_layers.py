"""Layers of Llama-like models that keep less for backward, or are faster on a CPU, with the same results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from components.common.kernels import gpu_fusion
from components.common.kernels.cpu import onednn


@contextmanager
def lean_layers(model: Any) -> Iterator[None]:
    """Lets norms, gated MLPs and linear layers work as `_Norm`, `_GatedDown` and `_Linear`, where nothing has wrapped,
    sharded or quantised them."""
    lean: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    hooks = []
    for layer in model.base_model.layers:
        # Their outputs are what several linear layers read: query, key and value; gate and up.
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        hooks += [norm.register_forward_hook(_cast_for_autocast) for norm in norms]
        lean += [(norm, _norm) for norm in norms if _is_plain_norm(norm, model.config.hidden_size)]
        lean += [(layer.mlp, _gated_mlp)] if _is_plain_gated_mlp(layer.mlp) else []
        lean += [(linear, _linear) for linear in layer.modules() if _is_plain_linear(linear)]
    for module, forward in lean:
        module.forward = functools.partial(forward, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, _ in lean:
            del module.forward  # the class's own again


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What a linear layer casts this tensor to."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _cast_for_autocast(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Under autocast each linear layer casts its input, and keeps its own copy for backward: here it is cast once for all.

    The values are those that the layers would have made.
    """
    return output.to(_autocast_dtype(output))


def _is_plain(module: nn.Module, weight: Any, size: int) -> bool:
    return type(weight) is nn.Parameter and weight.numel() == size and "forward" not in vars(module)


def _is_plain_norm(norm: Any, size: int) -> bool:
    """Whether it is weight * x / rms(x) over `size` values, whole."""
    known = type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")
    return known and _is_plain(norm, norm.weight, size)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, norm.weight, norm.variance_epsilon, _autocast_dtype(x))


class _Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon). Keeps x and a number for each token: autograd would keep the quotient too.

    With n = x / rms and g the incoming gradient:   d weight = sum g n,   d x = (g weight - n mean(g weight n)) / rms
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        """(..., size), (size,) -> (..., size) in `dtype`, computed in float32."""
        if gpu_fusion.is_wanted(x):
            result, scale = _norm_forward(x, weight, epsilon, dtype)
            ctx.save_for_backward(x, weight, scale)
            return result
        wide = x.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        if gpu_fusion.is_wanted(x):
            of_x, of_weight = _norm_backward(x, weight, scale, gradients[0])
            return of_x, of_weight if ctx.needs_input_grad[1] else None, None, None
        normed, gradient = x.float() * scale, gradients[0].float()
        product = gradient * normed
        d_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        slope = product.mul_(weight).mean(dim=-1, keepdim=True)
        d_x = (gradient * weight).sub_(normed.mul_(slope)).mul_(scale)
        return d_x.to(x.dtype), d_weight, None, None


@gpu_fusion.one_kernel_of_rows
def _norm_forward(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm in `dtype`, and 1 / rms of each token, (..., 1), float32."""
    wide = x.float()
    scale = (wide.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    return (wide * scale * weight).to(dtype), scale


@gpu_fusion.one_kernel_of_rows
def _norm_backward(x: Tensor, weight: Tensor, scale: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    normed, gradient = x.float() * scale, gradient.float()
    product = gradient * normed
    d_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype)
    slope = (product * weight).mean(dim=-1, keepdim=True)
    return ((gradient * weight - normed * slope) * scale).to(x.dtype), d_weight


def _is_plain_linear(linear: Any) -> bool:
    """Whether it is a float32 linear layer on a CPU, whole."""
    if type(linear) is not nn.Linear or linear.weight.dtype != torch.float32 or linear.weight.device.type != "cpu":
        return False
    return _is_plain(linear, linear.weight, linear.in_features * linear.out_features)


def _linear(linear: Any, x: Tensor) -> Tensor:
    if x.dtype == _autocast_dtype(x) == torch.float32:
        return _Linear.apply(x, linear.weight, linear.bias)
    return F.linear(x, linear.weight, linear.bias)


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, with both products of the weight by oneDNN.

    With g the incoming gradient:   d x = g @ weight,   d weight = g.T @ x,   d bias = sum g
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in), (out, in), (out,) -> (..., out), float32."""
        ctx.save_for_backward(x, weight)
        return onednn.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x, d_weight, d_bias = ctx.needs_input_grad
        rows = gradients[0].flatten(0, -2)
        return (
            onednn.linear(gradients[0], weight.t()) if d_x else None,
            rows.t() @ x.flatten(0, -2) if d_weight else None,
            rows.sum(dim=0) if d_bias else None,
        )


def _is_plain_gated_mlp(mlp: Any) -> bool:
    """Whether it is down(silu(gate(x)) * up(x)) with a linear layer `down` without a bias, whole."""
    down: Any = getattr(mlp, "down_proj", None)
    linear = type(down) is nn.Linear and down.bias is None and mlp.config.hidden_act == "silu"
    return linear and _is_plain(mlp, down.weight, down.in_features * down.out_features)


def _gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    return _GatedDown.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj.weight)


class _GatedDown(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T. Backward multiplies `gate` and `up` again: autograd would keep twice as much."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """(..., inner), (..., inner), (size, inner) -> (..., size) in the type of `gate`."""
        ctx.save_for_backward(gate, up, weight)
        if gpu_fusion.is_wanted(gate):
            return F.linear(_gated(gate, up), weight.to(gate.dtype))
        return onednn.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        if gpu_fusion.is_wanted(gate):
            d_gate, d_up, product = _gated_backward(gradients[0] @ weight.to(gate.dtype), gate, up)
            d_weight = None
            if ctx.needs_input_grad[2]:
                d_weight = (gradients[0].flatten(0, -2).t() @ product.flatten(0, -2)).to(weight.dtype)
            return d_gate, d_up, d_weight
        d_product, active = onednn.linear(gradients[0], weight.to(gate.dtype).t()), F.silu(gate)
        d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
        d_weight = None
        if ctx.needs_input_grad[2]:
            product = (active * up).flatten(0, -2)
            d_weight = (gradients[0].flatten(0, -2).t() @ product).to(weight.dtype)
        return d_gate, d_product.mul_(active), d_weight


@gpu_fusion.one_kernel_of_rows
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@gpu_fusion.one_kernel_of_rows
def _gated_backward(d_product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate` and `up`, and their product again, of which the weight's gradient is made."""
    active = F.silu(gate)
    return torch.ops.aten.silu_backward(d_product * up, gate), d_product * active, active * up
