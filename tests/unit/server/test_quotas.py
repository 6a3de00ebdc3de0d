"""Quotas: what is over them is refused, what ends gives back, and no rate is exceeded."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import Capacity, QuotaExceeded, Refused
from fedsea.server.config import QuotaSection, QuotasSection
from fedsea.server.quotas import Admissions, TokenBucket, Usage


def admissions(max_sessions=4, **default):
    """Admissions in pages of 8 rows, the same quota for everybody."""
    return Admissions(QuotasSection(default=QuotaSection(**default)), max_sessions, page_rows=8)


def test_a_full_table_refuses_everybody():
    """Beyond max_sessions the answer is Capacity with a time to retry."""
    table = admissions(max_sessions=1)

    with table.admitted("a", 0):
        with pytest.raises(Capacity, match="1 sessions") as refusal, table.admitted("b", 0):
            pass
        assert refusal.value.retry_after is not None
    with table.admitted("b", 0):
        assert table.sessions == 1


def test_session_quota_is_per_tenant():
    """One tenant at its quota does not stand in another's way."""
    table = admissions(sessions=1)

    with (
        table.admitted("a", 0),
        table.admitted("b", 0),
        pytest.raises(QuotaExceeded, match="its quota"),
        table.admitted("a", 0),
    ):
        pass


def test_kv_quota_counts_whole_pages():
    """A reservation counts as the pages it takes; one that can never fit has no retry time."""
    table = admissions(kv_rows=16)

    with table.admitted("a", 1):
        assert table.usage("a") == Usage(sessions=1, kv_rows=8)
        with pytest.raises(QuotaExceeded) as refusal, table.admitted("a", 9):
            pass
        assert refusal.value.retry_after is not None
        with pytest.raises(QuotaExceeded) as refusal, table.admitted("a", 17):
            pass
        assert refusal.value.retry_after is None
    assert table.usage("a") == Usage()


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.booleans()), max_size=40),
)
def test_counts_never_exceed_the_quotas(events):
    """However sessions come and go, nobody holds more than allowed, and at the end nothing."""
    table = admissions(max_sessions=5, sessions=3, kv_rows=64)
    held: list[tuple[str, ExitStack]] = []

    for tenant, rows, leaves in events:
        if leaves and held:
            held.pop(0)[1].close()
        stack = ExitStack()
        with suppress(Refused):
            stack.enter_context(table.admitted(tenant, rows))
            held.append((tenant, stack))
        assert table.sessions == len(held) <= 5
        for name in "abc":
            assert table.usage(name).sessions == sum(owner == name for owner, _ in held) <= 3
            assert table.usage(name).kv_rows <= 64
    for _, stack in held:
        stack.close()

    assert table.sessions == 0
    assert all(table.usage(name) == Usage() for name in "abc")


@given(
    rate=st.floats(0.5, 1000),
    waits=st.lists(st.floats(0, 3), min_size=1, max_size=50),
    greed=st.integers(1, 5000),
)
def test_no_interval_gets_more_than_rate_and_burst(rate, waits, greed):
    """Units taken by any time stay below rate x time plus the burst of one second."""
    bucket = TokenBucket(rate, now=0.0)
    now, taken = 0.0, 0

    for wait in waits:
        now += wait
        units = min(greed, bucket.available(now))
        bucket.take(units)
        taken += units
        assert taken <= rate * now + max(rate, 1.0) + 1e-6


@given(rate=st.floats(0.5, 1000), used=st.integers(1, 1000))
def test_ready_when_it_says(rate, used):
    """At the time named as ready a unit is there; half a unit earlier it is not."""
    bucket = TokenBucket(rate, now=0.0)
    bucket.take(min(used, bucket.available(0.0)))
    bucket.take(bucket.available(0.0))

    ready = bucket.ready_at()

    assert bucket.available(ready - 0.5 / rate) == 0
    assert bucket.available(ready + 1e-6) >= 1
