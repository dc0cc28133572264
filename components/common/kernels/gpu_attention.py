"""Attention over packed pairs on a GPU: FlexAttention under a block mask, or FlashAttention over gathered keys.

Both compute the same. FlexAttention takes any type, needs a compiler (once for a model, not once for a length) and copies
nothing. FlashAttention takes 16 bits only and copies keys and values, those of a prefix twice; its kernels are faster.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from components.common.kernels.pair_spans import BLOCK, Segments, Sight, ordered, seen_blocks

Kernel = Literal["flex", "varlen"]
Varlen = Callable[..., Tensor]


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device; the copy to a GPU does not wait for what the GPU does."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# ---- FlexAttention ----------------------------------------------------------------------------------------------------


def block_mask(seen: Sight, device: torch.device) -> BlockMask:
    """The block mask of what tokens see, made from the ends of runs: `create_block_mask` would make tokens x tokens.

    The question whether q sees k is always the same function of tensors, so that no new length and no window compiles anew.
    """
    low, gap_start, gap_end = (on_device(array, device) for array in seen)

    def visible(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= low[q]) & ((k < gap_start[q]) | (k >= gap_end[q]))

    partial, full = seen_blocks(seen)
    # By query and by key, the second for backward; (1, 1, blocks) and (1, 1, blocks, blocks).
    lists = [part[None, None] for mask in (partial, full, partial.T, full.T) for part in ordered(mask)]
    kv, kv_indices, full_kv, full_kv_indices, q, q_indices, full_q, full_q_indices = (
        on_device(part, device) for part in lists
    )
    return BlockMask(
        seq_lengths=(len(seen.low), len(seen.low)),
        kv_num_blocks=kv,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q,
        q_indices=q_indices,
        full_q_num_blocks=full_q,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float) -> Tensor:
    """FlexAttention, compiled. (1, heads, tokens, size), (1, key-value heads, tokens, size) twice -> as `query`."""
    for tensor in (query, key, value):
        # Dimensions that are equal by chance in the first call would else be taken to be equal ever after.
        torch._dynamo.mark_static(tensor, 1)
        torch._dynamo.mark_static(tensor, 3)
    return _compiled_flex_attention()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


# ---- FlashAttention ---------------------------------------------------------------------------------------------------


class PlacedSegments:
    """`Segments` on a device: its arrays as tensors, made once for all layers."""

    def __init__(self, of: Segments, device: torch.device) -> None:
        self.keys = on_device(of.keys, device)
        self.places = on_device(of.places, device)
        self.twice = on_device(of.twice, device)
        self.second_places = on_device(of.second_places, device)
        self.query_ends = on_device(of.query_ends, device)
        self.key_ends = on_device(of.key_ends, device)
        self.longest_queries = of.longest_queries
        self.longest_keys = of.longest_keys


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: PlacedSegments,
    scaling: float,
    window: int | None,
    varlen: Varlen | None = None,
) -> Tensor:
    """FlashAttention over sequences of unlike lengths.

    Args:
        query, key, value: (1, heads or key-value heads, tokens, size), 16 bits.
        window: most tokens of its own sequence that a token sees; None for all.
        varlen: takes query, key, value, as (tokens, heads, size), then `query_ends`, `key_ends`, `longest_queries`,
            `longest_keys`, scale and window, and is causal; default: FlashAttention as it is installed here.

    Returns:
        (1, heads, tokens, size).
    """
    varlen = varlen or installed_varlen()
    if varlen is None:
        raise RuntimeError("FlashAttention over sequences of unlike lengths: neither in this torch nor in flash-attn")
    rows = query[0].transpose(0, 1)  # (tokens, heads, size)
    keys, values = (_Gathered.apply(tensor[0].transpose(0, 1), segments) for tensor in (key, value))
    mixed = varlen(
        rows,
        keys,
        values,
        segments.query_ends,
        segments.key_ends,
        segments.longest_queries,
        segments.longest_keys,
        scaling,
        window,
    )
    return mixed.transpose(0, 1).unsqueeze(0)


class _Gathered(torch.autograd.Function):
    """Keys or values in the order of the sequences. Backward adds the two gradients of a prefix without atomics, so that it
    gives the same in every run, and adds in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, segments: PlacedSegments) -> Tensor:
        """(tokens, heads, size) -> (gathered, heads, size)."""
        ctx.segments = segments
        return rows.index_select(0, segments.keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        segments, gathered = ctx.segments, gradients[0]
        total = gathered.index_select(0, segments.places)
        first = total.index_select(0, segments.twice).float()
        second = gathered.index_select(0, segments.second_places)
        return total.index_copy_(0, segments.twice, (first + second).to(total.dtype)), None


@functools.cache
def installed_varlen() -> Varlen | None:
    """FlashAttention from the package flash-attn, else as torch has it, else None."""
    return _from_flash_attn() or _from_torch()


def _from_flash_attn() -> Varlen | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):  # not there, or built for another torch
        return None

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_queries: int,
        longest_keys: int,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        left = -1 if window is None else window - 1
        ends = query_ends, key_ends, longest_queries, longest_keys
        return flash_attn_varlen_func(
            query, key, value, *ends, softmax_scale=scaling, causal=True, window_size=(left, -1 if left < 0 else 0)
        )

    return varlen


def _from_torch() -> Varlen | None:
    try:
        from torch.nn.attention import varlen as of_torch
    except ImportError:
        return None
    varlen_attn: Any = of_torch.varlen_attn  # its arguments differ from version to version
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None  # of before torch 2.11
    grouped = (
        {"enable_gqa": True} if "enable_gqa" in parameters else {}
    )  # 2.11 has no such question: it takes fewer heads

    def varlen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_queries: int,
        longest_keys: int,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        left = -1 if window is None else window - 1
        ends = query_ends, key_ends, longest_queries, longest_keys
        return varlen_attn(query, key, value, *ends, scale=scaling, window_size=(left, 0), **grouped)

    return varlen
