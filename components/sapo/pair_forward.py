"""Log-probs of the responses of pairs, from one padded forward pass.

Rows are padded on the left, so that all responses end in the last column and only the columns of the longest response
reach the vocabulary projection (`logits_to_keep`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sequence:
    """A prompt with one response, as token ids."""

    prompt_ids: list[int]
    response_ids: list[int]


def collate(sequences: list[Sequence], pad_id: int) -> dict[str, Tensor]:
    """Pads to one batch.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, (sequences, longest), int64; and `response_mask`,
        (sequences, longest response), true at response tokens, which end in the last column.
    """
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    longest_response = max(len(s.response_ids) for s in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    response_mask = torch.zeros((len(sequences), longest_response), dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids = sequence.prompt_ids + sequence.response_ids
        input_ids[i, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[i, longest - len(ids) :] = 1
        response_mask[i, longest_response - len(sequence.response_ids) :] = True
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "response_mask": response_mask,
    }


def response_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-prob of every response token given what precedes it.

    Returns:
        (sequences, longest response), float32; 0 where `response_mask` is false.
    """
    longest_response = batch["response_mask"].shape[1]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=longest_response + 1,
        use_cache=False,
    ).logits
    targets = batch["input_ids"][:, -longest_response:]
    logps = token_logps(logits[:, :-1], targets)
    return torch.where(batch["response_mask"], logps, 0.0)


def sequence_nll(model: nn.Module, batch: dict[str, Tensor], rows: int) -> Tensor:
    """Mean negative log-prob per token over prompt and response of the first `rows` sequences, (rows,), float32.

    The first token of a sequence is given, not predicted, and padding never counts.
    """
    inputs = {name: batch[name][:rows] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, use_cache=False).logits
    predicted = (inputs["attention_mask"][:, 1:] * inputs["attention_mask"][:, :-1]).bool()
    logps = torch.where(predicted, token_logps(logits[:, :-1], inputs["input_ids"][:, 1:]), 0.0)
    return -logps.sum(dim=1) / predicted.sum(dim=1)


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`, in float32 whatever the type of the logits: (..., vocab), (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
