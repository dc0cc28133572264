"""A whole iteration of Algorithm 1, sample + train + EMA, against the same iteration written plainly.

The plain one is how the authors' code works: generate on a padded batch, policy and reference over padded rows with all
logits, an EMA parameter by parameter.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.harness import Result, Side, compare_apart, speed
from benchmarks.preference import mean_loss
from benchmarks.shapes import Shape, dtype_name, in_dtype, make_pairs, precisions, smollm2_shape
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import SamplingSettings
from components.common.kernels.pair_logps import response_logps
from components.common.kernels.pair_packing import PairIds, collate
from components.sapo.ema import EMA, frozen_copy, weights_of

SEGMENT = 64
SETTINGS = SamplingSettings(0.7, 50, 0.95, frozenset({2}))


SHAPE = Shape(pairs=8, prompt=(150, 300), response=(120, 200), segment=(SEGMENT, SEGMENT))


def whole_iteration(quick: bool, rounds: int) -> list[Result]:
    """DPO on eight pairs (quick: two) of a 512-token window with 64-token segments, no pair scored before by the reference.

    Both sides sample with transformers' generate; `sampler` compares that with vLLM.
    """
    results = []
    shape = replace(SHAPE, pairs=2) if quick else SHAPE
    for dtype in precisions(quick):
        check_losses(dtype)
        arguments = (shape, dtype, 2 if quick else 30)
        sides = [Side(make, arguments, ours=make is our_iteration) for make in (plain_iteration, our_iteration)]
        theirs, mine = compare_apart(sides, rounds)
        setting = f"{shape}, {dtype_name(dtype)}, {torch.get_num_threads()} threads"
        results.append(speed("whole DPO iteration", setting, "written plainly", theirs, mine))
    return results


def check_losses(dtype: torch.dtype) -> None:
    """Both sides compute the same, before they are timed."""
    model, pairs = smollm2_shape(layers=2), make_pairs(SHAPE)[:2]
    ours, plain = Ours(model, pairs, dtype), Plain(copy.deepcopy(model), pairs, dtype)
    with torch.no_grad():
        mine, theirs = ours.loss(pairs).item(), plain.loss(pairs).item()
    if abs(mine - theirs) > (1e-4 if dtype == torch.float32 else 0.02):
        raise AssertionError(f"losses on the same pairs differ: {mine}, {theirs}")


def plain_iteration(shape: Shape, dtype: torch.dtype, layers: int) -> Callable[[], None]:
    return Plain(smollm2_shape(layers), make_pairs(shape), dtype).iteration


def our_iteration(shape: Shape, dtype: torch.dtype, layers: int) -> Callable[[], None]:
    return Ours(smollm2_shape(layers), make_pairs(shape), dtype).iteration


def contexts(pairs: list[PairIds]) -> list[list[int]]:
    """x and A of each pair; B is the SEGMENT tokens after them."""
    return [pair.prompt + pair.chosen[: pair.shared()] for pair in pairs]


def spliced(pair: PairIds, replacement: list[int]) -> PairIds:
    a, c = pair.chosen[: pair.shared()], pair.chosen[pair.shared() + SEGMENT :]
    return PairIds(pair.prompt, pair.chosen, a + replacement + c)


class Ours:
    """The parts that SAPOTrainer puts together."""

    def __init__(self, model: LlamaForCausalLM, pairs: list[PairIds], dtype: torch.dtype) -> None:
        self.model = model
        self.pairs = pairs
        self.dtype = dtype

        average = cast(LlamaForCausalLM, frozen_copy(model))
        self.served = average if dtype == torch.float32 else in_dtype(copy.deepcopy(average), dtype)
        self.ema = EMA(weights_of(average), 0.5, None if self.served is average else weights_of(self.served))
        self.reference = frozen_copy(model)
        self.optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-7)
        self.sampler = HFSampler(self.served, SETTINGS, pad_id=0)

    def loss(self, pairs: list[PairIds]) -> Tensor:
        batch = collate(pairs, pad_id=0, share=True, from_divergence=True)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                reference = response_logps(self.reference, batch).sum(dim=1).chunk(2)
            sums = response_logps(self.model, batch).sum(dim=1)
            return mean_loss("dpo", sums, batch.response_mask.sum(dim=1), reference)

    def iteration(self) -> None:
        count = len(self.pairs)
        replacements = self.sampler.generate(contexts(self.pairs), [SEGMENT] * count, list(range(count)))
        pairs = [spliced(pair, replacement) for pair, replacement in zip(self.pairs, replacements, strict=True)]
        self.loss(pairs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(weights_of(self.model))


class Plain:
    """Nothing shared, nothing left out."""

    def __init__(self, model: LlamaForCausalLM, pairs: list[PairIds], dtype: torch.dtype) -> None:
        self.model = model
        self.pairs = pairs
        self.dtype = dtype

        # As the authors keep them: in the precision of the run, so that generate casts no weights.
        self.ema = in_dtype(copy.deepcopy(model), dtype)
        self.reference = in_dtype(copy.deepcopy(model), dtype)
        self.optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-7)

    def loss(self, pairs: list[PairIds]) -> Tensor:
        rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
        for i, (prompt, response) in enumerate(rows):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        attention = torch.arange(longest) < torch.tensor([len(p) + len(r) for p, r in rows]).unsqueeze(1)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                reference = self.sums(self.reference, ids, attention.long(), labels).chunk(2)
            sums = self.sums(self.model, ids, attention.long(), labels)
            return mean_loss("dpo", sums, (labels >= 0).sum(dim=1), reference)

    @staticmethod
    def sums(model: LlamaForCausalLM, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        logps = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        labels = labels[:, 1:]
        return (logps.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) * (labels >= 0)).sum(1)

    def iteration(self) -> None:
        prompts = contexts(self.pairs)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        attention = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "max_new_tokens": SEGMENT}
        generate: Any = self.ema.generate  # type: ignore[misc]  # its type is that of a mixin
        with torch.no_grad():
            tokens = generate(input_ids=ids, attention_mask=attention, eos_token_id=2, pad_token_id=0, **options)
        replacements = [np.trim_zeros(row, "b").tolist() for row in tokens[:, longest:].numpy()]
        pairs = [spliced(pair, replacement) for pair, replacement in zip(self.pairs, replacements, strict=True)]
        for low in range(0, len(pairs), 4):  # by four: all logits of eight pairs and their gradients need over 20 GiB
            (self.loss(pairs[low : low + 4]) * 4 / len(pairs)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                mine.data = 0.5 * mine.data + 0.5 * theirs.data.to(mine.dtype)
