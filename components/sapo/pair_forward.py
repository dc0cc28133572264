"""Log-probs of both responses of pairs, from one forward pass on an unmodified Hugging Face causal model.

A pair shares its prompt x and segment A. The fast form packs every pair as

    [ x A | rest of y+ | rest of y- ]      positions of both rests go on from the end of x A

in one row without padding: linear layers run over all tokens at once, attention runs per pair (the prefix over itself, then
each branch over the prefix and itself, never over the other branch), and x A is computed once. Models whose attention
cannot be swapped this way take the plain form, padded rows, with the same results to rounding.

Only response tokens reach the vocabulary, in chunks that are computed again in backward, so that memory does not grow with
the number of tokens times the vocabulary.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

logger = logging.getLogger(__name__)

SHARED_PREFIX = "sapo_shared_prefix"
# Architectures whose attention is the plain one behind transformers' attention interface, and whose logits are the output
# embeddings times the last hidden state, with nothing after.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
CHUNK = 512  # response tokens that are projected to the vocabulary together


@dataclass(frozen=True)
class PairIds:
    """A prompt with its two responses, as token ids; the responses may begin alike."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def shared(self) -> int:
        """Response tokens that both share at their beginning, leaving each at least one of its own."""
        most = min(len(self.chosen), len(self.rejected)) - 1
        return next((i for i in range(most) if self.chosen[i] != self.rejected[i]), most)


@dataclass(frozen=True)
class Span:
    """Where a packed pair lies: its prefix [start, start + prefix), then `chosen`, then `rejected` tokens."""

    start: int
    prefix: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PairBatch:
    """Pairs ready for the model. Rows of results are all chosen responses, then all rejected ones.

    Attributes:
        model_inputs: `input_ids`, `position_ids` and, in the plain form, `attention_mask`; (rows, tokens), int64.
        spans: the packed pairs, or None in the plain form.
        predictors: flat positions of `input_ids` whose hidden state predicts a response token, (scored,).
        targets: the tokens they predict, (scored,).
        rows, columns, sources: entry (rows[i], columns[i]) of the result is the log-prob of target sources[i]; a shared
            token is scored once and stands in both rows.
        response_mask: true at response tokens, which begin in the first column, (2 * pairs, longest response).
        tokens: real tokens of each pair with nothing shared, (pairs,).
    """

    model_inputs: dict[str, Tensor]
    spans: list[Span] | None
    predictors: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    sources: Tensor
    response_mask: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        inputs = {name: value.to(device) for name, value in self.model_inputs.items()}
        return PairBatch(model_inputs=inputs, spans=self.spans, **moved)


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether pairs of this model may be packed; the reason why not is logged."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in SUPPORTED:
        logger.info("shared-prefix forward: not known to be right for %r, so pairs are padded instead", kind)
    return kind in SUPPORTED


def collate(pairs: list[PairIds], pad_id: int, share: bool) -> PairBatch:
    """Packs pairs (`share`) or pads them, and works out where each response token is scored."""
    rows, columns, sources, targets = _scored_tokens(pairs, share)
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    inputs, spans, predictors = _packed(pairs) if share else _padded(pairs, pad_id)
    tokens = [2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    return PairBatch(
        model_inputs=inputs,
        spans=spans,
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        sources=torch.tensor(sources),
        response_mask=mask,
        tokens=torch.tensor(tokens),
    )


def _scored_tokens(pairs: list[PairIds], share: bool) -> tuple[list[int], list[int], list[int], list[int]]:
    """(rows, columns, sources) of the result and the targets, pair by pair: shared tokens, chosen rest, rejected rest."""
    rows: list[int] = []
    columns: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for i, pair in enumerate(pairs):
        shared = pair.shared() if share else 0
        first = len(targets)
        targets += pair.chosen[:shared]
        for row, response in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            rows += [row] * len(response)
            columns += range(len(response))
            sources += [*range(first, first + shared), *range(len(targets), len(targets) + len(response) - shared)]
            targets += response[shared:]
    return rows, columns, sources, targets


def _packed(pairs: list[PairIds]) -> tuple[dict[str, Tensor], list[Span], list[int]]:
    """One row of all pairs. The last token of a response predicts nothing that is scored, so it is left out."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    predictors: list[int] = []
    for pair in pairs:
        shared = pair.shared()
        prefix = pair.prompt + pair.chosen[:shared]
        branches = [pair.chosen[shared:-1], pair.rejected[shared:-1]]
        start = len(ids)
        spans.append(Span(start, len(prefix), len(branches[0]), len(branches[1])))
        predictors += range(start + len(pair.prompt) - 1, start + len(prefix) - 1)
        ids += prefix
        positions += range(len(prefix))
        for branch in branches:
            predictors += [start + len(prefix) - 1, *range(len(ids), len(ids) + len(branch))]
            ids += branch
            positions += range(len(prefix), len(prefix) + len(branch))
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return inputs, spans, predictors


def _padded(pairs: list[PairIds], pad_id: int) -> tuple[dict[str, Tensor], None, list[int]]:
    """One row a response, padded on the right."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(sequences):
        ids = prompt + response
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    predictors: list[int] = []
    for i, pair in enumerate(pairs):
        for row, response in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            first = row * longest + len(pair.prompt) - 1
            predictors += range(first, first + len(response))
    positions = torch.arange(longest).expand(len(sequences), -1).contiguous()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    return inputs, None, predictors


def response_logps(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-prob of every response token given what precedes it.

    Returns:
        (2 * pairs, longest response), float32; 0 where `batch.response_mask` is false.
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
        return decoder(**batch.model_inputs, use_cache=False, pair_spans=batch.spans).last_hidden_state


def chunked_logps(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """log softmax(head(hidden)) at `targets`, (tokens,), float32; only one chunk of logits exists at a time.

    Backward computes each chunk's logits again.
    """
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([token_logps(head(h), t) for h, t in chunks])
    return torch.cat([_recomputed(head, h, t) for h, t in chunks])


def _recomputed(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return checkpoint(
        lambda h, t: token_logps(head(h), t), hidden, targets, use_reentrant=False, preserve_rng_state=False
    )


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`, in float32 whatever the type of the logits: (..., vocab), (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def sequence_nll(model: nn.Module, sequences: list[tuple[list[int], list[int]]], pad_id: int, share: bool) -> Tensor:
    """Mean negative log-prob per token over prompt and response, (sequences,), float32.

    The first token of a sequence is given, not predicted, and padding never counts.
    """
    # As a pair of a one-token prompt and two responses that are the whole rest: packed, the second costs nothing.
    wholes = [(prompt + response)[1:] for prompt, response in sequences]
    pairs = [PairIds(prompt[:1], whole, whole) for (prompt, _), whole in zip(sequences, wholes, strict=True)]
    device = next(model.parameters()).device
    batch = collate(pairs, pad_id, share).to(device)
    return -(response_logps(model, batch).sum(dim=1) / batch.response_mask.sum(dim=1))[: len(sequences)]


@contextmanager
def shared_prefix_attention(model: nn.Module) -> Iterator[None]:
    """Swaps the attention of a model for that of packed pairs.

    With gradient checkpointing, backward runs layers again and looks the attention up again: keep this open around backward.
    """
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = SHARED_PREFIX
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend_pairs(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    pair_spans: list[Span],
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed pairs, as transformers' attention interface wants it.

    Args:
        query: (1, heads, tokens, size); key and value: (1, key-value heads, tokens, size).

    Returns:
        (1, tokens, heads, size).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = []
    for span in pair_spans:
        prefix = slice(span.start, span.start + span.prefix)
        parts.append(_attend(query[:, :, prefix], key[:, :, prefix], value[:, :, prefix], scaling, sliding_window))
        low = prefix.stop
        for length in (span.chosen, span.rejected):
            branch = slice(low, low + length)
            if length:
                keys = torch.cat([key[:, :, prefix], key[:, :, branch]], dim=2)
                values = torch.cat([value[:, :, prefix], value[:, :, branch]], dim=2)
                parts.append(_attend(query[:, :, branch], keys, values, scaling, sliding_window))
            low = branch.stop
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
    """Causal attention of the last queries over all keys, within the window of the model if it has one."""
    length, total = query.shape[2], key.shape[2]
    window = total if sliding_window is None else sliding_window
    if length == total and window >= total:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    distance = torch.arange(total - length, total, device=query.device).unsqueeze(1) - torch.arange(
        total, device=query.device
    )
    allowed = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)


AttentionInterface.register(SHARED_PREFIX, _attend_pairs)
