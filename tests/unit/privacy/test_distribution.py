"""Losses on a grid: never too small, and composed as they should."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import ConfigError
from fedsea.privacy.binomial_loss import BinomialLoss
from fedsea.privacy.distribution import LossDistribution, dominating, sampled
from fedsea.privacy.gaussian_loss import GaussianLoss, gaussian_delta

COIN = LossDistribution(math.log(3), -1, (0.25, 0.0, 0.75))


def test_delta_of_a_coin():
    """A coin of 3/4 against one of 1/4: delta(0) is their distance, delta(log 3) is nothing."""
    assert COIN.delta(0.0) == pytest.approx(0.5)
    assert COIN.delta(math.log(3)) == 0
    assert COIN.delta(-50.0) == pytest.approx(1)


def test_infinite_losses_stay():
    """What is infinite counts at every epsilon, and grows with every release."""
    law = LossDistribution(1.0, 0, (0.9,), 0.1)
    assert law.delta(1e6) == pytest.approx(0.1)
    assert law.power(3).delta(1e6) == pytest.approx(1 - 0.9**3)
    assert law.plus(law).delta(1e6) == pytest.approx(1 - 0.9**2)


@pytest.mark.parametrize("times", [2, 3, 7])
def test_power_is_repeated_addition(times):
    """The transform gives what adding one by one gives."""
    total = COIN
    for _ in range(times - 1):
        total = total.plus(COIN)
    for epsilon in (-2.0, 0.0, 0.5, 2.0, 3.3):
        assert COIN.power(times).delta(epsilon) == pytest.approx(total.delta(epsilon), abs=1e-11)


def test_powers_of_nothing_and_one():
    """No release costs nothing; one release is itself."""
    assert COIN.power(0).delta(0.0) == 0
    assert COIN.power(1) is COIN


@settings(max_examples=40)
@given(st.floats(0.05, 8), st.floats(0.005, 0.5), st.floats(-1.5, 1.5))
def test_a_sampled_curve_dominates(mu, share, where):
    """On the grid the curve is met; between its points the law is never below it."""
    reach = mu * mu / 2 + 8 * mu
    law = sampled(lambda epsilon: gaussian_delta(mu, epsilon), share * mu, reach)
    epsilon = where * reach
    assert law.delta(epsilon) >= gaussian_delta(mu, epsilon) - 1e-13
    point = round(epsilon / law.step) * law.step
    if abs(point) < reach:
        assert law.delta(point) == pytest.approx(gaussian_delta(mu, point), abs=1e-13)


def test_sums_of_different_laws_dominate():
    """Two Gaussian losses added on a grid are a little more than their exact sum."""
    step, exact = 0.02, GaussianLoss(math.hypot(1.0, 0.5))
    one = sampled(GaussianLoss(1.0).delta, step, 9)
    two = sampled(GaussianLoss(0.5).delta, step, 9)
    for epsilon in (0.0, 1.0, 3.0):
        found = one.plus(two).delta(epsilon)
        assert exact.delta(epsilon) <= found <= exact.delta(epsilon) * 1.001


def test_a_flat_curve_is_all_infinite():
    """A delta that never falls is a loss that is always infinite."""
    assert dominating(0.1, [1.0, 1.0, 1.0]).delta(1e3) == 1


@pytest.mark.parametrize(
    ("step", "masses", "infinite"),
    [(0.0, (1.0,), 0.0), (math.nan, (1.0,), 0.0), (1.0, (), 1.0), (1.0, (0.5,), 0.0),
     (1.0, (1.5, -0.5), 0.0), (1.0, (1.5,), -0.5), (1.0, (math.nan,), 0.0)],
)  # fmt: skip
def test_masses_are_a_law(step, masses, infinite):
    """What is no probability law on a grid is refused."""
    with pytest.raises(ConfigError):
        LossDistribution(step, 0, masses, infinite)


def test_grids_must_agree():
    """Losses on different grids are not added."""
    with pytest.raises(ConfigError, match="different grids"):
        COIN.plus(LossDistribution(1.0, 0, (1.0,)))


def test_too_many_points_are_refused():
    """What would not fit in memory is refused before it is tried."""
    with pytest.raises(ConfigError, match="too many"):
        LossDistribution(1e-6, -1, (0.5, 0.0, 0.5)).power(10**14)
    with pytest.raises(ConfigError, match="one grid"):
        sampled(lambda epsilon: 0.0, 1e-9, 10)


@pytest.mark.parametrize("releases", [10**4, 10**6, 10**8])
def test_rounding_of_many_releases_is_covered(releases):
    """The transform does not fall below binomial tails (which have nine digits themselves)."""
    chance = 0.51
    exact = BinomialLoss(releases, chance)
    total = LossDistribution(exact.step, -1, (1 - chance, 0.0, chance)).power(releases)
    middle = releases * exact.step * (2 * chance - 1)
    spread = 2 * exact.step * math.sqrt(releases * chance * (1 - chance))
    for deviations in (-8, -1, 0, 2, 4, 6):
        epsilon = middle + deviations * spread
        low, high = exact.delta(epsilon) * (1 - 2e-9), exact.delta(epsilon) + 1e-8
        assert low <= total.delta(epsilon) <= high
