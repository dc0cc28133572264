"""Attention over packed pairs: which tokens see which, and the arithmetic on CPUs and on CUDA.

A packed pair lies in its row as [ prefix | chosen | rejected ]. The prefix sees itself, each branch the prefix and itself,
all causally; no branch sees the other and no pair another.

On CUDA one kernel does that for all pairs (`gpu_attention.py`). Elsewhere blocks of queries are multiplied with the keys they
see and no others, and backward makes the probabilities again: nothing as large as queries times keys is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from components.common.kernels import gpu_attention
from components.common.kernels.pair_spans import Span, segments, sight

SHARED_PREFIX = "sapo_shared_prefix"
QUERIES = 128  # most queries of a block; fewer if they had more scores than
SCORES = 2**20
# What attends on a GPU in 16 bits, where it is installed: on an H100 `varlen` takes 0.56 to 0.7 of the time of `flex`, which is
# what float32 always takes.
ON_GPU: gpu_attention.Kernel = "varlen"


@dataclass(frozen=True)
class Block:
    """Queries [low, high) of a row, and the ranges of keys up to them that they see."""

    low: int
    high: int
    keys: tuple[tuple[int, int], ...]


class PairLayout:
    """Which tokens of packed pairs see which, as the attention of every layer needs it.

    Args:
        spans: where each pair lies.
    """

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self._block_masks: dict[int | None, BlockMask] = {}
        self._segments: gpu_attention.PlacedSegments | None = None
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """For FlexAttention; made once per sliding window, not once per layer."""
        if window not in self._block_masks:
            self._block_masks[window] = gpu_attention.block_mask(sight(self.spans, window), device)
        return self._block_masks[window]

    def segments(self, device: torch.device) -> gpu_attention.PlacedSegments:
        """For FlashAttention; made once."""
        if self._segments is None:
            self._segments = gpu_attention.PlacedSegments(segments(self.spans), device)
        return self._segments

    def blocks(self, heads: int) -> Iterator[Block]:
        """All queries, so few at once that their scores stay in the processor's cache."""
        for span in self.spans:
            prefix = span.start, span.start + span.prefix
            yield from _blocks(*prefix, (), heads)
            yield from _blocks(prefix[1], prefix[1] + span.chosen, (prefix,), heads)
            yield from _blocks(prefix[1] + span.chosen, prefix[1] + span.chosen + span.rejected, (prefix,), heads)

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """What the last `queries` of `keys` tokens in a row see: 0, or -inf to add, (queries, keys), float32."""
        if (queries, keys, window) not in self._masks:
            positions = torch.arange(keys, device=device)
            distance = positions[keys - queries :].unsqueeze(1) - positions
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(queries, keys, device=device).masked_fill_(hidden, -torch.inf)
            self._masks[queries, keys, window] = mask
        return self._masks[queries, keys, window]


def _blocks(start: int, end: int, before: tuple[tuple[int, int], ...], heads: int) -> Iterator[Block]:
    """Of one prefix or branch, which also sees all of the ranges `before`."""
    longest = end - start + sum(high - low for low, high in before)
    size = min(QUERIES, max(16, SCORES // (heads * max(longest, 1))))
    for low in range(start, end, size):
        high = min(low + size, end)
        yield Block(low, high, (*before, (start, high)))


def attend_pairs(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    pair_layout: PairLayout,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed pairs, as transformers' attention interface wants it.

    Args:
        query: (1, heads, tokens, size); key and value: (1, key-value heads, tokens, size).

    Returns:
        (1, tokens, heads, size), in the type of autocast if that is on, else in that of `value`.
    """
    kind = query.device.type
    # Under autocast, rotary embeddings make query and key float32 again.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if kind == "cuda":
        mixed = _attend_on_gpu(query, key, value, scaling, pair_layout, sliding_window)
        return mixed.transpose(1, 2), None
    with torch.autocast(kind, enabled=False):  # scores are float32 on purpose
        mixed = _BlockAttention.apply(query[0], key[0], value[0], pair_layout, scaling, sliding_window)
    return mixed.unsqueeze(0), None


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PairLayout, window: int | None
) -> Tensor:
    if ON_GPU == "varlen" and query.dtype.itemsize == 2 and gpu_attention.installed_varlen() is not None:
        return gpu_attention.attend_varlen(query, key, value, layout.segments(query.device), scaling, window)
    return gpu_attention.attend_flex(query, key, value, layout.block_mask(window, query.device), scaling)


class _BlockAttention(torch.autograd.Function):
    """softmax(scaling * query @ key.T) @ value over the blocks of a layout.

    Query heads that share a key-value head are multiplied with it as further rows of one matrix. Scores and probabilities are
    float32, everything else has the type of the inputs. With P the probabilities and dO the incoming gradient:
        dV = P.T @ dO,   dP = dO @ V.T,   dS = P * (dP - rowsum(P * dP)),   dQ = scaling * dS @ K,   dK = scaling * dS.T @ Q
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PairLayout,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """(heads, tokens, size), (key-value heads, tokens, size) twice -> (tokens, heads, size)."""
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scaling, ctx.window = layout, scaling, window
        heads, tokens, size = query.shape
        result = query.new_empty(tokens, heads, size)
        for block in layout.blocks(heads):
            rows = _rows(query, len(key), block)
            probabilities = _probabilities(rows, _seen(key, block), block, layout, scaling, window)
            mixed = torch.bmm(probabilities.to(value.dtype), _seen(value, block))
            result[block.low : block.high] = mixed.view(heads, -1, size).transpose(0, 1)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        d_result = gradients[0].transpose(0, 1)  # (heads, tokens, size)
        for block in ctx.layout.blocks(len(query)):
            rows, keys, values = _rows(query, len(key), block), _seen(key, block), _seen(value, block)
            d_rows = _rows(d_result, len(key), block)
            probabilities = _probabilities(rows, keys, block, ctx.layout, ctx.scaling, ctx.window)
            _add_seen(d_value, torch.bmm(probabilities.to(value.dtype).transpose(1, 2), d_rows), block)
            d_probabilities = torch.bmm(d_rows, values.transpose(1, 2)).float()
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, torch.float32)
            d_scores = d_scores.mul_(ctx.scaling).to(query.dtype)
            d_query[:, block.low : block.high] = torch.bmm(d_scores, keys).view(len(query), -1, query.shape[2])
            _add_seen(d_key, torch.bmm(d_scores.transpose(1, 2), rows), block)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _rows(heads: Tensor, key_heads: int, block: Block) -> Tensor:
    """A block's rows of all query heads that share a key-value head, one after the other: (key-value heads, rows, size)."""
    return heads[:, block.low : block.high].reshape(key_heads, -1, heads.shape[2])


def _seen(heads: Tensor, block: Block) -> Tensor:
    """Keys or values that a block sees, (key-value heads, keys, size)."""
    parts = [heads[:, low:high] for low, high in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_seen(total: Tensor, gradient: Tensor, block: Block) -> None:
    """Adds the gradient of what `_seen` returned."""
    sizes = [high - low for low, high in block.keys]
    for (low, high), part in zip(block.keys, gradient.split(sizes, dim=1), strict=True):
        total[:, low:high] += part


def _probabilities(
    rows: Tensor, keys: Tensor, block: Block, layout: PairLayout, scaling: float, window: int | None
) -> Tensor:
    """Softmax over the keys that each row of a block sees, (key-value heads, rows, keys), float32."""
    scores = torch.bmm(rows.float() * scaling, keys.float().transpose(1, 2))
    queries, seen = block.high - block.low, keys.shape[1]
    # Without a window every query of the block sees all keys before the block.
    masked = queries if window is None or window >= seen else seen
    scores.unflatten(1, (-1, queries))[..., seen - masked :] += layout.mask(queries, masked, window, rows.device)
    return scores.softmax(dim=-1)


AttentionInterface.register(SHARED_PREFIX, attend_pairs)
