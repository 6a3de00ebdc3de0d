"""Exact intervals of rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fedsea.errors import ConfigError
from fedsea.redteam.intervals import clopper_pearson

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS)
def test_each_end_leaves_its_share_outside(counts):
    """At either end, what was seen or something more extreme has a chance of 2.5 %."""
    successes, trials = counts
    interval = clopper_pearson(successes, trials)

    assert successes / trials in interval
    if successes:
        assert binom.sf(successes - 1, trials, interval.low) == pytest.approx(0.025, rel=1e-6)
    if successes < trials:
        assert binom.cdf(successes, trials, interval.high) == pytest.approx(0.025, rel=1e-6)


@given(COUNTS)
def test_failures_mirror_successes(counts):
    """The interval of the failures is the mirror image."""
    successes, trials = counts
    one, other = clopper_pearson(successes, trials), clopper_pearson(trials - successes, trials)

    assert one.low == pytest.approx(1 - other.high)


def test_nothing_and_everything():
    """No success leaves zero possible, and no trial everything."""
    assert clopper_pearson(0, 100).low == 0.0
    assert clopper_pearson(100, 100).high == 1.0
    assert clopper_pearson(0, 100).high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert (clopper_pearson(0, 0).low, clopper_pearson(0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize("counts", [(-1, 5), (6, 5), (1, -1)])
def test_impossible_counts_are_refused(counts):
    """More successes than trials is a defect of the caller, said as such."""
    with pytest.raises(ConfigError):
        clopper_pearson(*counts)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_confidence_is_refused(confidence):
    """A confidence lies between 0 and 1."""
    with pytest.raises(ConfigError):
        clopper_pearson(1, 2, confidence)
