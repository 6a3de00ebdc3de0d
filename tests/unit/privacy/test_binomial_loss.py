"""The exact accountant of stochastic quantization."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsea.errors import ConfigError
from fedsea.privacy.binomial_loss import BinomialLoss, binomial_masses
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.privacy.loss import PrivacyLoss


def del_loss(mu: float, bits: int, width: int = 128) -> BinomialLoss:
    """The loss of a DEL row whose scale the paper calibrates to mu."""
    levels = 2**bits - 1
    ratio = math.sqrt(1 + 4 * levels * width / mu**2)
    return BinomialLoss(levels * width, 0.5 + 0.5 / ratio)


@pytest.mark.parametrize(
    ("mu", "bits", "epsilon"), [(20, 4, 274.2), (20, 1, 184.6), (2, 4, 9.98), (1, 4, 4.37)]
)
def test_golden_epsilons(mu, bits, epsilon):
    """epsilon at delta = 1e-5 of a row of 128 counts."""
    assert del_loss(mu, bits).epsilon(1e-5) == pytest.approx(epsilon, rel=1e-3)


def test_a_prompt_of_256_tokens():
    """What 256 rows at mu = 20 cost: about epsilon 50,800."""
    assert del_loss(20, 4).composed(256).epsilon(1e-5) == pytest.approx(50_811, rel=1e-4)


def test_the_papers_figure_understates_delta():
    """At mu = 1 the Gaussian figure alone is up to 3.6e-5 too small."""
    exact, paper = del_loss(1, 4), GaussianLoss(1.0)
    gaps = [exact.delta(e) - paper.delta(e) for e in np.linspace(0, 4, 401)]
    assert max(gaps) == pytest.approx(3.6e-5, rel=0.05)


@pytest.mark.parametrize(("trials", "chance"), [(1, 0.9), (7, 0.6), (60, 0.55), (480, 0.52)])
def test_three_ways(trials, chance):
    """The sum, a public accountant fed with the two laws, and samples agree on delta."""
    loss = BinomialLoss(trials, chance)
    counts = np.arange(trials + 1)
    upper, lower = stats.binom(trials, chance), stats.binom(trials, 1 - chance)
    table = oracle.from_two_probability_mass_functions(
        dict(enumerate(lower.logpmf(counts))), dict(enumerate(upper.logpmf(counts)))
    )
    drawn = upper.rvs(100_000, random_state=1)
    for epsilon in (0.0, 0.3 * loss.pure_epsilon / math.sqrt(trials)):
        gains = -np.expm1(np.minimum(0, epsilon - loss.step * (2 * drawn - trials)))
        assert table.get_delta_for_epsilon(epsilon) == pytest.approx(loss.delta(epsilon), rel=2e-3)
        assert gains.mean() == pytest.approx(loss.delta(epsilon), rel=0.05)


@pytest.mark.parametrize(("trials", "chance"), [(5, 0.5), (40, 0.6), (1000, 0.9), (10**6, 0.501)])
def test_masses_have_ten_digits(trials, chance):
    """Probabilities of counts, ends included, against fifty-digit arithmetic."""
    spread = math.sqrt(trials * chance * (1 - chance))
    middle = trials * chance
    counts = sorted({0, 1, trials, *(int(middle + k * spread) for k in (-1, 0, 1))} - {-1})
    found = binomial_masses(np.array(counts, dtype=np.float64), trials, chance)
    with mpmath.workdps(50):
        exact = [
            mpmath.binomial(trials, k)
            * mpmath.mpf(chance) ** k
            * (1 - mpmath.mpf(chance)) ** (trials - k)
            for k in counts
        ]
    assert found == pytest.approx([float(value) for value in exact], rel=1e-9, abs=1e-290)


def test_pure_privacy():
    """At epsilon = N l delta is 0, and just below it is not."""
    loss = BinomialLoss(20, 0.6)
    assert loss.delta(loss.pure_epsilon) == 0
    assert loss.delta(loss.pure_epsilon - 0.01) > 0
    assert loss.epsilon(1e-300) == pytest.approx(loss.pure_epsilon, rel=1e-2)


@settings(max_examples=40)
@given(st.integers(1, 400), st.floats(0.5, 0.99), st.floats(0, 20))
def test_the_two_tails(trials, chance, epsilon):
    """The sum is the difference of tails that the formula names, where that can be computed."""
    loss = BinomialLoss(trials, chance)
    last = math.floor((epsilon / loss.step + trials) / 2) if loss.step else trials
    tails = stats.binom.sf(last, trials, chance) - math.exp(epsilon) * stats.binom.sf(
        last, trials, 1 - chance
    )
    assert loss.delta(epsilon) == pytest.approx(max(0.0, tails), abs=1e-9)


@settings(max_examples=30)
@given(st.integers(1, 300), st.floats(0.5, 0.95), st.integers(1, 20), st.floats(0, 5))
def test_composition_only_costs(trials, chance, times, epsilon):
    """More releases never have a smaller delta; trials add up."""
    one = BinomialLoss(trials, chance)
    many = one.composed(times)
    assert many.trials == trials * times
    assert many.delta(epsilon) >= one.delta(epsilon) - 1e-12


def test_mu_dominates():
    """mu-GDP with the returned mu is nowhere below the exact curve, up to the stated slack."""
    for loss in (del_loss(2, 4), del_loss(1, 1, 32), del_loss(20, 4)):
        gaussian = GaussianLoss(loss.mu())
        for epsilon in np.linspace(0, loss.epsilon(1e-7), 200):
            assert gaussian.delta(epsilon) >= loss.delta(epsilon) * (1 - 1e-3) - 1e-8


@settings(max_examples=30)
@given(st.integers(1, 500), st.floats(0.5, 0.9), st.floats(1e-5, 1))
def test_recovery_bound(trials, chance, prior):
    """Between the prior and what the pair of opposite corners would allow."""
    loss = BinomialLoss(trials, chance)
    bound = loss.recovery_bound(prior)
    assert prior <= bound <= min(1.0, PrivacyLoss.recovery_bound(loss, prior) * (1 + 1e-6) + 1e-9)


def test_recovery_bound_of_one_flip():
    """One flip of a coin of 0.8: knowing nothing about a fair bit, 0.8 is what can be had."""
    assert BinomialLoss(1, 0.8).recovery_bound(0.5) == pytest.approx(0.8)
    assert BinomialLoss(1, 0.8).recovery_bound(0.25) == pytest.approx(0.4)


def test_many_releases_stay_quick_and_finite():
    """Twenty million draws are composed without overflow."""
    loss = del_loss(20, 4).composed(10_240)
    assert 0 < loss.epsilon(1e-5) < loss.pure_epsilon


def test_no_draws_and_fair_coins_cost_nothing():
    """Nothing sent, or nothing but fair coins."""
    for loss in (BinomialLoss(0, 0.7), BinomialLoss(50, 0.5)):
        assert (loss.delta(0.0), loss.epsilon(1e-9), loss.mu()) == (0, 0, 0)
        assert loss.recovery_bound(0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(("trials", "chance"), [(-1, 0.6), (1, 0.4), (1, 1.0), (1, math.nan)])
def test_parameters_are_checked(trials, chance):
    """Negative counts and what is no chance of at least one half."""
    with pytest.raises(ConfigError):
        BinomialLoss(trials, chance)
