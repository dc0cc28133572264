"""The paper's losses on log-probs that a benchmark has computed, ours or a peer's."""

from dataclasses import dataclass

from torch import Tensor

from components.sapo.losses import LOSSES, LossType, PairLogps


@dataclass
class Settings:
    """What the losses read, with the paper's values."""

    beta: float = 0.1
    orpo_lambda: float = 0.05
    label_smoothing: float = 0.1
    nll_weight: float = 1.0
    simpo_gamma: float = 0.5


def mean_loss(name: LossType, sums: Tensor, tokens: Tensor, reference: tuple[Tensor, ...] | None = None) -> Tensor:
    """The mean of a loss over pairs.

    Args:
        sums: log-probs of chosen responses, then of rejected ones, (2 * pairs,).
        tokens: of each response, (2 * pairs,).
        reference: the reference's sums, (pairs,) each.
    """
    chosen, rejected = sums.chunk(2)
    chosen_tokens, rejected_tokens = tokens.chunk(2)

    pairs = PairLogps(chosen, rejected, chosen_tokens, rejected_tokens, *(reference or (None, None)))
    return LOSSES[name].function(pairs, Settings()).losses.mean()
