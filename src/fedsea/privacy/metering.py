"""What one session has to pay: positions, forks and blocks of releases over an account.

Unit token. A text costs as many releases as its most released position: its tokens stand at different
positions, and one token changes the rows of its own position only, so positions compose in parallel.
Feeding another token at a position is one more release of that position. Sequences that were forked
from each other are counted together position by position, because beams and samples of one prompt may
hold the same token there. Sequences that were begun apart add up, as sessions do: nothing tells that
they hold different texts, and the rows of equal ones are released with noise of their own.

Units prompt and record. Every release of the session composes with every other. Rows of a prompt are
reserved exactly, decoding draws on blocks, so that a token costs no write to disk.

Sessions of one account compose sequentially in every unit: the same text may come again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Self

from fedsea.errors import ConfigError
from fedsea.privacy.ledger import Account, Reservation
from fedsea.privacy.mechanism import Unit

BLOCK = 64


@dataclass(slots=True)
class _Family:
    """Releases of each position, over sequences that were forked from each other.

    `depth` is that of the most released position: what the family has paid.
    """

    released: list[int] = field(default_factory=list)
    depth: int = 0

    def depth_of(self, start: int, count: int) -> int:
        """Releases of the most released of some positions."""
        return max(self.released[start : start + count], default=0)

    def add(self, start: int, count: int) -> None:
        """Count one more release of some positions."""
        self.depth = max(self.depth, self.depth_of(start, count) + 1)
        missing = start + count - len(self.released)
        self.released.extend([0] * max(0, missing))
        for position in range(start, start + count):
            self.released[position] += 1


class SessionMeter:
    """The account of one session. Safe between threads; use it as a context manager, or close it.

    What is reserved and not sent goes back when it is closed; without that it stays charged.
    """

    def __init__(self, account: Account, *, block: int = BLOCK) -> None:
        if block < 1:
            raise ConfigError(f"a block of {block} releases: it needs 1 or more")
        self.account = account
        self._block = block
        self._families: dict[int, _Family] = {}
        self._used = 0
        self._reserved: Reservation | None = None
        self._ahead: dict[int, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def used(self) -> int:
        """Releases that were charged for rows of this session."""
        return self._used

    def reserve_ahead(self, releases: int, sequence: int = 0) -> None:
        """Charge so many releases for a sequence before it uses any: a whole prompt, or nothing.

        Other sequences do not use what is set aside for it. For unit token this does nothing: a
        prompt costs one release there, however long it is.

        Raises:
            BudgetExceeded: they do not fit; nothing was charged.
            LedgerError: the charge could not be written.
        """
        with self._lock:
            if self.account.unit is not Unit.TOKEN:
                self._ensure(releases, releases, sequence)
                self._ahead[sequence] = releases

    def reserve_positions(self, start: int, count: int, sequence: int = 0) -> None:
        """Charge the rows of one `protect` before they are sent; durable when this returns.

        Args:
            start: position of the first row in its sequence.
            count: rows of one `Mechanism.protect`.
            sequence: which sequence of the session.

        Raises:
            BudgetExceeded: they do not fit; nothing was charged and nothing may be sent.
            LedgerError: the charge could not be written; nothing may be sent.
        """
        if start < 0 or count < 1:
            raise ConfigError(f"{count} rows from position {start} cannot be charged")
        with self._lock:
            if self.account.unit is Unit.TOKEN:
                self._charge_positions(start, count, sequence)
            else:
                releases = self.account.mechanism.releases(count)
                most = max(releases, self._block) if count == 1 else releases
                self._ensure(releases, most, sequence)
                self._use(releases)
                if sequence in self._ahead:
                    self._ahead[sequence] = max(0, self._ahead[sequence] - releases)

    def fork(self, source: int, target: int) -> None:
        """Sequence `target` was forked from `source`: their positions are counted together."""
        with self._lock:
            self._families[target] = self._families.setdefault(source, _Family())

    def drop(self, sequence: int) -> None:
        """Forget a sequence; its number may begin anew, and what it cost stays charged."""
        with self._lock:
            self._families.pop(sequence, None)
            self._ahead.pop(sequence, None)

    def close(self) -> None:
        """Give back what was reserved and never sent; safe to repeat.

        Raises:
            LedgerError: the ledger cannot be written; then it stays charged.
        """
        with self._lock:
            reserved, self._reserved = self._reserved, None
            if reserved is not None:
                reserved.settle()

    def _charge_positions(self, start: int, count: int, sequence: int) -> None:
        """Pay when the most released position of the family rises; it rises by one at most."""
        family = self._families.setdefault(sequence, _Family())
        if family.depth_of(start, count) == family.depth:
            self._ensure(1, 1, sequence)
            self._use(1)
        family.add(start, count)

    def _ensure(self, least: int, most: int, sequence: int) -> None:
        """Have at least `least` unused releases for a sequence; take up to `most` when short."""
        if self._reserved is None:
            self._reserved = self.account.reserve(most, least=least)
            return
        promised = sum(self._ahead.values()) - self._ahead.get(sequence, 0)
        have = self._reserved.left - promised
        if have < least:
            self._reserved.extend(most - have, least=least - have)

    def _use(self, releases: int) -> None:
        assert self._reserved is not None
        self._reserved.use(releases)
        self._used += releases
