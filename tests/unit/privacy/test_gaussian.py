"""Gaussian mechanisms: calibration, clipping, centre, Frobenius norm, FedSEA's scale."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fedsea.errors import ConfigError
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian, center_fingerprint
from fedsea.privacy.noise import NoiseSource

WIDTH = 8


def noise_of(mechanism, row, count=4000):
    """What `count` releases of one row are away from where clipping puts it."""
    released = mechanism.protect(row.expand(count, WIDTH), NoiseSource(b"gauss"))
    return released.double()


def test_noise_is_normal_with_the_calibrated_sigma():
    """sigma = 2 C / mu, for each coordinate, around the clipped row."""
    mechanism = Gaussian(clip_norm=1.5, mu=2.0)
    row = torch.full((WIDTH,), 50.0)
    standard = (noise_of(mechanism, row) - 1.5 / math.sqrt(WIDTH)) / 1.5
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-3


def test_calibration_from_epsilon_and_delta():
    """(8, 1e-5) needs sigma = 0.600 of the sensitivity."""
    mechanism = Gaussian.calibrated(8.0, 1e-5, clip_norm=0.5)
    assert mechanism.sigma / mechanism.sensitivity == pytest.approx(0.600, abs=5e-4)
    assert mechanism.loss().epsilon(1e-5) == pytest.approx(8.0)


def test_recovery_uses_the_centre_as_reference():
    """The loss carries half of mu for recovery bounds."""
    loss = Gaussian(1.0, 2.0).loss()
    assert (loss.mu(), loss.reference_mu) == (2.0, 1.0)


def test_a_centre_shifts_the_ball():
    """Rows are clipped towards the centre and released around it."""
    center = torch.linspace(-3, 3, WIDTH)
    mechanism = Gaussian(1.0, 50.0, center=center)
    released = noise_of(mechanism, center + 100)
    expected = center.double() + 1 / math.sqrt(WIDTH)
    assert torch.allclose(released.mean(0), expected, atol=0.01)
    score = mechanism.log_likelihood(released[0], torch.stack([center + 100, center - 100]))
    assert score[0] > score[1]


def test_a_centre_is_part_of_the_spec_and_is_copied():
    """Two centres are two mechanisms; changing the tensor later changes nothing."""
    center = torch.ones(WIDTH)
    mechanism = Gaussian(1.0, 1.0, center=center)
    spec = mechanism.spec()
    center += 1
    assert mechanism.spec() == spec
    assert f"center={center_fingerprint(torch.ones(WIDTH).double())}" in spec
    assert mechanism != Gaussian(1.0, 1.0, center=center)


def test_a_centre_of_another_width_is_refused():
    """The centre must fit the rows."""
    with pytest.raises(ConfigError, match="centre of width"):
        Gaussian(1.0, 1.0, center=torch.ones(3)).protect(torch.ones(1, 4), NoiseSource(b"a"))


@pytest.mark.parametrize(
    "center", [torch.tensor([math.nan]), torch.ones(2, 2), torch.ones(2, dtype=torch.int64)]
)
def test_a_centre_is_a_finite_vector(center):
    """Anything else is refused."""
    with pytest.raises(ConfigError, match="centre"):
        Gaussian(1.0, 1.0, center=center)


def test_the_frobenius_norm_bounds_a_chunk():
    """All rows together are clipped, and the chunk is one release."""
    mechanism = Gaussian(3.0, 600.0, by=Clipping.FROBENIUS)
    released = mechanism.protect(torch.full((9, WIDTH), 40.0), NoiseSource(b"a"))
    assert float(released.norm()) == pytest.approx(3.0, rel=0.05)
    assert (mechanism.releases(9), mechanism.releases(1), mechanism.releases(0)) == (1, 1, 0)
    assert Gaussian(3.0, 600.0).releases(9) == 9


def test_frobenius_candidates_are_scored_at_their_best_factor():
    """A candidate explains the release by its direction where the factor of the chunk is hidden."""
    mechanism = Gaussian(1.0, 200.0, by=Clipping.FROBENIUS)
    rows = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)) * 5
    released = mechanism.protect(rows, NoiseSource(b"a"))
    for row in range(20):
        assert int(mechanism.log_likelihood(released[row], rows).argmax()) == row


def test_fedsea_has_the_papers_sigma():
    """scale sqrt(pi / 2), without clipping."""
    mechanism = FedSEAGaussian(0.02)
    released = noise_of(mechanism, torch.full((WIDTH,), 5.0))
    assert mechanism.sigma == pytest.approx(0.02507, rel=1e-3)
    assert float((released - 5.0).std()) == pytest.approx(mechanism.sigma, rel=0.02)


def test_fedsea_with_a_clip_norm_is_accounted():
    """At its own scale and typical norms: mu of about 128, epsilon of thousands."""
    loss = FedSEAGaussian(0.02, clip_norm=1.6).loss()
    assert loss is not None
    assert loss.mu() == pytest.approx(127.7, rel=1e-3)
    assert loss.epsilon(1e-5) == pytest.approx(8.7e3, rel=0.01)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_parameters_out_of_range(value):
    """Every parameter must be positive and finite."""
    for make in (
        lambda: Gaussian(value, 1.0),
        lambda: Gaussian(1.0, value),
        lambda: FedSEAGaussian(value),
        lambda: FedSEAGaussian(0.1, clip_norm=value),
    ):
        with pytest.raises(ConfigError, match="positive"):
            make()


def test_another_kind_of_clipping():
    """A word that is neither row nor frobenius."""
    with pytest.raises(ConfigError, match="row or frobenius"):
        Gaussian(1.0, 1.0, by="column")  # type: ignore[arg-type]
