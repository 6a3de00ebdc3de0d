"""Laws of every mechanism: spec, shape, bias, refusals, and the guarantee as it is sampled."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import ConfigError, UnsafeRows
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.mechanism import Mechanism, Unit
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization, Ternary
from fedsea.privacy.registry import mechanism_from_spec

WIDTH = 6
BOUNDED = [
    Gaussian(clip_norm=1.0, mu=1.5),
    FedSEAGaussian(0.8, clip_norm=0.7),
    StochasticQuantization(bits=3, clip=0.4, mu=2.0, width=WIDTH),
    StochasticQuantization(bits=1, clip=0.4, mu=2.0, width=WIDTH),
    Ternary(clip=0.4, mu=1.0, sparsity=0.5, width=WIDTH),
    Ternary(clip=0.4, mu=2.0, sparsity=1.0, width=WIDTH),
    MetricDP(eta=2.0, clip_norm=1.0, width=WIDTH),
    MetricDP(eta=20.0, clip_norm=1.0, width=WIDTH),
]
EVERY = [
    *BOUNDED,
    FedSEAGaussian(0.02),
    MetricDP(eta=5.0),
    Gaussian(2.0, 1.0, by=Clipping.FROBENIUS),
]
ids = Mechanism.spec


def worst_pair(mechanism: Mechanism) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows that the accountant takes for the worst: opposite ends of what clipping leaves."""
    row = torch.full((WIDTH,), 100.0, dtype=torch.float64)
    return row, -row


@lru_cache
def sampled_losses(mechanism: Mechanism) -> np.ndarray:
    """log P(y) / Q(y) of releases y of the worst pair's first row."""
    count = 600 if isinstance(mechanism, MetricDP) else 4000
    one, other = worst_pair(mechanism)
    released = mechanism.protect(one.expand(count, WIDTH), NoiseSource(b"pairs"))
    both = torch.stack([one, other])
    scores = torch.stack([mechanism.log_likelihood(row, both) for row in released])
    return (scores[:, 0] - scores[:, 1]).numpy()


@pytest.mark.parametrize("mechanism", BOUNDED, ids=ids)
def test_the_accountant_describes_what_is_released(mechanism):
    """delta of sampled releases under their own likelihood = the loss (metric: not above it).

    The output of the metric mechanism is clipped, which can only lower delta.
    """
    losses, cost = sampled_losses(mechanism), mechanism.loss()
    for epsilon in (0.0, 0.5, 1.0):
        gains = -np.expm1(np.minimum(0.0, epsilon - losses))
        slack = 4.5 * gains.std() / math.sqrt(len(gains)) + 1e-3
        assert gains.mean() <= cost.delta(epsilon) + slack
        if not isinstance(mechanism, MetricDP):
            assert gains.mean() >= cost.delta(epsilon) - slack


@pytest.mark.parametrize(
    "mechanism",
    [m for m in BOUNDED if (loss := m.loss()) is not None and loss.epsilon(1e-3) < 8],
    ids=ids,
)
def test_the_likelihood_is_a_law(mechanism):
    """The mean of Q / P under P is 1: both densities are normalised alike."""
    ratios = np.exp(-sampled_losses(mechanism))
    assert ratios.mean() == pytest.approx(1, abs=5 * ratios.std() / math.sqrt(len(ratios)))


@pytest.mark.parametrize("mechanism", BOUNDED, ids=ids)
def test_no_attacker_beats_the_bound(mechanism):
    """The best guess between two equally likely rows is right no more often than promised."""
    right = (sampled_losses(mechanism) > 0).mean()
    assert right <= mechanism.loss().recovery_bound(0.5) + 0.05


@pytest.mark.parametrize("mechanism", EVERY, ids=ids)
def test_spec_round_trip(mechanism):
    """A mechanism read from its spec is the same one, and says the same."""
    again = mechanism_from_spec(mechanism.spec())
    assert again == mechanism
    assert hash(again) == hash(mechanism)
    assert again.describe() == mechanism.describe()


@pytest.mark.parametrize("mechanism", EVERY, ids=ids)
def test_shape_and_kind_of_releases(mechanism):
    """fp32 on a fixed grid, or counts that fit the levels; the same seed gives the same rows."""
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    released = mechanism.protect(rows, NoiseSource(b"a"))
    assert released.shape == rows.shape
    assert torch.equal(released, mechanism.protect(rows, NoiseSource(b"a")))
    assert not torch.equal(released, mechanism.protect(rows, NoiseSource(b"b")))
    if mechanism.levels:
        assert released.dtype == torch.uint8
        assert int(released.max()) <= mechanism.levels
    else:
        assert released.dtype == torch.float32
        assert torch.equal(released * 2**20, (released * 2**20).round())
    assert mechanism.values(released).dtype == torch.float32


@pytest.mark.parametrize("mechanism", EVERY, ids=ids)
def test_no_rows_are_no_release(mechanism):
    """An empty chunk is answered with an empty chunk and costs nothing."""
    assert mechanism.protect(torch.zeros(0, WIDTH), NoiseSource(b"a")).shape == (0, WIDTH)
    assert mechanism.releases(0) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mechanism", EVERY, ids=ids)
def test_unsafe_rows_are_refused(mechanism, bad):
    """One number that is not finite stops the whole chunk."""
    rows = torch.zeros(3, WIDTH)
    rows[2, 1] = bad
    with pytest.raises(UnsafeRows):
        mechanism.protect(rows, NoiseSource(b"a"))


@pytest.mark.parametrize("mechanism", [m for m in BOUNDED if not isinstance(m, MetricDP)], ids=ids)
def test_releases_are_unbiased(mechanism):
    """The mean of many releases is the clipped row (metric noise: not after output clipping)."""
    row = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.3, 0.25])
    released = mechanism.values(mechanism.protect(row.expand(20000, WIDTH), NoiseSource(b"a")))
    error = released.double().std(0) / math.sqrt(20000)
    assert ((released.double().mean(0) - row).abs() <= 5 * error).all()


@settings(max_examples=20)
@given(st.sampled_from(EVERY), st.floats(1e-3, 1e3))
def test_every_release_is_scored(mechanism, size):
    """Likelihoods are finite float64 numbers, one for each candidate, for rows of any size."""
    rows = size * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    released = mechanism.protect(rows, NoiseSource(b"a"))
    scores = mechanism.log_likelihood(released[0], rows)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float64
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("mechanism", [m for m in BOUNDED if m.levels == 0], ids=ids)
def test_the_true_row_explains_best(mechanism):
    """Summed over 200 releases of one row, its likelihood beats that of other rows."""
    rows = torch.nn.functional.normalize(torch.eye(WIDTH)[:4]) * 0.9
    released = mechanism.protect(rows[1].expand(200, WIDTH), NoiseSource(b"a"))
    scores = sum(mechanism.log_likelihood(row, rows) for row in released)
    assert int(scores.argmax()) == 1


def test_unbounded_mechanisms_say_so():
    """Without a clip norm there is no loss, and the words say what that means."""
    for mechanism in (FedSEAGaussian(0.02), MetricDP(5.0)):
        assert mechanism.loss() is None
        assert math.isinf(mechanism.sensitivity)
        assert mechanism.describe().startswith("not differentially private")
    for bounded in BOUNDED:
        assert "not differentially private" not in bounded.describe()


def test_mechanisms_are_equal_by_spec():
    """Parameters make a mechanism; different ones are different."""
    assert Gaussian(1.0, 2.0) == Gaussian(1.0, 2.0)
    assert Gaussian(1.0, 2.0) != Gaussian(1.0, 2.5)
    assert Gaussian(1.0, 2.0) != "gaussian"
    assert len({Gaussian(1.0, 2.0), Gaussian(1.0, 2.0), FedSEAGaussian(1.0)}) == 2


@pytest.mark.parametrize(
    "mechanism", [m for m in BOUNDED if m.levels or m.name == "metric-dp"], ids=ids
)
def test_another_width_is_refused(mechanism):
    """Noise for one width does not protect rows of another."""
    with pytest.raises(ConfigError, match="width"):
        mechanism.protect(torch.zeros(2, WIDTH + 1), NoiseSource(b"a"))


def test_units_are_words():
    """The words of options and ledgers."""
    assert [unit.value for unit in Unit] == ["token", "prompt", "record"]


@pytest.mark.parametrize("mechanism", EVERY, ids=ids)
def test_candidates_are_scored_one_by_one(mechanism, monkeypatch):
    """Scores do not depend on how many candidates are scored together."""
    rows = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(5))
    released = mechanism.protect(rows, NoiseSource(b"a"))[0]
    together = mechanism.log_likelihood(released, rows)
    monkeypatch.setattr("fedsea.privacy.mechanism._NUMBERS_PER_BLOCK", 2 * WIDTH)
    assert torch.allclose(mechanism.log_likelihood(released, rows), together)
