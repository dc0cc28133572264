"""Log-probs of both responses of pairs, from one forward pass on an unmodified Hugging Face causal model.

A pair shares its prompt x and segment A. The fast form packs every pair as

    [ x A | rest of y+ | rest of y- ]      positions of both rests go on from the end of x A

in one row without padding: linear layers run over all tokens at once, attention runs per pair (the prefix over itself, then
each branch over the prefix and itself, never over the other branch), and x A is computed once. Models whose attention
cannot be swapped this way take the plain form, padded rows, with the same results to rounding.

Only response tokens reach the vocabulary, block by block of it, and backward computes each block's logits again, so that memory
does not grow with the number of tokens times the vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.sapo.lean_layers import lean_layers
from components.sapo.pair_attention import SHARED_PREFIX, PairLayout, Span

logger = logging.getLogger(__name__)

# Architectures whose attention is the plain one behind transformers' attention interface, and whose logits are the output
# embeddings times the last hidden state, with nothing after.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
# Logits that exist at once: so many that they stay in a CPU's cache, or keep a GPU busy. A block of the vocabulary is at least
# so wide that products are fast.
LOGITS, LOGITS_ON_GPU, NARROWEST = 2**20, 2**25, 1024
CHUNK = 256  # response tokens that go through a head that is not a plain linear layer together


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

    def real_tokens(self) -> int:
        """Tokens that the model computes, without padding."""
        mask = self.model_inputs.get("attention_mask")
        return self.model_inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def to(self, device: torch.device) -> PairBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        inputs = {name: value.to(device) for name, value in self.model_inputs.items()}
        return PairBatch(model_inputs=inputs, spans=self.spans, **moved)


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether pairs of this model may be packed; the reason why not is logged."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in SUPPORTED:
        logger.info("shared-prefix forward: not known to be right for %r, so pairs are padded instead", kind)
    return kind in SUPPORTED


def collate(pairs: list[PairIds], pad_id: int, share: bool, from_divergence: bool = False) -> PairBatch:
    """Packs pairs (`share`) or pads them, and works out where each response token is scored.

    Args:
        pad_id: any token id; padding is masked.
        share: compute the prompt and what both responses share once.
        from_divergence: score each response from its first token that the other has not. What they share cancels in
            DPO's margin; in ORPO's means per token it does not.
    """
    rows, columns, sources, targets = _scored_tokens(pairs, share, from_divergence)
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    form = _packed if share else _padded
    inputs, spans, predictors = form(pairs, pad_id, from_divergence)
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


def _scored_tokens(
    pairs: list[PairIds], share: bool, from_divergence: bool
) -> tuple[list[int], list[int], list[int], list[int]]:
    """(rows, columns, sources) of the result and the targets, pair by pair: shared tokens, chosen rest, rejected rest."""
    rows: list[int] = []
    columns: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for i, pair in enumerate(pairs):
        skipped = pair.shared() if from_divergence else 0
        shared = pair.shared() if share else skipped  # response tokens before the branches begin
        first = len(targets)
        targets += pair.chosen[skipped:shared]
        for row, response in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            rows += [row] * (len(response) - skipped)
            columns += range(skipped, len(response))
            sources += [*range(first, first + shared - skipped)]
            sources += [*range(len(targets), len(targets) + len(response) - shared)]
            targets += response[shared:]
    return rows, columns, sources, targets


def _packed(
    pairs: list[PairIds], pad_id: int, from_divergence: bool
) -> tuple[dict[str, Tensor], list[Span], list[int]]:
    """One row of all pairs. The last token of a response predicts nothing that is scored, so it is left out."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    predictors: list[int] = []
    for pair in pairs:
        shared = pair.shared()
        prefix = pair.prompt + pair.chosen[:shared]
        branches = [pair.chosen[shared:-1], pair.rejected[shared:-1]]
        last = len(ids) + len(prefix) - 1  # its hidden state predicts the first token of both branches
        spans.append(Span(len(ids), len(prefix), len(branches[0]), len(branches[1])))
        if not from_divergence:
            predictors += range(last - shared, last)
        ids += prefix
        positions += range(len(prefix))
        for branch in branches:
            predictors += [last, *range(len(ids), len(ids) + len(branch))]
            ids += branch
            positions += range(len(prefix), len(prefix) + len(branch))
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return inputs, spans, predictors


def _padded(pairs: list[PairIds], pad_id: int, from_divergence: bool) -> tuple[dict[str, Tensor], None, list[int]]:
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
        skipped = pair.shared() if from_divergence else 0
        for row, response in ((i, pair.chosen), (len(pairs) + i, pair.rejected)):
            first = row * longest + len(pair.prompt) - 1
            predictors += range(first + skipped, first + len(response))
    positions = torch.arange(longest).expand(len(sequences), -1).contiguous()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    return inputs, None, predictors


def pair_logps(wrapped: nn.Module, model: nn.Module, batches: list[PairBatch]) -> list[Tensor]:
    """`response_logps` of several batches in one forward pass of what distributed training has wrapped around a model.

    DDP, DeepSpeed and FSDP2 act when the outermost forward is called: they gather shards there, or get ready for backward.
    So the model's own forward answers with log-probs for as long as this runs.

    Args:
        wrapped: what to call: the model itself, or its wrapper.
        model: the model within.
    """
    with _forward_replaced(model, lambda batches: [response_logps(model, batch) for batch in batches]):
        return wrapped(batches)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module, around which its hooks still run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward  # the class's own again
        else:
            module.forward = before


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
        layout = PairLayout(batch.spans)
        return decoder(**batch.model_inputs, use_cache=False, pair_layout=layout).last_hidden_state


def chunked_logps(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """log softmax(head(hidden)) at `targets`, (tokens,), float32; only a part of the logits exists at a time.

    Backward computes each part again. A linear head is fused with the softmax, in blocks of the vocabulary; any other one (with
    a bias, quantised, with an adapter) is called as it is, on chunks of the tokens.
    """
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None:
        # Called as a module, once: where it is sharded, its weight is whole meanwhile.
        with _forward_replaced(head, functools.partial(_fused_logps, head)):
            return head(hidden, targets)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([token_logps(head(h), t) for h, t in chunks])
    return torch.cat([_recomputed(head, h, t) for h, t in chunks])


def _fused_logps(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    return _FusedLogps.apply(hidden.to(dtype), head.weight, targets)


def _recomputed(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return checkpoint(
        lambda h, t: token_logps(head(h), t), hidden, targets, use_reentrant=False, preserve_rng_state=False
    )


class _FusedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T) at the targets, by blocks of the vocabulary that stay in the processor's cache.

    With p = softmax(logits) and the incoming gradient g, one value a token:
        d logits = g (onehot(target) - p),   d hidden = d logits @ weight,   d weight = d logits.T @ hidden
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """(tokens, size) in the type to multiply in, (vocab, size) in any, (tokens,) -> (tokens,) in float32."""
        lses, chosen = [], hidden.new_zeros(len(hidden), dtype=torch.float32)
        for block in _vocabulary_blocks(hidden, weight):
            logits = _block_logits(hidden, weight[block])
            rows, columns = _targets_within(block, targets)
            chosen[rows] = logits[rows, columns]
            highest = logits.amax(dim=1, keepdim=True)
            lses.append(logits.sub_(highest).exp_().sum(dim=1).log_().add_(highest.squeeze(1)))
        lse = torch.stack(lses).logsumexp(dim=0)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return chosen - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        gradient = gradients[0]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for block in _vocabulary_blocks(hidden, weight):
            d_logits = _block_logits(hidden, weight[block]).sub_(lse.unsqueeze(1)).exp_().mul_(-gradient.unsqueeze(1))
            rows, columns = _targets_within(block, targets)
            d_logits[rows, columns] += gradient[rows]
            d_logits = d_logits.to(hidden.dtype)
            d_hidden += d_logits @ weight[block].to(hidden.dtype)
            if d_weight is not None:
                d_weight[block] = d_logits.t() @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None


def block_width(tokens: int, vocabulary: int, on_gpu: bool) -> int:
    """Entries of the vocabulary whose logits exist at once for `tokens` tokens."""
    limit = LOGITS_ON_GPU if on_gpu else LOGITS
    return min(max(limit // max(tokens, 1), NARROWEST), vocabulary)


def _vocabulary_blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = block_width(len(hidden), len(weight), hidden.is_cuda)
    return (slice(low, min(low + size, len(weight))) for low in range(0, len(weight), size))


def _block_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(tokens, size), (block, size) -> (tokens, block), float32, multiplied in the type of `hidden`."""
    return (hidden @ weight.to(hidden.dtype).t()).float()


def _targets_within(block: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in a block of the vocabulary, and its column there."""
    rows = ((targets >= block.start) & (targets < block.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - block.start


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`, in float32 whatever the type of the logits: (..., vocab), (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def whole_sequences(sequences: list[tuple[list[int], list[int]]], pad_id: int, share: bool) -> PairBatch:
    """Prompts and responses as sequences of which every token but the first, which is given, is scored."""
    # As a pair of a one-token prompt and two responses that are the whole rest: packed, the second costs nothing.
    wholes = [(prompt + response)[1:] for prompt, response in sequences]
    pairs = [PairIds(prompt[:1], whole, whole) for (prompt, _), whole in zip(sequences, wholes, strict=True)]
    return collate(pairs, pad_id, share)


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
