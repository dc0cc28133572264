"""The sampling stage of Algorithm 1 (lines 6 to 11): which rows a step takes, where they are cut, and what B' becomes."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from components.common.generation.protocol import Sampler, request_seed
from components.common.models.chat_templates import EncodedRow
from components.sapo.config import SAPOConfig
from components.sapo.replay_buffer import Entry
from components.sapo.segments import Rejected, choose_segment, splice

# Independent random streams of one run. A generator is made for each (seed, stream, step), so that nothing random has to
# be saved: a resumed run draws what an uninterrupted one would.
ROW_ORDER, SAMPLING, DRAWS, HELD_OUT = range(4)


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """The random generator of one stream at one step."""
    return np.random.default_rng((seed, stream, step))


@dataclass(frozen=True)
class RankSlice:
    """One of `count` processes, the `index`-th, and what it does of a list that they do together."""

    index: int
    count: int

    def of(self, length: int) -> range:
        """Positions in a list: consecutive ones, so that the shares of all processes, joined in order, are the list."""
        return range(length * self.index // self.count, length * (self.index + 1) // self.count)


class RowOrder:
    """Which rows each step takes: a fresh permutation every epoch, in slices of `rows_per_step`.

    Args:
        rows: size of the training set.
        rows_per_step: fresh rows of an optimizer step; the last step of an epoch may have fewer.
        seed: the run's seed.
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int) -> None:
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.steps_per_epoch = -(-rows // rows_per_step)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def at(self, step: int) -> list[int]:
        """Row indices of optimizer step `step`, counted from 0 over the whole run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        permutation = generator(self.seed, ROW_ORDER, epoch).permutation(self.rows)
        low = step_in_epoch * self.rows_per_step
        return [int(row) for row in permutation[low : low + self.rows_per_step]]


def sample_entries(
    rows: Rows[EncodedRow],
    chosen: list[int],
    sampler: Sampler,
    config: SAPOConfig,
    random: np.random.Generator,
    step: int,
    epoch: int,
    rank_slice: RankSlice = RankSlice(0, 1),
) -> list[Entry]:
    """Cuts the chosen rows, regenerates B from (x, A), and returns one entry for each row and response.

    With several processes each one cuts all the rows, as one process would, and regenerates its share of them.

    Args:
        rows: the training set.
        chosen: indices of the rows of this step.
        sampler: engine with the EMA's weights (the policy's, on-policy).
        random: where B starts.
        step: optimizer steps done so far, recorded in the entries.
        epoch: passes over the rows done so far; with the run's seed and the row it seeds what is sampled.
        rank_slice: this process's.
    """
    indices = [row for row in chosen for _ in range(config.responses_per_prompt)]
    segment_length = None if config.no_segment else config.segment_length
    segments = [
        choose_segment(len(rows[row]["chosen_ids"]), segment_length, random, config.segment_start) for row in indices
    ]
    prompts, limits, seeds = [], [], []
    mine = rank_slice.of(len(indices))
    for i, row, segment in zip(mine, indices[mine.start : mine.stop], segments[mine.start : mine.stop], strict=True):
        prompts.append(rows[row]["prompt_ids"] + rows[row]["chosen_ids"][: segment.start])
        limits.append(min(config.max_new_tokens, config.max_length - len(prompts[-1])))
        seeds.append(request_seed(config.seed, rows[row]["id"], epoch, i % config.responses_per_prompt))
    replacements = sampler.generate(prompts, limits, seeds)
    return [
        Entry(indices[i], segments[i], np.array(replacement, dtype=np.int32), step, sampler.version)
        for i, replacement in zip(mine, replacements, strict=True)
    ]


def rejected_response(row: EncodedRow, entry: Entry, config: SAPOConfig, stop_ids: frozenset[int]) -> Rejected:
    """y- of an entry: B' spliced into the row's response."""
    window = config.max_length - len(row["prompt_ids"])
    replacement: list[int] = entry.replacement.tolist()
    return splice(row["chosen_ids"], entry.segment, replacement, stop_ids, window, config.on_eos)
