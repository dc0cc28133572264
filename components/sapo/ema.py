"""The exponential moving average of the policy (paper Eq. 6), and copies between models of one architecture."""

import copy

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that takes no gradients. Make it before a trainer wraps the model's forward."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.eval()


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers as plain tensors; tied weights once."""
    return [parameter.data for parameter in model.parameters()] + list(model.buffers())


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """target <- source, in place."""
    torch._foreach_copy_(_tensors(target), _tensors(source))


@torch.no_grad()
def relative_distance(model: nn.Module, other: nn.Module) -> float:
    """|theta - theta_other| / |theta_other| over all parameters, in the Euclidean norm."""
    # One parameter at a time: a difference of all at once would be another copy of the model.
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    difference = torch.stack([(mine - theirs).float().norm() for mine, theirs in pairs]).norm()
    return float(difference / torch.stack([theirs.float().norm() for _, theirs in pairs]).norm())


class EMA:
    """theta_EMA <- decay * theta_EMA + (1 - decay) * theta, in place, starting at theta.

    Args:
        policy: the model to follow; copied.
        decay: the paper's alpha, in [0, 1]. 0 follows the policy, 1 never moves.

        served_dtype: type of a copy for the sampler; None samples with the average where it lies.

    Attributes:
        model: the averaged weights, without gradients.
        version: updates done so far.
        served: what samples: `model`, or the copy.
        served_version: updates that `served` has.
    """

    def __init__(self, policy: nn.Module, decay: float, served_dtype: torch.dtype | None = None) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"ema_decay = {decay}: must be within [0, 1]")
        self.model = frozen_copy(policy)
        self.served = self.model if served_dtype is None else frozen_copy(policy).to(served_dtype)
        self.decay = decay
        self.version = self.served_version = 0

    @torch.no_grad()
    def update(self, policy: nn.Module, serve: bool = True) -> None:
        """One step of Eq. 6 over all parameters; buffers (such as rotary tables) are constants.

        Args:
            serve: whether the copy for the sampler, if there is one, follows.
        """
        mine = [parameter.data for parameter in self.model.parameters()]
        theirs = [parameter.data for parameter in policy.parameters()]
        if serve and self.served is not self.model:
            # Each is cast while it is still in the cache: one pass over the average instead of two.
            for average, parameter, copy_ in zip(mine, theirs, self.served.parameters(), strict=True):
                copy_.data.copy_(average.lerp_(parameter, 1.0 - self.decay))
        else:
            torch._foreach_lerp_(mine, theirs, 1.0 - self.decay)
        self.version += 1
        if serve or self.served is self.model:
            self.served_version = self.version

    def load_state_dict(self, weights: dict[str, Tensor], version: int) -> None:
        """Puts back the average, and what is served from it."""
        self.model.load_state_dict(weights)
        if self.served is not self.model:
            copy_weights(self.model, self.served)
        self.version = self.served_version = version
