"""Pairs as the model reads them: packed in one row without padding, or padded, one row a response.

A pair shares its prompt x and segment A. The packed form lays every pair out as

    [ x A | rest of y+ | rest of y- ]      positions of both rests go on from the end of x A
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from components.common.kernels.pair_attention import PairLayout
from components.common.kernels.pair_spans import Span


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

    @functools.cached_property
    def layout(self) -> PairLayout | None:
        """What attention needs to know of the packed pairs, worked out once for all that is run on them."""
        return None if self.spans is None else PairLayout(self.spans)

    def to(self, device: torch.device) -> PairBatch:
        """The same on a device. The host does not wait for what a GPU is doing."""
        moved = {name: _to(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        inputs = {name: _to(value, device) for name, value in self.model_inputs.items()}
        return PairBatch(model_inputs=inputs, spans=self.spans, **moved)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # From pageable memory a copy waits for all that the GPU has to do, and the next step's kernels come late.
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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


def whole_sequences(sequences: list[tuple[list[int], list[int]]], pad_id: int, share: bool) -> PairBatch:
    """Prompts and responses as sequences of which every token but the first, which is given, is scored."""
    # As a pair of a one-token prompt and two responses that are the whole rest: packed, the second costs nothing.
    wholes = [(prompt + response)[1:] for prompt, response in sequences]
    pairs = [PairIds(prompt[:1], whole, whole) for (prompt, _), whole in zip(sequences, wholes, strict=True)]
    return collate(pairs, pad_id, share)
