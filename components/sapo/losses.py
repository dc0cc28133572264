"""Preference losses as pure functions of log-probs, and `LOSSES`, the table of what each takes.

A new loss is a function here, its entry in `LOSSES` (with its name in `LossType` and its settings in `config.py`) and its test.
A loss takes `(PairLogps, args)`; it reads the settings that its entry names. Everything is float32, one value a pair, (pairs,).

    DPO    (Eq. 1)  -log sigmoid(m),  m = beta [(log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))], sums over tokens
    ORPO   (Eq. 3)  NLL(y+) - lambda log sigmoid(log odds(y+) - log odds(y-)),  odds = p / (1 - p), log p per token
    IPO             ([d(y+) - d(y-)] - 1 / (2 beta))^2,  d = (log pi - log ref) per token
    cDPO            -(1 - eps) log sigmoid(m) - eps log sigmoid(-m),  m as in DPO
    RPO             -log sigmoid(m) + alpha NLL(y+),  m as in DPO
    SimPO           -log sigmoid(beta [log pi(y+) - log pi(y-)] - gamma),  log pi per token

Equations with a number are the paper's. IPO is Azar et al., arXiv 2310.12036, Eq. 17, with the mean per token of its authors'
code; cDPO is Mitchell's note (https://ericmitchell.ai/cdpo.pdf, Eq. 3); RPO is Pang et al., arXiv 2404.19733, Eq. 1; SimPO is
Meng et al., arXiv 2405.14734, Eq. 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LOG_HALF = -math.log(2.0)


class PairLogps(NamedTuple):
    """What a loss may read of a micro-batch of pairs; each is (pairs,), float32.

    Attributes:
        chosen, rejected: the policy's log-probs, summed over response tokens. Tokens that both responses begin with are left
            out where the loss says that they cancel.
        chosen_tokens, rejected_tokens: tokens of the whole responses.
        reference_chosen, reference_rejected: the reference's, summed over the same tokens; None for a loss without one.
        sequence_nll: L_SFT over prompt and chosen response, in nats per token; None unless `nll_scope` is "sequence".
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    sequence_nll: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log pi - log ref of both responses, summed over tokens."""
        assert self.reference_chosen is not None and self.reference_rejected is not None  # its entry says `reference`

        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def means(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probs of both responses, per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens

    def reference_means(self) -> tuple[Tensor, Tensor]:
        """The reference's, per token."""
        assert self.reference_chosen is not None and self.reference_rejected is not None

        return self.reference_chosen / self.chosen_tokens, self.reference_rejected / self.rejected_tokens

    def nll(self, chosen_mean: Tensor) -> Tensor:
        """L_SFT in nats per token: over the chosen response, whose mean log-prob is given, or over the whole sequence."""
        return -chosen_mean if self.sequence_nll is None else self.sequence_nll


class PairLoss(NamedTuple):
    """Per pair: the loss, and the implicit rewards of both responses (detached)."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class LossSettings(Protocol):
    """The settings that losses read; each reads those that its entry names."""

    beta: float
    orpo_lambda: float
    label_smoothing: float
    nll_weight: float
    simpo_gamma: float


def dpo_loss(logps: PairLogps, args: LossSettings) -> PairLoss:
    """Eq. 1 on summed log-probs; only differences matter, so a shared prefix may be left out of all four."""
    chosen_ratios, rejected_ratios = logps.log_ratios()

    chosen_rewards = args.beta * chosen_ratios
    rejected_rewards = args.beta * rejected_ratios

    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def cdpo_loss(logps: PairLogps, args: LossSettings) -> PairLoss:
    """DPO for labels that are wrong with probability `label_smoothing` (eps): margins beyond log((1 - eps) / eps) cost.

    Worked: m = 0.7 and eps 0.1: -0.9 log sigmoid(0.7) - 0.1 log sigmoid(-0.7) = 0.9 * 0.403186 + 0.1 * 1.103186 = 0.473186.
    """
    _, chosen_rewards, rejected_rewards = dpo_loss(logps, args)
    chosen_ratios, rejected_ratios = logps.log_ratios()

    margins = args.beta * chosen_ratios - args.beta * rejected_ratios
    eps = args.label_smoothing

    losses = -(1 - eps) * F.logsigmoid(margins) - eps * F.logsigmoid(-margins)
    return PairLoss(losses, chosen_rewards, rejected_rewards)


def rpo_loss(logps: PairLogps, args: LossSettings) -> PairLoss:
    """DPO plus `nll_weight` (alpha) times the NLL of the chosen response per token, which keeps its log-prob from falling."""
    preference = dpo_loss(logps, args)
    chosen_mean, _ = logps.means()

    return preference._replace(losses=preference.losses + args.nll_weight * logps.nll(chosen_mean))


def orpo_loss(logps: PairLogps, args: LossSettings) -> PairLoss:
    """Eq. 3 on mean log-probs per response token; `orpo_lambda` is the paper's lambda, the NLL its L_SFT."""
    chosen, rejected = logps.means()
    weight = args.orpo_lambda

    log_odds_ratio = log_odds(chosen) - log_odds(rejected)
    losses = logps.nll(chosen) - weight * F.logsigmoid(log_odds_ratio)
    return PairLoss(losses, weight * chosen.detach(), weight * rejected.detach())


def ipo_loss(logps: PairLogps, args: LossSettings) -> PairLoss:
    """Squared distance of the margin per token from 1 / (2 beta); `beta` is IPO's tau, in 1 / nats per token.

    Worked: policy -1.0 and -2.0, reference -1.2 and -1.5 nats per token, beta 0.5. The ratios are 0.2 and -0.5, the margin
    0.7, its target 1 / (2 * 0.5) = 1, so L = (0.7 - 1)^2 = 0.09. Unlike DPO's, this loss is 0 at a finite margin: a pair
    that is told apart well enough pulls no further. Rewards are times beta, so their margin aims at 0.5 whatever beta is.
    """
    chosen, rejected = logps.means()
    reference_chosen, reference_rejected = logps.reference_means()

    chosen_ratios = chosen - reference_chosen
    rejected_ratios = rejected - reference_rejected

    losses = (chosen_ratios - rejected_ratios - 1 / (2 * args.beta)) ** 2
    return PairLoss(losses, args.beta * chosen_ratios.detach(), args.beta * rejected_ratios.detach())


def simpo_loss(logps: PairLogps, args: LossSettings) -> PairLoss:
    """Mean log-probs are the rewards, without a reference; `simpo_gamma` is the margin that they are to have.

    Worked: -1.0 and -1.5 nats per token, beta 2, gamma 0.5: L = -log sigmoid(2 * 0.5 - 0.5) = -log sigmoid(0.5) = 0.474077.
    """
    chosen, rejected = logps.means()

    chosen_rewards = args.beta * chosen
    rejected_rewards = args.beta * rejected

    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - args.simpo_gamma)
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


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
    """A loss, and what it takes.

    Attributes:
        function: (log-probs, settings) -> loss of each pair.
        settings: those that it reads, by name.
        reference: compares the policy with a frozen model, which is then kept and refreshed.
        nll: reads L_SFT, over the tokens of `nll_scope`.
        per_token: compares means per response token, else sums.
        shared_cancels: tokens that both responses begin with do not change it, so they need not be scored. Never true of
            means: responses of different lengths weigh what they share differently. Nor of an NLL, which wants every token.
        reward_scale: the setting that turns log-probs into rewards, for held-out pairs too; None: rewards are log-probs.
    """

    function: Callable[[PairLogps, LossSettings], PairLoss]
    settings: tuple[str, ...]
    reference: bool = False
    nll: bool = False
    per_token: bool = False
    shared_cancels: bool = False
    reward_scale: str | None = "beta"


LossType = Literal["dpo", "orpo", "ipo", "cdpo", "rpo", "simpo"]

LOSSES: dict[LossType, PreferenceLoss] = {
    "dpo": PreferenceLoss(dpo_loss, settings=("beta",), reference=True, shared_cancels=True),
    "orpo": PreferenceLoss(orpo_loss, settings=("orpo_lambda",), nll=True, per_token=True, reward_scale=None),
    "ipo": PreferenceLoss(ipo_loss, settings=("beta",), reference=True, per_token=True),
    "cdpo": PreferenceLoss(cdpo_loss, settings=("beta", "label_smoothing"), reference=True, shared_cancels=True),
    "rpo": PreferenceLoss(rpo_loss, settings=("beta", "nll_weight"), reference=True, nll=True),
    "simpo": PreferenceLoss(simpo_loss, settings=("beta", "simpo_gamma"), per_token=True),
}
