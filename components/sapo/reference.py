"""The reference's log-probs of the buffer's pairs, computed once per (entry, version of the reference)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.common.training.distributed.processes import gather
from components.sapo.pairs import MicroBatch
from components.sapo.scoring import PairScorer


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


class ReferenceLogps:
    """Scores pairs with the reference, each once between two refreshes.

    Args:
        capacity: that of the replay buffer.
        scorer: runs a model on pairs.
        model: opens the reference: gives what to call for its forward pass, and the model within.
        rank: index of this process.
    """

    def __init__(
        self,
        capacity: int,
        scorer: PairScorer,
        model: Callable[[], AbstractContextManager[tuple[nn.Module, nn.Module]]],
        rank: int,
    ) -> None:
        self.cache = ReferenceCache(capacity)
        self.scorer = scorer
        self.model = model
        self.rank = rank

    @torch.no_grad()
    def logps(self, micro_batch: MicroBatch) -> tuple[Tensor, float]:
        """The sums of both responses, (2, pairs) on the CPU, and the share of the pairs that had been scored before."""
        ids = micro_batch.ids_by_process[self.rank]
        missing = self.cache.missing(ids)

        if any(self.cache.missing(of_one) for of_one in micro_batch.ids_by_process):
            self._score(micro_batch, missing)

        return self.cache.get(ids), 1 - len(missing) / len(ids)

    def _score(self, micro_batch: MicroBatch, missing: list[int]) -> None:
        """Scores what is missing here; what one process scores, all of them know."""
        by_id = {pair.entry_id: pair for pair in micro_batch.pairs}
        # Sharded processes go forward together, even the one that has nothing to score.
        scored = missing or [micro_batch.pairs[0].entry_id]

        with self.model() as (wrapped, policy):
            sums = self.scorer.response_sums(wrapped, policy, [by_id[entry_id] for entry_id in scored])

        for entry_ids, values in gather([(scored, sums.float().cpu())]):
            self.cache.store(entry_ids, values)

    def forget(self) -> None:
        """The reference was refreshed: what was stored before is not found again."""
        self.cache.version += 1

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """The same in every process."""
        return self.cache.state_dict()

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Restores `state_dict`."""
        self.cache.load_state_dict(state)
