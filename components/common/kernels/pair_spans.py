"""Which tokens of packed pairs see which, as the kernels of a GPU want it; arithmetic on a few integers a token, no tensors.

A packed pair lies in its row as [ prefix | chosen | rejected ]. Prefix and chosen together are one causal run of tokens. A
rejected token sees such a run too, with a gap in it where the chosen tokens lie. So what any token sees is two numbers and
itself: from `low` on up to itself, but for [gap_start, gap_end). A sliding window moves both ends of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 128  # queries and keys of one block of FlexAttention

Integers = NDArray[np.int32]


@dataclass(frozen=True)
class Span:
    """Where a packed pair lies: its prefix [start, start + prefix), then `chosen`, then `rejected` tokens."""

    start: int
    prefix: int
    chosen: int
    rejected: int

    @property
    def branching(self) -> int:
        """Where the rejected tokens begin."""
        return self.start + self.prefix + self.chosen

    @property
    def end(self) -> int:
        return self.branching + self.rejected


class Sight(NamedTuple):
    """Token q sees the keys in [low[q], q] that are not in [gap_start[q], gap_end[q]); each (tokens,), int32.

    Where nothing is left out, the gap is empty and lies at `low`.
    """

    low: Integers
    gap_start: Integers
    gap_end: Integers


def sight(spans: list[Span], window: int | None) -> Sight:
    """What each token sees.

    Args:
        spans: one after the other, from token 0 on.
        window: most tokens of its own sequence that a token sees, itself included; None for all.
    """
    runs = [np.arange(span.start, span.end) for span in spans]
    token = np.concatenate(runs)

    def of_each(values: list[int]) -> NDArray[np.int64]:
        return np.repeat(values, [len(run) for run in runs])

    start = of_each([span.start for span in spans])
    prefix_end = of_each([span.start + span.prefix for span in spans])
    branching = of_each([span.branching for span in spans])
    is_rejected = token >= branching

    # The first token within the window. A rejected token's window counts the prefix, and not the chosen tokens between.
    reach = len(token) if window is None else window
    own_low = np.maximum(np.where(is_rejected, branching, start), token - reach + 1)
    prefix_low = np.maximum(start, token - (branching - prefix_end) - reach + 1)

    has_gap = is_rejected & (prefix_low < prefix_end)
    low = np.where(has_gap, prefix_low, own_low)
    has_gap &= own_low > prefix_end  # else the rejected tokens follow the prefix directly
    gap_start, gap_end = np.where(has_gap, prefix_end, low), np.where(has_gap, own_low, low)
    return Sight(*(array.astype(np.int32) for array in (low, gap_start, gap_end)))


class Blocks(NamedTuple):
    """How many blocks each row of blocks sees, (rows,), and which, the first ones of (rows, columns); int32."""

    counts: Integers
    indices: Integers


def seen_blocks(seen: Sight) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Blocks of keys that blocks of queries see in part, and those that they see whole; each (blocks, blocks).

    Nothing of the size tokens x tokens is made: each token adds 1 where its run of blocks begins and takes 1 where it ends.
    """
    tokens = len(seen.low)
    size = -(-tokens // BLOCK)
    rows = np.arange(tokens) // BLOCK
    ends = np.arange(1, tokens + 1)

    # The two runs of keys that a token sees: before its gap, and after it. Without a gap the first is empty.
    runs: list[tuple[NDArray[Any], NDArray[Any]]] = [(seen.low, seen.gap_start), (seen.gap_end, ends)]
    touched, covered = np.zeros((size, size), np.int64), np.zeros((size, size), np.int64)
    for first, end in runs:
        some = end > first
        touched += _blocks_between(rows[some], first[some] // BLOCK, -(-end[some] // BLOCK), size)
        whole_first, whole_end = -(-first[some] // BLOCK), end[some] // BLOCK
        some_whole = whole_end > whole_first
        covered += _blocks_between(rows[some][some_whole], whole_first[some_whole], whole_end[some_whole], size)

    full = covered == BLOCK  # by every query of a whole block
    return (touched > 0) & ~full, full


def _blocks_between(
    rows: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """How many of the runs [first, end) of each row include each column, (size, size)."""
    width = size + 1
    begins = np.bincount(rows * width + first, minlength=size * width)
    stops = np.bincount(rows * width + end, minlength=size * width)
    return (begins - stops).reshape(size, width).cumsum(axis=1)[:, :size]


def ordered(mask: NDArray[np.bool_]) -> Blocks:
    """The columns that are true in each row, in order; what follows them in a row of `indices` has no meaning."""
    counts = mask.sum(axis=1)
    indices = np.argsort(~mask, axis=1, kind="stable")
    return Blocks(counts.astype(np.int32), indices.astype(np.int32))


@dataclass(frozen=True)
class Segments:
    """Packed pairs as FlashAttention's sequences of unlike lengths, causal from the last query and key back.

    A pair makes two: the prefix with the chosen tokens, over itself; and the rejected tokens, over the prefix and themselves.
    Queries lie in the row as they are. Keys are gathered, as those of a prefix come twice.

    Attributes:
        keys: the row's token of each gathered key, (gathered,), int64.
        places: where each token of the row is gathered first, (tokens,), int64.
        twice, second_places: tokens that are gathered again, and where, (again,), int64.
        query_ends, key_ends: where sequences end, after a 0, (sequences + 1,), int32.
        longest_queries, longest_keys: tokens of the longest sequence.
    """

    keys: NDArray[np.int64]
    places: NDArray[np.int64]
    twice: NDArray[np.int64]
    second_places: NDArray[np.int64]
    query_ends: Integers
    key_ends: Integers
    longest_queries: int
    longest_keys: int


def segments(spans: list[Span]) -> Segments:
    """The sequences of packed pairs."""
    keys: list[NDArray[np.int64]] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    twice: list[NDArray[np.int64]] = []
    for span in spans:
        keys.append(np.arange(span.start, span.branching))
        query_lengths.append(span.prefix + span.chosen)
        key_lengths.append(span.prefix + span.chosen)
        if span.rejected:
            prefix = np.arange(span.start, span.start + span.prefix)
            keys += [prefix, np.arange(span.branching, span.end)]
            twice.append(prefix)
            query_lengths.append(span.rejected)
            key_lengths.append(span.prefix + span.rejected)

    gathered = np.concatenate(keys)
    again = np.concatenate(twice) if twice else np.empty(0, np.int64)
    # Stable, so the first of equal tokens is the one that is gathered first.
    order = np.argsort(gathered, kind="stable")
    is_first = np.diff(gathered[order], prepend=-1) > 0
    return Segments(
        keys=gathered,
        places=order[is_first],
        twice=again,
        second_places=order[~is_first],
        query_ends=np.cumsum([0, *query_lengths], dtype=np.int32),
        key_ends=np.cumsum([0, *key_lengths], dtype=np.int32),
        longest_queries=max(query_lengths),
        longest_keys=max(key_lengths),
    )
