"""Engines that continue prompts: self-play writes B' with them, SPIN whole responses, the evaluation its answers.

All speak one protocol, so what calls them does not know which it has.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. `top_k` 0 and `top_p` 1 switch the filters off; `temperature` 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Canary:
    """What a model gives a few tokens: the proof that an engine serves its weights. `log_probs` starts at the second."""

    token_ids: list[int]
    log_probs: list[float]


class Sampler(Protocol):
    """A generation engine that serves one set of weights at a time."""

    version: int
    settings: SamplingSettings  # may be replaced between calls of `generate`

    def generate(self, prompts: list[list[int]], max_new_tokens: list[int], seeds: list[int]) -> list[list[int]]:
        """Continues each prompt by at most its own number of tokens; a stop token ends it and is included.

        What a prompt gets depends on its seed and on the weights, not on the prompts beside it (to the rounding of the
        engine's arithmetic), and the process's random state is left as it was.
        """
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int, canary: Canary | None = None) -> None:
        """Serves these weights, named as in the Hugging Face model, from now on; an engine of its own checks the canary."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; it generates no more."""
        ...


@torch.no_grad()
def make_canary(model: PreTrainedModel, token_ids: list[int]) -> Canary:
    """Teacher-forced log-probs of the tokens after the first, by the model whose weights are pushed."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([token_ids], device=model.device)
    log_probs = model(ids).logits[0, :-1].float().log_softmax(dim=-1)
    model.train(was_training)
    return Canary(token_ids, log_probs.gather(1, ids[0, 1:, None]).squeeze(1).tolist())


def request_seed(*parts: int | str) -> int:
    """The seed of one request, from what identifies it (run seed, row id, epoch, response index); 31 bits."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
