"""Losses against values worked by hand from Eqs. 1 and 3."""

import math

import pytest
import torch

from components.sapo.losses import dpo_loss, log1mexp, log_odds, orpo_loss


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
