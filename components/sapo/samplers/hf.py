"""The sampler that needs nothing: `transformers`' generate on a model that is already in memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.sapo.samplers import SamplingSettings


class HFSampler:
    """Generates with a Hugging Face model, whose weights it reads where they lie.

    Args:
        model: the EMA model (or the policy, on-policy). Updates in place are seen at once, so `load` copies nothing.
        settings: how tokens are drawn.
        pad_id: any token id; padding is masked.
        batch_size: most prompts in one call of generate.
    """

    def __init__(self, model: PreTrainedModel, settings: SamplingSettings, pad_id: int, batch_size: int = 64) -> None:
        self.model = model
        self.settings = settings
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.version = 0

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = version

    def generate(self, prompts: list[list[int]], max_new_tokens: list[int], seed: int) -> list[list[int]]:
        # Prompts of like length share a batch, so that little of it is padding; results return to the caller's order.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: list[list[int]] = [[] for _ in prompts]
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(seed)
            for low in range(0, len(order), self.batch_size):
                batch = order[low : low + self.batch_size]
                tokens = self._generate_batch([prompts[i] for i in batch], max(max_new_tokens[i] for i in batch))
                for i, row in zip(batch, tokens, strict=True):
                    results[i] = self._cut(row, max_new_tokens[i])
        return results

    def _devices(self) -> list[int]:
        device = self.model.device
        return [device.index or 0] if device.type == "cuda" else []

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), longest), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, prompt in enumerate(prompts):  # padded on the left: every continuation starts in the same column
            input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[i, longest - len(prompt) :] = 1
        was_training = self.model.training
        self.model.eval()
        generate: Any = self.model.generate
        output = generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.settings.stop_ids),
            pad_token_id=self.pad_id,
            use_cache=True,
            **self._draw_options(),
        )
        self.model.train(was_training)
        return output[:, longest:].tolist()

    def _draw_options(self) -> dict[str, bool | float | int | None]:
        if self.settings.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {
            "do_sample": True,
            "temperature": self.settings.temperature,
            "top_k": self.settings.top_k,
            "top_p": self.settings.top_p,
        }

    def _cut(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` tokens, ending with the first stop token; what follows it is padding."""
        tokens = tokens[:limit]
        stop = next((i for i, token in enumerate(tokens) if token in self.settings.stop_ids), None)
        return tokens if stop is None else tokens[: stop + 1]
