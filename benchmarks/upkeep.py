"""What surrounds the learner: the EMA update and the replay buffer."""

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Result, compare, speed
from benchmarks.shapes import smollm2_shape
from components.sapo.ema import EMA, copy_weights, frozen_copy, weights_of
from components.sapo.replay_buffer import Entry, ReplayBuffer
from components.sapo.segments import Segment


def ema(quick: bool, rounds: int) -> list[Result]:
    """One EMA update against the loop over parameters of the authors' code, and against a plain copy of the weights.

    With a bfloat16 copy for the sampler, against the same update and a copy after it.
    """
    policy = smollm2_shape(layers=4 if quick else 30)
    weights, naive = weights_of(policy), copy.deepcopy(policy)
    served = weights_of(frozen_copy(policy).to(torch.bfloat16))
    plain, cast = EMA(weights_of(frozen_copy(policy)), 0.5), EMA(weights_of(frozen_copy(policy)), 0.5, served)

    @torch.no_grad()
    def loop() -> None:
        for mine, theirs in zip(naive.parameters(), policy.parameters(), strict=True):
            mine.data = 0.5 * mine.data + 0.5 * theirs.data

    def two_passes() -> None:
        plain.update(weights)
        copy_weights(plain.average, served)

    repeats = 5 if quick else 15
    peer, ours, memcpy = compare(
        [loop, lambda: plain.update(weights), lambda: copy_weights(weights, weights_of(naive))], repeats
    )
    twice, once = compare([two_passes, lambda: cast.update(weights)], repeats)
    setting = f"{policy.num_parameters() / 1e6:.0f}M parameters, float32, {torch.get_num_threads()} threads"
    return [
        speed("EMA update", setting, "loop over parameters", peer, ours, memcpy.seconds),
        speed("EMA update with bfloat16 copy", setting, "update, then copy", twice, once),
    ]


def replay_buffer(quick: bool, rounds: int) -> list[Result]:
    """A step (8 in, 8 out) against a deque with Python weights."""
    results = []
    for capacity in (2_000, 100_000) if quick else (2_000, 100_000, 1_000_000):
        entry = Entry(0, Segment(0, 256), np.zeros(256, dtype=np.int32), 0, 0)
        ours, plain = ReplayBuffer(capacity), deque([[entry, 0] for _ in range(capacity)], maxlen=capacity)
        ours.add([entry] * capacity)
        generator = np.random.default_rng(0)

        def our_step(ours: ReplayBuffer = ours, entry: Entry = entry, generator: Any = generator) -> None:
            ours.add([entry] * 8)
            ours.draw(8, generator)

        def plain_step(plain: deque = plain, entry: Entry = entry) -> None:
            plain.extend([entry, 0] for _ in range(8))
            for used in random.choices(plain, weights=[1 / (count + 1) for _, count in plain], k=8):
                used[1] += 1

        peer, mine = compare([plain_step, our_step], 3 if quick or capacity > 100_000 else 15)
        results.append(speed("buffer step", f"{capacity:,} entries", "deque", peer, mine))
    return results
