"""Log-probs of tokens from hidden states, with a part of the logits at a time.

Only response tokens reach the vocabulary, block by block of it, and backward computes each block's logits again, so that memory
does not grow with the number of tokens times the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.common.kernels import gpu_fusion
from components.common.kernels.replaced_forward import forward_replaced

# Logits that exist at once: so many that they stay in a CPU's cache, or keep a GPU busy. A block of the vocabulary is at least
# so wide that products are fast.
LOGITS, LOGITS_ON_GPU, NARROWEST = 2**20, 2**25, 1024


ALIGNED = 256  # of a block on a GPU, whose products of rows that begin at odd addresses are slow
CHUNK = 256  # response tokens that go through a head that is not a plain linear layer together


def chunked_logps(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """log softmax(head(hidden)) at `targets`, (tokens,), float32; only a part of the logits exists at a time.

    Backward computes each part again. A linear head is fused with the softmax, in blocks of the vocabulary; any other one (with
    a bias, quantised, with an adapter) is called as it is, on chunks of the tokens.
    """
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None:
        # Called as a module, once: where it is sharded, its weight is whole meanwhile.
        with forward_replaced(head, functools.partial(_fused_logps, head)):
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
        lses, chosen = [], hidden.new_zeros(len(hidden), 1, dtype=torch.float32)
        for block in _vocabulary_blocks(hidden, weight):
            logits = _block_logits(hidden, weight[block])
            columns, inside = _targets_within(block, targets)
            chosen = torch.where(inside, logits.gather(1, columns).float(), chosen)
            if gpu_fusion.is_wanted(hidden):
                lses.append(_lse(logits))
                continue
            logits = logits.float()
            highest = logits.amax(dim=1, keepdim=True)
            lses.append(logits.sub_(highest).exp_().sum(dim=1).log_().add_(highest.squeeze(1)))
        lse = torch.stack(lses).logsumexp(dim=0)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return chosen.squeeze(1) - lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(1)  # (tokens, 1)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for block in _vocabulary_blocks(hidden, weight):
            if gpu_fusion.is_wanted(hidden):
                logits = _block_logits(hidden, weight[block])
                d_logits = _d_logits(logits, lse.unsqueeze(1), gradient, targets.unsqueeze(1) - block.start)
            else:
                d_logits = _block_logits(hidden, weight[block]).float().sub_(lse.unsqueeze(1)).exp_().mul_(-gradient)
                columns, inside = _targets_within(block, targets)
                of_targets = d_logits.gather(1, columns)
                d_logits.scatter_(1, columns, torch.where(inside, of_targets + gradient, of_targets))
                d_logits = d_logits.to(hidden.dtype)
            d_hidden += d_logits @ weight[block].to(hidden.dtype)
            if d_weight is not None:
                d_weight[block] = d_logits.t() @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None


def block_width(tokens: int, vocabulary: int, on_gpu: bool) -> int:
    """Entries of the vocabulary whose logits exist at once for `tokens` tokens."""
    limit = LOGITS_ON_GPU if on_gpu else LOGITS
    width = max(limit // max(tokens, 1), NARROWEST)
    if on_gpu:
        width -= width % ALIGNED
    return min(width, vocabulary)


def _vocabulary_blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = block_width(len(hidden), len(weight), hidden.is_cuda)
    return (slice(low, min(low + size, len(weight))) for low in range(0, len(weight), size))


def _block_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(tokens, size), (block, size) -> (tokens, block), in the type of `hidden`."""
    return hidden @ weight.to(hidden.dtype).t()


@gpu_fusion.one_kernel
def _lse(logits: Tensor) -> Tensor:
    """(tokens, block), any type -> its log-sum-exp, (tokens,), float32."""
    wide = logits.float()
    highest = wide.amax(dim=1, keepdim=True)
    return ((wide - highest).exp().sum(dim=1, keepdim=True).log() + highest).squeeze(1)


@gpu_fusion.one_kernel
def _d_logits(logits: Tensor, lse: Tensor, gradient: Tensor, columns: Tensor) -> Tensor:
    """g (onehot(target) - p) in the type of the logits.

    Args:
        logits: (tokens, block).
        lse: of the whole vocabulary, (tokens, 1), float32; `gradient` likewise.
        columns: of each target, counted from the block's first entry, (tokens, 1); it may lie outside.
    """
    p = (logits.float() - lse).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == columns
    return (gradient * torch.where(is_target, 1 - p, -p)).to(logits.dtype)


def _targets_within(block: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The column of each target in a block of the vocabulary, and whether it lies there; (tokens, 1) each.

    A target outside has the nearest column. To pick out those inside would make the host wait for a GPU, to count them.
    """
    columns = (targets - block.start).unsqueeze(1)
    inside = (columns >= 0) & (columns < block.stop - block.start)
    return columns.clamp(0, block.stop - block.start - 1), inside


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`, in float32 whatever the type of the logits: (..., vocab), (...) -> (...)."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
