"""What the server computes with: public rows stay, the others are protected text by text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import UnsafeRows
from fedsea.evaluation.releasing import Clip, Cut, seeded_noise
from fedsea.model.projection import Projection
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.quantization import StochasticQuantization, Ternary

WIDTH = 6
CENTER = torch.arange(WIDTH) / 10.0
MECHANISMS = (
    Gaussian(1.0, 50.0),
    Gaussian(1.0, 50.0, center=CENTER),
    Gaussian(3.0, 50.0, Clipping.FROBENIUS),
    FedSEAGaussian(0.01),
    FedSEAGaussian(0.01, 1.0),
    StochasticQuantization(8, 0.5, 200.0, WIDTH),
    Ternary(0.5, 5.0, 0.9, WIDTH),
)


def rows(seed=0):
    """Two texts of five rows."""
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_nothing_at_the_cut_changes_nothing():
    """Without projection and mechanism rows pass as they are."""
    cut = Cut(1)
    assert torch.equal(cut.widen(cut.release(cut.narrow(rows()), seeded_noise(0, 0))), rows())


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.spec())
def test_the_average_release_is_what_is_let_through(mechanism):
    """The gradient belongs to a function that the mechanism has on average."""
    cut, count = Cut(1, mechanism), 400
    drawn = torch.stack([cut.release(rows(), seeded_noise(0, step)) for step in range(count)])
    expected = cut.let_through(rows())
    tolerance = 5 * drawn.std(0) / count**0.5 + 2e-3
    assert ((drawn.mean(0) - expected).abs() < tolerance).all()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda mechanism: mechanism.spec())
def test_public_rows_pass_where_the_format_allows_it(mechanism):
    """Floats travel clean; a session of counts has no other way than counts."""
    released = Cut(2, mechanism).release(rows(), seeded_noise(0, 0))
    assert torch.equal(released[:, :2], rows()[:, :2]) is (mechanism.levels == 0)
    assert not torch.isclose(released[:, 2:], rows()[:, 2:]).all()


def test_noise_follows_from_seed_and_step():
    """The same step releases the same, another one does not."""
    cut = Cut(0, MECHANISMS[0])
    first = cut.release(rows(), seeded_noise(0, 7))
    assert torch.equal(first, cut.release(rows(), seeded_noise(0, 7)))
    assert not torch.equal(first, cut.release(rows(), seeded_noise(0, 8)))
    assert not torch.equal(first, cut.release(rows(), seeded_noise(1, 7)))


def test_a_projection_narrows_before_the_mechanism():
    """The mechanism sees narrow rows, the trunk wide ones."""
    encoder = torch.eye(WIDTH)[:2]
    cut = Cut(0, None, Projection.of(encoder, encoder.T, 1, "ab" * 32))
    narrow = cut.narrow(rows())
    assert torch.equal(narrow, rows()[..., :2])
    assert torch.equal(cut.widen(narrow)[..., :2], rows()[..., :2])
    assert not cut.widen(narrow)[..., 2:].any()


@given(st.integers(0, 1000), st.sampled_from(MECHANISMS))
def test_clipped_rows_lie_inside(seed, mechanism):
    """Whatever is let through is within the radius, and what lay inside is left as it was."""
    clip, given_rows = Clip.of(mechanism), 3 * rows(seed)
    before, after = clip.magnitudes(given_rows), clip.magnitudes(clip(given_rows))
    assert (after <= clip.radius * (1 + 1e-5)).all()
    inside = (before <= clip.radius).expand_as(given_rows)
    assert torch.allclose(clip(given_rows)[inside], given_rows[inside], atol=1e-6)


def test_metric_noise_clips_the_input():
    """Its ball bounds what is let through."""
    assert Clip.of(MetricDP(5.0, 2.0, WIDTH)).radius == 2.0
    assert Clip.of(MetricDP(5.0)).radius == Clip.of(None).radius == torch.inf


def test_rows_that_are_not_finite_are_refused():
    """The mechanism refuses them here as anywhere."""
    with pytest.raises(UnsafeRows):
        Cut(0, MECHANISMS[0]).release(rows() / 0, seeded_noise(0, 0))
