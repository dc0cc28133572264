"""Log-probs of both responses of pairs, from one forward pass on an unmodified Hugging Face causal model.

A pair shares its prompt x and segment A. The fast form packs every pair as

    [ x A | rest of y+ | rest of y- ]      positions of both rests go on from the end of x A

in one row without padding: linear layers run over all tokens at once, attention runs per pair (the prefix over itself, then
each branch over the prefix and itself, never over the other branch), and x A is computed once. Models whose attention
cannot be swapped this way take the plain form, padded rows, with the same results to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from components.common.kernels.lean_layers import lean_layers
from components.common.kernels.pair_attention import SHARED_PREFIX
from components.common.kernels.pair_packing import PairBatch
from components.common.kernels.replaced_forward import forward_replaced
from components.common.kernels.vocabulary_head import chunked_logps

logger = logging.getLogger(__name__)

# Architectures whose attention is the plain one behind transformers' attention interface, and whose logits are the output
# embeddings times the last hidden state, with nothing after.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether pairs of this model may be packed; the reason why not is logged."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in SUPPORTED:
        logger.info("shared-prefix forward: not known to be right for %r, so pairs are padded instead", kind)
    return kind in SUPPORTED


def pair_logps(wrapped: nn.Module, model: nn.Module, batches: list[PairBatch]) -> list[Tensor]:
    """`response_logps` of several batches in one forward pass of what distributed training has wrapped around a model.

    DDP, DeepSpeed and FSDP2 act when the outermost forward is called: they gather shards there, or get ready for backward.
    So the model's own forward answers with log-probs for as long as this runs.

    Args:
        wrapped: what to call: the model itself, or its wrapper.
        model: the model within.
    """
    with forward_replaced(model, lambda batches: [response_logps(model, batch) for batch in batches]):
        return wrapped(batches)


def response_logps(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-prob of every response token given what precedes it.

    Returns:
        (2 * pairs, longest response), float32; 0 where `batch.response_mask` is false and at tokens that are not scored.
    """
    hidden = last_hidden_states(model, batch).flatten(0, 1)[batch.predictors]
    scored = chunked_logps(hidden, model.get_output_embeddings(), batch.targets)  # type: ignore[operator]
    result = scored.new_zeros(batch.response_mask.shape)
    return result.index_put((batch.rows, batch.columns), scored[batch.sources])


def last_hidden_states(model: nn.Module, batch: PairBatch) -> Tensor:
    """The decoder's output for every input token, (rows, tokens, hidden)."""
    decoder: Any = model.base_model
    if batch.spans is None:
        return decoder(**batch.model_inputs, use_cache=False).last_hidden_state
    with shared_prefix_attention(model):
        return decoder(**batch.model_inputs, use_cache=False, pair_layout=batch.layout).last_hidden_state


def sequence_nll(logps: Tensor, batch: PairBatch) -> Tensor:
    """Mean negative log-prob per token over prompt and response, (sequences,), float32, from `whole_sequences`' log-probs."""
    return -(logps.sum(dim=1) / batch.response_mask.sum(dim=1)).chunk(2)[0]


@contextmanager
def shared_prefix_attention(model: nn.Module) -> Iterator[None]:
    """Swaps the attention of a model for that of packed pairs.

    With gradient checkpointing, backward runs layers again and looks the attention up again: keep this open around backward.
    """
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = SHARED_PREFIX
    try:
        with lean_layers(model):
            yield
    finally:
        config._attn_implementation = before
