"""The program that makes tokens: what it is given, what it may print, and how long it may take."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path

import pytest

from fedsea.errors import (
    AttestationError,
    Capacity,
    ConfigError,
    QuotaExceeded,
    RemoteProtocolError,
)
from fedsea.server import attestation
from fedsea.server.app import _attester
from fedsea.server.attestation import MAX_AT_ONCE, TokenCommand
from fedsea.server.config import AttestationSection, ServerConfig
from fedsea.transport.base import Peer
from fedsea.transport.certificates import init_ca, issue_server
from fedsea.wire.attestation import decode_attestation, encode_attest_request

pytestmark = pytest.mark.anyio

KEY = hashlib.sha256(b"key").hexdigest()
NONCE = bytes(range(32))
REQUEST = encode_attest_request(NONCE)
ACME, GLOBEX = Peer("acme", "test"), Peer("globex", "test")


@pytest.fixture
def anyio_backend() -> str:
    """Subprocesses are those of asyncio."""
    return "asyncio"


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def python(code: str, **settings) -> TokenCommand:
    """A token command that runs a line of Python; its clock stands still."""
    section = AttestationSection(command=(sys.executable, "-c", code), **settings)
    return TokenCommand(section, KEY, Clock())


async def test_the_program_gets_nonce_and_key():
    """They are its last arguments, in hex; what it prints is the token."""
    command = python("import sys; print('a.' + sys.argv[1] + '.' + sys.argv[2])")
    answer = await command.attest(ACME, REQUEST)
    assert decode_attestation(answer) == f"a.{NONCE.hex()}.{KEY}"


async def test_no_shell_is_between(tmp_path: Path):
    """What a shell would act on is a plain argument."""
    trap = tmp_path / "trap"
    code = "import sys; print('a.b.c' if sys.argv[1] == '$(touch trap); `x`' else '')"
    section = AttestationSection(command=(sys.executable, "-c", code, "$(touch trap); `x`"))
    assert await TokenCommand(section, KEY).attest(ACME, REQUEST)
    assert not trap.exists()


async def test_a_request_that_is_none():
    """Nothing is run for it."""
    with pytest.raises(RemoteProtocolError):
        await python("raise SystemExit(1)").attest(ACME, b"\xff")


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(3)",
        "print('a.b.c'); raise SystemExit(1)",
        "print()",
        "print('a secret that is no token')",
        "print('a.b.c d')",
        "print('a.b.' + 'c' * 40000)",
        "import sys; sys.stdout.buffer.write(b'\\xff.b.c')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
async def test_a_program_that_fails(code):
    """The client gets to know that, and nothing of what was printed."""
    with pytest.raises(AttestationError, match="could not get proof") as caught:
        await python(code).attest(ACME, REQUEST)
    assert "secret" not in str(caught.value)


async def test_output_without_end():
    """It is cut off at the size of a token, not at the time limit."""
    command = python("while True: print('a' * 1000)", timeout_s=60)
    async with asyncio.timeout(20):
        with pytest.raises(AttestationError):
            await command.attest(ACME, REQUEST)


async def test_output_that_waits_to_be_read(monkeypatch):
    """A program is gone at once, however much it printed that nobody has read."""

    async def reads_nothing(program):
        while not program.stdout._paused:  # noqa: ASYNC110 - nobody tells when it is full
            await asyncio.sleep(0.01)
        raise AttestationError("enough")

    monkeypatch.setattr(attestation, "_read", reads_nothing)
    command = python("while True: print('a' * 1000)", timeout_s=60)
    async with asyncio.timeout(20):
        with pytest.raises(AttestationError, match="enough"):
            await command.attest(ACME, REQUEST)


async def test_a_program_that_does_not_exist():
    """A wrong path is told like any failure; the log says which."""
    section = AttestationSection(command=("/nonexistent/program",))
    with pytest.raises(AttestationError):
        await TokenCommand(section, KEY).attest(ACME, REQUEST)


async def test_a_program_that_hangs_goes_with_its_children(tmp_path: Path):
    """After the time limit nothing of it runs any more."""
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    with pytest.raises(AttestationError):
        await python(code, timeout_s=3.0).attest(ACME, REQUEST)
    for pid in pids.read_text().split():
        assert not is_running(int(pid))


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


async def test_a_client_that_goes_away(tmp_path: Path):
    """The program of a cancelled request is killed."""
    pipe = tmp_path / "pid"
    os.mkfifo(pipe)
    code = f"import os, time; open({str(pipe)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    request = asyncio.create_task(python(code).attest(ACME, REQUEST))
    pid = int(await asyncio.to_thread(pipe.read_text))
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not is_running(pid)


async def test_a_tenant_that_asks_too_often():
    """It is told when to come back; others are not held up."""
    command = python("print('a.b.c')", requests_per_second=2.0)
    for _ in range(2):
        await command.attest(ACME, REQUEST)
    with pytest.raises(QuotaExceeded) as caught:
        await command.attest(ACME, REQUEST)
    assert await command.attest(GLOBEX, REQUEST)
    assert caught.value.retry_after == pytest.approx(0.5)
    clock = command._clock
    assert isinstance(clock, Clock)
    clock.now += 0.5
    assert await command.attest(ACME, REQUEST)


async def test_too_many_programs_at_once(monkeypatch):
    """All tenants together start no more than a few."""
    gate = asyncio.Event()

    async def token(self, nonce):
        await gate.wait()
        return "a.b.c"

    monkeypatch.setattr(attestation.TokenCommand, "_token", token)
    command = python("")
    waiting = [
        asyncio.create_task(command.attest(Peer(f"tenant-{i}", "test"), REQUEST))
        for i in range(MAX_AT_ONCE)
    ]
    await asyncio.sleep(0)
    with pytest.raises(Capacity) as caught:
        await command.attest(GLOBEX, REQUEST)
    assert caught.value.retry_after == 1.0
    gate.set()
    await asyncio.gather(*waiting)
    assert await command.attest(Peer("late", "test"), REQUEST)


def config(**sections) -> ServerConfig:
    """Settings with these sections."""
    return ServerConfig.from_table({"server": {"model": "m"}, **sections})


def test_without_a_command_there_is_no_proof():
    """Attestation is off unless it is configured."""
    assert _attester(config()) is None


def test_the_key_of_the_certificate_is_attested(tmp_path):
    """It is that of the file, or one that is named for a proxy."""
    init_ca(tmp_path)
    tls = issue_server(tmp_path, ["localhost"])
    security = {"ca": str(tls.ca), "certificate": str(tls.certificate), "key": str(tls.key)}
    own = _attester(config(security=security, attestation={"command": ["x"]}))
    assert own is not None
    assert len(own._key_sha256) == 64
    named = _attester(config(security=security, attestation={"command": ["x"], "key_sha256": KEY}))
    assert named is not None
    assert named._key_sha256 == KEY != own._key_sha256


def test_plaintext_has_no_key_to_attest():
    """A server without certificates must name the key of its proxy."""
    settings = config(security={"plaintext": True}, attestation={"command": ["x"]})
    with pytest.raises(ConfigError, match="needs a TLS key"):
        _attester(settings)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"command": "program"}, "attestation.command is no list of texts"),
        ({"command": [1]}, "attestation.command is no list of texts"),
        ({"command": [""]}, "attestation.command names no program"),
        ({"timeout_s": 0}, "attestation.timeout_s is 0"),
        ({"requests_per_second": -1}, "attestation.requests_per_second is -1"),
        ({"key_sha256": "AB"}, "attestation.key_sha256 is no SHA-256"),
        ({"comand": []}, r"no key of section \[attestation\]; did you mean command"),
    ],
)
def test_a_bad_section(section, words):
    """Each mistake is named."""
    with pytest.raises(ConfigError, match=words):
        config(attestation=section)
