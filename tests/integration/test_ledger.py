"""The ledger under real processes: races for one budget, kill -9, full and read-only disks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsea.errors import LedgerError
from fedsea.privacy.accounts import Budget
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.mechanism import Unit

ONE = Gaussian(clip_norm=1.0, mu=1.0)
SECONDS = 90
NOBODY = 65534

# What every process below begins with: the account that they share.
_OPEN = """
import os, resource, signal, sys
from fedsea.errors import BudgetExceeded, LedgerError
from fedsea.privacy.gaussian import Gaussian
from fedsea.privacy.ledger import Ledger
from fedsea.privacy.mechanism import Unit

def say(*words):
    print(*words, flush=True)

def account():
    ledger = Ledger.open(sys.argv[1])
    return ledger.account("acme", Unit.PROMPT, Gaussian(clip_norm=1.0, mu=1.0))
"""


class Child:
    """A Python process with a program of a few lines; ends with the test."""

    def __init__(self, program: str, ledger: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OPEN + program, str(ledger)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def line(self) -> str:
        """What it says next; waits for it."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End it, however it is."""
        self.process.kill()
        self.process.communicate(timeout=SECONDS)


@pytest.fixture
def start() -> Iterator[Callable[[str, Path], Child]]:
    """Start processes that end with the test."""
    children: list[Child] = []

    def begin(program: str, ledger: Path) -> Child:
        children.append(Child(program, ledger))
        return children[-1]

    yield begin
    for child in children:
        child.close()


@pytest.fixture
def path(tmp_path):
    """Where the ledger of a test is."""
    return tmp_path / "privacy.ledger"


def charged(path: Path) -> int:
    """Releases in the ledger, read by this process."""
    with Ledger.open(path, create=False) as ledger:
        return sum(statement.releases for statement in ledger.statements())


def budgeted(path: Path, mu: float) -> None:
    """Make a ledger whose account has a budget."""
    with Ledger.open(path) as ledger:
        ledger.account("acme", Unit.PROMPT, ONE, budget=Budget(mu=mu))


def test_processes_never_pass_the_budget_together(start, path):
    """Four processes race for 400 releases and give some back: what is sent is charged, and fits."""
    budgeted(path, 20.0)
    program = """
mine = account()
say("ready"); sys.stdin.readline()
sent = 0
try:
    while True:
        with mine.reserve(7, least=1) as reservation:
            reservation.use(min(3, reservation.releases))
            sent += reservation.used
except BudgetExceeded:
    say(sent)
"""
    racers = [start(program, path) for _ in range(4)]
    assert [racer.line() for racer in racers] == ["ready"] * 4
    for racer in racers:
        racer.go()
    sent = [int(racer.line()) for racer in racers]

    # A racer stops when the others hold the rest, some of which they give back later.
    assert sum(sent) == charged(path)
    assert 400 - 4 * 7 <= sum(sent) <= 400


def test_processes_make_one_ledger_together(start, path):
    """Six processes open a ledger that is not there yet; all of them count into the same one."""
    program = """
say("ready"); sys.stdin.readline()
account().reserve(5)
say("done")
"""
    children = [start(program, path) for _ in range(6)]
    assert [child.line() for child in children] == ["ready"] * 6
    for child in children:
        child.go()
    assert [child.line() for child in children] == ["done"] * 6
    assert charged(path) == 30
    assert not list(path.parent.glob(".*"))


def test_kill_9_between_charge_and_send_leaves_the_charge(start, path):
    """A process killed after `reserve` returned has charged all, whatever it had sent of it."""
    child = start(
        """
reservation = account().reserve(64)
reservation.use(3)
say("reserved"); sys.stdin.readline()
""",
        path,
    )
    assert child.line() == "reserved"
    child.process.kill()
    child.process.wait(SECONDS)

    with Ledger.open(path, create=False) as ledger:
        (statement,) = ledger.statements()
        (charge,) = statement.charges
        assert (charge.releases, charge.held) == (64, 64)
        ledger.account("acme", Unit.PROMPT, ONE).reserve(1)
    assert charged(path) == 65


def test_kill_9_at_any_moment_loses_nothing_that_was_returned(start, path):
    """A process killed in the middle of reserving has charged at least what it was granted."""
    for _ in range(5):
        child = start(
            """
mine, number = account(), 0
while True:
    mine.reserve(1)
    number += 1
    say(number)
""",
            path,
        )
        before = charged(path) if path.exists() else 0
        while int(child.line()) < 20:
            pass
        child.process.kill()
        rest, _ = child.process.communicate(timeout=SECONDS)
        # The last line may be cut short.
        said = max([20, *(int(line) for line in rest.split("\n")[:-1])])
        assert said <= charged(path) - before <= said + 1


def test_a_process_killed_while_it_writes_blocks_nobody(start, path):
    """A lock of a killed process is gone with it, and its half transaction too."""
    budgeted(path, 20.0)
    child = start(
        """
mine = account()
with mine._ledger._transaction() as db:
    db.execute("UPDATE accounts SET mu = 1e9")
    say("writing"); sys.stdin.readline()
""",
        path,
    )
    assert child.line() == "writing"
    child.process.kill()
    child.process.wait(SECONDS)

    with Ledger.open(path) as ledger:
        account = ledger.account("acme", Unit.PROMPT, ONE)
        assert account.left() == 400
        account.reserve(1)


def test_a_fork_cannot_count_with_its_parents_ledger(start, path):
    """Neither reserving nor giving back is possible on the other side of a fork."""
    child = start(
        """
mine = account()
reservation = mine.reserve(10)
if os.fork() == 0:
    for act in (lambda: mine.reserve(1), reservation.settle):
        try:
            act()
        except LedgerError as error:
            say(error)
    os._exit(0)
os.wait()
say(mine.statement().releases)
""",
        path,
    )
    assert "opened before a fork" in child.line()
    assert "opened before a fork" in child.line()
    assert child.line() == "10"


def test_a_disk_that_takes_no_more_grants_nothing(start, path):
    """When the system refuses to write, nothing is granted; what was granted before stays."""
    child = start(
        """
mine = account()
mine.reserve(1)
size = os.path.getsize(sys.argv[1] + "-wal")
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 6000, resource.RLIM_INFINITY))
granted = 1
try:
    while True:
        mine.reserve(1)
        granted += 1
except LedgerError as error:
    say(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
mine.reserve(1)
say(granted + 1)
""",
        path,
    )
    assert "the ledger" in child.line()
    granted = int(child.line())
    child.process.wait(SECONDS)
    assert granted <= charged(path) <= granted + 1


@pytest.mark.parametrize("case", ["file", "folder", "foreign"])
def test_a_ledger_without_permission_grants_nothing(start, case):
    """A read-only file, a read-only folder and a file of somebody else end with one line."""
    if os.geteuid() != 0:
        pytest.skip("needs to become another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "privacy.ledger"
        if case != "folder":
            with Ledger.open(path) as ledger:
                ledger.account("acme", Unit.PROMPT, ONE).reserve(3)
        if case == "file":
            os.chown(path, NOBODY, NOBODY)
            path.chmod(0o400)
        child = start(
            f"""
os.seteuid({NOBODY})
try:
    account().reserve(1)
    say("granted")
except LedgerError as error:
    say(error)
""",
            path,
        )
        said = child.line()
        assert str(path) in said
        assert "cannot be" in said
        child.process.wait(SECONDS)
        if case != "folder":
            assert charged(path) == 3


def test_a_ledger_locked_for_too_long_is_an_error(path, monkeypatch):
    """Another process that never ends its transaction is named as the cause."""
    monkeypatch.setattr("fedsea.privacy.ledger_file.BUSY_SECONDS", 0.2)
    with Ledger.open(path) as ledger, Ledger.open(path) as other:
        account = ledger.account("acme", Unit.PROMPT, ONE)
        with other._transaction(), pytest.raises(LedgerError, match="locked by another process"):
            account.reserve(1)
        account.reserve(1)
    assert charged(path) == 1
