"""Engines that write B'. All speak one protocol, so the trainer does not know which it has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. `top_k` 0 and `top_p` 1 switch the filters off; `temperature` 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    stop_ids: frozenset[int]


class Sampler(Protocol):
    """A generation engine that serves one set of weights at a time."""

    version: int

    def generate(self, prompts: list[list[int]], max_new_tokens: list[int], seed: int) -> list[list[int]]:
        """Continues each prompt by at most its own number of tokens; a stop token ends it and is included.

        Leaves the process's random state as it was: the same arguments and weights give the same tokens.
        """
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Serves these weights, named as in the Hugging Face model, from now on."""
        ...
