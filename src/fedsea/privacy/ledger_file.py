"""The file of a ledger: made whole or not at all, checked when it is opened, errors in our words."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path

from fedsea.errors import LedgerError

APPLICATION_ID = 0x46534541
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0

_MODE = 0o600
_OTHERS = 0o077
_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
PRAGMA journal_mode = WAL;
CREATE TABLE mechanisms (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    loss TEXT NOT NULL
);
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    unit TEXT NOT NULL CHECK (unit IN ('token', 'prompt', 'record')),
    record TEXT NOT NULL,
    epsilon REAL,
    mu REAL,
    delta REAL,
    opened TEXT NOT NULL,
    UNIQUE (tenant, unit, record)
);
CREATE TABLE charges (
    account INTEGER NOT NULL REFERENCES accounts,
    mechanism INTEGER NOT NULL REFERENCES mechanisms,
    releases INTEGER NOT NULL CHECK (typeof(releases) = 'integer' AND releases >= 0),
    last TEXT NOT NULL,
    PRIMARY KEY (account, mechanism)
);
CREATE TABLE reservations (
    id INTEGER PRIMARY KEY,
    account INTEGER NOT NULL,
    mechanism INTEGER NOT NULL,
    releases INTEGER NOT NULL CHECK (releases > 0),
    FOREIGN KEY (account, mechanism) REFERENCES charges
);
CREATE INDEX reservations_of_charges ON reservations (account, mechanism);
"""


def open_file(path: Path, *, create: bool) -> sqlite3.Connection:
    """A connection to a ledger that is whole; see `Ledger.open` for the errors."""
    if not path.exists():
        if not create:
            raise LedgerError(
                f"there is no ledger at {path}: nothing was released under it yet, or it is "
                "elsewhere; fix the path"
            )
        _create(path)
    _check_mode(path)
    connection = _connect(path)
    try:
        _check(path, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a path; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _create(path: Path) -> None:
    """Make an empty ledger so that others see all of it or nothing; one that is there stays."""
    for suffix in ("-wal", "-journal"):
        if path.with_name(path.name + suffix).exists():
            raise LedgerError(
                f"{path} is gone but {path.name}{suffix} is there: restore the ledger, or move "
                "that file away"
            )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE))
        try:
            connection = _connect(temporary)
            try:
                connection.executescript(_SCHEMA)
            finally:
                connection.close()
            _sync(temporary)
            with suppress(FileExistsError):  # another process was faster: its ledger counts
                os.link(temporary, path)
        finally:
            for suffix in ("", "-wal", "-shm"):
                temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
        _sync(path.parent)
    except sqlite3.Error as error:
        raise ledger_error(path, error) from error
    except OSError as error:
        raise LedgerError(f"{path} cannot be made ({error.strerror}): check the folder") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_mode(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror}): check it") from error
    if not stat.S_ISREG(mode):
        raise LedgerError(f"{path} is no file: fix the path")
    if mode & _OTHERS:
        raise LedgerError(f"{path} is open to others: chmod 600 it")


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise ledger_error(path, error) from error
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        connection.close()
        raise ledger_error(path, error) from error
    return connection


def _check(path: Path, db: sqlite3.Connection) -> None:
    """That this is a ledger, of a version that is known, and whole."""
    try:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID:
            raise LedgerError(f"{path} is not a privacy ledger: fix the path")
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"{path} is a ledger of version {version}, and this fedsea knows {SCHEMA_VERSION}: "
                "use the fedsea that wrote it"
            )
        damage = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        orphans = db.execute("PRAGMA foreign_key_check").fetchall()
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    except sqlite3.Error as error:
        raise ledger_error(path, error) from error
    if damage != "ok" or orphans:
        raise LedgerError(f"the ledger {path} is damaged: restore it from a copy")
    if mode != "wal":
        raise LedgerError(f"the ledger {path} cannot be kept in WAL mode: use a local disk")


def ledger_error(path: Path, error: sqlite3.Error) -> LedgerError:
    """What SQLite says, as one line: what happened, and what to do."""
    name = getattr(error, "sqlite_errorname", "") or ""
    kind = name.removeprefix("SQLITE_").split("_")[0]
    if kind in ("CORRUPT", "NOTADB", "FORMAT"):
        return LedgerError(f"the ledger {path} is damaged or no ledger: restore it from a copy")
    if kind == "BUSY":
        return LedgerError(
            f"the ledger {path} was locked by another process for {BUSY_SECONDS:g} s: "
            "try again, or end that process"
        )
    if kind == "FULL":
        return LedgerError(f"the ledger {path} cannot grow, so nothing is sent: free disk space")
    if kind in ("READONLY", "CANTOPEN", "PERM", "AUTH"):
        return LedgerError(f"the ledger {path} cannot be written: check it and its folder")
    return LedgerError(f"the ledger {path} failed ({error}): check the disk")
