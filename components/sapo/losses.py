"""Preference losses as pure functions of log-probs, and `LOSSES`, the table of what each needs from the trainer.

A new loss is a function here, its line in `LOSSES` (with its name in `LossType`) and its test. Everything is float32, one
value per pair: shape (pairs,). Equations are the paper's, except IPO, which it does not use.

DPO (Eq. 1):   L = -log sigmoid(beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))]), sums over response tokens.
ORPO (Eq. 3):  L = NLL(y+) - lambda log sigmoid(log odds(y+) - log odds(y-)), odds = p / (1 - p), where log p is the *mean*
               log-prob per response token.
IPO:           L = ([m(y+) - m(y-)] - 1 / (2 beta))^2, m = (log pi - log ref) / tokens of the response: Azar et al., arXiv
               2310.12036, Eq. 17, with the mean per token that its authors used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


def ipo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    reference_chosen_mean_logps: Tensor,
    reference_rejected_mean_logps: Tensor,
    beta: float,
) -> PairLoss:
    """Squared distance of the margin per token from 1 / (2 beta); `beta` is IPO's tau, in 1 / nats per token.

    Worked: policy -1.0 and -2.0, reference -1.2 and -1.5 nats per token, beta 0.5. The ratios are 0.2 and -0.5, the margin
    0.7, its target 1 / (2 * 0.5) = 1, so L = (0.7 - 1)^2 = 0.09. Unlike DPO's, this loss is 0 at a finite margin: a pair
    that is told apart well enough pulls no further. Rewards are times beta, so their margin aims at 0.5 whatever beta is.
    """
    chosen_ratios = chosen_mean_logps - reference_chosen_mean_logps
    rejected_ratios = rejected_mean_logps - reference_rejected_mean_logps
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * beta)) ** 2
    return PairLoss(losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach())


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


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss, and what the trainer must give it.

    Attributes:
        function: takes the policy's log-probs of chosen and rejected responses; then those of the reference, chosen and
            rejected, where `reference`; then the chosen NLL where `nll`; then the weight.
        weight: the setting that is its weight.
        reference: compares the policy with a frozen model, which is then kept and refreshed.
        nll: adds L_SFT, in nats per token, over the tokens of `nll_scope`.
        per_token: log-probs are means per response token, else sums.
        shared_cancels: tokens that both responses begin with do not change it, so they need not be scored. Never true of
            means: responses of different lengths weigh what they share differently.
    """

    function: Callable[..., PairLoss]
    weight: str
    reference: bool = False
    nll: bool = False
    per_token: bool = False
    shared_cancels: bool = False


LossType = Literal["dpo", "orpo", "ipo"]

LOSSES: dict[LossType, PreferenceLoss] = {
    "dpo": PreferenceLoss(dpo_loss, weight="beta", reference=True, shared_cancels=True),
    "orpo": PreferenceLoss(orpo_loss, weight="orpo_lambda", nll=True, per_token=True),
    "ipo": PreferenceLoss(ipo_loss, weight="beta", reference=True, per_token=True),
}
