"""When bytes arrive over a link."""

import pytest
from benchmarks.shaping import Link, Schedule


def test_a_message_takes_its_size_and_the_delay():
    """1,000 bytes at 10,000 bytes/s, then 50 ms."""
    assert Schedule(Link(0.05, 10_000.0)).arrival(1000, now=7.0) == pytest.approx(7.15)


def test_messages_wait_for_those_before_them():
    """The link carries one after the other; delays overlap."""
    schedule = Schedule(Link(0.05, 10_000.0))
    schedule.arrival(1000, now=0.0)
    assert schedule.arrival(1000, now=0.02) == pytest.approx(0.25)
    assert schedule.backlog(0.05) == pytest.approx(0.15)


def test_a_link_rests_when_nothing_comes():
    """Time that nobody used is not saved up."""
    schedule = Schedule(Link(0.0, 10_000.0))
    schedule.arrival(1000, now=0.0)
    assert schedule.backlog(5.0) == 0.0
    assert schedule.arrival(1000, now=5.0) == pytest.approx(5.1)
