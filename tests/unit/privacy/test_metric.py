"""Metric differential privacy: one radius and one direction for each row."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fedsea.errors import ConfigError
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource

WIDTH = 48


def test_the_radius_is_gamma_and_rows_have_their_own():
    """Norms of the noise have the Gamma law of shape d and rate eta, independent between rows."""
    mechanism = MetricDP(eta=3.0)
    released = mechanism.protect(torch.zeros(4000, WIDTH), NoiseSource(b"a")).double()
    norms = released.norm(dim=1)
    assert stats.kstest(norms.numpy(), stats.gamma(WIDTH, scale=1 / 3).cdf).pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([norms[:-1], norms[1:]]))[0, 1])) < 0.08


def test_directions_are_uniform():
    """No coordinate or pair of coordinates is preferred."""
    released = MetricDP(eta=3.0).protect(torch.zeros(8000, 4), NoiseSource(b"a")).double()
    directions = torch.nn.functional.normalize(released)
    assert (directions.mean(0).abs() < 0.03).all()
    assert torch.allclose(directions.T @ directions / 8000, torch.eye(4).double() / 4, atol=0.02)


def test_input_and_output_are_clipped():
    """No release is longer than the clip norm (and rounding), whatever comes in."""
    mechanism = MetricDP(eta=4.0, clip_norm=2.0, width=WIDTH)
    released = mechanism.protect(torch.full((200, WIDTH), 1e6), NoiseSource(b"a"))
    assert float(released.norm(dim=1).max()) <= 2.0 * (1 + 1 / 256)
    assert mechanism.sensitivity == 4.0


def test_small_outputs_survive_the_grid():
    """Noise far longer than the clip norm does not make the grid coarser than the output."""
    mechanism = MetricDP(eta=0.01, clip_norm=1.0, width=WIDTH)
    released = mechanism.protect(torch.zeros(50, WIDTH), NoiseSource(b"a"))
    assert released.norm(dim=1).numpy() == pytest.approx(1.0, rel=0.01)


def test_likelihood_inside_the_ball_is_the_density():
    """-eta times the distance, where the output was not clipped."""
    mechanism = MetricDP(eta=1000.0, clip_norm=2.0, width=WIDTH)
    rows = torch.eye(WIDTH)[:3]
    released = mechanism.protect(rows, NoiseSource(b"a"))
    distances = (released[0].double() - rows.double()).norm(dim=1)
    assert torch.allclose(mechanism.log_likelihood(released[0], rows), -1000 * distances)


def test_likelihood_on_the_sphere_prefers_the_direction():
    """Of clipped outputs only the direction is left; candidates near it are likelier."""
    mechanism = MetricDP(eta=30.0, clip_norm=1.0, width=WIDTH)
    rows = torch.eye(WIDTH)[:3]
    seen = mechanism.protect(rows[:1].expand(100, WIDTH), NoiseSource(b"a"))
    assert seen.norm(dim=1).numpy() == pytest.approx(1.0, rel=0.01)
    scores = torch.stack([mechanism.log_likelihood(row, rows) for row in seen]).sum(0)
    assert int(scores.argmax()) == 0


def test_epsilon_of_replacing_a_row():
    """At delta = 0 it is 2 eta clip_norm, as the words say."""
    mechanism = MetricDP(eta=3.0, clip_norm=0.5, width=WIDTH)
    loss = mechanism.loss()
    assert loss is not None
    assert loss.delta(3.0) < 1e-12
    assert mechanism.describe().startswith("epsilon = 3 at delta = 0")


@pytest.mark.parametrize(
    "make",
    [
        lambda: MetricDP(0.0),
        lambda: MetricDP(math.nan),
        lambda: MetricDP(1.0, clip_norm=0.0, width=4),
        lambda: MetricDP(1.0, clip_norm=1.0),
        lambda: MetricDP(1.0, clip_norm=1.0, width=1),
        lambda: MetricDP(1.0, width=0),
    ],
)
def test_parameters_out_of_range(make):
    """Each is refused when the mechanism is made."""
    with pytest.raises(ConfigError):
        make()
