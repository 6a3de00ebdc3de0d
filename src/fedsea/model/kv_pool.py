"""Who holds which rows of the KV cache: plain bookkeeping, no tensors.

The pool is a row of pages of `page_rows` rows each. An *account* (a session) reserves pages when
it opens, so that nothing inside its reservation can ever be refused. Its *sequences* take pages
from the reservation as they grow. Forked sequences share full pages; a page is copied when a
sequence writes into one that others read.

Rows of a sequence should lie in one run of pages, because attention reads a run without a copy.
The pool therefore places a new sequence where its whole capacity fits in one run, and extends runs
in place; fragmentation costs speed, never a refusal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedsea.errors import Capacity, LocalProtocolError, QuotaExceeded


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Rows to copy from one page to another before the next write."""

    source: int
    target: int
    rows: int


@dataclass(slots=True)
class Sequence:
    """One KV chain: its pages in order and the number of rows written.

    `joined` counts how many of the first pages lie in one run.
    """

    capacity: int
    home: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    joined: int = 0

    @property
    def is_one_run(self) -> bool:
        """Whether all pages follow each other."""
        return self.joined == len(self.pages)

    def append_page(self, page: int) -> None:
        """Add a page at the end."""
        if self.is_one_run and (not self.pages or page == self.pages[-1] + 1):
            self.joined += 1
        self.pages.append(page)

    def cut_pages(self, keep: int) -> list[int]:
        """Keep the first `keep` pages and return the others."""
        dropped, self.pages = self.pages[keep:], self.pages[:keep]
        self.joined = min(self.joined, keep)
        return dropped

    @property
    def first_page(self) -> int:
        """The first page, or where the first page should go."""
        return self.pages[0] if self.pages else self.home


@dataclass(slots=True)
class Account:
    """The pages that one session has reserved, and its sequences by id."""

    reserved: int
    sequences: dict[int, Sequence] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)


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
        self._free: list[int] = list(range(num_pages))
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
        return len(self._free)

    @property
    def unreserved_rows(self) -> int:
        """Rows that a new account can still reserve."""
        return (self.num_pages - self._reserved) * self.page_rows

    @property
    def num_accounts(self) -> int:
        """Open accounts."""
        return len(self._accounts)

    def open(self, rows: int) -> int:
        """Reserve `rows` rows, rounded up to whole pages.

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
        self._give_back(closed.held)

    def begin(self, account: int, sequence: int, capacity: int) -> None:
        """Start an empty sequence that will hold at most `capacity` rows."""
        owner = self._accounts[account]
        if sequence in owner.sequences:
            raise LocalProtocolError(f"sequence {sequence} exists already; drop it first")
        home = self._find_home(pages_for(capacity, self.page_rows))
        owner.sequences[sequence] = Sequence(capacity=capacity, home=home)

    def extend(self, account: int, sequence: int, rows: int) -> tuple[PageCopy, ...]:
        """Make room for `rows` more rows and count them as written.

        Returns the page copies to make before the rows are written.

        Raises:
            QuotaExceeded: the account's reservation is used up.
        """
        owner = self._accounts[account]
        grown = owner.sequences[sequence]
        copies = self._own_last_page(owner, grown) if rows else ()
        needed = pages_for(grown.length + rows, self.page_rows) - len(grown.pages)
        self._take_pages(owner, grown, needed)
        grown.length += rows
        return copies

    def rollback(self, account: int, sequence: int, length: int) -> None:
        """Forget all rows from `length` on."""
        owner = self._accounts[account]
        cut = owner.sequences[sequence]
        if length > cut.length:
            raise LocalProtocolError(f"cannot roll {cut.length} rows back to {length}")
        keep = pages_for(length, self.page_rows)
        cut.length = length
        self._release(owner, cut.cut_pages(keep))

    def fork(self, account: int, source: int, target: int, length: int, capacity: int) -> None:
        """Start `target` as the first `length` rows of `source`, sharing its pages."""
        owner = self._accounts[account]
        origin = owner.sequences[source]
        if length > origin.length:
            raise LocalProtocolError(f"cannot fork {length} rows of {origin.length}")
        self.begin(account, target, capacity)
        shared = origin.pages[: pages_for(length, self.page_rows)]
        for page in shared:
            owner.held[page] += 1
        forked = owner.sequences[target]
        for page in shared:
            forked.append_page(page)
        forked.length = length

    def drop(self, account: int, sequence: int) -> None:
        """Forget a sequence."""
        owner = self._accounts[account]
        self._release(owner, owner.sequences.pop(sequence).pages)

    def sequence(self, account: int, sequence: int) -> Sequence:
        """A sequence, to be read only."""
        return self._accounts[account].sequences[sequence]

    def sequences(self, account: int) -> list[int]:
        """Ids of the account's sequences."""
        return list(self._accounts[account].sequences)

    def check_integrity(self) -> None:
        """Verify that every page is free or held exactly as often as it is used.

        Raises:
            AssertionError: the bookkeeping is wrong, which is a defect of the pool.
        """
        used: list[int] = list(self._free)
        for account in self._accounts.values():
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
            used.extend(counts)
        if sorted(used) != list(range(self.num_pages)):
            raise AssertionError("a page is lost or held by two accounts")
        if self._reserved != sum(account.reserved for account in self._accounts.values()):
            raise AssertionError("the sum of reservations is wrong")

    def _own_last_page(self, owner: Account, sequence: Sequence) -> tuple[PageCopy, ...]:
        """Copy the part-filled last page when other sequences read it."""
        rows = sequence.length % self.page_rows
        if not rows or owner.held[sequence.pages[-1]] == 1:
            return ()
        (shared,) = sequence.cut_pages(len(sequence.pages) - 1)
        self._take_pages(owner, sequence, 1)
        self._release(owner, [shared])
        return (PageCopy(shared, sequence.pages[-1], rows),)

    def _take_pages(self, owner: Account, sequence: Sequence, count: int) -> None:
        if count <= 0:
            return
        if len(owner.held) + count > owner.reserved:
            raise QuotaExceeded(
                f"the session reserved {owner.reserved * self.page_rows} rows and needs more; "
                "open it with a larger reservation"
            )
        for _ in range(count):
            wanted = sequence.pages[-1] + 1 if sequence.pages else sequence.home
            page = self._take_page(wanted)
            owner.held[page] = 1
            sequence.append_page(page)

    def _take_page(self, wanted: int) -> int:
        index = bisect_left(self._free, wanted)
        if index == len(self._free):
            index = 0
        return self._free.pop(index)

    def _release(self, owner: Account, pages: Iterable[int]) -> None:
        for page in pages:
            owner.held[page] -= 1
            if owner.held[page] == 0:
                del owner.held[page]
                self._give_back([page])

    def _give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._free.insert(bisect_left(self._free, page), page)

    def _find_home(self, count: int) -> int:
        """First page of a run of `count` pages that no sequence holds or grows into."""
        claimed = sorted(
            (sequence.first_page, sequence.first_page + pages_for(sequence.capacity, self.page_rows))
            for account in self._accounts.values()
            for sequence in account.sequences.values()
        )
        start = 0
        for first, end in claimed:
            if first - start >= count:
                return start
            start = max(start, end)
        return start if start + count <= self.num_pages else 0
