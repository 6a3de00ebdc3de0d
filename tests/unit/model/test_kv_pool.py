"""The pool never loses a page, never mixes sequences and never breaks a reservation."""

from copy import deepcopy
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fedsea.errors import Capacity, LocalProtocolError, QuotaExceeded
from fedsea.model.kv_pool import KVPool, PageCopy, Sequence, pages_for

ROWS = st.integers(0, 9)


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a list of row values for each sequence.

    `store` plays the KV cache: rows are written where the pool says, and must read back as the
    lists of `expected` say, whatever other sequences did in between.
    """

    @initialize(num_pages=st.integers(12, 24), page_rows=st.integers(2, 4))
    def make_pool(self, num_pages, page_rows):
        self.pool = KVPool(num_pages, page_rows)
        self.store = [-1] * self.pool.num_rows
        self.accounts: list[int] = []
        self.expected: dict[tuple[int, int], list[int]] = {}
        self.next_value = 0
        self.next_sequence = 0
        self.open(24)

    @precondition(lambda self: len(self.accounts) < 3)
    @rule(rows=st.integers(8, 40))
    def open(self, rows):
        if pages_for(rows, self.pool.page_rows) * self.pool.page_rows <= self.pool.unreserved_rows:
            self.accounts.append(self.pool.open(rows))
            return
        with pytest.raises(Capacity):
            self.pool.open(rows)

    @precondition(lambda self: len(self.accounts) > 1)
    @rule(data=st.data())
    def close(self, data):
        account = data.draw(st.sampled_from(self.accounts))
        self.accounts.remove(account)
        self.pool.close(account)
        self.expected = {key: rows for key, rows in self.expected.items() if key[0] != account}

    @precondition(lambda self: self.accounts and len(self.expected) < 3)
    @rule(data=st.data(), capacity=ROWS, rows=ROWS)
    def begin(self, data, capacity, rows):
        key = self._new_key(data.draw(st.sampled_from(self.accounts)))
        self.pool.begin(key[0], key[1], capacity)
        self.expected[key] = []
        self._grow(key, rows)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), rows=ROWS)
    def extend(self, data, rows):
        self._grow(data.draw(st.sampled_from(sorted(self.expected))), rows)

    def _grow(self, key, rows):
        before = self._locations(key)
        if self._pages_after(key, rows) > self.pool._accounts[key[0]].reserved:
            with pytest.raises(QuotaExceeded):
                self.pool.extend(key[0], key[1], rows)
            assert self._locations(key) == before
            return
        self._apply(self.pool.extend(key[0], key[1], rows))
        for location in self._locations(key)[len(before) :]:
            self.store[location] = self.next_value
            self.expected[key].append(self.next_value)
            self.next_value += 1

    @precondition(lambda self: any(self.expected.values()))
    @rule(data=st.data(), counts=st.lists(st.integers(1, 5), min_size=6, max_size=6))
    def extend_together(self, data, counts):
        """What `check_room` says about several sequences is what growing them would show."""
        account = self._draw_key(data)[0]
        numbers = [number for owner, number in self.expected if owner == account]
        rows = dict(zip(numbers, counts, strict=False))
        trial = deepcopy(self.pool)
        try:
            for number, count in rows.items():
                trial.extend(account, number, count)
        except QuotaExceeded:
            with pytest.raises(QuotaExceeded):
                self.pool.check_room(account, rows)
            return
        self.pool.check_room(account, rows)
        for number, count in rows.items():
            self._grow((account, number), count)

    @precondition(lambda self: any(self.expected.values()))
    @rule(data=st.data())
    def rollback(self, data):
        key = self._draw_key(data)
        length = max(0, len(self.expected[key]) - data.draw(st.integers(0, 9)))
        self.pool.rollback(key[0], key[1], length)
        del self.expected[key][length:]

    @precondition(lambda self: any(self.expected.values()) and len(self.expected) < 6)
    @rule(data=st.data(), extra=ROWS)
    def fork(self, data, extra):
        key = self._draw_key(data)
        length = max(0, len(self.expected[key]) - data.draw(st.integers(0, 5)))
        target = self._new_key(key[0])
        self.pool.fork(key[0], key[1], target[1], length, length + extra)
        self.expected[target] = self.expected[key][:length]
        self._grow(target, extra)

    @precondition(lambda self: any(self.expected.values()) and len(self.expected) > 3)
    @rule(data=st.data())
    def drop(self, data):
        key = self._draw_key(data)
        self.pool.drop(key[0], key[1])
        del self.expected[key]

    @invariant()
    def pages_are_accounted_for(self):
        self.pool.check_integrity()

    @invariant()
    def rows_read_back(self):
        for key, rows in self.expected.items():
            assert [self.store[location] for location in self._locations(key)] == rows

    @invariant()
    def one_run_is_one_run(self):
        for key in self.expected:
            pages = self.pool.sequence(*key).pages
            follows = all(b == a + 1 for a, b in pairwise(pages))
            assert self.pool.sequence(*key).is_one_run == follows

    def _draw_key(self, data):
        """A sequence that has rows."""
        return data.draw(
            st.sampled_from(sorted(key for key, rows in self.expected.items() if rows))
        )

    def _new_key(self, account):
        self.next_sequence += 1
        return account, self.next_sequence

    def _locations(self, key):
        sequence, page_rows = self.pool.sequence(*key), self.pool.page_rows
        return [
            sequence.pages[row // page_rows] * page_rows + row % page_rows
            for row in range(sequence.length)
        ]

    def _apply(self, copies):
        for copy in copies:
            source, target = copy.source * self.pool.page_rows, copy.target * self.pool.page_rows
            self.store[target : target + copy.rows] = self.store[source : source + copy.rows]

    def _pages_after(self, key, rows):
        """Pages that the account holds once the sequence has `rows` more rows of its own."""
        pages = {
            page
            for account, number in self.expected
            if account == key[0]
            for page in self.pool.sequence(account, number).pages
        }
        sequence, page_rows = self.pool.sequence(*key), self.pool.page_rows
        grown = pages_for(sequence.length + rows, page_rows) - len(sequence.pages)
        return len(pages) + grown + self._writes_into_shared_page(key, rows)

    def _writes_into_shared_page(self, key, rows):
        sequence = self.pool.sequence(*key)
        if not rows or sequence.length % self.pool.page_rows == 0:
            return False
        return any(
            sequence.pages[-1] in self.pool.sequence(*other).pages
            for other in self.expected
            if other[0] == key[0] and other != key
        )


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestPoolMachine = PoolMachine.TestCase


def filled(pool: KVPool, account: int, sequence: int, rows: int) -> Sequence:
    """Begin a sequence of exactly `rows` rows and write them."""
    pool.begin(account, sequence, rows)
    assert pool.extend(account, sequence, rows) == ()
    return pool.sequence(account, sequence)


def test_reservation_rounds_up_to_pages():
    """17 rows in pages of 16 reserve two pages."""
    pool = KVPool(4, 16)
    pool.open(17)
    assert pool.unreserved_rows == 32


def test_full_pool_asks_to_retry():
    """A reservation that fits an empty pool but not this one can be retried."""
    pool = KVPool(4, 16)
    pool.open(50)
    with pytest.raises(Capacity, match="0 of 64 rows left and 1 were asked for") as refused:
        pool.open(1)
    assert refused.value.retry_after == 1.0


def test_larger_than_the_pool_is_hopeless():
    """A reservation that no empty pool could hold is refused without a time to retry."""
    with pytest.raises(Capacity) as refused:
        KVPool(4, 16).open(65)
    assert refused.value.retry_after is None


def test_reservation_is_a_promise():
    """What one account reserved is there for it after others filled theirs and fragmented."""
    pool = KVPool(8, 2)
    patient, greedy = pool.open(8), pool.open(8)
    for number in range(4):
        filled(pool, greedy, number, 2)
    pool.drop(greedy, 1)
    pool.drop(greedy, 3)
    filled(pool, patient, 0, 8)
    pool.check_integrity()


def test_refused_growth_changes_nothing():
    """Growth past the reservation is refused before any page is taken or copied."""
    pool = KVPool(8, 4)
    account = pool.open(8)
    filled(pool, account, 0, 6)
    pool.fork(account, 0, 1, 6, 8)
    before = list(pool.sequence(account, 1).pages)
    with pytest.raises(QuotaExceeded, match="reserved 8 rows"):
        pool.extend(account, 1, 1)
    assert pool.sequence(account, 1).pages == before
    assert pool.sequence(account, 1).length == 6
    pool.check_integrity()


def test_growth_beside_others_stays_in_one_run():
    """Sequences that grow in turns each stay in one run, because each claimed its capacity."""
    pool = KVPool(64, 4)
    account = pool.open(256)
    for number in range(4):
        pool.begin(account, number, 64)
    for _ in range(64):
        for number in range(4):
            pool.extend(account, number, 1)
    assert all(pool.sequence(account, number).is_one_run for number in range(4))


def test_claim_of_a_dropped_sequence_is_used_again():
    """Room that a sequence claimed and never filled returns with its end."""
    pool = KVPool(8, 4)
    account = pool.open(32)
    pool.begin(account, 0, 32)
    pool.drop(account, 0)
    assert filled(pool, account, 1, 32).is_one_run


def test_fork_of_a_dropped_source_keeps_growing_in_its_run():
    """A fork that outlives its source continues behind the shared pages."""
    pool = KVPool(16, 4)
    account = pool.open(64)
    filled(pool, account, 0, 8)
    pool.fork(account, 0, 1, 8, 24)
    pool.drop(account, 0)
    pool.extend(account, 1, 16)
    assert pool.sequence(account, 1).is_one_run


def test_scattered_pages_are_no_run():
    """Without a run for its capacity a sequence takes scattered pages and says so."""
    pool = KVPool(5, 1)
    account = pool.open(5)
    for number in range(5):
        filled(pool, account, number, 1)
    for number in (1, 3):
        pool.drop(account, number)
    assert filled(pool, account, 9, 2).pages == [1, 3]
    assert not pool.sequence(account, 9).is_one_run


def test_shared_page_is_copied_once():
    """The first write into a shared part-filled page copies its rows; the next one does not."""
    pool = KVPool(8, 4)
    account = pool.open(32)
    origin = filled(pool, account, 0, 6)
    pool.fork(account, 0, 1, 6, 16)
    (copy,) = pool.extend(account, 1, 1)
    assert copy == PageCopy(
        source=origin.pages[1], target=pool.sequence(account, 1).pages[1], rows=2
    )
    assert pool.extend(account, 1, 1) == ()
    assert pool.extend(account, 0, 1) == ()


def test_full_shared_pages_are_not_copied():
    """A fork at a page boundary shares all pages for good."""
    pool = KVPool(8, 4)
    account = pool.open(32)
    filled(pool, account, 0, 8)
    pool.fork(account, 0, 1, 8, 16)
    assert pool.extend(account, 1, 4) == ()
    assert pool.free_pages == 5


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda pool: pool.begin(0, 0, 4), "sequence 0 exists already"),
        (lambda pool: pool.rollback(0, 0, 5), "cannot roll 4 rows back to 5"),
        (lambda pool: pool.fork(0, 0, 1, 5, 8), "cannot fork 5 rows of 4"),
        (lambda pool: pool.fork(0, 0, 0, 4, 8), "sequence 0 exists already"),
        (lambda pool: pool.fork(0, 7, 1, 0, 8), "there is no sequence 7"),
        (lambda pool: pool.extend(0, 7, 1), "there is no sequence 7"),
        (lambda pool: pool.rollback(0, 7, 0), "there is no sequence 7"),
        (lambda pool: pool.check_room(0, {7: 1}), "there is no sequence 7"),
        (lambda pool: pool.drop(0, 7), "there is no sequence 7"),
        (lambda pool: pool.sequence(0, 7), "there is no sequence 7"),
    ],
)
def test_misuse_is_named_and_harmless(action, message):
    """A call that makes no sense is refused by name and leaves the pool as it was."""
    pool = KVPool(8, 4)
    account = pool.open(16)
    filled(pool, account, 0, 4)
    with pytest.raises(LocalProtocolError, match=message):
        action(pool)
    assert pool.sequences(account) == [0]
    assert pool.sequence(account, 0).length == 4
    pool.check_integrity()


def test_two_hundred_sessions_on_a_small_pool():
    """200 sessions on a pool for 20: one is refused until another ends, and no page is lost."""
    pool = KVPool(100, 16)
    alive: list[int] = []
    for number in range(200):
        if len(alive) == 20:
            with pytest.raises(Capacity):
                pool.open(70)
            pool.close(alive.pop(number % 20))
        alive.append(pool.open(70))
        filled(pool, alive[-1], number, 70)
        pool.check_integrity()
    for account in alive:
        pool.close(account)
    pool.check_integrity()
    assert pool.free_pages == 100
    assert pool.num_accounts == 0


def break_hold(pool: KVPool) -> None:
    """A page read by one sequence counts twice."""
    pool._accounts[0].held[0] += 1


def break_state(pool: KVPool) -> None:
    """A page in use counts as free."""
    pool._states[0] = 0


def break_pages(pool: KVPool) -> None:
    """A page is gone from its sequence."""
    pool._accounts[0].sequences[0].pages.pop()


def break_reservation(pool: KVPool) -> None:
    """An account reserved less than it holds."""
    pool._accounts[0].reserved = 1


def break_sum(pool: KVPool) -> None:
    """The sum of reservations has moved."""
    pool._reserved += 1


def break_owner(pool: KVPool) -> None:
    """Two accounts hold the same page."""
    pool._accounts[1].held.update(pool._accounts[0].held)
    pool._accounts[1].sequences.update(pool._accounts[0].sequences)


def break_claim(pool: KVPool) -> None:
    """Two sequences claim the same page."""
    pool._accounts[0].sequences[1].home = 0


@pytest.mark.parametrize(
    "defect",
    [
        break_hold,
        break_state,
        break_pages,
        break_reservation,
        break_sum,
        break_owner,
        break_claim,
    ],
)
def test_integrity_check_sees_defects(defect):
    """Each kind of broken bookkeeping is noticed."""
    pool = KVPool(8, 4)
    pool.open(16)
    pool.open(16)
    filled(pool, 0, 0, 8)
    pool.begin(0, 1, 4)
    pool.check_integrity()
    defect(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_a_fork_of_whole_pages_continues_behind_them():
    """Where the claim of the forked sequence was given up, both together are one run of pages."""
    pool = KVPool(12, 16)
    account = pool.open(10 * 16)
    pool.begin(account, 0, 6 * 16)
    pool.extend(account, 0, 2 * 16)
    pool.seal(account, 0)
    pool.fork(account, 0, 1, 2 * 16, 5 * 16)
    pool.fork(account, 0, 2, 2 * 16, 5 * 16)
    for sequence in (1, 2):
        pool.extend(account, sequence, 3 * 16)

    assert pool.sequence(account, 1).pages == [0, 1, 2, 3, 4]
    assert pool.sequence(account, 2).pages == [0, 1, 5, 6, 7]
    pool.check_integrity()
    pool.close(account)
    pool.check_integrity()
