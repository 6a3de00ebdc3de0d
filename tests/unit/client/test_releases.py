"""Kept releases: the bytes by position against a plain model, the memory bound, the spill file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedsea.client.releases import ReleaseLog, ReleaseStore
from fedsea.errors import LocalProtocolError

ROW = 3


def rows(count, seed=0):
    """Bytes of some rows, different for every seed."""
    return bytes((seed * 7 + index) % 256 for index in range(count * ROW))


class LogMachine(RuleBasedStateMachine):
    """Logs that are appended to, cut, forked and dropped, beside byte strings that say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.store = ReleaseStore(max_memory=40)
        self.logs = [ReleaseLog(self.store, ROW)]
        self.models = [b""]
        self.made = 0

    def pick(self, number):
        return number % len(self.logs)

    @rule(number=st.integers(0, 9), count=st.integers(1, 6))
    def append(self, number, count):
        self.made += 1
        index = self.pick(number)
        data = rows(count, self.made)
        self.logs[index].append(data)
        self.models[index] += data

    @rule(number=st.integers(0, 9), part=st.floats(0, 1))
    def truncate(self, number, part):
        index = self.pick(number)
        length = round(part * len(self.logs[index]))
        self.logs[index].truncate(length)
        self.models[index] = self.models[index][: length * ROW]

    @precondition(lambda self: len(self.logs) < 6)
    @rule(number=st.integers(0, 9), part=st.floats(0, 1))
    def fork(self, number, part):
        index = self.pick(number)
        length = round(part * len(self.logs[index]))
        self.logs.append(self.logs[index].fork(length))
        self.models.append(self.models[index][: length * ROW])

    @precondition(lambda self: len(self.logs) > 1)
    @rule(number=st.integers(0, 9))
    def drop(self, number):
        index = self.pick(number)
        del self.logs[index], self.models[index]

    @rule(number=st.integers(0, 9), first=st.floats(0, 1), last=st.floats(0, 1))
    def read(self, number, first, last):
        index = self.pick(number)
        start, end = sorted(round(part * len(self.logs[index])) for part in (first, last))
        assert self.logs[index].read(start, end) == self.models[index][start * ROW : end * ROW]

    @invariant()
    def everything_is_there(self):
        for log, model in zip(self.logs, self.models, strict=True):
            assert len(log) == len(model) // ROW
            assert log.read(0, len(log)) == model

    @invariant()
    def memory_is_bounded(self):
        assert 0 <= self.store.memory_bytes <= 40

    def teardown(self):
        self.store.close()


TestLogMachine = LogMachine.TestCase


def test_beyond_the_budget_the_oldest_bytes_leave_memory():
    """The newest stay in memory, the oldest are read back from the file unchanged."""
    store = ReleaseStore(max_memory=20)
    releases = [store.put(rows(2, seed)) for seed in range(6)]
    assert store.memory_bytes <= 20
    assert store.spilled_bytes == 18
    assert [release.data is None for release in releases] == [True] * 3 + [False] * 3
    assert [store.read(release) for release in releases] == [rows(2, seed) for seed in range(6)]
    store.close()


def test_a_release_larger_than_the_budget_is_kept_on_disk():
    """Even a budget of nothing loses nothing."""
    store = ReleaseStore(max_memory=0)
    release = store.put(rows(100))
    assert store.memory_bytes == 0
    assert store.read(release) == rows(100)
    store.close()


def test_a_dropped_release_leaves_memory():
    """What no log refers to any more is not counted."""
    store = ReleaseStore()
    log = ReleaseLog(store, ROW)
    log.append(rows(4))
    assert store.memory_bytes == 4 * ROW
    del log
    assert store.memory_bytes == 0


def test_a_fork_shares_bytes():
    """Branches of one prompt keep it once; it leaves with the last of them."""
    store = ReleaseStore()
    log = ReleaseLog(store, ROW)
    log.append(rows(4))
    forked = log.fork(4)
    assert store.memory_bytes == 4 * ROW
    del log
    assert forked.read(0, 4) == rows(4)
    del forked
    assert store.memory_bytes == 0


def test_the_spill_file_is_used_again_when_nothing_in_it_is_needed():
    """A client that runs for long does not fill the disk with what it has dropped."""
    store = ReleaseStore(max_memory=0)
    for seed in range(50):
        release = store.put(rows(10, seed))
        assert store.read(release) == rows(10, seed)
        del release
    assert store.spilled_bytes <= 10 * ROW
    store.close()


def test_many_living_releases_are_not_swept_at_every_put(monkeypatch):
    """The sweep for dead references costs little per release, however many are alive."""
    monkeypatch.setattr("fedsea.client.releases._MANY_RELEASES", 8)
    store = ReleaseStore()
    sweeps = []
    sweep = store._forget_dead

    def counted():
        sweeps.append(1)
        sweep()

    monkeypatch.setattr(store, "_forget_dead", counted)
    alive = [store.put(rows(1, seed)) for seed in range(200)]
    assert len(alive) == 200
    assert len(sweeps) <= 8


def test_a_closed_store_says_so():
    """Spilled bytes of a closed store are gone, and the error says what to do."""
    store = ReleaseStore(max_memory=0)
    release = store.put(rows(1))
    store.close()
    with pytest.raises(LocalProtocolError, match="open a new session"):
        store.read(release)
    store.close()


@given(st.lists(st.integers(1, 5), max_size=8), st.integers(0, 40), st.integers(0, 40))
def test_a_range_beyond_the_end_is_cut(counts, start, end):
    """Reading past the end gives what there is, as slicing does."""
    log = ReleaseLog(ReleaseStore(), ROW)
    model = b""
    for seed, count in enumerate(counts):
        log.append(rows(count, seed))
        model += rows(count, seed)
    assert log.read(start, end) == model[start * ROW : max(start, end) * ROW]
