"""The ledger: what was released for whom, on disk before anything is sent.

SQLite in WAL mode with synchronous=FULL, so that a reservation that was returned survives a crash of
the process or of the machine. Charges come first: rows are sent only after their releases were
committed. What a killed process had reserved stays charged, because nobody knows what it sent.

    mechanisms     canonical spec, and the privacy loss of one release as JSON, kept once
    accounts       (tenant, unit, record) and the budget
    charges        releases of a mechanism on an account; the composition is always recomputed
    reservations   what of them is held by a session and may still come back when it settles

The file names tenants and records and is readable by its owner only. It holds no text and no rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedsea.errors import BudgetExceeded, ConfigError, LedgerError
from fedsea.privacy.accounts import Budget, Charge, Frontier, Statement
from fedsea.privacy.ledger_file import identity, ledger_error, open_file
from fedsea.privacy.losses import PrivacyLoss, from_json
from fedsea.privacy.mechanism import Mechanism, Unit


def default_path() -> Path:
    """Where the ledger of this user is, unless FEDSEA_LEDGER or an option says otherwise."""
    if named := os.environ.get("FEDSEA_LEDGER"):
        return Path(named)
    home = os.environ.get("XDG_DATA_HOME")
    base = Path(home) if home else Path.home() / ".local" / "share"
    return base / "fedsea" / "privacy.ledger"


class Ledger:
    """An open ledger. Safe between threads and between processes; a fork has to open its own.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._file = identity(path)
        self._mechanisms: dict[int, tuple[str, PrivacyLoss | None]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True) -> Ledger:
        """Open a ledger, and make a new one where there is none and `create` is true.

        Raises:
            LedgerError: it is missing, damaged, not a ledger, of a newer version, readable by
                others, or cannot be written. A file that is there is never made anew.
        """
        place = Path(path).expanduser().absolute()
        return cls(place, open_file(place, create=create))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; safe to repeat. Reservations that are not settled stay charged."""
        with self._lock:
            self._db.close()

    def account(
        self,
        tenant: str,
        unit: Unit,
        mechanism: Mechanism,
        record: str | None = None,
        budget: Budget | None = None,
    ) -> Account:
        """The account that releases of `mechanism` are charged to; opened when it is new.

        A budget is kept with the account. None means the one that is kept, or no limit.

        Raises:
            ConfigError: a name is empty, unit and record do not fit, the mechanism guarantees
                nothing that a budget could hold, or the account has another budget.
            LedgerError: the ledger cannot be read or written.
        """
        name = _checked(tenant, unit, record)
        spec, loss = mechanism.spec(), mechanism.loss()
        text = json.dumps(None if loss is None else loss.to_json(), sort_keys=True)
        with self._transaction() as db:
            account = self._account_id(db, tenant, unit, name)
            kept = _kept_budget(db, account)
            if budget is not None and kept is None:
                _keep_budget(db, account, budget)
            elif budget is not None and budget != kept:
                raise ConfigError(
                    f"this account has the budget {kept}, and {budget} was asked for: leave the "
                    "budget out, or change it with `fedsea privacy budget`"
                )
            if loss is None and (budget or kept):
                raise ConfigError(
                    f"{mechanism.name} as given is not differentially private, so no budget holds "
                    "it: give a clip norm, or no budget"
                )
            known = _mechanism_id(db, spec, text)
        return Account(self, account, known, mechanism, unit)

    def set_budget(
        self, tenant: str, unit: Unit, record: str | None, budget: Budget | None
    ) -> None:
        """Replace the budget of an account; None removes the limit. What was spent stays spent.

        Raises:
            ConfigError: there is no such account.
        """
        name = _checked(tenant, unit, record)
        with self._transaction() as db:
            row = db.execute(
                "SELECT id FROM accounts WHERE tenant = ? AND unit = ? AND record = ?",
                (tenant, unit.value, name),
            ).fetchone()
            if row is None:
                raise ConfigError(
                    "the ledger has no such account: `fedsea privacy report` lists those it has"
                )
            _keep_budget(db, row[0], budget)

    def statements(self) -> list[Statement]:
        """All accounts as they stand, by tenant, unit and record."""
        with self._transaction(writes=False) as db:
            rows = db.execute(
                "SELECT id, tenant, unit, record, opened FROM accounts "
                "ORDER BY tenant, unit, record"
            ).fetchall()
            return [
                Statement(
                    tenant,
                    Unit(unit),
                    record,
                    _kept_budget(db, account),
                    tuple(charge for _, charge in self._charges(db, account)),
                    opened,
                )
                for account, tenant, unit, record, opened in rows
            ]

    def _account_id(self, db: sqlite3.Connection, tenant: str, unit: Unit, record: str) -> int:
        db.execute(
            "INSERT OR IGNORE INTO accounts (tenant, unit, record, opened) VALUES (?, ?, ?, ?)",
            (tenant, unit.value, record, _now()),
        )
        row = db.execute(
            "SELECT id FROM accounts WHERE tenant = ? AND unit = ? AND record = ?",
            (tenant, unit.value, record),
        ).fetchone()
        return int(row[0])

    def _charges(self, db: sqlite3.Connection, account: int) -> list[tuple[int, Charge]]:
        """Charges of an account with the ids of their mechanisms."""
        rows = db.execute(
            "SELECT c.mechanism, c.releases, c.last, coalesce(sum(r.releases), 0) FROM charges c "
            "LEFT JOIN reservations r ON r.account = c.account AND r.mechanism = c.mechanism "
            "WHERE c.account = ? GROUP BY c.mechanism ORDER BY c.mechanism",
            (account,),
        ).fetchall()
        found = []
        for known, releases, last, held in rows:
            spec, loss = self._mechanism(db, known)
            found.append((int(known), Charge(spec, loss, releases, held, last)))
        return found

    def _mechanism(self, db: sqlite3.Connection, known: int) -> tuple[str, PrivacyLoss | None]:
        """Spec and loss of a stored mechanism, which never change.

        Raises:
            LedgerError: they are not what was written.
        """
        if known not in self._mechanisms:
            digest, spec, text = db.execute(
                "SELECT digest, spec, loss FROM mechanisms WHERE id = ?", (known,)
            ).fetchone()
            if digest != _digest(spec, text):
                raise LedgerError(
                    f"the ledger {self.path} is damaged, a mechanism in it was changed: "
                    "restore it from a copy"
                )
            value = json.loads(text)
            self._mechanisms[known] = spec, None if value is None else from_json(value)
        return self._mechanisms[known]

    @contextmanager
    def _transaction(self, *, writes: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing, alone among those who write; committed durably when the block ends."""
        with self._lock:
            self._check_place()
            try:
                self._db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                raise ledger_error(self.path, error) from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _check_place(self) -> None:
        """Refuse to count into a file that nobody would read again."""
        if os.getpid() != self._process:
            raise LedgerError(
                "this ledger was opened before a fork: open it again in the new process"
            )
        if identity(self.path) != self._file:
            raise LedgerError(
                f"the ledger {self.path} was removed or replaced while it was in use: restore it, "
                "and start again"
            )


class Account:
    """What one tenant may release with one mechanism. Made by `Ledger.account`."""

    def __init__(
        self, ledger: Ledger, account: int, mechanism_id: int, mechanism: Mechanism, unit: Unit
    ) -> None:
        self.mechanism = mechanism
        self.unit = unit
        self._ledger = ledger
        self._account = account
        self._mechanism_id = mechanism_id
        self._loss = mechanism.loss()
        self._frontier: tuple[object, Frontier] | None = None

    def reserve(self, releases: int, *, least: int | None = None) -> Reservation:
        """Charge `releases`, durably, before any of them is sent.

        Args:
            releases: losses of `mechanism.loss()` that compose sequentially, 1 or more.
            least: when given, as many as fit are reserved, from `least` to `releases`.

        Raises:
            BudgetExceeded: so many do not fit; nothing was charged.
            LedgerError: the charge could not be written; nothing may be sent.
        """
        row, granted = self._charge(releases, releases if least is None else least, None)
        return Reservation(self, row, granted)

    def statement(self) -> Statement:
        """The account as it stands, with the charges of all its mechanisms."""
        with self._ledger._transaction(writes=False) as db:
            tenant, unit, record, opened = db.execute(
                "SELECT tenant, unit, record, opened FROM accounts WHERE id = ?", (self._account,)
            ).fetchone()
            budget = _kept_budget(db, self._account)
            charges = tuple(charge for _, charge in self._ledger._charges(db, self._account))
        return Statement(tenant, Unit(unit), record, budget, charges, opened)

    def left(self) -> int | None:
        """How many more releases of this mechanism fit now; None: no budget."""
        with self._ledger._transaction(writes=False) as db:
            budget = _kept_budget(db, self._account)
            charges = self._ledger._charges(db, self._account)
        if budget is None:
            return None
        frontier = self._frontier_of(budget, charges)
        return max(0, frontier.most() - self._spent(charges)) if frontier else 0

    def _charge(self, releases: int, least: int, row: int | None) -> tuple[int, int]:
        """Charge and reserve, in a new row or on top of one; that row, and what was granted."""
        if not 1 <= least <= releases:
            raise ConfigError(
                f"{least} to {releases} releases cannot be reserved: ask for 1 or more"
            )
        mine = self._account, self._mechanism_id
        with self._ledger._transaction() as db:
            charges = self._ledger._charges(db, self._account)
            granted = self._grant(_kept_budget(db, self._account), charges, least, releases)
            db.execute(
                "INSERT INTO charges (account, mechanism, releases, last) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET releases = releases + excluded.releases, "
                "last = excluded.last",
                (*mine, granted, _now()),
            )
            if row is None:
                row = db.execute(
                    "INSERT INTO reservations (account, mechanism, releases) VALUES (?, ?, ?)",
                    (*mine, granted),
                ).lastrowid
            else:
                db.execute(
                    "UPDATE reservations SET releases = releases + ? WHERE id = ?", (granted, row)
                )
        assert row is not None
        return row, granted

    def _grant(
        self, budget: Budget | None, charges: list[tuple[int, Charge]], least: int, most: int
    ) -> int:
        if budget is None:
            return most
        spent = self._spent(charges)
        frontier = self._frontier_of(budget, charges)
        if frontier is None:
            raise BudgetExceeded(
                f"a budget of {budget} holds no release without differential privacy, so nothing "
                "was sent: give the mechanism a clip norm"
            )
        if frontier.allows(spent + most):
            return most
        room = max(0, frontier.most() - spent)
        if room >= least:
            return min(room, most)
        total = Statement("", self.unit, "", budget, tuple(c for _, c in charges)).spending()
        raise BudgetExceeded(
            f"{_more(least)} not fit into the budget {budget}: spent is epsilon "
            f"{total.epsilon(budget.delta):.4g} at delta {budget.delta:g} (mu {total.mu():.4g}), "
            f"{room} more fit, so nothing more was sent; raise it with `fedsea privacy budget`, or see "
            "`fedsea privacy plan` for more noise"
        )

    def _spent(self, charges: list[tuple[int, Charge]]) -> int:
        return next((c.releases for known, c in charges if known == self._mechanism_id), 0)

    def _frontier_of(self, budget: Budget, charges: list[tuple[int, Charge]]) -> Frontier | None:
        """How far this mechanism may go beside the others; kept while these do not change."""
        if self._loss is None:
            return None
        others = tuple(c for known, c in charges if known != self._mechanism_id)
        key = budget, tuple((c.spec, c.releases) for c in others)
        if self._frontier is None or self._frontier[0] != key:
            self._frontier = key, Frontier(budget, others, self._loss)
        return self._frontier[1]

    def _settle(self, reservation: int, unused: int) -> None:
        with self._ledger._transaction() as db:
            found = db.execute("DELETE FROM reservations WHERE id = ?", (reservation,)).rowcount
            if found != 1:
                raise LedgerError("this reservation was settled before: each is settled once")
            if unused:
                db.execute(
                    "UPDATE charges SET releases = releases - ? "
                    "WHERE account = ? AND mechanism = ?",
                    (unused, self._account, self._mechanism_id),
                )


class Reservation:
    """Releases that are charged and may be sent; what provably was not comes back by `settle`.

    Use it as a context manager, or call `settle`; otherwise all of it stays charged.
    """

    def __init__(self, account: Account, row: int, releases: int) -> None:
        self.releases = releases
        self.used = 0
        self._account = account
        self._row = row
        self._settled = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    @property
    def left(self) -> int:
        """Releases that may still be sent."""
        return 0 if self._settled else self.releases - self.used

    def extend(self, releases: int, *, least: int | None = None) -> None:
        """Reserve more, as `Account.reserve` does.

        Raises:
            BudgetExceeded: so many do not fit; what was reserved before stays.
            LedgerError: it is settled, or the charge could not be written.
        """
        with self._lock:
            if self._settled:
                raise LedgerError("this reservation is settled: reserve anew")
            least = releases if least is None else least
            _, granted = self._account._charge(releases, least, self._row)
            self.releases += granted

    def use(self, releases: int) -> None:
        """Note that so many are sent now; call it before sending.

        Raises:
            LedgerError: it is settled, or fewer are left.
        """
        with self._lock:
            if releases < 0 or releases > self.left:
                raise LedgerError(
                    f"{releases} releases were to be sent where {self.left} are reserved: "
                    "reserve before sending"
                )
            self.used += releases

    def settle(self, used: int | None = None) -> None:
        """Give back what was never sent; safe to repeat.

        Args:
            used: releases that were sent, or may have been; what `use` noted is the least.

        Raises:
            LedgerError: `used` is more than was reserved or less than was noted, or the ledger
                cannot be written. Then all of it stays charged.
        """
        with self._lock:
            if self._settled:
                return
            sent = self.used if used is None else used
            if not self.used <= sent <= self.releases:
                raise LedgerError(
                    f"{sent} used releases cannot be settled where {self.used} of {self.releases} "
                    "are noted as sent"
                )
            self._settled = True
            self.used = sent
            self._account._settle(self._row, self.releases - sent)


def _more(releases: int) -> str:
    return "1 more release does" if releases == 1 else f"{releases} more releases do"


def _checked(tenant: str, unit: Unit, record: str | None) -> str:
    if not tenant:
        raise ConfigError("the tenant has no name: give one")
    if unit is Unit.RECORD and not record:
        raise ConfigError("unit record counts by record: name the record")
    if unit is not Unit.RECORD and record:
        raise ConfigError(f"a record is named, and unit {unit.value} knows none: use unit record")
    return record or ""


def _kept_budget(db: sqlite3.Connection, account: int) -> Budget | None:
    epsilon, mu, delta = db.execute(
        "SELECT epsilon, mu, delta FROM accounts WHERE id = ?", (account,)
    ).fetchone()
    return None if delta is None else Budget(epsilon=epsilon, mu=mu, delta=delta)


def _keep_budget(db: sqlite3.Connection, account: int, budget: Budget | None) -> None:
    values = (None, None, None) if budget is None else (budget.epsilon, budget.mu, budget.delta)
    db.execute(
        "UPDATE accounts SET epsilon = ?, mu = ?, delta = ? WHERE id = ?", (*values, account)
    )


def _mechanism_id(db: sqlite3.Connection, spec: str, loss: str) -> int:
    digest = _digest(spec, loss)
    db.execute(
        "INSERT OR IGNORE INTO mechanisms (digest, spec, loss) VALUES (?, ?, ?)",
        (digest, spec, loss),
    )
    row = db.execute("SELECT id FROM mechanisms WHERE digest = ?", (digest,)).fetchone()
    return int(row[0])


def _digest(spec: str, loss: str) -> str:
    return hashlib.sha256(f"{spec}\n{loss}".encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
