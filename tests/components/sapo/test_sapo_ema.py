"""The EMA against Eq. 6 by hand."""

import pytest
import torch
from torch import nn

from components.sapo.ema import EMA, copy_weights, frozen_copy


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def weights(model: nn.Module) -> list[float]:
    return [round(x, 6) for p in model.parameters() for x in p.flatten().tolist()]


def test_update_by_hand():
    """alpha 0.5: 1 -> (1 + 3) / 2 = 2 -> (2 + 7) / 2 = 4.5. alpha 0.9: 1 -> 0.9 * 1 + 0.1 * 3 = 1.2."""
    policy = linear(1.0)
    half, slow = EMA(policy, 0.5), EMA(policy, 0.9)
    for value in (3.0, 7.0):
        copy_weights(linear(value), policy)
        half.update(policy)
        if value == 3.0:
            slow.update(policy)
            assert weights(half.model) == [2.0] * 3
    assert weights(half.model) == [4.5] * 3
    assert weights(slow.model) == [1.2] * 3
    assert (half.version, slow.version) == (2, 1)
    assert weights(policy) == [7.0] * 3  # the policy itself is only read


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (1.0, 1.0)])
def test_ends_of_the_range(decay, expected):
    policy = linear(1.0)
    ema = EMA(policy, decay)
    copy_weights(linear(3.0), policy)
    ema.update(policy)
    assert weights(ema.model) == [expected] * 3


def test_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"ema_decay = 1\.5"):
        EMA(linear(1.0), 1.5)


def test_copy_is_independent_and_frozen():
    model = linear(1.0)
    twin = frozen_copy(model)
    nn.init.constant_(model.weight, 5.0)
    assert weights(twin) == [1.0] * 3
    assert not any(p.requires_grad for p in twin.parameters())


def test_tied_weights_move_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)
            self.head = nn.Linear(2, 3, bias=False)
            self.head.weight = self.embedding.weight

    policy = Tied()
    nn.init.constant_(policy.embedding.weight, 1.0)
    ema = EMA(policy, 0.5)
    nn.init.constant_(policy.embedding.weight, 3.0)
    ema.update(policy)
    torch.testing.assert_close(ema.model.head.weight.data, torch.full((3, 2), 2.0))


def test_served_copy_follows_the_average_in_its_own_type():
    policy = linear(1.0)
    plain, cast = EMA(policy, 0.5), EMA(policy, 0.5, torch.bfloat16)
    copy_weights(linear(1.3), policy)
    for ema in (plain, cast):
        ema.update(policy)
    assert weights(cast.model) == weights(plain.model)
    assert plain.served is plain.model
    expected = [p.to(torch.bfloat16) for p in plain.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(cast.served.parameters(), expected, strict=True))


def test_loaded_average_is_served():
    policy, other = linear(1.0), linear(2.0)
    ema = EMA(policy, 0.5, torch.bfloat16)
    ema.load_state_dict(other.state_dict(), version=7)
    assert weights(ema.served) == weights(ema.model) == [2.0] * 3
    assert ema.version == 7
