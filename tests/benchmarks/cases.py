"""What is compared: the EMA update and the replay buffer. Each case returns results for its settings."""

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.sapo.ema import EMA, copy_weights
from components.sapo.replay_buffer import Entry, ReplayBuffer
from components.sapo.segments import Segment
from tests.benchmarks.harness import Result, compare


def smollm2_shape(layers: int = 30) -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))


def ema(quick: bool) -> list[Result]:
    """One EMA update against the loop over parameters of the authors' code, and against a plain copy of the weights."""
    policy = smollm2_shape(layers=4 if quick else 30)
    ours = EMA(policy, decay=0.5)
    naive = copy.deepcopy(policy)

    @torch.no_grad()
    def loop() -> None:
        for mine, theirs in zip(naive.parameters(), policy.parameters(), strict=True):
            mine.data = 0.5 * mine.data + 0.5 * theirs.data

    peer, mine, memcpy = compare(
        [loop, lambda: ours.update(policy), lambda: copy_weights(policy, naive)], 3 if quick else 9
    )
    setting = f"{policy.num_parameters() / 1e6:.0f}M parameters, float32, {torch.get_num_threads()} threads"
    return [Result("EMA update", setting, "loop over parameters", peer, mine, "ms", peer / mine, memcpy / mine)]


def replay_buffer(quick: bool) -> list[Result]:
    """A step (8 in, 8 out) against a deque with Python weights."""
    results = []
    for capacity in (2_000, 100_000) if quick else (2_000, 100_000, 1_000_000):
        entry = Entry(0, Segment(0, 256), np.zeros(256, dtype=np.int32), 0, 0)
        ours, plain = ReplayBuffer(capacity), deque([[entry, 0] for _ in range(capacity)], maxlen=capacity)
        for _ in range(capacity):
            ours.add(entry)
        generator = np.random.default_rng(0)

        def our_step(ours: ReplayBuffer = ours, entry: Entry = entry, generator: Any = generator) -> None:
            for _ in range(8):
                ours.add(entry)
            ours.draw(8, generator)

        def plain_step(plain: deque = plain, entry: Entry = entry) -> None:
            plain.extend([entry, 0] for _ in range(8))
            for used in random.choices(plain, weights=[1 / (count + 1) for _, count in plain], k=8):
                used[1] += 1

        peer, mine = compare([plain_step, our_step], 3 if quick or capacity > 100_000 else 15)
        results.append(Result("buffer step", f"{capacity:,} entries", "deque", peer, mine, "ms", peer / mine))
    return results


CASES = [ema, replay_buffer]
