"""The reference's log-probs of the buffer's pairs, computed once per (entry, version of the reference)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class ReferenceCache:
    """Values by entry id, in as many slots as the replay buffer has; an evicted entry's slot goes to the one that evicts it.

    Args:
        capacity: that of the replay buffer.

    Attributes:
        version: refreshes of the reference so far; what was stored before the last one is not found again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.version = 0
        self._entries = np.full(capacity, -1, dtype=np.int64)
        self._versions = np.full(capacity, -1, dtype=np.int64)
        self._logps = np.zeros((capacity, 2), dtype=np.float32)

    def missing(self, entry_ids: Sequence[int]) -> list[int]:
        """Those of the ids that have no values of the current version, each once, in order."""
        slots = np.asarray(entry_ids) % self.capacity
        known = (self._entries[slots] == entry_ids) & (self._versions[slots] == self.version)
        return list(
            dict.fromkeys(entry_id for entry_id, is_known in zip(entry_ids, known, strict=True) if not is_known)
        )

    def store(self, entry_ids: Sequence[int], logps: Tensor) -> None:
        """Keeps the log-probs of both responses, (2, entries)."""
        slots = np.asarray(entry_ids) % self.capacity
        self._entries[slots], self._versions[slots] = entry_ids, self.version
        self._logps[slots] = logps.float().cpu().numpy().T

    def get(self, entry_ids: Sequence[int]) -> Tensor:
        """The log-probs of both responses, (2, entries), float32; raises KeyError for one that is missing."""
        if absent := self.missing(entry_ids):
            raise KeyError(absent[0])
        return torch.from_numpy(self._logps[np.asarray(entry_ids) % self.capacity].T.copy())

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "entries": self._entries,
            "versions": self._versions,
            "logps": self._logps,
        }
        return arrays | {"version": np.array([self.version])}

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Restores `state_dict`."""
        self._entries[:], self._versions[:], self._logps[:] = (state[n] for n in ("entries", "versions", "logps"))
        self.version = int(state["version"][0])
