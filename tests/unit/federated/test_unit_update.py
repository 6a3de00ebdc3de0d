from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import BudgetExceeded, ConfigError, UnsafeRows
from fedsea.federated.arrays import norm, plus
from fedsea.federated.config import Neighbours, PrivacySection
from fedsea.federated.unit_update import RECORD, UnitUpdate, account_of, mechanism_of
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.noise import NoiseSource

numbers = st.floats(-1e6, 1e6, width=32)
updates = st.lists(numbers, min_size=6, max_size=6).map(
    lambda found: {
        "a": np.array(found[:2], np.float32),
        "b": np.array(found[2:], np.float32).reshape(2, 2),
    }
)


def total(found):
    """The sum of unit updates, as the aggregator forms it."""
    summed = {"a": np.zeros(2, np.float32), "b": np.zeros((2, 2), np.float32)}
    for update in found:
        summed = plus(summed, UnitUpdate.normalized(update))
    return summed


@given(st.lists(updates, min_size=1, max_size=4), updates)
def test_replacing_a_client_moves_the_sum_by_two_at_most(others, replacement):
    """The sensitivity that the noise is calibrated to holds for any data of any client."""
    mechanism = UnitUpdate(1.0, Neighbours.REPLACE)
    before, after = total(others), total([*others[:-1], replacement])

    moved = norm({name: after[name] - before[name] for name in before})

    assert moved <= mechanism.sensitivity + 1e-5


@given(st.lists(updates, min_size=1, max_size=4))
def test_removing_a_client_moves_the_sum_by_one_at_most(found):
    """Likewise for neighbours that differ by a client."""
    mechanism = UnitUpdate(1.0, Neighbours.REMOVE)
    before, after = total(found), total(found[:-1])

    moved = norm({name: after[name] - before[name] for name in before})

    assert moved <= mechanism.sensitivity + 1e-5


def test_a_zero_update_stays_zero():
    """It has no direction, and is within the ball all the same."""
    zero = {"a": np.zeros(2, np.float32)}

    assert norm(UnitUpdate.normalized(zero)) == 0


def test_nan_is_refused_before_it_is_divided():
    """A norm that is NaN would spread to every number."""
    with pytest.raises(UnsafeRows):
        UnitUpdate.normalized({"a": np.array([np.nan, 1.0], np.float32)})


@pytest.mark.parametrize(("neighbours", "sigma"), [("replace", 4.0), ("remove", 2.0)])
def test_noise_has_the_calibrated_size(neighbours, sigma):
    """sigma = sensitivity / mu, measured on the released sum."""
    mechanism = UnitUpdate(0.5, Neighbours(neighbours))
    zeros = {"a": np.zeros((200, 200), np.float32)}

    released = mechanism.noised(zeros, NoiseSource(b"test"))["a"]

    assert mechanism.sigma == sigma
    assert released.std() == pytest.approx(sigma, rel=0.02)
    assert abs(released.mean()) < 0.1


def test_rounds_compose_as_gaussian_privacy_does():
    """T rounds cost mu sqrt(T), exactly."""
    assert UnitUpdate(0.5).loss().composed(20).mu() == pytest.approx(0.5 * math.sqrt(20))


def test_it_is_a_mechanism():
    """Spec, likelihood and rows work as those of the others."""
    mechanism = UnitUpdate(2.0, Neighbours.REMOVE)
    candidates = torch.tensor([[3.0, 0.0], [0.0, 5.0]])

    scores = mechanism.log_likelihood(torch.tensor([0.1, 0.9]), candidates)
    protected = mechanism.protect(torch.ones(3, 4), NoiseSource(b"test"))

    assert mechanism.spec() == "unit-update:mu=2,neighbours=remove"
    assert int(scores.argmax()) == 1
    assert protected.shape == (3, 4)
    assert mechanism.releases(3) == 1
    assert "unit client" in mechanism.describe()


@pytest.mark.parametrize("options", [{"mu": 0.0}, {"mu": 1.0, "neighbours": "both"}])
def test_other_parameters_are_refused(options):
    """A guarantee needs a positive mu and a known neighbourhood."""
    with pytest.raises(ConfigError):
        UnitUpdate(**options)


def test_rounds_are_charged_to_any_one_client(tmp_path):
    """The account names what is protected, and its budget ends the rounds."""
    section = PrivacySection(mu=0.5, budget_mu=0.8)
    mechanism = mechanism_of(section)
    assert mechanism is not None
    with Ledger.open(tmp_path / "ledger") as ledger:
        account = account_of(ledger, "trial", section, mechanism)
        account.reserve(1).settle(1)
        account.reserve(1).settle(1)
        with pytest.raises(BudgetExceeded):
            account.reserve(1)
        (statement,) = ledger.statements()

    assert statement.record == RECORD
    assert statement.spending().mu() == pytest.approx(0.5 * math.sqrt(2))
    assert mechanism_of(PrivacySection()) is None
