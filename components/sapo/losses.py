"""The paper's two losses as pure functions of log-probs. Everything is float32, one value per pair: shape (pairs,).

DPO (Eq. 1):   L = -log sigmoid(beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))]), sums over response tokens.
ORPO (Eq. 3):  L = NLL(y+) - lambda log sigmoid(log odds(y+) - log odds(y-)), odds = p / (1 - p), where log p is the *mean*
               log-prob per response token.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LOG_HALF = -math.log(2.0)


class PairLoss(NamedTuple):
    """Per pair: the loss, and the implicit rewards of both responses (detached)."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> PairLoss:
    """Eq. 1 on summed log-probs; only differences matter, so a shared prefix may be left out of all four."""
    chosen_rewards = beta * (chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def orpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, chosen_nll: Tensor, weight: float) -> PairLoss:
    """Eq. 3 on mean log-probs per response token; `weight` is the paper's lambda, `chosen_nll` its L_SFT in nats per token."""
    log_odds_ratio = log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps)
    losses = chosen_nll - weight * F.logsigmoid(log_odds_ratio)
    return PairLoss(losses, weight * chosen_mean_logps.detach(), weight * rejected_mean_logps.detach())


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0; finite up to p = 1, where log1p(-exp(x)) is not."""
    logps = logps.clamp(max=-torch.finfo(torch.float32).eps)
    return logps - log1mexp(logps)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012): two forms that meet at -ln 2."""
    near_zero = x > LOG_HALF
    # Each form only sees arguments of its own side: `where` would otherwise turn inf * 0 in backward into NaN.
    small = torch.where(near_zero, x, LOG_HALF)
    large = torch.where(near_zero, LOG_HALF, x)
    return torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
