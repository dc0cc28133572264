"""The engine that writes rejected responses, as SPIN's settings say."""

from contextlib import AbstractContextManager

from transformers import PreTrainedTokenizerBase

from components.common.generation.engines import EngineSettings, open_engine
from components.common.generation.protocol import Sampler, SamplingSettings
from components.common.models.loading import stop_ids
from components.spin.config import SPINSettings


def open_sampler(
    model: str, tokenizer: PreTrainedTokenizerBase, settings: SPINSettings
) -> AbstractContextManager[Sampler]:
    """The engine of `settings.sampler` with a model directory's weights, closed afterwards if it has to be."""
    drawing = SamplingSettings(settings.temperature, settings.top_k, settings.top_p, stop_ids(model, tokenizer))
    engine = EngineSettings(
        name=settings.sampler,
        dtype="bfloat16" if settings.bf16 else "float32",
        max_length=settings.max_length,
        batch_size=settings.sampler_batch_size,
        use_cpu=settings.use_cpu,
    )
    return open_engine(model, tokenizer, engine, drawing)
