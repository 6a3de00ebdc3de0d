from __future__ import annotations

import pytest
import torch
from tests.broken_mechanisms import cases

from fedsea.errors import ConfigError
from fedsea.privacy.audit import audit, likelihood_ratio, worst_pair
from fedsea.privacy.clipping import Clipping
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.metric import MetricDP
from fedsea.privacy.noise import NoiseSource
from fedsea.privacy.quantization import StochasticQuantization, Ternary

WIDTH = 8
# At mu = 3 an error rate of a few percent makes the most of few samples.
CASES = cases(WIDTH, 3.0)


def channel_of(mechanism, seed=b"audit"):
    """What the server would compute with, of a mechanism with noise of a fixed seed."""
    noise = NoiseSource(seed)
    return lambda rows: mechanism.values(mechanism.protect(rows, noise))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_correct_mechanisms_pass_and_broken_ones_do_not(case):
    """Sigma 5 % small, half the sensitivity, a forgotten clip and a small scale are found."""
    found = audit(case.claimed, channel_of(case.real), width=WIDTH, samples=200_000)

    assert found.passed is not case.is_broken
    assert (found.shown_mu > found.claimed_mu) is case.is_broken
    assert not found.is_blind


@pytest.mark.parametrize(
    "mechanism",
    [
        Gaussian(0.5, 1.0, center=torch.linspace(-3, 3, WIDTH)),
        Gaussian(2.0, 2.0, by=Clipping.FROBENIUS),
        FedSEAGaussian(0.5, clip_norm=1.0),
        StochasticQuantization(1, 0.1, 1.0, WIDTH),
        StochasticQuantization(8, 0.1, 4.0, WIDTH),
        Ternary(0.1, 2.0, 0.5, WIDTH),
        MetricDP(6.0, 1.0, WIDTH),
        MetricDP(40.0, 1.0, WIDTH),
    ],
    ids=lambda mechanism: mechanism.spec(),
)
def test_every_mechanism_keeps_its_claim_and_is_used_up(mechanism):
    """No sample contradicts a claim, and the bound comes near to it: test and pair are optimal."""
    found = audit(mechanism, channel_of(mechanism), width=WIDTH, samples=20_000, confidence=0.99)

    assert found.passed
    assert 0.8 * min(found.claimed_mu, found.largest_mu) < found.shown_mu <= found.claimed_mu


def test_the_statistic_orders_releases_as_the_law_does():
    """What is compared with the threshold rises with the log-likelihood ratio."""
    for mechanism in (
        Gaussian(1.0, 2.0),
        StochasticQuantization(4, 0.1, 2.0, WIDTH),
        Ternary(0.1, 2.0, 0.5, WIDTH),
        MetricDP(6.0, 1.0, WIDTH),
        MetricDP(14.0, 1.0, WIDTH),
    ):
        first, second = worst_pair(mechanism, WIDTH)
        rows = torch.stack([first] * 20 + [second] * 20)
        released = mechanism.protect(rows, NoiseSource(b"law"))
        pair = torch.stack([first, second])
        scores = torch.stack([mechanism.log_likelihood(row, pair) for row in released])
        exact = scores[:, 0] - scores[:, 1]
        measured = likelihood_ratio(mechanism, first, second)(mechanism.values(released))
        order = exact.argsort()
        steps = torch.as_tensor(measured)[order].diff()
        spread = float(measured.max() - measured.min())
        assert float(steps.min()) > -1e-2 * spread, mechanism.spec()


def test_a_channel_that_leaks_is_found_whatever_the_mechanism_does():
    """A codec that lets the clean row through breaks every claim."""
    found = audit(Gaussian(1.0, 1.0), lambda rows: rows, width=WIDTH, samples=2000)

    assert not found.passed
    assert found.shown_mu == found.largest_mu


def test_a_channel_that_says_nothing_shows_nothing():
    """Without any signal the lower bound is 0."""
    found = audit(Gaussian(1.0, 1.0), torch.zeros_like, width=WIDTH, samples=2000)

    assert found.passed
    assert found.shown_mu == 0.0


def test_a_weak_claim_cannot_be_tested_by_few_samples():
    """Where even no error at all would not contradict the claim, the audit says so."""
    mechanism = Gaussian(1.0, 20.0)
    found = audit(mechanism, channel_of(mechanism), width=WIDTH, samples=2000)

    assert found.passed
    assert found.is_blind


def test_progress_reaches_the_end():
    """Samples done rise to samples in all."""
    told = []
    audit(
        Gaussian(1.0, 1.0, by=Clipping.FROBENIUS),
        channel_of(Gaussian(1.0, 1.0, by=Clipping.FROBENIUS)),
        width=2,
        samples=400,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (400, 400)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("mechanism", "options", "words"),
    [
        (FedSEAGaussian(0.02), {}, "not differentially private"),
        (MetricDP(1.0), {}, "not differentially private"),
        (Gaussian(1.0, 1.0), {"samples": 100}, "show nothing"),
        (Gaussian(1.0, 1.0), {"confidence": 1.0}, "confidence"),
        (Gaussian(1.0, 1.0), {"confidence": 0.2}, "confidence"),
        (Gaussian(1.0, 1.0), {"width": 0}, "width above 0"),
        (StochasticQuantization(4, 0.1, 1.0, 16), {}, "do not fit a mechanism of width 16"),
    ],
)
def test_bad_requests_are_refused(mechanism, options, words):
    """No claim, too few samples, no confidence and widths that do not fit are errors."""
    with pytest.raises(ConfigError, match=words):
        audit(mechanism, lambda rows: rows, **{"width": WIDTH, **options})
