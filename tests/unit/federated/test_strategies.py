from __future__ import annotations

import numpy as np
import pytest

from fedsea.errors import CheckpointError, ConfigError
from fedsea.federated.config import Neighbours, StrategySection
from fedsea.federated.strategies import (
    Contributions,
    FlowerAdam,
    FlowerAveraging,
    NormFedAvg,
    averaging,
)
from fedsea.federated.unit_update import UnitUpdate
from fedsea.privacy.noise import NoiseSource

START = {"a": np.array([1.0, -1.0], np.float32), "b": np.array([[2.0]], np.float32)}


def update(x, y, z):
    """An update of the arrays above."""
    return {"a": np.array([x, y], np.float32), "b": np.array([[z]], np.float32)}


def test_fedavg_by_hand():
    """Weighted by examples, added to the global arrays."""
    updates = Contributions([("one", 1, update(1, 0, 0)), ("two", 3, update(0, 2, -4))])

    found = FlowerAveraging().next(1, START, updates)

    assert found["a"].tolist() == [1.25, 0.5]
    assert found["b"].tolist() == [[-1.0]]


def test_the_order_of_replies_does_not_matter():
    """Sums are formed in the order of the names, so the bits are the same."""
    chance = np.random.default_rng(0)
    made = [
        (f"c{at}", at + 1, update(*chance.normal(size=3).astype(np.float32))) for at in range(5)
    ]

    found = [FlowerAveraging().next(1, START, Contributions(order)) for order in (made, made[::-1])]

    assert all((found[0][name] == found[1][name]).all() for name in START)


def test_a_mean_that_came_masked_is_taken_as_it_is():
    """Under secure aggregation there is one contribution: the mean."""
    found = FlowerAveraging().next(1, START, Contributions([("mean", 4, update(1, 1, 1))]))

    assert found["a"].tolist() == [2.0, 0.0]


def test_adams_moments_are_kept():
    """Saved and loaded, the second round is the same as without a stop."""

    def made():
        return FlowerAdam(0.1, (0.9, 0.99), 1e-3)

    rounds = [
        Contributions([("one", 1, update(1, 2, 3))]),
        Contributions([("one", 1, update(3, 2, 1))]),
    ]
    whole, stopped, later = made(), made(), made()
    first = whole.next(1, START, rounds[0])
    wanted = whole.next(2, first, rounds[1])

    stopped.next(1, START, rounds[0])
    later.load(stopped.state())
    found = later.next(2, first, rounds[1])

    assert all((found[name] == wanted[name]).all() for name in START)
    assert all(array.dtype == np.float32 for array in found.values())


@pytest.mark.parametrize("strategy", [FlowerAveraging(), FlowerAdam(0.1, (0.9, 0.99), 1e-3)])
def test_the_state_of_another_strategy_is_refused(strategy):
    """What was saved by one is not taken by another."""
    with pytest.raises(CheckpointError, match="another strategy"):
        strategy.load({"z:a": START["a"]})


def test_normfedavg_divides_by_who_answered_or_by_who_was_expected():
    """Where a client's presence is the secret, the number of answers must not show."""
    updates = Contributions([("one", 1, update(1, 0, 0)), ("two", 1, update(1, 0, 0))])

    found = NormFedAvg(1.0, 4).next(1, START, updates)
    assert found["a"].tolist() == [2.0, -1.0]

    quiet = UnitUpdate(1e9, Neighbours.REMOVE)
    found = NormFedAvg(1.0, 4, quiet, NoiseSource(b"test")).next(1, START, updates)
    assert found["a"][0] == pytest.approx(1.5, abs=1e-6)


def test_a_long_update_is_shortened_before_noise_is_added():
    """A client that does not normalize cannot break the others' guarantee, nor its own."""
    quiet = UnitUpdate(1e9)
    updates = Contributions([("one", 1, update(0, 0, 100.0)), ("two", 1, update(0, 1, 0))])

    found = NormFedAvg(1.0, 2, quiet, NoiseSource(b"test")).next(1, START, updates)

    assert found["b"][0, 0] == pytest.approx(2.5, abs=1e-6)


def test_noise_needs_unit_updates():
    """A configuration cannot ask for noise that is calibrated to nothing."""
    with pytest.raises(ConfigError, match="normfedavg"):
        averaging(StrategySection(), 3, UnitUpdate(1.0))
