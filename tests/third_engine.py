"""An engine beside the two there are: a class, and an entry of the table. It has weights of its own, and proves them."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from components.common.generation.engines import Engine, EngineSettings
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import Canary, SamplingSettings, make_canary
from components.common.models.loading import load_model

STARTED: list["ThirdSampler"] = []  # every engine that was started, the newest last

ENTRY = Engine(
    module="third_engine",
    title="Third",
    package="third_engine",
    distributions=("a-distribution-that-is-not-installed",),
    install="it is part of the tests",
    proves_weights=True,
    dtypes=("float32",),
    least_batch=6,
)


def start(
    model: str, tokenizer: Any, settings: EngineSettings, drawing: SamplingSettings, loaded: Any = None
) -> "ThirdSampler":
    STARTED.append(ThirdSampler(model, drawing, int(tokenizer.pad_token_id)))
    return STARTED[-1]


class ThirdSampler:
    """Generates with a copy of the model that nobody else sees; pushes alone change it."""

    def __init__(self, model: str, settings: SamplingSettings, pad_id: int) -> None:
        self.settings = settings
        self.version = 0
        self.closed = False
        self.proofs = 0
        self.batches: list[int] = []
        self._copy = load_model(model, torch.float32).eval()
        self._pad_id = pad_id

    def generate(self, prompts: list[list[int]], max_new_tokens: list[int], seeds: list[int]) -> list[list[int]]:
        assert not self.closed
        self.batches.append(len(prompts))
        return HFSampler(self._copy, self.settings, self._pad_id).generate(prompts, max_new_tokens, seeds)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int, canary: Canary | None = None) -> None:
        mine = dict(self._copy.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                assert weight.data_ptr() != mine[name].data_ptr()
                mine[name].copy_(copy.deepcopy(weight.detach()))
        if canary is not None:
            found = make_canary(self._copy, canary.token_ids).log_probs
            torch.testing.assert_close(found, canary.log_probs, atol=1e-4, rtol=0)
            self.proofs += 1
        self.version = version

    def close(self) -> None:
        self.closed = True
