"""What a run measures between two log entries."""

import resource
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.common.models.chat_templates import EncodedRow
from components.common.training.clock import Clock
from components.common.training.distributed.processes import gather, is_main_process
from components.sapo.losses import PairLoss
from components.sapo.pairs import MicroBatch, Pair
from components.sapo.replay_buffer import Entry, ReplayBuffer


class TrainingMetrics:
    """Values of this process since the last log entry; an entry has their means over all processes.

    Args:
        clock: of the run.
        stop_ids: tokens that end a turn.
    """

    def __init__(self, clock: Clock, stop_ids: frozenset[int]) -> None:
        self.clock = clock
        self.stop_ids = stop_ids

        # Tensors stay on their device until an entry is logged: to read one at once would make a GPU wait.
        self._values: defaultdict[str, list[float | Tensor]] = defaultdict(list)
        self._step_logged = 0

    def begin(self, step: int) -> None:
        """The run begins, or goes on, after `step` optimizer steps."""
        self._step_logged = step
        self.clock.lap()

    def record(self, name: str, value: float) -> None:
        """Adds a value to the mean that the next entry has of it."""
        self._values[name].append(value)

    def record_sampling(self, entries: Sequence[Entry], rows: Sequence[EncodedRow]) -> None:
        """What this process's sampler wrote for a step."""
        for entry in entries:
            b = rows[entry.row]["chosen_ids"][entry.segment.start : entry.segment.end]
            b_prime: list[int] = entry.replacement.tolist()

            self.record("sampling/b_prime_length", len(b_prime))
            self.record("sampling/identical", float(b == b_prime))
            self.record("sampling/ended", float(not self.stop_ids.isdisjoint(b_prime)))
            self.clock.add("tokens/generated", len(b_prime))

    def record_draw(self, pairs: Sequence[Pair], step: int, version: int) -> None:
        """How old the drawn pairs are, in optimizer steps and in EMA updates."""
        for pair in pairs:
            self.record("buffer/age_steps", step - pair.step)
            self.record("buffer/age_versions", version - pair.version)

    def record_training(self, loss: PairLoss, token_logps: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """What the policy makes of a micro-batch.

        Args:
            token_logps: (2 * pairs, longest response), detached.

        Returns:
            the policy's sums over B and over B', (pairs,) each.
        """
        margins = loss.chosen_rewards - loss.rejected_rewards
        chosen, rejected = token_logps.sum(dim=1).chunk(2)
        of_chosen, of_rejected = token_logps.chunk(2)
        b = _sums(of_chosen, [(pair.b.start, pair.b.end) for pair in micro_batch.pairs])
        b_prime = _sums(of_rejected, [(pair.b_prime.start, pair.b_prime.end) for pair in micro_batch.pairs])

        values = {
            "rewards/chosen": loss.chosen_rewards,
            "rewards/rejected": loss.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/b": b,
            "logps/b_prime": b_prime,
            "tokens/pair": micro_batch.batch.tokens,
        }
        for name, of_pairs in values.items():
            self._values[name].append(of_pairs)

        self.clock.add("tokens/trained", micro_batch.batch.real_tokens())
        return b, b_prime

    def entry(self, step: int, buffer: ReplayBuffer) -> dict[str, float]:
        """A log entry after `step` optimizer steps; every process must call this."""
        values = self._of_all_processes()
        means = {name: float(np.mean(some)) for name, some in values.items() if some}

        return means | self._speed(values, step) | _buffer_use(buffer)

    def clear(self, step: int) -> None:
        """The entry of `step` is logged."""
        self._values.clear()
        self._step_logged = step

    def _of_all_processes(self) -> dict[str, list[float]]:
        """Values of every process since the last entry."""
        mine = {name: _numbers(values) for name, values in self._values.items()}

        merged: defaultdict[str, list[float]] = defaultdict(list)
        for of_one in gather([mine]):
            for name, values in of_one.items():
                merged[name] += values
        return dict(merged)

    def _speed(self, values: dict[str, list[float]], step: int) -> dict[str, float]:
        """Seconds of each part of a step, pairs and tokens per second, and the most memory so far, since the last entry."""
        steps = max(step - self._step_logged, 1)
        seconds = self.clock.lap()
        # The sampler may work while the learner does: its time is told apart.
        sampled = seconds.pop("seconds/generate", 0.0)
        total = max(sum(seconds.values()), 1e-9)

        speed = {name: part / steps for name, part in seconds.items()}
        speed["seconds/sample"] = sampled / steps
        speed["pairs_per_second"] = len(values["rewards/margins"]) / total
        speed["tokens_per_second"] = sum(values["tokens/pair"]) / total
        return speed | {"memory/peak_gib": peak_memory_gib()}

    def state_dict(self) -> dict[str, Any]:
        """Values of all processes since the last entry, and the clock; every process must call this."""
        return {"values": self._of_all_processes(), "clock": self.clock.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; a resumed run logs the values with its own."""
        # They are of all processes: one goes on from them.
        values = state["values"] if is_main_process() else {}
        self._values = defaultdict(list, values)
        self.clock.load_state_dict(state["clock"])


def _numbers(values: list[float | Tensor]) -> list[float]:
    """Numbers and tensors of numbers as one list of numbers."""
    numbers: list[float] = []
    for value in values:
        numbers += value.tolist() if isinstance(value, Tensor) else [value]
    return numbers


def _sums(logps: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Sum of log-probs over a span of response tokens of each row: (rows, tokens) -> (rows,)."""
    return torch.stack([row[start:end].sum() for row, (start, end) in zip(logps, spans, strict=True)])


def _buffer_use(buffer: ReplayBuffer) -> dict[str, float]:
    """How full the buffer is, and the reuse histogram of what it holds: shares drawn 0, 1, 2 and 3 or more times."""
    counts = np.minimum(buffer.counts(), 3)
    shares = np.bincount(counts, minlength=4) / max(len(counts), 1)
    names = ("never", "once", "twice", "more")

    reuse = {f"buffer/drawn_{name}": float(share) for name, share in zip(names, shares, strict=True)}
    use = {"buffer/size": len(buffer), "buffer/evicted": buffer.evicted}
    return {**use, "buffer/mean_count": float(buffer.counts().mean()), **reuse}


def peak_memory_gib() -> float:
    """The most memory this process has held: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
