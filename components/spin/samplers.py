"""The engine that writes rejected responses: one function knows which there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from components.common.models import load_model, stop_ids
from components.common.samplers import Sampler, SamplingSettings
from components.spin.config import SPINSettings


@contextmanager
def open_sampler(model: str, tokenizer: PreTrainedTokenizerBase, settings: SPINSettings) -> Iterator[Sampler]:
    """The engine of `settings.sampler` with a model directory's weights, closed afterwards if it has to be."""
    drawing = SamplingSettings(settings.temperature, settings.top_k, settings.top_p, stop_ids(model, tokenizer))
    sampler = _ENGINES[settings.sampler](model, tokenizer, settings, drawing)
    try:
        yield sampler
    finally:
        if close := getattr(sampler, "close", None):
            close()


def _hf(model: str, tokenizer: PreTrainedTokenizerBase, settings: SPINSettings, drawing: SamplingSettings) -> Sampler:
    from components.common.samplers.hf import HFSampler

    loaded: Any = load_model(model, torch.bfloat16 if settings.bf16 else torch.float32)
    if torch.cuda.is_available() and not settings.use_cpu:
        loaded.to("cuda")
    return HFSampler(loaded, drawing, int(tokenizer.pad_token_id), settings.sampler_batch_size)


def _vllm(model: str, tokenizer: PreTrainedTokenizerBase, settings: SPINSettings, drawing: SamplingSettings) -> Sampler:
    from components.common.samplers.vllm import VLLMSampler

    # Nothing else is in memory while responses are generated. A batch is one call of the engine, and may take long.
    return VLLMSampler(
        model,
        drawing,
        max_model_len=settings.max_length,
        dtype="bfloat16" if settings.bf16 else "float32",
        gpu_memory_utilization=0.9,
        timeout=7200,
    )


_ENGINES = {"hf": _hf, "vllm": _vllm}
