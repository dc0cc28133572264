"""The EMA against Eq. 6 by hand."""

import pytest
import torch
from torch import nn

from components.sapo.ema import EMA, copy_weights, frozen_copy, weights_of


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def weights(model: nn.Module) -> list[float]:
    return [round(x, 6) for p in model.parameters() for x in p.flatten().tolist()]


def average_of(model: nn.Module, decay: float, dtype: torch.dtype | None = None) -> EMA:
    """An EMA that starts as the model and shares nothing with it."""
    served = None if dtype is None else weights_of(frozen_copy(model).to(dtype))
    return EMA(weights_of(frozen_copy(model)), decay, served)


def values(tensors: list[torch.Tensor]) -> list[float]:
    return [round(x, 6) for tensor in tensors for x in tensor.tolist()]


def test_update_by_hand():
    """alpha 0.5: 1 -> (1 + 3) / 2 = 2 -> (2 + 7) / 2 = 4.5. alpha 0.9: 1 -> 0.9 * 1 + 0.1 * 3 = 1.2."""
    policy = linear(1.0)
    half, slow = average_of(policy, 0.5), average_of(policy, 0.9)
    for value in (3.0, 7.0):
        copy_weights(weights_of(linear(value)), weights_of(policy))
        half.update(weights_of(policy))
        if value == 3.0:
            slow.update(weights_of(policy))
            assert values(half.average) == [2.0] * 3
    assert values(half.average) == [4.5] * 3
    assert values(slow.average) == [1.2] * 3
    assert (half.version, slow.version) == (2, 1)
    assert weights(policy) == [7.0] * 3  # the policy itself is only read


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (1.0, 1.0)])
def test_ends_of_the_range(decay, expected):
    ema = average_of(linear(1.0), decay)
    ema.update(weights_of(linear(3.0)))
    assert values(ema.average) == [expected] * 3


def test_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"ema_decay = 1\.5"):
        average_of(linear(1.0), 1.5)


def test_copy_is_independent_and_frozen():
    model = linear(1.0)
    twin = frozen_copy(model)
    nn.init.constant_(model.weight, 5.0)
    assert weights(twin) == [1.0] * 3
    assert not any(p.requires_grad for p in twin.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_move_once_and_a_model_sees_it():
    policy = Tied()
    nn.init.constant_(policy.embedding.weight, 1.0)
    twin = frozen_copy(policy)
    ema = EMA(weights_of(twin), 0.5)
    nn.init.constant_(policy.embedding.weight, 3.0)
    ema.update(weights_of(policy))
    torch.testing.assert_close(twin.head.weight.data, torch.full((3, 2), 2.0))


def test_served_copy_follows_the_average_in_its_own_type():
    policy = linear(1.0)
    plain, cast = average_of(policy, 0.5), average_of(policy, 0.5, torch.bfloat16)
    for ema in (plain, cast):
        ema.update(weights_of(linear(1.3)))
    assert values(cast.average) == values(plain.average)
    assert plain.serving is plain.average and cast.serving is cast.served
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(cast.serving, plain.average, strict=True))


def test_an_update_that_is_not_served_leaves_the_copy():
    ema = average_of(linear(1.0), 0.5, torch.float32)
    ema.update(weights_of(linear(3.0)), serve=False)
    assert (values(ema.average), values(ema.serving)) == ([2.0] * 3, [1.0] * 3)
    assert (ema.version, ema.served_version) == (1, 0)
