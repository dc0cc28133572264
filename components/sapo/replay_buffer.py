"""The replay buffer (paper section 3): first in, first out; an entry is drawn with weight 1 / (count + 1).

`count` is how often the entry has been drawn. An entry holds what y- needs beyond the data set: the row, the cut points
and B' (design: a million entries fit in memory). Weights live in a sum tree, so a draw of k entries costs O(k log n) in
vectorised numpy, whatever the capacity. Entries are known by an integer id that never repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from components.sapo.segments import Segment


@dataclass(frozen=True, slots=True)
class Entry:
    """One generated B'.

    Attributes:
        row: index of the row in the training set.
        segment: B in the row's response.
        replacement: B' as the sampler gave it, int32 token ids.
        step: optimizer steps done when it was generated.
        version: EMA updates done when it was generated.
    """

    row: int
    segment: Segment
    replacement: npt.NDArray[np.int32]
    step: int
    version: int


def pack(entries: list[Entry]) -> dict[str, npt.NDArray[Any]]:
    """Entries as flat arrays: one row of `columns` each, replacements joined, `offsets` saying where each begins."""
    columns = [[e.row, e.segment.start, e.segment.end, e.step, e.version] for e in entries]
    return {
        "columns": np.array(columns, dtype=np.int64).reshape(len(entries), 5),
        "offsets": np.cumsum([0, *(len(e.replacement) for e in entries)], dtype=np.int64),
        "replacements": np.concatenate([np.zeros(0, dtype=np.int32), *(e.replacement for e in entries)]),
    }


def unpack(packed: dict[str, npt.NDArray[Any]]) -> list[Entry]:
    """The inverse of `pack`."""
    offsets, replacements = packed["offsets"], packed["replacements"]
    return [
        Entry(int(row), Segment(int(start), int(end)), replacements[low:high].copy(), int(step), int(version))
        for (row, start, end, step, version), low, high in zip(
            packed["columns"], offsets[:-1], offsets[1:], strict=True
        )
    ]


class ReplayBuffer:
    """FIFO of entries with draws in inverse proportion to use.

    Args:
        capacity: most entries held; one more evicts the oldest.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"replay_buffer_size = {capacity}: must be at least 1")
        self.capacity = capacity
        self.added = 0  # entries ever added; the next id
        self._entries: list[Entry] = []
        self._counts = np.zeros(capacity, dtype=np.int64)
        self._leaves = 1 << (capacity - 1).bit_length()
        self._tree = np.zeros(2 * self._leaves)  # node i sums nodes 2i and 2i + 1; leaves start at _leaves

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def evicted(self) -> int:
        return self.added - len(self)

    def add(self, entries: Sequence[Entry]) -> list[int]:
        """Appends entries, evicting the oldest when full, and returns their ids."""
        ids = range(self.added, self.added + len(entries))
        for entry_id, entry in zip(ids, entries, strict=True):
            if entry_id < self.capacity:
                self._entries.append(entry)
            else:
                self._entries[entry_id % self.capacity] = entry
        slots = np.unique(np.arange(ids.start, ids.stop) % self.capacity)
        self.added = ids.stop
        self._counts[slots] = 0
        if len(slots):
            self._update_weights(slots)
        return list(ids)

    def draw(self, size: int, generator: np.random.Generator) -> list[tuple[int, Entry]]:
        """Draws `size` entries with replacement and counts them as used once the draw is complete.

        Returns:
            pairs of (id, entry).

        Raises:
            ValueError: the buffer is empty.
        """
        if not self._entries:
            raise ValueError("the replay buffer is empty: sample before drawing")
        slots = self._find(generator.random(size) * self._tree[1])
        np.add.at(self._counts, slots, 1)
        self._update_weights(np.unique(slots))
        return [(self.id_of(int(slot)), self._entries[slot]) for slot in slots]

    def id_of(self, slot: int) -> int:
        """The id of the entry that a slot holds now: the newest one that is equal to the slot modulo the capacity."""
        return self.added - 1 - (self.added - 1 - slot) % self.capacity

    def count(self, entry_id: int) -> int:
        """How often an entry has been drawn; raises KeyError when it was evicted or never added."""
        if not self.evicted <= entry_id < self.added:
            raise KeyError(entry_id)
        return int(self._counts[entry_id % self.capacity])

    def counts(self) -> npt.NDArray[np.int64]:
        """Use counts of all entries held, in the order of their slots."""
        return self._counts[: len(self)].copy()

    def _update_weights(self, slots: npt.NDArray[np.int64]) -> None:
        """Recomputes the leaves of `slots` and every sum above them, so that no rounding error builds up."""
        nodes = slots + self._leaves
        self._tree[nodes] = 1.0 / (self._counts[slots] + 1)
        while nodes[0] > 1:
            nodes = np.unique(nodes >> 1)
            self._tree[nodes] = self._tree[2 * nodes] + self._tree[2 * nodes + 1]

    def _find(self, targets: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The slot in whose share of [0, total weight) each target falls, by descending the tree."""
        nodes = np.ones(len(targets), dtype=np.int64)
        while nodes[0] < self._leaves:
            left = self._tree[2 * nodes]
            # A target at a share's very edge must not enter an empty subtree because of rounding.
            go_right = (targets >= left) & (self._tree[2 * nodes + 1] > 0)
            targets = np.where(go_right, targets - left, targets)
            nodes = 2 * nodes + go_right
        return nodes - self._leaves

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as flat arrays, in the order of slots."""
        place = np.array([self.capacity, self.added], dtype=np.int64)
        return {**pack(self._entries), "counts": self.counts(), "place": place}

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Restores `state_dict`; raises ValueError when the capacity differs."""
        capacity, added = (int(value) for value in state["place"])
        if capacity != self.capacity:
            raise ValueError(f"replay_buffer_size is {self.capacity}, the saved buffer has {capacity}")
        self._entries = unpack(state)
        self.added = added
        self._counts[: len(self)] = state["counts"]
        if self._entries:
            self._update_weights(np.arange(len(self)))
