"""The loss of metric noise, by numbers that were made in other ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as oracle
from scipy import integrate

from fedsea.privacy.metric_loss import metric_loss
from fedsea.privacy.noise import NoiseSource


@pytest.mark.parametrize(
    ("eta", "distance", "width", "epsilon"), [(100, 1, 4096, 5.5), (500, 1, 768, 195)]
)
def test_golden_epsilons(eta, distance, width, epsilon):
    """epsilon at delta = 1e-3, far below the pure epsilon eta * distance."""
    found = metric_loss(eta, distance / 2, width).epsilon(1e-3)
    assert found == pytest.approx(epsilon, rel=2e-3)
    assert found < eta * distance


def test_large_widths_are_nearly_gaussian():
    """mu is about eta D / sqrt(d) where the noise is long against the distance."""
    assert metric_loss(100, 0.5, 4096).mu() == pytest.approx(100 / 64, rel=1e-3)


@pytest.mark.parametrize("width", [2, 3, 8, 64])
@pytest.mark.parametrize("reach", [0.5, 4.0])
def test_three_ways(width, reach):
    """Integration over radius and angle = a public accountant on cells = samples."""
    loss = metric_loss(1.0, reach / 2, width)
    table = _cells(width, reach)
    drawn = _losses(width, reach, 200_000)
    for epsilon in (0.0, reach / 4):
        exact = loss.delta(epsilon)
        gains = -np.expm1(np.minimum(0.0, epsilon - drawn))
        assert table.get_delta_for_epsilon(epsilon) == pytest.approx(exact, rel=2e-2)
        assert gains.mean() == pytest.approx(exact, abs=5 * gains.std() / math.sqrt(len(gains)))


def test_three_dimensions_by_a_direct_integral():
    """delta of three dimensions by adaptive integration over the plane."""
    reach, epsilon = 2.0, 0.5

    def gain(across: float, along: float) -> float:
        one = math.exp(-math.hypot(across, along))
        other = math.exp(epsilon - math.hypot(across, along - reach))
        return across / 4 * max(0.0, one - other)

    exact, _ = integrate.dblquad(gain, -40, 2, 0, 40, epsabs=1e-7)
    assert metric_loss(1.0, reach / 2, 3).delta(epsilon) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("width", [2, 32, 1024])
@pytest.mark.parametrize("reach", [0.01, 1.0, 50.0, 1000.0])
def test_pure_privacy(width, reach):
    """delta is 0 from epsilon = eta D on (up to 1e-12), and falls before."""
    loss = metric_loss(reach, 0.5, width)
    deltas = [loss.delta(share * reach) for share in (0.0, 0.25, 0.5, 1.0)]
    assert deltas == sorted(deltas, reverse=True)
    assert deltas[-1] < 1e-12
    assert loss.recovery_bound(0.1) <= min(1.0, 0.1 * math.exp(reach / 2)) + 1e-9


def test_farther_inputs_cost_more():
    """The largest distance is the worst pair, at every epsilon."""
    losses = [metric_loss(2.0, radius, 16) for radius in (0.5, 1.0, 2.0)]
    for epsilon in (0.0, 0.5, 1.5):
        deltas = [loss.delta(epsilon) for loss in losses]
        assert deltas == sorted(deltas)


def _losses(width: int, reach: float, count: int) -> np.ndarray:
    """Privacy losses of sampled noise of rate 1."""
    noise = NoiseSource(b"metric")
    normal = noise.normal(count, width)
    radius = noise.gamma(width, count)
    along = radius * normal[:, 0] / np.linalg.norm(normal, axis=1)
    losses: np.ndarray = np.sqrt(np.maximum(radius**2 - 2 * along * reach + reach**2, 0.0)) - radius
    return losses


def _cells(width: int, reach: float) -> oracle.PrivacyLossDistribution:
    """The plane (along the difference, across it) cut in cells."""
    spread = 9 * math.sqrt(width) + 10
    along = np.linspace(-spread, spread + reach, 500)
    across = np.linspace(max(0.01, width - spread), width + spread, 250)
    a, b = np.meshgrid(along, across)
    volume = (width - 2) * np.log(b)
    logs = []
    for shift in (reach, 0.0):
        log = volume - np.hypot(a - shift, b)
        logs.append((log - np.logaddexp.reduce(log.ravel())).ravel())
    kept = np.maximum(*logs) > -40
    lower, upper = (dict(enumerate(log[kept])) for log in logs)
    return oracle.from_two_probability_mass_functions(
        lower, upper, value_discretization_interval=reach / 5000
    )
