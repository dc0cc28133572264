"""The sampler that needs nothing: `transformers`' generate on a model that is already in memory."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from components.common.generation.engines import EngineSettings
from components.common.generation.protocol import Canary, SamplingSettings
from components.common.kernels.cpu.decode import prefill, quick_decoding
from components.common.models.loading import load_model


def start(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: EngineSettings,
    drawing: SamplingSettings,
    loaded: PreTrainedModel | None = None,
) -> "HFSampler":
    """The engine `hf`, with the loaded model as it is, or the directory's; see `engines.start_engine`."""
    served: Any = loaded
    if served is None:
        served = load_model(model, getattr(torch, settings.dtype))
        served = served.to("cuda") if torch.cuda.is_available() and not settings.use_cpu else served
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return HFSampler(served, drawing, int(pad_id), settings.batch_size)


class HFSampler:
    """Generates with a Hugging Face model, whose weights it reads where they lie.

    Args:
        model: the EMA model (or the policy, on-policy). Updates in place are seen at once, so `load` copies only weights that
            lie elsewhere.
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

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]], version: int, canary: Canary | None = None) -> None:
        mine = dict(self.model.named_parameters())
        for name, weight in weights:
            if weight.data_ptr() != mine[name].data_ptr():
                mine[name].copy_(weight)
        self.version = version

    def close(self) -> None:
        """Nothing to free: the model is the caller's."""

    def generate(self, prompts: list[list[int]], max_new_tokens: list[int], seeds: list[int]) -> list[list[int]]:
        # Prompts of like length share a batch, so that little of it is padding; results return to the caller's order.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: list[list[int]] = [[] for _ in prompts]
        for low in range(0, len(order), self.batch_size):
            batch = order[low : low + self.batch_size]
            limit = max(max_new_tokens[i] for i in batch)
            tokens = self._generate_batch([prompts[i] for i in batch], limit, [seeds[i] for i in batch])
            for i, row in zip(batch, tokens, strict=True):
                results[i] = self._cut(row, max_new_tokens[i])
        return results

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], max_new_tokens: int, seeds: list[int]) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), longest), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, prompt in enumerate(prompts):  # padded on the left: every continuation starts in the same column
            input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[i, longest - len(prompt) :] = 1
        was_training = self.model.training
        self.model.eval()
        generate: Any = self.model.generate
        with quick_decoding(self.model, max_new_tokens):
            output = generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.settings.stop_ids),
                pad_token_id=self.pad_id,
                past_key_values=prefill(self.model, prompts, max_new_tokens),
                use_cache=True,
                # Greedy for `generate`: the last processor has drawn the token.
                **{"do_sample": False, "temperature": None, "top_k": None, "top_p": None},
                logits_processor=self._processors(max_new_tokens, seeds),
            )
        self.model.train(was_training)
        return output[:, longest:].tolist()

    def _processors(self, max_new_tokens: int, seeds: list[int]) -> LogitsProcessorList:
        greedy = self.settings.temperature == 0
        return LogitsProcessorList([] if greedy else [_SeededDraw(self.settings, seeds, max_new_tokens)])

    def _cut(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` tokens, ending with the first stop token; what follows it is padding."""
        tokens = tokens[:limit]
        stop = next((i for i, token in enumerate(tokens) if token in self.settings.stop_ids), None)
        return tokens if stop is None else tokens[: stop + 1]


class _SeededDraw(LogitsProcessor):
    """Draws each row's token with that row's own random numbers, so that no row's draw depends on its neighbours.

    The filters are those of transformers' generate, but what follows top-k works on the k tokens that are left: sorting the
    whole vocabulary for every token takes ten times as long.

    Args:
        settings: the filters.
        seeds: one for each row.
        steps: most tokens to draw.
    """

    def __init__(self, settings: SamplingSettings, seeds: list[int], steps: int) -> None:
        self.settings = settings
        # (steps, rows), in [0, 1): one number a token, for inverting the cumulative distribution.
        self.uniforms = torch.from_numpy(np.stack([np.random.default_rng(s).random(steps) for s in seeds], axis=1))
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocab) -> the same with 0 at the drawn tokens and -inf elsewhere."""
        self.uniforms = self.uniforms.to(scores.device)  # once: a copy a token would make a GPU wait
        kept, tokens = scores / self.settings.temperature, None
        if self.settings.top_k:
            tokens = kept.topk(min(self.settings.top_k, scores.shape[1])).indices.sort(dim=-1).values
            kept = kept.gather(1, tokens)
        if self.settings.top_p < 1:
            kept = TopPLogitsWarper(self.settings.top_p)(input_ids, kept)
        cumulative = kept.double().softmax(dim=-1).cumsum(dim=-1)
        target = self.uniforms[self.step].unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=kept.shape[1] - 1)
        self.step += 1
        drawn = drawn if tokens is None else tokens.gather(1, drawn)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
