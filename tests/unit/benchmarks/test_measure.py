"""Medians, pairing, targets."""

import pytest
from benchmarks.measure import (
    Row,
    Spread,
    Verdict,
    at_least,
    at_most,
    differences,
    interleave,
    percentile,
    ratios,
)


def test_a_spread_is_median_least_and_greatest():
    """The order of the values does not matter."""
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)


def test_nothing_has_no_spread():
    """An empty measurement is an error, not a zero."""
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_works_run_in_turn():
    """A B A B, and each pair holds what ran beside each other."""
    order = []

    def work(name):
        order.append(name)
        return f"{name}{len(order)}"

    pairs = interleave([lambda: work("a"), lambda: work("b")], 2)
    assert order == ["a", "b", "a", "b"]
    assert pairs == [("a1", "b2"), ("a3", "b4")]


def test_ratios_are_taken_pair_by_pair():
    """A machine that slows down on both sides changes no ratio."""
    assert ratios([10.0, 1.0, 100.0], [5.0, 0.5, 50.0]) == Spread(2.0, 2.0, 2.0, 3)


def test_differences_are_taken_pair_by_pair():
    """As for ratios."""
    assert differences([3.0, 13.0], [1.0, 11.0]) == Spread(2.0, 2.0, 2.0, 2)


def test_what_does_not_pair_is_refused():
    """A missing partner is not left out silently."""
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (at_least(1.0), 1.0, Verdict.MET),
        (at_least(1.0), 0.999, Verdict.MISSED),
        (at_most(0.6), 0.6, Verdict.MET),
        (at_most(0.6), 0.601, Verdict.MISSED),
    ],
)
def test_targets_include_their_bound(target, value, verdict):
    """At least and at most."""
    assert target.verdict(value) is verdict


def test_a_row_without_target_has_no_verdict():
    """Most rows only inform."""
    assert Row(case="c", name="n", spread=Spread.of([1.0])).verdict is Verdict.NONE


@pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.95, 95.0), (1.0, 100.0), (0.0, 1.0)])
def test_percentile_is_one_of_the_values(share, value):
    """Nearest rank over 1..100."""
    assert percentile([float(n) for n in range(100, 0, -1)], share) == value
