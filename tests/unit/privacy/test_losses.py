"""Composing losses of any kind, and their JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.privacy.losses import (
    BinomialLoss,
    DiscreteLoss,
    GaussianLoss,
    LossDistribution,
    MixedLoss,
    compose,
    from_json,
)
from fedsea.privacy.metric_loss import metric_loss

COIN = DiscreteLoss(LossDistribution(math.log(1.5), -1, (0.4, 0.0, 0.6)))
HUGE = BinomialLoss(10**7, 0.9)
"""Its epsilon is 17 million: more than a grid of a few hundred points has in exponents of floats."""
NEVER = DiscreteLoss(LossDistribution(1.0, 0, (0.2,), 0.8))
"""Most of it is infinite: delta never falls under 0.8."""
KINDS = [
    GaussianLoss(1.5),
    GaussianLoss(1.5, 0.75),
    BinomialLoss(60, 0.6),
    COIN,
    DiscreteLoss(COIN.law, LossDistribution(0.1, -1, (0.5, 0.0, 0.5)), 7),
    metric_loss(3.0, 0.5, 16),
    MixedLoss((GaussianLoss(0.5), COIN)),
]


@pytest.mark.parametrize("loss", KINDS)
def test_json_round_trip(loss):
    """What is stored is read back as the same loss, through text."""
    again = from_json(json.loads(json.dumps(loss.to_json())))
    assert again == loss
    assert again.delta(0.7) == loss.delta(0.7)


@pytest.mark.parametrize("loss", KINDS)
def test_curves(loss):
    """delta falls from 1 at minus infinity, epsilon inverts it, recovery starts at the prior."""
    points = [loss.delta(epsilon) for epsilon in (-30.0, -1.0, 0.0, 0.5, 1.0, 3.0)]
    assert points[0] == pytest.approx(1, abs=1e-9)
    assert points == sorted(points, reverse=True)
    assert loss.delta(loss.epsilon(1e-4)) <= 1e-4
    assert loss.delta(loss.epsilon(1e-4) * (1 - 1e-6)) >= 1e-4 * 0.999
    assert 0.2 - 1e-9 <= loss.recovery_bound(0.2) < loss.recovery_bound(0.5) <= 1


@pytest.mark.parametrize("loss", KINDS)
def test_mu_is_not_too_small(loss):
    """The Gaussian curve of mu() lies on or above the loss at every epsilon."""
    gaussian = GaussianLoss(loss.mu())
    for index in range(40):
        epsilon = index / 40 * loss.epsilon(1e-7)
        assert gaussian.delta(epsilon) >= loss.delta(epsilon) * 0.995 - 1e-8


def test_nothing_composes_to_nothing():
    """The cost of no release."""
    assert compose([]).delta(0.0) == 0
    assert compose([GaussianLoss(0.0), BinomialLoss(3, 0.6)]) == BinomialLoss(3, 0.6)
    assert compose([GaussianLoss(0.0), GaussianLoss(0.0)]) == GaussianLoss(0.0)


def test_losses_of_one_law_compose_exactly():
    """Gaussian losses add squares, binomial losses trials, discrete losses times."""
    assert compose([GaussianLoss(3.0, 1.5), GaussianLoss(4.0, 2.0)]) == GaussianLoss(5.0, 2.5)
    assert compose([GaussianLoss(3.0, 1.5), GaussianLoss(4.0)]) == GaussianLoss(5.0)
    assert compose([BinomialLoss(5, 0.6), BinomialLoss(7, 0.6)]) == BinomialLoss(12, 0.6)
    assert compose([COIN, COIN.composed(4)]) == COIN.composed(5)


@settings(max_examples=8)
@given(st.floats(0.05, 5), st.integers(1, 200), st.floats(0.51, 0.8))
def test_a_mixture_costs_more_than_its_parts(mu, trials, chance):
    """Different kinds together: above each alone, and order does not matter."""
    one, other = GaussianLoss(mu), BinomialLoss(trials, chance)
    both = compose([one, other])
    for epsilon in (0.0, 0.5, 2.0):
        assert both.delta(epsilon) >= max(one.delta(epsilon), other.delta(epsilon)) * (1 - 1e-9)
        assert both.delta(epsilon) == pytest.approx(compose([other, one]).delta(epsilon), abs=1e-9)


def test_a_mixture_is_not_far_from_the_truth():
    """Two binomial laws that are all but Gaussian compose as Gaussian losses do."""
    parts = [BinomialLoss(100_000, 0.5 + 0.5 * mu / math.sqrt(4e5)) for mu in (1.0, 2.0)]
    found = compose(parts)
    assert isinstance(found, MixedLoss)
    assert found.epsilon(1e-5) == pytest.approx(GaussianLoss(math.sqrt(5)).epsilon(1e-5), rel=5e-3)


@pytest.mark.parametrize("part", [COIN, COIN.composed(4 * 10**6), HUGE, NEVER])
def test_a_mixture_holds_however_much_is_infinite(part):
    """Rounding makes more infinite with every release; a mixture is still no less than a part."""
    mixed = MixedLoss((GaussianLoss(2.0), part))
    for delta in (0.5, 1e-5, 1e-9):
        epsilon = part.epsilon(delta)
        assert mixed.epsilon(delta) >= epsilon
        if not math.isinf(epsilon):
            assert mixed.delta(epsilon) >= part.delta(epsilon)


def test_mixtures_compose_with_more():
    """Parts of a mixture join losses of their own kind, instead of nesting."""
    both = compose([GaussianLoss(3.0), COIN])
    more = compose([both, GaussianLoss(4.0), COIN])
    assert more == MixedLoss((GaussianLoss(5.0), COIN.composed(2)))
    assert both.composed(2) == MixedLoss((GaussianLoss(3.0).composed(2), COIN.composed(2)))


def test_discrete_composition_counts():
    """Composing twice multiplies; nothing and negatives are handled."""
    assert COIN.composed(3).composed(4) == COIN.composed(12)
    assert COIN.composed(0).delta(0.0) == 0
    with pytest.raises(ConfigError, match="releases"):
        COIN.composed(-1)
    with pytest.raises(ConfigError, match="at least one"):
        MixedLoss(())


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"kind": "laplace"},
        {"kind": "gaussian"},
        {"kind": "gaussian", "mu": "1"},
        {"kind": "gaussian", "mu": True},
        {"kind": "gaussian", "mu": -1},
        {"kind": "binomial", "trials": 1.5, "probability": 0.6},
        {"kind": "binomial", "trials": 3, "probability": 2},
        {"kind": "discrete", "law": None, "times": 1},
        {
            "kind": "discrete",
            "law": {"step": 1, "lowest": 0, "masses": 3, "infinite": 0},
            "times": 1,
        },
        {
            "kind": "discrete",
            "law": {"step": 1, "lowest": 0, "masses": ["x"], "infinite": 0},
            "times": 1,
        },
        {"kind": "mixed", "parts": []},
        {"kind": "mixed", "parts": [3]},
    ],
)
def test_damaged_json_is_refused(text):
    """A ledger with another text in it gives an error of ours."""
    with pytest.raises(ConfigError):
        from_json(text)
