"""Opens an engine for bulk generation: SPIN writes rejected responses with it, the evaluation its answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.common.generation.protocol import Sampler, SamplingSettings
from components.common.models.loading import load_model


@dataclass(frozen=True)
class Engine:
    """Which engine, and what it may use.

    Args:
        max_length: most tokens of a prompt and its continuation.
        batch_size: most prompts in one call of the hf engine.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes; nothing else is in memory meanwhile.
    """

    name: Literal["hf", "vllm"]
    dtype: Literal["float32", "bfloat16"]
    max_length: int
    batch_size: int
    use_cpu: bool = False
    gpu_memory_utilization: float = 0.9


@contextmanager
def open_engine(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    drawing: SamplingSettings,
    loaded: PreTrainedModel | None = None,
) -> Iterator[Sampler]:
    """The engine with a model directory's weights, closed afterwards if it has to be.

    Args:
        loaded: the same model where it is in memory already; the hf engine takes it as it is.
    """
    if engine.name == "hf":
        from components.common.generation.hf import HFSampler

        served = _load(model, engine) if loaded is None else loaded
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        yield HFSampler(served, drawing, int(pad_id), engine.batch_size)
        return
    from components.common.generation.vllm import VLLMSampler

    # A batch is one call of the engine, and may take long.
    sampler = VLLMSampler(
        model,
        drawing,
        max_model_len=engine.max_length,
        dtype=engine.dtype,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        timeout=7200,
    )
    try:
        yield sampler
    finally:
        sampler.close()


def _load(model: str, engine: Engine) -> PreTrainedModel:
    loaded: Any = load_model(model, getattr(torch, engine.dtype))
    return loaded.to("cuda") if torch.cuda.is_available() and not engine.use_cpu else loaded
