"""One pair, from the replay buffer's draw to the loss."""

import dataclasses
from dataclasses import dataclass

import torch

from components.common.kernels.pair_packing import PairBatch, PairIds
from components.common.models.chat_templates import EncodedRow
from components.sapo.config import SAPOConfig
from components.sapo.replay_buffer import Entry
from components.sapo.segments import Segment, splice


@dataclass(frozen=True)
class Pair(PairIds):
    """A row's chosen response y+ = A B C beside the rejected one, y- = A B' C, as token ids.

    Attributes:
        row_id: `id` of the row.
        entry_id: of the buffer's entry that it was drawn as.
        b: B in `chosen`.
        b_prime: B' in `rejected`.
        c_kept: whether C follows B'.
        step: optimizer steps done when B' was generated.
        version: EMA updates done when B' was generated.
    """

    row_id: str
    entry_id: int
    b: Segment
    b_prime: Segment
    c_kept: bool
    step: int
    version: int


def make_pair(row: EncodedRow, entry_id: int, entry: Entry, config: SAPOConfig, stop_ids: frozenset[int]) -> Pair:
    """The pair of a row and an entry of the buffer: B' spliced into the row's response (Eq. 5)."""
    window = config.max_length - len(row["prompt_ids"])
    replacement: list[int] = entry.replacement.tolist()
    rejected = splice(row["chosen_ids"], entry.segment, replacement, stop_ids, window, config.on_eos)

    return Pair(
        prompt=row["prompt_ids"],
        chosen=row["chosen_ids"],
        rejected=rejected.ids,
        row_id=row["id"],
        entry_id=entry_id,
        b=entry.segment,
        b_prime=Segment(rejected.start, rejected.end),
        c_kept=rejected.c_kept,
        step=entry.step,
        version=entry.version,
    )


@dataclass(frozen=True)
class MicroBatch:
    """What one process trains on together.

    Attributes:
        pairs: this process's.
        batch: they as tensors; rows of results are all chosen responses, then all rejected ones.
        ids_by_process: entries that each process trains on meanwhile.
    """

    pairs: list[Pair]
    batch: PairBatch
    ids_by_process: list[list[int]]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with its tensors on a device."""
        return dataclasses.replace(self, batch=self.batch.to(device))
