"""Gaussian differential privacy: golden numbers, limits and laws."""

from __future__ import annotations

import math

import mpmath
import pytest
from dp_accounting.pld import privacy_loss_distribution as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsea.errors import ConfigError
from fedsea.privacy.distribution import sampled
from fedsea.privacy.gaussian_loss import GaussianLoss, gaussian_delta, gaussian_mu
from fedsea.privacy.loss import PrivacyLoss, least_line

GOLDEN = [
    (1.0, 1e-5, 0.26805, 3.73),
    (4.0, 1e-5, 0.92493, 1.08),
    (8.0, 1e-5, 1.66603, 0.600),
    (16.0, 1e-5, 2.90548, 0.344),
    (64.0, 1e-5, 7.89179, 0.127),
    (256.0, 1e-5, 18.8000, 0.053),
]


@pytest.mark.parametrize(("epsilon", "delta", "mu", "sigma"), GOLDEN)
def test_golden_table(epsilon, delta, mu, sigma):
    """mu and sigma / sensitivity of the analytic Gaussian mechanism, to the digits printed."""
    found = gaussian_mu(epsilon, delta)
    assert found == pytest.approx(mu, rel=1e-5)
    assert 1 / found == pytest.approx(sigma, rel=1e-2)
    assert GaussianLoss(found).epsilon(delta) == pytest.approx(epsilon, rel=1e-9)
    assert GaussianLoss(found).delta(epsilon) <= delta


@pytest.mark.parametrize(
    ("mu", "prior", "bound"),
    [(1, 1 / 32000, 0.0013), (2, 1 / 32000, 0.023), (3, 1 / 32000, 0.158), (4, 1 / 32000, 0.499),
     (1, 0.01, 0.092), (2, 0.01, 0.37), (1, 0.35, 0.73), (3, 0.35, 0.995)],
)  # fmt: skip
def test_golden_recovery(mu, prior, bound):
    """The bound on recovery that people are shown."""
    assert GaussianLoss(mu).recovery_bound(prior) == pytest.approx(bound, rel=0.03)


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("share", [-0.9, 0.0, 0.5, 1.0, 3.0, 8.0])
def test_against_many_digits(mu, share):
    """Twelve digits at every epsilon, negative and huge ones included (fifty-digit arithmetic)."""
    epsilon = share * (mu * mu / 2 + 3 * mu)
    with mpmath.workdps(50):
        exact = mpmath.ncdf(mpmath.mpf(mu) / 2 - mpmath.mpf(epsilon) / mu) - mpmath.exp(
            epsilon
        ) * mpmath.ncdf(-mpmath.mpf(mu) / 2 - mpmath.mpf(epsilon) / mu)
    assert gaussian_delta(mu, epsilon) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("mu", [0.3, 1.0, 4.0])
def test_three_ways(mu):
    """Closed form, a public accountant and samples agree on delta."""
    epsilon = mu * mu / 2 + mu
    closed = GaussianLoss(mu).delta(epsilon)
    table = oracle.from_gaussian_mechanism(1 / mu, value_discretization_interval=1e-3)
    drawn = stats.norm.rvs(mu * mu / 2, mu, size=100_000, random_state=1)
    gains = [max(0.0, -math.expm1(epsilon - loss)) for loss in drawn]
    assert table.get_delta_for_epsilon(epsilon) == pytest.approx(closed, rel=1e-3)
    assert math.fsum(gains) / len(gains) == pytest.approx(closed, rel=0.05)


@pytest.mark.parametrize("times", [2, 64, 1000])
def test_composition_agrees_with_convolution(times):
    """mu sqrt(n) is what convolving the loss n times gives, a little rounded up."""
    loss = GaussianLoss(0.2)
    reach = loss.epsilon(1e-15)
    total = sampled(loss.delta, reach / 500, reach).power(times)
    epsilon = loss.composed(times).epsilon(1e-6)
    assert 1e-6 * (1 - 1e-6) <= total.delta(epsilon) <= 1e-6 * 1.01


@settings(max_examples=50)
@given(st.floats(1e-3, 100), st.floats(1.001, 3), st.floats(0, 1000))
def test_delta_rises_with_mu_and_falls_with_epsilon(mu, factor, epsilon):
    """Less noise never helps; a larger epsilon never needs a larger delta."""
    assert gaussian_delta(mu, epsilon) <= gaussian_delta(mu * factor, epsilon) + 1e-15
    assert gaussian_delta(mu, epsilon + 0.1) <= gaussian_delta(mu, epsilon) + 1e-15


@settings(max_examples=50)
@given(st.floats(1e-3, 1e4), st.floats(1e-12, 0.5))
def test_calibration_inverts(epsilon, delta):
    """mu from (epsilon, delta) gives them back, never exceeds delta, and is the largest such."""
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_delta(mu, epsilon) <= delta
    assert gaussian_delta(mu * (1 + 1e-6), epsilon) > delta


@settings(max_examples=30)
@given(st.floats(0.01, 6), st.floats(1e-6, 0.99))
def test_the_bound_is_the_trade_off(mu, prior):
    """Phi(Phi^-1(prior) + mu) is the least e^epsilon prior + delta(epsilon)."""
    loss = GaussianLoss(mu)
    assert least_line(loss.delta, prior) == pytest.approx(loss.recovery_bound(prior), rel=1e-6)
    assert PrivacyLoss.recovery_bound(loss, prior) == least_line(loss.delta, prior)


@given(st.floats(0, 10), st.floats(1e-6, 1))
def test_a_reference_law_tightens_the_bound(mu, prior):
    """With half of mu the bound is smaller, and never below the prior."""
    tight = GaussianLoss(mu, mu / 2).recovery_bound(prior)
    assert prior * (1 - 1e-9) <= tight <= GaussianLoss(mu).recovery_bound(prior)


def test_nothing_released_costs_nothing():
    """mu = 0: no delta, no epsilon, no gain over guessing."""
    loss = GaussianLoss(1.0, 0.5).composed(0)
    assert (loss.delta(0.0), loss.epsilon(1e-9), loss.mu()) == (0.0, 0.0, 0.0)
    assert loss.recovery_bound(0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("mu", [-1.0, math.nan, math.inf])
def test_mu_must_be_a_number(mu):
    """No loss is made of what is no mu."""
    with pytest.raises(ConfigError, match="mu"):
        GaussianLoss(mu)


@pytest.mark.parametrize("reference", [-0.1, 1.1, math.nan])
def test_a_reference_is_no_farther_than_the_neighbour(reference):
    """A reference beyond mu would loosen what it should tighten."""
    with pytest.raises(ConfigError, match="reference"):
        GaussianLoss(1.0, reference)


@pytest.mark.parametrize(("epsilon", "delta"), [(-1, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5),
                                                (1, 0), (1, 1), (1, math.nan)])  # fmt: skip
def test_calibration_refuses_what_is_no_guarantee(epsilon, delta):
    """epsilon and delta out of range."""
    with pytest.raises(ConfigError):
        gaussian_mu(epsilon, delta)


def test_counts_and_probabilities_are_checked():
    """Negative counts and impossible priors or deltas are refused."""
    loss = GaussianLoss(1.0)
    with pytest.raises(ConfigError, match="releases"):
        loss.composed(-1)
    for prior in (0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="prior"):
            loss.recovery_bound(prior)
    for delta in (0, 1, math.nan):
        with pytest.raises(ConfigError, match="delta"):
            loss.epsilon(delta)
