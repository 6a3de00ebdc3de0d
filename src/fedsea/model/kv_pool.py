"""Who holds which rows of the KV cache: plain bookkeeping, no tensors.

The pool is a row of pages of `page_rows` rows each. An *account* (a session) reserves pages when
it opens, so that nothing inside its reservation can ever be refused. Its *sequences* take pages
from the reservation as they grow. Forked sequences share pages; a page is copied when a sequence
writes into one that others read.

Rows of a sequence should lie in one run of pages, because attention reads a run without a copy.
A new sequence therefore claims a run of pages for its whole capacity, and grows inside its claim.
A claim keeps others away as long as they find room elsewhere and is no promise: fragmentation
costs speed, never a refusal. A fork of whole pages continues behind them where that is free, so
that a sequence that is forked once and never grows itself is one run with its fork.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedsea.errors import Capacity, LocalProtocolError, QuotaExceeded

# State of a page, one byte each: searching them is one call into C.
_FREE = 0
_TAKEN = 1
_CLAIMED = 2
_WITHOUT_CLAIM = bytes(state & ~_CLAIMED for state in range(256))


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Rows to copy from one page to another before the next write."""

    source: int
    target: int
    rows: int


@dataclass(slots=True)
class Sequence:
    """One KV chain: its pages in order and the number of rows written.

    `claim` pages from `home` on are kept for its growth. `joined` counts how many of the first
    pages lie in one run.
    """

    capacity: int
    home: int
    claim: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    joined: int = 0

    @property
    def is_one_run(self) -> bool:
        """Whether all pages follow each other."""
        return self.joined == len(self.pages)

    @property
    def first_page(self) -> int:
        """The first page, or where the first page should go."""
        return self.pages[0] if self.pages else self.home

    def claims(self, page: int) -> bool:
        """Whether the page is kept for this sequence."""
        return self.home <= page < self.home + self.claim

    def append_page(self, page: int) -> None:
        """Add a page at the end."""
        if self.is_one_run and (not self.pages or page == self.pages[-1] + 1):
            self.joined += 1
        self.pages.append(page)

    def cut_pages(self, keep: int) -> list[int]:
        """Keep the first `keep` pages and return the others."""
        dropped = self.pages[keep:]
        del self.pages[keep:]
        self.joined = min(self.joined, keep)
        return dropped


@dataclass(slots=True)
class Account:
    """The pages that one session has reserved, its sequences by id, and how many read a page."""

    reserved: int
    sequences: dict[int, Sequence] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    def sequence(self, number: int) -> Sequence:
        """A sequence by its id."""
        try:
            return self.sequences[number]
        except KeyError:
            raise LocalProtocolError(f"there is no sequence {number}; begin it first") from None


def pages_for(rows: int, page_rows: int) -> int:
    """Pages that hold `rows` rows."""
    return -(-rows // page_rows)


class KVPool:
    """Pages of the KV cache, handed to sequences of accounts.

    Args:
        num_pages: pages in all.
        page_rows: rows in a page.
    """

    def __init__(self, num_pages: int, page_rows: int) -> None:
        self.num_pages = num_pages
        self.page_rows = page_rows
        self._states = bytearray(num_pages)
        self._accounts: dict[int, Account] = {}
        self._reserved = 0
        self._next_account = 0

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return self.num_pages * self.page_rows

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return self.num_pages - sum(len(account.held) for account in self._accounts.values())

    @property
    def unreserved_rows(self) -> int:
        """Rows that a new account can still reserve."""
        return (self.num_pages - self._reserved) * self.page_rows

    @property
    def num_sequences(self) -> int:
        """Living sequences of all accounts."""
        return sum(len(account.sequences) for account in self._accounts.values())

    @property
    def num_accounts(self) -> int:
        """Open accounts."""
        return len(self._accounts)

    def open(self, rows: int) -> int:
        """Reserve `rows` rows, rounded up to whole pages, and return the account's number.

        An account that holds several sequences needs each one's capacity in whole pages.

        Raises:
            Capacity: the pool has too few unreserved rows.
        """
        pages = pages_for(rows, self.page_rows)
        if self._reserved + pages > self.num_pages:
            raise Capacity(
                f"the KV pool has {self.unreserved_rows} of {self.num_rows} rows left and "
                f"{rows} were asked for; retry later or ask for a shorter context",
                retry_after=None if pages > self.num_pages else 1.0,
            )
        self._reserved += pages
        account = self._next_account
        self._next_account += 1
        self._accounts[account] = Account(pages)
        return account

    def close(self, account: int) -> None:
        """Free everything that the account holds and its reservation."""
        closed = self._accounts.pop(account)
        self._reserved -= closed.reserved
        for sequence in closed.sequences.values():
            self._give_up_claim(sequence)
        self._give_back(closed.held)

    def begin(self, account: int, sequence: int, capacity: int) -> None:
        """Start an empty sequence that will hold at most `capacity` rows.

        Raises:
            LocalProtocolError: the account has such a sequence already.
        """
        self._new_sequence(self._accounts[account], sequence, capacity)

    def extend(self, account: int, sequence: int, rows: int) -> tuple[PageCopy, ...]:
        """Make room for `rows` more rows and count them as written.

        Returns the page copies to make before the rows are written.

        Raises:
            LocalProtocolError: there is no such sequence.
            QuotaExceeded: the account's reservation is used up; nothing has changed.
        """
        owner = self._accounts[account]
        grown = owner.sequence(sequence)
        length = grown.length
        missing = pages_for(length + rows, self.page_rows) - len(grown.pages)
        filled = length % self.page_rows
        is_shared = rows > 0 and filled > 0 and owner.held[grown.pages[-1]] > 1
        copies: tuple[PageCopy, ...] = ()
        if missing or is_shared:
            self._check_reservation(owner, missing + is_shared)
            if is_shared:
                copies = (self._own_last_page(owner, grown, filled),)
            for _ in range(missing):
                self._take_page(owner, grown)
        grown.length = length + rows
        return copies

    def check_room(self, account: int, rows: Mapping[int, int]) -> None:
        """Verify that sequences can grow by `rows` rows each, all of them together.

        Raises:
            LocalProtocolError: there is no such sequence.
            QuotaExceeded: the account's reservation is too small for that.
        """
        owner = self._accounts[account]
        needed = 0
        writers: dict[int, int] = {}
        for number, count in rows.items():
            grown = owner.sequence(number)
            needed += pages_for(grown.length + count, self.page_rows) - len(grown.pages)
            if grown.length % self.page_rows:
                page = grown.pages[-1]
                writers[page] = writers.get(page, 0) + 1
        # Whoever writes into a shared page copies it, except for its last reader.
        for page, count in writers.items():
            needed += count - (count == owner.held[page])
        self._check_reservation(owner, needed)

    def rollback(self, account: int, sequence: int, length: int) -> None:
        """Forget all rows from `length` on.

        Raises:
            LocalProtocolError: there is no such sequence, or it is shorter.
        """
        owner = self._accounts[account]
        cut = owner.sequence(sequence)
        if length > cut.length:
            raise LocalProtocolError(
                f"cannot roll {cut.length} rows back to {length}; give a smaller length"
            )
        cut.length = length
        self._release(owner, cut.cut_pages(pages_for(length, self.page_rows)))

    def fork(self, account: int, source: int, target: int, length: int, capacity: int) -> None:
        """Start `target` as the first `length` rows of `source`, sharing its pages.

        Raises:
            LocalProtocolError: no such source, a source that is shorter, or an existing target.
        """
        owner = self._accounts[account]
        origin = owner.sequence(source)
        if length > origin.length:
            raise LocalProtocolError(
                f"cannot fork {length} rows of {origin.length}; give a smaller length"
            )
        shared = origin.pages[: pages_for(length, self.page_rows)]
        behind = shared[-1] + 1 if shared and not length % self.page_rows else None
        forked = self._new_sequence(owner, target, capacity, length, behind)
        for page in shared:
            owner.held[page] += 1
            forked.append_page(page)
        forked.length = length

    def seal(self, account: int, sequence: int) -> None:
        """Let others have what is claimed for a sequence's growth: it will not grow.

        Raises:
            LocalProtocolError: there is no such sequence.
        """
        sealed = self._accounts[account].sequence(sequence)
        self._give_up_claim(sealed)
        sealed.claim = 0

    def drop(self, account: int, sequence: int) -> None:
        """Forget a sequence.

        Raises:
            LocalProtocolError: there is no such sequence.
        """
        owner = self._accounts[account]
        dropped = owner.sequence(sequence)
        del owner.sequences[sequence]
        self._give_up_claim(dropped)
        self._release(owner, dropped.pages)

    def sequence(self, account: int, sequence: int) -> Sequence:
        """A sequence, to be read only.

        Raises:
            LocalProtocolError: there is no such sequence.
        """
        return self._accounts[account].sequence(sequence)

    def sequences(self, account: int) -> list[int]:
        """Ids of the account's sequences."""
        return list(self._accounts[account].sequences)

    def check_integrity(self) -> None:
        """Verify that every page is free or held exactly as often as it is used.

        Raises:
            AssertionError: the bookkeeping is wrong, which is a defect of the pool.
        """
        states = bytearray(self.num_pages)
        for account in self._accounts.values():
            self._check_account(account)
            for page in account.held:
                if states[page] & _TAKEN:
                    raise AssertionError("a page is held by two accounts")
                states[page] |= _TAKEN
            for sequence in account.sequences.values():
                for page in range(sequence.home, sequence.home + sequence.claim):
                    if states[page] & _CLAIMED:
                        raise AssertionError("a page is claimed by two sequences")
                    states[page] |= _CLAIMED
        if states != self._states:
            raise AssertionError("a page is lost, or one in use counts as free")
        if self._reserved != sum(account.reserved for account in self._accounts.values()):
            raise AssertionError("the sum of reservations is wrong")

    def _check_account(self, account: Account) -> None:
        counts: dict[int, int] = {}
        for sequence in account.sequences.values():
            if len(sequence.pages) != pages_for(sequence.length, self.page_rows):
                raise AssertionError("a sequence has pages that its length does not explain")
            for page in sequence.pages:
                counts[page] = counts.get(page, 0) + 1
        if counts != account.held:
            raise AssertionError("the page counts of an account are wrong")
        if len(counts) > account.reserved:
            raise AssertionError("an account holds more pages than it reserved")

    def _new_sequence(
        self,
        owner: Account,
        number: int,
        capacity: int,
        shared_rows: int = 0,
        preferred: int | None = None,
    ) -> Sequence:
        if number in owner.sequences:
            raise LocalProtocolError(f"sequence {number} exists already; drop it first")
        # Full shared pages are never written again, so only the rest needs a place.
        claim = pages_for(capacity, self.page_rows) - shared_rows // self.page_rows
        free = bytes(claim)
        home = self._states.find(free)
        if preferred is not None and self._states.startswith(free, preferred):
            home = preferred
        if home < 0:
            home = claim = 0
        self._states[home : home + claim] = bytes((_CLAIMED,)) * claim
        owner.sequences[number] = Sequence(capacity=capacity, home=home, claim=claim)
        return owner.sequences[number]

    def _give_up_claim(self, sequence: Sequence) -> None:
        claimed = slice(sequence.home, sequence.home + sequence.claim)
        self._states[claimed] = self._states[claimed].translate(_WITHOUT_CLAIM)

    def _check_reservation(self, owner: Account, new_pages: int) -> None:
        if len(owner.held) + new_pages > owner.reserved:
            raise QuotaExceeded(
                f"the session reserved {owner.reserved * self.page_rows} rows and needs more; "
                "open it with a larger reservation"
            )

    def _own_last_page(self, owner: Account, sequence: Sequence, rows: int) -> PageCopy:
        """Replace the part-filled last page, which other sequences read, by one of its own."""
        (shared,) = sequence.cut_pages(len(sequence.pages) - 1)
        owner.held[shared] -= 1
        return PageCopy(shared, self._take_page(owner, sequence), rows)

    def _take_page(self, owner: Account, sequence: Sequence) -> int:
        page = self._next_page(sequence)
        self._states[page] |= _TAKEN
        owner.held[page] = 1
        sequence.append_page(page)
        return page

    def _next_page(self, sequence: Sequence) -> int:
        """Where a sequence grows: behind its last page, in its claim, or anywhere."""
        states = self._states
        after = sequence.pages[-1] + 1 if sequence.pages else sequence.home
        if after < self.num_pages:
            state = states[after]
            if state == _FREE or (state == _CLAIMED and sequence.claims(after)):
                return after
        in_claim = states.find(_CLAIMED, sequence.home, sequence.home + sequence.claim)
        if in_claim >= 0:
            return in_claim
        free = states.find(_FREE)
        return free if free >= 0 else states.find(_CLAIMED)

    def _release(self, owner: Account, pages: Iterable[int]) -> None:
        held = owner.held
        for page in pages:
            held[page] -= 1
            if not held[page]:
                del held[page]
                self._states[page] &= ~_TAKEN

    def _give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._states[page] &= ~_TAKEN
