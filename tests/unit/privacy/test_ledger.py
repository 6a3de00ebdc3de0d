from __future__ import annotations

import sqlite3
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import BudgetExceeded, ConfigError, LedgerError
from fedsea.privacy.accounts import Budget
from fedsea.privacy.gaussian import FedSEAGaussian, Gaussian
from fedsea.privacy.ledger import Ledger, default_path
from fedsea.privacy.mechanism import Unit

ONE = Gaussian(clip_norm=1.0, mu=1.0)
TWO = Gaussian(clip_norm=1.0, mu=2.0)


@pytest.fixture
def path(tmp_path):
    """Where the ledger of a test is."""
    return tmp_path / "privacy.ledger"


@pytest.fixture
def ledger(path):
    """An empty ledger."""
    with Ledger.open(path) as opened:
        yield opened


def test_what_is_reserved_is_there_after_opening_again(path):
    """A reservation is on disk before it is returned, and stays without being settled."""
    with Ledger.open(path) as ledger:
        ledger.account("acme", Unit.PROMPT, ONE).reserve(12)
        with Ledger.open(path) as other:
            (statement,) = other.statements()
    assert (statement.tenant, statement.unit, statement.releases) == ("acme", Unit.PROMPT, 12)
    with Ledger.open(path) as ledger:
        (statement,) = ledger.statements()
    assert [(c.spec, c.loss, c.releases, c.held) for c in statement.charges] == [
        (ONE.spec(), ONE.loss(), 12, 12)
    ]


def test_settling_gives_back_what_was_not_sent(ledger):
    """Only releases that were never noted as sent come back, once."""
    account = ledger.account("acme", Unit.PROMPT, ONE)
    reservation = account.reserve(64)
    reservation.use(10)
    reservation.use(5)
    assert account.statement().releases == 64
    reservation.settle()
    reservation.settle()

    (charge,) = account.statement().charges
    assert (charge.releases, charge.held, reservation.left) == (15, 0, 0)


def test_a_reservation_is_a_block(ledger):
    """Leaving the block settles."""
    account = ledger.account("acme", Unit.PROMPT, ONE)
    with account.reserve(8) as reservation:
        reservation.use(3)
    assert account.statement().releases == 3


def test_more_than_reserved_cannot_be_sent(ledger):
    """Sending beyond a reservation, or after settling, is refused."""
    reservation = ledger.account("acme", Unit.PROMPT, ONE).reserve(2)
    with pytest.raises(LedgerError, match="reserve before sending"):
        reservation.use(3)
    reservation.settle(used=1)
    with pytest.raises(LedgerError, match="reserve before sending"):
        reservation.use(1)
    with pytest.raises(LedgerError, match="reserve anew"):
        reservation.extend(1)


@pytest.mark.parametrize("used", [1, 9])
def test_settling_cannot_forget_or_invent(ledger, used):
    """Fewer than were noted as sent, or more than were reserved, cannot be settled."""
    account = ledger.account("acme", Unit.PROMPT, ONE)
    reservation = account.reserve(8)
    reservation.use(2)
    with pytest.raises(LedgerError, match="cannot be settled"):
        reservation.settle(used=used)
    assert account.statement().releases == 8


def test_a_budget_is_met_exactly(ledger):
    """mu 10 holds a hundred releases of mu 1: the last fits, the next is refused."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=10.0))
    account.reserve(99)
    assert account.left() == 1
    account.reserve(1)
    with pytest.raises(BudgetExceeded) as refused:
        account.reserve(1)

    assert "budget mu 10" in str(refused.value)
    assert "1 more release does not fit" in str(refused.value)
    assert "0 more fit, so nothing more was sent" in str(refused.value)
    assert "fedsea privacy" in str(refused.value)
    assert account.statement().releases == 100


def test_a_refusal_says_what_is_left(ledger):
    """Epsilon at delta, mu and the number of releases that still fit are in the one line."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(epsilon=20.0))
    account.reserve(4)
    left = account.left()
    with pytest.raises(BudgetExceeded) as refused:
        account.reserve(500)
    message = str(refused.value)

    assert f"{left} more fit" in message
    assert "spent is epsilon 9.997 at delta 1e-05 (mu 2)" in message
    assert "\n" not in message


def test_a_refusal_charges_nothing(ledger):
    """What does not fit leaves the account as it was, and less may still be reserved."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=2.0))
    with pytest.raises(BudgetExceeded):
        account.reserve(5)
    assert account.statement().releases == 0
    assert account.reserve(4).releases == 4


def test_a_block_shrinks_to_what_fits(ledger):
    """With a least number given, the rest of the budget is used to its end."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=3.0))
    reservation = account.reserve(64, least=1)
    assert reservation.releases == 9
    with pytest.raises(BudgetExceeded):
        reservation.extend(64, least=1)
    assert reservation.left == 9


def test_mechanisms_of_an_account_share_its_budget(ledger):
    """One release of mu 2 takes what four of mu 1 take."""
    first = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=4.0))
    second = ledger.account("acme", Unit.PROMPT, TWO)
    first.reserve(4)
    second.reserve(2)

    assert (first.left(), second.left()) == (4, 1)
    assert first.statement().spending().mu() == pytest.approx((4 + 8) ** 0.5)
    with pytest.raises(BudgetExceeded):
        second.reserve(2)


def test_accounts_are_apart(ledger):
    """Tenants, units and records do not spend each other's budgets."""
    budget = Budget(mu=1.0)
    for tenant, unit, record in [
        ("acme", Unit.TOKEN, None),
        ("acme", Unit.PROMPT, None),
        ("globex", Unit.PROMPT, None),
        ("acme", Unit.RECORD, "7"),
        ("acme", Unit.RECORD, "8"),
    ]:
        ledger.account(tenant, unit, ONE, record, budget).reserve(1)
    assert [statement.releases for statement in ledger.statements()] == [1] * 5


def test_a_record_accumulates(path):
    """Releases under one record name add up over sessions and openings."""
    for _ in range(3):
        with Ledger.open(path) as ledger:
            account = ledger.account("acme", Unit.RECORD, ONE, "7", Budget(mu=2.0))
            account.reserve(1)
    with Ledger.open(path) as ledger:
        assert ledger.account("acme", Unit.RECORD, ONE, "7").left() == 1


def test_the_budget_stays_with_the_account(path):
    """An account opened without a budget has the one that was given before."""
    with Ledger.open(path) as ledger:
        ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=1.0))
    with Ledger.open(path) as ledger:
        account = ledger.account("acme", Unit.PROMPT, ONE)
        account.reserve(1)
        with pytest.raises(BudgetExceeded):
            account.reserve(1)
        with pytest.raises(ConfigError, match="has the budget mu 1, and mu 2 was asked for"):
            ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=2.0))


def test_a_budget_is_changed_on_purpose(ledger):
    """`set_budget` raises, lowers and removes a limit; what was spent counts under any of them."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=1.0))
    account.reserve(1)
    ledger.set_budget("acme", Unit.PROMPT, None, Budget(epsilon=20.0))
    account.reserve(1)
    ledger.set_budget("acme", Unit.PROMPT, None, None)
    account.reserve(1000)
    ledger.set_budget("acme", Unit.PROMPT, None, Budget(mu=2.0))
    assert account.left() == 0
    with pytest.raises(ConfigError, match="no such account"):
        ledger.set_budget("globex", Unit.PROMPT, None, None)


def test_without_a_budget_everything_still_counts(ledger):
    """An unlimited account refuses nothing and forgets nothing."""
    account = ledger.account("acme", Unit.PROMPT, ONE)
    for _ in range(3):
        account.reserve(10**6)
    assert (account.left(), account.statement().releases) == (None, 3 * 10**6)


def test_no_budget_holds_noise_without_a_guarantee(ledger):
    """A mechanism that is not differentially private is counted, and refused where a limit is."""
    bare = FedSEAGaussian(0.02)
    account = ledger.account("acme", Unit.PROMPT, bare)
    account.reserve(5)
    assert account.statement().spending().is_unbounded
    with pytest.raises(ConfigError, match="not differentially private"):
        ledger.account("acme", Unit.PROMPT, bare, budget=Budget(mu=1.0))
    ledger.set_budget("acme", Unit.PROMPT, None, Budget(mu=1.0))
    with pytest.raises(BudgetExceeded):
        account.reserve(1)
    with pytest.raises(BudgetExceeded):
        ledger.account("acme", Unit.PROMPT, ONE).reserve(1)


@pytest.mark.parametrize(
    ("tenant", "unit", "record", "words"),
    [
        ("", Unit.PROMPT, None, "no name"),
        ("acme", Unit.RECORD, None, "name the record"),
        ("acme", Unit.RECORD, "", "name the record"),
        ("acme", Unit.PROMPT, "7", "knows none"),
        ("acme", Unit.TOKEN, "7", "knows none"),
    ],
)
def test_accounts_without_sense_are_refused(ledger, tenant, unit, record, words):
    """Names have to be there where the unit needs them, and only there."""
    with pytest.raises(ConfigError, match=words):
        ledger.account(tenant, unit, ONE, record)
    assert ledger.statements() == []


@pytest.mark.parametrize(("most", "least"), [(0, None), (-1, None), (4, 0), (4, 5)])
def test_reservations_without_sense_are_refused(ledger, most, least):
    """None, negative numbers and a least above the most are errors."""
    with pytest.raises(ConfigError, match="cannot be reserved"):
        ledger.account("acme", Unit.PROMPT, ONE).reserve(most, least=least)


@settings(max_examples=25)
@given(steps=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=12))
def test_the_ledger_never_passes_its_budget(tmp_path_factory, steps):
    """Whatever is reserved and settled, the charge is what was sent or held, within the budget."""
    with Ledger.open(tmp_path_factory.mktemp("law") / "privacy.ledger") as ledger:
        account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=6.0))
        sent = 0
        for asked, used in steps:
            if sent + asked > 36:
                with pytest.raises(BudgetExceeded):
                    account.reserve(asked)
                continue
            with account.reserve(asked) as reservation:
                reservation.use(min(asked, used))
            sent += min(asked, used)
            assert account.statement().releases == sent <= 36


def test_threads_do_not_pass_the_budget_together(ledger):
    """Eight threads that take one by one get exactly what fits."""
    account = ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=5.0))
    granted = []

    def take():
        try:
            while True:
                account.reserve(1)
                granted.append(1)
        except BudgetExceeded:
            pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(granted), account.statement().releases) == (25, 25)


# The file


def test_the_file_belongs_to_its_owner(path, ledger):
    """The ledger and its log are readable by their owner only; there is no leftover."""
    ledger.account("acme", Unit.PROMPT, ONE).reserve(1)
    files = list(path.parent.iterdir())
    assert {file.name for file in files} == {path.name, f"{path.name}-wal", f"{path.name}-shm"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_it_is_durable_by_its_settings(ledger):
    """WAL, and every commit is synchronised before it returns."""
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_ledger_that_is_missing_is_made_only_on_request(path):
    """`create=False` refuses; otherwise folders are made too."""
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger.open(path, create=False)
    nested = path.parent / "a" / "b" / "privacy.ledger"
    Ledger.open(nested).close()
    assert nested.exists()


def test_a_ledger_open_to_others_is_refused(path):
    """A file that others can read is not used until its mode is right."""
    Ledger.open(path).close()
    path.chmod(0o640)
    with pytest.raises(LedgerError, match="chmod 600"):
        Ledger.open(path)


@pytest.mark.parametrize("content", [b"", b"no ledger at all", bytes(8192)])
def test_foreign_files_are_refused_and_left_alone(path, content):
    """Empty, short and binary files are never taken for a new ledger."""
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(LedgerError, match="ledger"):
        Ledger.open(path)
    assert path.read_bytes() == content


def test_another_database_is_refused(path):
    """A SQLite file of another program is no ledger."""
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE accounts (id)")
    other.close()
    path.chmod(0o600)
    with pytest.raises(LedgerError, match="not a privacy ledger"):
        Ledger.open(path)


def test_a_newer_version_is_refused(path):
    """A schema that this version does not know is not guessed at."""
    Ledger.open(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 2")
    other.close()
    with pytest.raises(LedgerError, match="of version 2, and this fedsea knows 1"):
        Ledger.open(path)


@pytest.mark.parametrize("page", [0, 1, 2, 3, 4, 5])
def test_damage_is_noticed_when_it_is_opened(path, page):
    """A page overwritten with noise is an error, and the file stays as it is."""
    with Ledger.open(path) as ledger:
        for record in range(20):
            ledger.account("acme", Unit.RECORD, ONE, f"record-{record}").reserve(1)
    data = bytearray(path.read_bytes())
    data[page * 4096 : page * 4096 + 4096] = bytes([0xA5]) * 4096
    path.write_bytes(data)
    with pytest.raises(LedgerError, match="restore it from a copy"):
        Ledger.open(path)
    assert path.read_bytes() == data


def test_a_file_cut_short_is_noticed(path):
    """A ledger of which the end is missing is an error."""
    with Ledger.open(path) as ledger:
        ledger.account("acme", Unit.PROMPT, ONE).reserve(1)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(LedgerError, match="restore it from a copy"):
        Ledger.open(path)


def test_a_mechanism_that_was_changed_is_noticed(path):
    """A loss edited by hand to look cheaper does not pass its digest."""
    with Ledger.open(path) as ledger:
        ledger.account("acme", Unit.PROMPT, TWO).reserve(1)
    with sqlite3.connect(path) as editor:
        editor.execute("UPDATE mechanisms SET loss = replace(loss, '2.0', '0.1')")
    editor.close()
    with (
        Ledger.open(path) as ledger,
        pytest.raises(LedgerError, match="mechanism in it was changed"),
    ):
        ledger.statements()


def test_charges_without_an_account_are_noticed(path):
    """Rows that refer to nothing are damage."""
    with Ledger.open(path) as ledger:
        ledger.account("acme", Unit.PROMPT, ONE).reserve(1)
    with sqlite3.connect(path) as editor:
        editor.execute("DELETE FROM accounts")
    editor.close()
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.open(path)


def test_a_log_without_its_ledger_is_no_fresh_start(path):
    """Where only the write-ahead log is left, a ledger was lost: nothing begins anew."""
    path.with_name(f"{path.name}-wal").write_bytes(b"log")
    with pytest.raises(LedgerError, match="is gone but"):
        Ledger.open(path)


def test_a_ledger_that_is_removed_meanwhile_is_noticed(path, ledger):
    """Nothing is counted into a file that no path leads to."""
    account = ledger.account("acme", Unit.PROMPT, ONE)
    path.unlink()
    with pytest.raises(LedgerError, match="removed or replaced"):
        account.reserve(1)
    Ledger.open(path.with_name("other.ledger")).close()
    path.with_name("other.ledger").rename(path)
    with pytest.raises(LedgerError, match="removed or replaced"):
        account.reserve(1)


def test_what_cannot_be_written_is_not_granted(ledger):
    """A ledger that is read-only, or full, grants nothing."""
    account = ledger.account("acme", Unit.PROMPT, ONE)
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="cannot be written"):
        account.reserve(1)
    ledger._db.execute("PRAGMA query_only = OFF")
    ledger._db.execute("PRAGMA max_page_count = 1")

    def fill():
        for record in range(1000):
            ledger.account("acme", Unit.RECORD, ONE, f"a long name of a record {record}")

    with pytest.raises(LedgerError, match="free disk space"):
        fill()
    ledger._db.execute("PRAGMA max_page_count = 100000")
    assert account.statement().releases == 0
    assert account.reserve(1).releases == 1


def test_a_closed_ledger_grants_nothing(path):
    """After closing, a reservation is an error of ours."""
    ledger = Ledger.open(path)
    account = ledger.account("acme", Unit.PROMPT, ONE)
    ledger.close()
    with pytest.raises(LedgerError):
        account.reserve(1)


def test_a_folder_is_no_ledger(tmp_path):
    """A folder at the path is named as what it is."""
    with pytest.raises(LedgerError, match="is no file"):
        Ledger.open(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    """A file where the folder should be ends with one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be made"):
        Ledger.open(tmp_path / "file" / "privacy.ledger")


def test_the_default_place_can_be_named(monkeypatch, tmp_path):
    """FEDSEA_LEDGER comes first, then the data folder of the user."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("FEDSEA_LEDGER", raising=False)
    assert default_path() == tmp_path / "fedsea" / "privacy.ledger"
    monkeypatch.setenv("FEDSEA_LEDGER", str(tmp_path / "here"))
    assert default_path() == tmp_path / "here"


def test_open_reservations_are_found_by_their_account(path):
    """A report does not read all reservations of killed processes again for every account."""
    Ledger.open(path).close()
    with sqlite3.connect(path) as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT sum(releases) FROM reservations "
            "WHERE account = 1 AND mechanism = 1"
        ).fetchall()
    assert "INDEX" in plan[0][3]
