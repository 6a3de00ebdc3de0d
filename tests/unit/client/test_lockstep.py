"""Sequences that fall into step, told by a clock that stands still until it is set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.client.lockstep import Lockstep


class Clock:
    """Time as the test sets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    """Time that the test sets."""
    return Clock()


@pytest.fixture
def lockstep(clock):
    """A lockstep that knows a round trip of 0.04 s."""
    made = Lockstep(clock)
    key = made.send()
    clock.now += 0.04
    made.back(key)
    return made


def test_nobody_waits_alone(lockstep):
    """With no rows on their way there is nothing to wait for."""
    assert lockstep.wait() == 0.0


def test_before_any_round_trip_is_known_nobody_waits(clock):
    """The first rows of a process are not held up by a guess."""
    lockstep = Lockstep(clock)
    lockstep.send()
    assert lockstep.wait() == 0.0


def test_rows_due_soon_are_waited_for(lockstep, clock):
    """Rows due in a quarter of a round are worth that time and the allowed lateness."""
    lockstep.send()
    clock.now += 0.03
    assert lockstep.wait() == pytest.approx(0.01 + 0.01)


def test_rows_just_sent_are_not_waited_for(lockstep):
    """More than half a round would cost more than a common batch gains."""
    lockstep.send()
    assert lockstep.wait() == 0.0


def test_rows_that_are_overdue_are_given_up(lockstep, clock):
    """A sequence that is stuck does not slow the others down."""
    lockstep.send()
    clock.now += 0.051
    assert lockstep.wait() == 0.0


def test_the_wait_is_bounded(clock):
    """However slow the server, nobody is held longer than the longest wait."""
    lockstep = Lockstep(clock)
    key = lockstep.send()
    clock.now += 10.0
    lockstep.back(key)
    lockstep.send()
    clock.now += 9.0
    assert lockstep.wait() == 0.05


def test_the_round_trip_is_followed(lockstep, clock):
    """The estimate moves a quarter of the way to the latest round trip."""
    key = lockstep.send()
    clock.now += 0.08
    lockstep.back(key)
    lockstep.send()
    clock.now += 0.05
    assert lockstep.wait() == pytest.approx(0.25 * 0.05)


@given(
    st.lists(st.floats(0.0, 0.2), min_size=1, max_size=20),
    st.lists(st.floats(0.0, 0.2), max_size=5),
)
def test_waits_are_never_negative_and_always_bounded(trips, ages):
    """Whatever came before, a wait is between nothing and the bound."""
    clock = Clock()
    lockstep = Lockstep(clock)
    for seconds in trips:
        key = lockstep.send()
        clock.now += seconds
        lockstep.back(key)
    for seconds in ages:
        lockstep.send()
        clock.now += seconds
    assert 0.0 <= lockstep.wait() <= 0.05
