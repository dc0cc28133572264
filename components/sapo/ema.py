"""The exponential moving average of the policy (paper Eq. 6), and copies between models of one architecture."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that takes no gradients. Make it before a trainer wraps the model's forward."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.eval()


def weights_of(model: nn.Module, names: Sequence[str] | None = None) -> list[Tensor]:
    """A model's parameters, all or those named, as flat tensors that share its memory; tied ones once."""
    parameters = dict(model.named_parameters())
    return [parameters[name].data.view(-1) for name in names or parameters]


@torch.no_grad()
def copy_weights(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """target <- source, in place, cast to the type of the target."""
    torch._foreach_copy_(list(target), list(source))


class EMA:
    """theta_EMA <- decay * theta_EMA + (1 - decay) * theta, in place.

    Args:
        average: theta_EMA at the start, float32, one flat tensor a parameter, or this process's part of it; updated where
            it lies.
        decay: the paper's alpha, in [0, 1]. 0 follows the policy, 1 never moves.
        served: a copy of the average for the sampler, in a type of its own; None where the sampler does without.

    Attributes:
        version: updates done so far.
        served_version: updates that the served copy has.
    """

    def __init__(self, average: list[Tensor], decay: float, served: list[Tensor] | None = None) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema_decay = {decay}: must be within [0, 1]")
        self.average = average
        self.decay = decay
        self.served = served
        self.version = self.served_version = 0

    @property
    def serving(self) -> list[Tensor]:
        """What the sampler is to have."""
        return self.average if self.served is None else self.served

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], serve: bool = True) -> None:
        """One step of Eq. 6.

        Args:
            weights: theta, in the order and shapes of the average.
            serve: whether the sampler gets this version, so that a copy for it follows.
        """
        if serve and self.served is not None:
            # Each is cast while it is still in the cache: one pass over the average instead of two.
            for average, weight, copy_ in zip(self.average, weights, self.served, strict=True):
                copy_.copy_(average.lerp_(weight, 1.0 - self.decay))
        else:
            torch._foreach_lerp_(self.average, list(weights), 1.0 - self.decay)
        self.version += 1
        if serve:
            self.served_version = self.version
