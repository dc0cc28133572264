"""Losses against values worked by hand from their equations; the table names every loss and what it takes."""

import dataclasses
import math
import typing
from types import SimpleNamespace

import pytest
import torch

from components.sapo.config import SAPOConfig
from components.sapo.losses import (
    LOSSES,
    LossType,
    PairLogps,
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    log1mexp,
    log_odds,
    orpo_loss,
    rpo_loss,
    simpo_loss,
)


def one_token(chosen, rejected, *reference, sequence_nll=None) -> PairLogps:
    """Pairs of one-token responses, whose sums are their means."""
    ones = torch.ones(len(chosen))
    return PairLogps(chosen, rejected, ones, ones, *(reference or (None, None)), sequence_nll)


def settings(**values: float) -> SimpleNamespace:
    """Those of a loss; one that it is not told is missing."""
    return SimpleNamespace(**values)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand():
    """margin = 0.1 * ((-10 - -12) - (-20 - -15)) = 0.1 * (2 - -5) = 0.7, so L = -log sigmoid(0.7) = 0.40319."""
    loss = dpo_loss(one_token(*(torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0))), settings(beta=0.1))
    assert loss.losses.item() == pytest.approx(-math.log(sigmoid(0.7)), abs=1e-6)
    assert loss.losses.item() == pytest.approx(0.403186, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.2)
    assert loss.rejected_rewards.item() == pytest.approx(-0.5)


def test_dpo_gradient_by_hand():
    """dL/dlog pi(y+) = -beta * sigmoid(-margin); the rejected one has the other sign."""
    chosen = torch.tensor([-10.0], requires_grad=True)
    rejected = torch.tensor([-20.0], requires_grad=True)
    logps = one_token(chosen, rejected, torch.tensor([-12.0]), torch.tensor([-15.0]))
    dpo_loss(logps, settings(beta=0.1)).losses.backward()
    assert chosen.grad.item() == pytest.approx(-0.1 * sigmoid(-0.7), abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.1 * sigmoid(-0.7), abs=1e-7)


def test_dpo_ignores_a_shared_prefix():
    logps = [torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0)]
    shifted = [logps[0] - 3, logps[1] - 3, logps[2] - 4, logps[3] - 4]
    losses = [dpo_loss(one_token(*some), settings(beta=0.1)).losses.item() for some in (logps, shifted)]
    assert losses[0] == pytest.approx(losses[1])


def test_dpo_starts_at_log_two():
    logps = torch.tensor([-3.0, -100.0])
    assert dpo_loss(one_token(logps, logps - 5, logps, logps - 5), settings(beta=0.1)).losses.tolist() == pytest.approx(
        [math.log(2)] * 2
    )


def test_orpo_by_hand():
    """p+ = 0.5 and p- = 0.2 per token: odds 1 and 0.25, log ratio ln 4, sigmoid 0.8.

    L = -ln 0.5 - 0.05 * ln 0.8 = 0.693147 + 0.011157 = 0.704304
    """
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)])
    loss = orpo_loss(one_token(chosen, rejected), settings(orpo_lambda=0.05))
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
    loss = ipo_loss(one_token(*(torch.tensor([x]) for x in (-1.0, -2.0, -1.2, -1.5))), settings(beta=0.5))
    assert loss.losses.item() == pytest.approx(0.09, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.1)
    assert loss.rejected_rewards.item() == pytest.approx(-0.25)


def test_ipo_gradient_by_hand():
    """dL/dm(y+) = 2 (margin - target): -0.6 below the target, 0 on it, and the other way above it."""
    chosen = torch.tensor([-1.0, -0.7, -0.5], requires_grad=True)
    rest = [torch.tensor([x] * 3) for x in (-2.0, -1.2, -1.5)]
    ipo_loss(one_token(chosen, *rest), settings(beta=0.5)).losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.6, 0.0, 0.4], abs=1e-6)


def test_ipo_of_equal_policy_and_reference_is_the_target_squared():
    logps = torch.tensor([-3.0, -1.0])
    loss = ipo_loss(one_token(logps, logps - 1, logps, logps - 1), settings(beta=0.1))
    assert loss.losses.tolist() == pytest.approx([25.0, 25.0])


def test_means_are_per_token():
    """Sums -4 and -9 over 2 and 3 tokens are means -2 and -3; the reference's -6 and -6 are -3 and -2."""
    logps = PairLogps(*(torch.tensor([x]) for x in (-4.0, -9.0, 2.0, 3.0, -6.0, -6.0)))
    assert [mean.item() for mean in logps.means()] == [-2.0, -3.0]
    assert [mean.item() for mean in logps.reference_means()] == [-3.0, -2.0]
    assert [ratio.item() for ratio in logps.log_ratios()] == [2.0, -3.0]


def test_cdpo_by_hand():
    """m = 0.7 as for DPO and eps 0.1: 0.9 * 0.403186 + 0.1 * 1.103186 = 0.473186."""
    logps = one_token(*(torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0)))
    loss = cdpo_loss(logps, settings(beta=0.1, label_smoothing=0.1))
    assert loss.losses.item() == pytest.approx(0.473186, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.2)
    assert loss.losses.item() != dpo_loss(logps, settings(beta=0.1)).losses.item()


def test_cdpo_pulls_back_a_margin_beyond_its_target():
    """The gradient is 0 at the margin log((1 - eps) / eps)."""
    eps, beta = 0.2, 0.5
    target = math.log((1 - eps) / eps) / beta
    chosen = torch.tensor([target - 1, target, target + 1], requires_grad=True)
    zeros = torch.zeros(3)
    cdpo_loss(one_token(chosen, zeros, zeros, zeros), settings(beta=beta, label_smoothing=eps)).losses.sum().backward()
    assert chosen.grad[0] < 0 and chosen.grad[2] > 0
    assert chosen.grad[1].item() == pytest.approx(0.0, abs=1e-6)


def test_rpo_by_hand():
    """DPO's 0.403186 plus 0.5 times the NLL per token, 10 / 4 = 2.5: 1.653186."""
    logps = PairLogps(*(torch.tensor([x]) for x in (-10.0, -20.0, 4.0, 5.0, -12.0, -15.0)))
    loss = rpo_loss(logps, settings(beta=0.1, nll_weight=0.5))
    assert loss.losses.item() == pytest.approx(1.653186, abs=1e-6)
    of_sequence = logps._replace(sequence_nll=torch.tensor([3.0]))
    assert rpo_loss(of_sequence, settings(beta=0.1, nll_weight=0.5)).losses.item() == pytest.approx(1.903186, abs=1e-6)


def test_simpo_by_hand():
    """-1.0 and -1.5 nats per token, beta 2, gamma 0.5: L = -log sigmoid(2 * 0.5 - 0.5) = 0.474077."""
    loss = simpo_loss(one_token(torch.tensor([-1.0]), torch.tensor([-1.5])), settings(beta=2.0, simpo_gamma=0.5))
    assert loss.losses.item() == pytest.approx(0.474077, abs=1e-6)
    assert (loss.chosen_rewards.item(), loss.rejected_rewards.item()) == (-2.0, -3.0)


def pairs_for(name: LossType) -> PairLogps:
    generator = torch.Generator().manual_seed(0)
    logps = [-20 * torch.rand(3, generator=generator) - 1 for _ in range(4)]
    return PairLogps(logps[0], logps[1], torch.full((3,), 7.0), torch.full((3,), 5.0), *logps[2:])


@pytest.mark.parametrize("name", typing.get_args(LossType))
def test_the_table_names_every_loss_with_the_settings_it_reads(name):
    loss = LOSSES[name]
    declared = {field.name for field in dataclasses.fields(SAPOConfig)}
    assert set(loss.settings) <= declared
    assert loss.reward_scale is None or loss.reward_scale in loss.settings

    # It runs on what its entry names, and on nothing else; each setting that it names counts.
    pairs = pairs_for(name)
    if not loss.reference:
        pairs = pairs._replace(reference_chosen=None, reference_rejected=None)
    given = dict.fromkeys(loss.settings, 0.3)
    expected = loss.function(pairs, settings(**given)).losses
    for setting in loss.settings:
        other = loss.function(pairs, settings(**given | {setting: 0.4})).losses
        assert not torch.equal(other, expected), setting


@pytest.mark.parametrize("name", typing.get_args(LossType))
def test_what_the_table_says_of_a_loss_is_true_of_its_function(name):
    loss, pairs = LOSSES[name], pairs_for(name)
    given = settings(**dict.fromkeys(loss.settings, 0.3))
    expected = loss.function(pairs, given).losses

    def changes(**others: torch.Tensor) -> bool:
        return not torch.allclose(loss.function(pairs._replace(**others), given).losses, expected, rtol=1e-6)

    assert changes(reference_chosen=pairs.chosen - 1) == loss.reference
    assert changes(sequence_nll=torch.full((3,), 9.0)) == loss.nll
    assert changes(rejected_tokens=torch.full((3,), 6.0)) == loss.per_token
    assert changes(chosen=pairs.chosen - 1, rejected=pairs.rejected - 1) != loss.shared_cancels
    assert set(typing.get_args(LossType)) == set(LOSSES)
