"""Losses against values worked by hand from their equations; the table names every loss and what it takes."""

import inspect
import math
import typing

import pytest
import torch

from components.sapo.losses import LOSSES, LossType, dpo_loss, ipo_loss, log1mexp, log_odds, orpo_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand():
    """margin = 0.1 * ((-10 - -12) - (-20 - -15)) = 0.1 * (2 - -5) = 0.7, so L = -log sigmoid(0.7) = 0.40319."""
    loss = dpo_loss(*(torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0)), beta=0.1)
    assert loss.losses.item() == pytest.approx(-math.log(sigmoid(0.7)), abs=1e-6)
    assert loss.losses.item() == pytest.approx(0.403186, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.2)
    assert loss.rejected_rewards.item() == pytest.approx(-0.5)


def test_dpo_gradient_by_hand():
    """dL/dlog pi(y+) = -beta * sigmoid(-margin); the rejected one has the other sign."""
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-20.0], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-12.0]), torch.tensor([-15.0]), beta=0.1).losses.backward()
    assert chosen.grad.item() == pytest.approx(-0.1 * sigmoid(-0.7), abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.1 * sigmoid(-0.7), abs=1e-7)


def test_dpo_ignores_a_shared_prefix():
    logps = [torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0)]
    shifted = [logps[0] - 3, logps[1] - 3, logps[2] - 4, logps[3] - 4]
    assert dpo_loss(*logps, beta=0.1).losses.item() == pytest.approx(dpo_loss(*shifted, beta=0.1).losses.item())


def test_dpo_starts_at_log_two():
    logps = torch.tensor([-3.0, -100.0])
    assert dpo_loss(logps, logps - 5, logps, logps - 5, 0.1).losses.tolist() == pytest.approx([math.log(2)] * 2)


def test_orpo_by_hand():
    """p+ = 0.5 and p- = 0.2 per token: odds 1 and 0.25, log ratio ln 4, sigmoid 0.8.

    L = -ln 0.5 - 0.05 * ln 0.8 = 0.693147 + 0.011157 = 0.704304
    """
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)])
    loss = orpo_loss(chosen, rejected, chosen_nll=-chosen, weight=0.05)
    assert loss.losses.item() == pytest.approx(0.704304, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.05 * math.log(0.5))
    assert loss.rejected_rewards.item() == pytest.approx(0.05 * math.log(0.2))


@pytest.mark.parametrize("p", [1e-30, 1e-6, 0.01, 0.4999, 0.5, 0.5001, 0.99, 1 - 1e-6])
def test_log_odds_equals_the_definition_in_double_precision(p):
    logp = torch.tensor([math.log(p)], dtype=torch.float32)
    exact = logp.double() - torch.log(-torch.expm1(logp.double()))
    assert log_odds(logp).item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)


def test_log_odds_is_finite_at_probability_one():
    logps = torch.tensor([0.0, -1e-12, -1e-7, -200.0], requires_grad=True)
    values = log_odds(logps)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(logps.grad).all()


def test_log1mexp_has_a_finite_gradient_on_both_sides():
    x = torch.tensor([-1e-7, -0.6931, -0.6932, -50.0], requires_grad=True)
    log1mexp(x).sum().backward()
    expected = -torch.exp(x.double()) / -torch.expm1(x.double())
    torch.testing.assert_close(x.grad.double(), expected.detach(), rtol=1e-4, atol=1e-12)


def test_ipo_by_hand():
    """margin = (-1.0 - -1.2) - (-2.0 - -1.5) = 0.2 + 0.5 = 0.7, target 1 / (2 * 0.5) = 1, so L = (0.7 - 1)^2 = 0.09."""
    loss = ipo_loss(*(torch.tensor([x]) for x in (-1.0, -2.0, -1.2, -1.5)), beta=0.5)
    assert loss.losses.item() == pytest.approx(0.09, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.1)
    assert loss.rejected_rewards.item() == pytest.approx(-0.25)


def test_ipo_gradient_by_hand():
    """dL/dm(y+) = 2 (margin - target): -0.6 below the target, 0 on it, and the other way above it."""
    chosen = torch.tensor([-1.0, -0.7, -0.5], requires_grad=True)
    rest = [torch.tensor([x] * 3) for x in (-2.0, -1.2, -1.5)]
    ipo_loss(chosen, *rest, beta=0.5).losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.6, 0.0, 0.4], abs=1e-6)


def test_ipo_of_equal_policy_and_reference_is_the_target_squared():
    logps = torch.tensor([-3.0, -1.0])
    assert ipo_loss(logps, logps - 1, logps, logps - 1, 0.1).losses.tolist() == pytest.approx([25.0, 25.0])


def test_the_table_names_every_loss_and_what_its_function_takes():
    assert set(typing.get_args(LossType)) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert len(inspect.signature(loss.function).parameters) == 2 + 2 * loss.reference + loss.nll + 1, name
        assert not (loss.per_token and loss.shared_cancels), name
