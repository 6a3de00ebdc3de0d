"""Stochastic quantization and ternary counts: scale, law, figures of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as oracle
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedsea.errors import ConfigError
from fedsea.privacy.discrete_loss import DiscreteLoss
from fedsea.privacy.gaussian_loss import GaussianLoss
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization, Ternary


@pytest.mark.parametrize(
    ("bits", "mu", "scale", "gamma"),
    [(4, 20, 0.2247, 0.014), (4, 60, 0.0885, 0.020), (2, 40, 0.0700, 0.062), (1, 20, 0.0755, 0.095),
     (1, 60, 0.0534, 0.263)],
)  # fmt: skip
def test_the_papers_figures(bits, mu, scale, gamma):
    """A, mu and gamma of theorem 4.2 at clip 0.05 and width 128."""
    mechanism = StochasticQuantization(bits, 0.05, mu, 128)
    assert mechanism.scale == pytest.approx(scale, abs=6e-5)
    assert mechanism.paper_mu() == pytest.approx(mu)
    assert mechanism.paper_gamma() == pytest.approx(gamma, abs=6e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_counts_are_binomial(bits):
    """Mean and variance of the counts of three coordinates, one of them beyond the clip."""
    mechanism = StochasticQuantization(bits, 0.5, 3.0, 3)
    row = torch.tensor([0.2, -0.5, 9.0])
    counts = mechanism.protect(row.expand(20000, 3), NoiseSource(b"a")).double()
    chances = (mechanism.scale + torch.tensor([0.2, -0.5, 0.5]).double()) / (2 * mechanism.scale)
    law = stats.binom(mechanism.levels, chances.numpy())
    assert counts.mean(0).numpy() == pytest.approx(law.mean(), abs=5 * law.std().max() / 141)
    assert counts.var(0).numpy() == pytest.approx(law.var(), rel=0.06)


def test_variance_of_values():
    """(A^2 - v^2) / u for each coordinate."""
    mechanism = StochasticQuantization(4, 0.5, 3.0, 2)
    row = torch.tensor([0.3, -0.1])
    values = mechanism.values(mechanism.protect(row.expand(20000, 2), NoiseSource(b"a")))
    expected = (mechanism.scale**2 - row.double() ** 2) / 15
    assert values.double().var(0).numpy() == pytest.approx(expected.numpy(), rel=0.05)


def test_likelihood_of_counts():
    """Differences of log-likelihoods are those of the binomial law."""
    mechanism = StochasticQuantization(3, 0.5, 3.0, 4)
    rows = torch.tensor([[0.1, 0.2, -0.9, 0.0], [0.5, -0.5, 0.5, 0.4]])
    counts = torch.tensor([0, 7, 3, 5], dtype=torch.uint8)
    chances = (mechanism.scale + rows.double().clamp(-0.5, 0.5)) / (2 * mechanism.scale)
    exact = stats.binom.logpmf(counts.numpy(), 7, chances.numpy()).sum(1)
    found = mechanism.log_likelihood(counts, rows)
    assert float(found[0] - found[1]) == pytest.approx(exact[0] - exact[1])


@given(st.integers(1, 8), st.floats(0.1, 30), st.integers(1, 512))
def test_more_noise_for_more_privacy(bits, mu, width):
    """A grows as mu falls, so that the exact delta falls with it."""
    loud = StochasticQuantization(bits, 1.0, mu / 2, width)
    quiet = StochasticQuantization(bits, 1.0, mu, width)
    assert loud.scale > quiet.scale > 1.0
    assert loud.loss().delta(0.5) <= quiet.loss().delta(0.5)
    assert quiet.sensitivity == pytest.approx(2 * math.sqrt(width))


@pytest.mark.parametrize(("sparsity", "mu"), [(1.0, 3.0), (0.5, 2.0), (0.1, 0.5)])
def test_ternary_law(sparsity, mu):
    """Shares of -B, 0 and B; the mean is the clamped coordinate; A B as calibrated."""
    mechanism = Ternary(0.5, mu, sparsity, 4)
    counts = mechanism.protect(torch.full((8000, 4), 0.3), NoiseSource(b"a"))
    shares = np.bincount(counts.flatten().numpy(), minlength=3) / counts.numel()
    a, b = mechanism.amplitude, mechanism.scale
    assert shares == pytest.approx([(a - 0.3) / (2 * b), 1 - a / b, (a + 0.3) / (2 * b)], abs=0.012)
    assert 2 * 0.5 * math.sqrt(4) / math.sqrt(a * b - 0.25) == pytest.approx(mu)


def test_ternary_without_zeros_is_one_bit():
    """With sparsity 1 there are only signs, and the accountant agrees with that of one bit."""
    signs, bit = Ternary(0.5, 2.0, 1.0, 16), StochasticQuantization(1, 0.5, 2.0, 16)
    assert signs.scale == pytest.approx(bit.scale)
    for epsilon in (0.0, 0.7, 2.0):
        assert signs.loss().delta(epsilon) == pytest.approx(bit.loss().delta(epsilon), abs=1e-11)


def discrete(mechanism: Ternary) -> DiscreteLoss:
    """The loss of a ternary mechanism that is sparse."""
    loss = mechanism.loss()
    assert isinstance(loss, DiscreteLoss)
    return loss


def test_the_exact_trade_off_of_ternary():
    """f of one coordinate in its three pieces, from the loss."""
    clip, mechanism = 0.5, Ternary(0.5, 1.0, 0.4, 1)
    a, b = mechanism.amplitude, mechanism.scale
    first, second = (a - clip) / (2 * b), 1 - (a + clip) / (2 * b)
    law = discrete(mechanism).law
    epsilons = [*np.linspace(-3, 3, 601), law.step, -law.step]

    def trade_off(alpha: float) -> float:
        if alpha <= first:
            return 1 - (a + clip) / (a - clip) * alpha
        if alpha <= second:
            return 1 - clip / b - alpha
        return (a - clip) / (a + clip) * (1 - alpha)

    for alpha in (0.01, first, 0.4, second, 0.9):
        dual = max(1 - law.delta(e) - math.exp(e) * alpha for e in epsilons)
        assert dual == pytest.approx(trade_off(alpha), abs=1e-9)


@pytest.mark.parametrize("width", [1, 16, 100])
def test_ternary_three_ways(width):
    """Convolution here, convolution in a public accountant, and sampled signs."""
    mechanism = Ternary(0.5, 1.0, 0.4, width)
    loss = discrete(mechanism)
    law = loss.law
    upper = dict(zip("-0+", np.log(law.masses), strict=True))
    lower = dict(zip("+0-", np.log(law.masses), strict=True))
    table = oracle.from_two_probability_mass_functions(lower, upper).self_compose(width)
    signs = np.random.default_rng(1).choice([-1, 0, 1], p=law.masses, size=(40_000, width))
    drawn = law.step * signs.sum(1)
    for epsilon in (0.0, 0.2):
        gains = -np.expm1(np.minimum(0.0, epsilon - drawn))
        assert table.get_delta_for_epsilon(epsilon) == pytest.approx(loss.delta(epsilon), rel=5e-3)
        assert gains.mean() == pytest.approx(loss.delta(epsilon), rel=0.05, abs=1e-6)


def test_ternary_is_nearly_its_gaussian_figure_when_wide():
    """At width 4096 the exact mu is close to the calibrated one."""
    assert Ternary(0.05, 2.0, 0.5, 4096).loss().mu() == pytest.approx(2.0, rel=0.01)
    assert Ternary(0.05, 2.0, 0.5, 4096).loss().epsilon(1e-5) == pytest.approx(
        GaussianLoss(2.0).epsilon(1e-5), rel=0.01
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: StochasticQuantization(0, 1.0, 1.0, 4),
        lambda: StochasticQuantization(9, 1.0, 1.0, 4),
        lambda: StochasticQuantization(4, 0.0, 1.0, 4),
        lambda: StochasticQuantization(4, math.nan, 1.0, 4),
        lambda: StochasticQuantization(4, 1.0, -1.0, 4),
        lambda: StochasticQuantization(4, 1.0, math.inf, 4),
        lambda: StochasticQuantization(4, 1.0, 1e30, 4),
        lambda: StochasticQuantization(4, 1.0, 1.0, 0),
        lambda: Ternary(0.0, 1.0, 0.5, 4),
        lambda: Ternary(1.0, math.nan, 0.5, 4),
        lambda: Ternary(1.0, 1.0, 0.0, 4),
        lambda: Ternary(1.0, 1.0, 1.5, 4),
        lambda: Ternary(1.0, 20.0, 0.5, 4),
        lambda: Ternary(1.0, 1.0, 0.5, -1),
        lambda: StochasticQuantization(4, 1e12, 1e12, 4),
        lambda: StochasticQuantization(4, 1e13, 1.0, 4),
    ],
)
def test_parameters_out_of_range(make):
    """Each is refused when the mechanism is made."""
    with pytest.raises(ConfigError):
        make()
