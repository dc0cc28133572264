"""The sampling stage of Algorithm 1 (lines 6 to 11): which rows a step takes, where they are cut, and what B' becomes."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.common.generation.engines import EngineSettings, start_engine
from components.common.generation.protocol import Sampler, SamplingSettings, request_seed
from components.common.models.chat_templates import EncodedRow
from components.common.training.clock import Clock
from components.common.training.distributed.processes import gather
from components.sapo.config import SAPOConfig
from components.sapo.replay_buffer import Entry, pack, unpack
from components.sapo.schedule import Overlap, Schedule, Sync
from components.sapo.segments import choose_segment

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


class SamplingStage:
    """Gives each step its fresh entries, and held-out rows theirs.

    Args:
        rows: the training set.
        sampler: the engine.
        args: settings.
        rank_slice: this process's.
        clock: of the run.
        serving: the sampler runs within it; what puts the weights in place that an engine without any of its own samples with.

    Attributes:
        sampler: the engine.
        order: which rows each step takes.
        total_steps: optimizer steps of the run.
        schedule: when the sampler works.
    """

    def __init__(
        self,
        rows: Rows[EncodedRow],
        sampler: Sampler,
        args: SAPOConfig,
        rank_slice: RankSlice,
        clock: Clock,
        serving: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.rows = rows
        self.sampler = sampler
        self.args = args
        self.rank_slice = rank_slice
        self.clock = clock
        self.serving = serving

        self.order = RowOrder(len(rows), pairs_per_step(args), args.seed)
        self.total_steps = args.max_steps
        if args.max_steps <= 0:
            self.total_steps = math.ceil(args.num_train_epochs * self.order.steps_per_epoch)
        self.schedule = self._schedule()

    def _schedule(self) -> Schedule:
        if self.args.schedule == "sync":
            return Sync(self.generate, self.clock)

        return Overlap(self.generate, self.clock, self.total_steps - 1, self.args.sampler_timeout)

    def entries(self, step: int) -> list[Entry]:
        """This process's share of the fresh entries of a step."""
        return self.schedule.entries(step)

    def generate(self, step: int, steps_done: int) -> list[Entry]:
        """Entries from the rows of a step; reads nothing that changes while a step runs."""
        random = generator(self.args.seed, SAMPLING, step)
        chosen = self.order.at(step)
        epoch = self.order.epoch_of(step)

        return self._sample(self.rows, chosen, random, steps_done, epoch)

    def held_out(self, rows: Rows[EncodedRow]) -> list[Entry]:
        """Entries from every held-out row, by the weights that are served now; the same in all processes."""
        random = generator(self.args.seed, HELD_OUT, 0)
        mine = self._sample(rows, list(range(len(rows))), random, step=0, epoch=0)

        return gather(mine)

    def _sample(
        self, rows: Rows[EncodedRow], chosen: list[int], random: np.random.Generator, step: int, epoch: int
    ) -> list[Entry]:
        with self.serving():
            return sample_entries(rows, chosen, self.sampler, self.args, random, step, epoch, self.rank_slice)

    def settle(self) -> None:
        """Waits until nothing is sampled; raises what the sampler raised."""
        self.schedule.settle()

    def state_dict(self) -> dict[str, Any]:
        """Entries that are ready for the next step, of all processes; the same in each."""
        if self.schedule.ahead is None:
            return {}

        return pack(gather(self.schedule.ahead))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, in any number of processes."""
        if not state:
            return

        ahead = unpack(state)
        self.schedule.ahead = [ahead[i] for i in self.rank_slice.of(len(ahead))]


def pairs_per_step(args: SAPOConfig) -> int:
    """As many fresh rows as pairs are trained on by all processes: N of Algorithm 1."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def open_sampler(
    args: SAPOConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    served: nn.Module | None,
    stop_ids: frozenset[int],
) -> Sampler:
    """The engine that `args.sampler` names.

    Args:
        policy: an engine with weights of its own reads them from the directory that it came from.
        served: the model that an engine without any of its own runs.
        stop_ids: tokens that end a turn.
    """
    drawing = SamplingSettings(args.temperature, args.top_k, args.top_p, stop_ids)
    settings = EngineSettings(
        name=args.sampler,
        dtype=args.engine_dtype(),
        max_length=args.max_length,
        batch_size=args.sampler_batch_size,
        use_cpu=args.use_cpu,
        gpu_memory_utilization=args.gpu_memory_utilization,
        sleep_level=args.sleep_level,
        timeout=args.sampler_timeout,
    )

    return start_engine(str(policy.name_or_path), tokenizer, settings, drawing, cast("PreTrainedModel | None", served))
