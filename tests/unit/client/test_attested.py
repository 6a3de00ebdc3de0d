"""The channel of the mode `attested`: what it lets through, and when it asks again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from fedsea.client.attested import Attestation, AttestedChannel
from fedsea.errors import (
    AttestationError,
    ConnectionLost,
    FedseaError,
    QuotaExceeded,
    RemoteProtocolError,
    Unreachable,
)
from fedsea.privacy.attestation import Attested, Evidence, Verifier
from fedsea.transport.base import ClientStream, PinnedChannel
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.attestation import decode_attest_request, encode_attestation

pytestmark = pytest.mark.anyio

NOW = 1_800_000_000.0


@pytest.fixture
def anyio_backend() -> str:
    """Our transports are written for asyncio."""
    return "asyncio"


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Server:
    """A server with a key; `log` has everything that reached it, in order."""

    def __init__(self) -> None:
        self.key = "11" * 32
        self.log: list[Any] = []
        self.nonces: list[bytes] = []
        self.trouble: list[FedseaError] = []
        self.stream_end: FedseaError | None = None
        self.pins = 0

    async def pin(self) -> Pinned:
        self.pins += 1
        return Pinned(self)

    async def close(self) -> None:
        self.log.append("closed for good")


class Pinned(PinnedChannel):
    """A connection to a `Server`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.key = server.key
        self.lost = False

    @property
    def key_sha256(self) -> str:
        return self.key

    @property
    def is_lost(self) -> bool:
        return self.lost

    async def attest(self, request: bytes) -> bytes:
        self.server.log.append("attest")
        if self.server.trouble:
            raise self.server.trouble.pop(0)
        self.server.nonces.append(decode_attest_request(request))
        return encode_attestation("a.b.c")

    async def describe(self) -> bytes:
        self.server.log.append("describe")
        return b"description"

    async def open_stream(self) -> ClientStream:
        self.server.log.append("open")
        if self.server.trouble:
            raise self.server.trouble.pop(0)
        return Stream(self.server)

    async def close(self) -> None:
        self.server.log.append("close")


class Stream(ClientStream):
    """A stream that notes what is sent, and ends as its server says."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ended = asyncio.Event()

    async def send(self, data: bytes) -> None:
        self.server.log.append(data)

    async def receive(self) -> bytes | None:
        await self.ended.wait()
        if self.server.stream_end is not None:
            raise self.server.stream_end
        return None

    async def half_close(self) -> None:
        self.server.log.append("half close")

    async def cancel(self) -> None:
        self.server.log.append("cancel")
        self.ended.set()


class Judge(Verifier):
    """Accepts everything for 100 s, or does what a test put into `verdict`."""

    def __init__(self) -> None:
        self.seen: list[Evidence] = []
        self.verdict: Any = None

    def verify(self, evidence: Evidence) -> Attested:
        self.seen.append(evidence)
        if isinstance(self.verdict, Exception):
            raise self.verdict
        good = Attested("https://attest.test", (("image", "x"),), NOW + 100, evidence.key_sha256)
        return self.verdict(good) if callable(self.verdict) else good


REFUSED = AttestationError("refused at its measurement; nothing was sent")


class Setting:
    """A channel with all that is around it."""

    def __init__(self) -> None:
        self.clock, self.server, self.judge = Clock(), Server(), Judge()
        self.accepted: list[Attested] = []
        self.channel = AttestedChannel(
            self.server,  # type: ignore[arg-type]
            self.judge,
            "trunk.test:1",
            accepted=self.accepted.append,
            clock=self.clock,
        )


@pytest.fixture
async def at() -> Setting:
    """A fresh channel."""
    return Setting()


async def test_nothing_goes_out_before_acceptance(at):
    """The server is asked first; the evidence has its token, our nonce and its key."""
    assert at.channel.attested is None
    assert await at.channel.describe() == b"description"
    stream = await at.channel.open_stream()
    await stream.send(b"rows")
    assert at.server.log == ["attest", "describe", "open", b"rows"]
    (seen,) = at.judge.seen
    assert seen == Evidence("a.b.c", at.server.nonces[0], at.server.key, "trunk.test:1")
    found = at.channel.attested
    assert found is not None
    assert found.issuer == "https://attest.test"
    assert at.accepted == [found]


@pytest.mark.parametrize("call", ["describe", "open_stream"])
async def test_a_refused_server_gets_nothing(at, call):
    """Only the question reached it, and its connection is closed."""
    at.judge.verdict = REFUSED
    with pytest.raises(AttestationError, match="measurement"):
        await getattr(at.channel, call)()
    assert at.server.log == ["attest", "close"]
    assert at.channel.attested is None
    assert not at.accepted


@pytest.mark.parametrize(
    "verdict",
    [
        lambda _: None,
        lambda _: True,
        lambda good: replace(good, key_sha256="22" * 32),
        lambda good: replace(good, expires=NOW),
        ValueError("a defect of the verifier"),
    ],
)
async def test_a_verifier_that_is_no_good(at, verdict):
    """Whatever it does but accept this key until later: nothing is sent."""
    at.judge.verdict = verdict
    with pytest.raises((AttestationError, ValueError)):
        await at.channel.open_stream()
    assert at.server.log == ["attest", "close"]


async def test_an_answer_that_is_no_token(at, monkeypatch):
    """The verifier is not even asked."""

    async def attest(self, request):
        return b"\xff"

    monkeypatch.setattr(Pinned, "attest", attest)
    with pytest.raises(RemoteProtocolError, match="not valid protobuf"):
        await at.channel.open_stream()
    assert not at.judge.seen


async def test_many_callers_share_one_acceptance(at):
    """Streams that open together ask once."""
    await asyncio.gather(*(at.channel.open_stream() for _ in range(5)))
    assert at.server.log == ["attest", *["open"] * 5]


async def test_each_question_has_a_nonce_of_its_own(at):
    """A server that comes again is asked something new."""
    await at.channel.describe()
    at.clock.now += 100
    at.judge.verdict = lambda good: replace(good, expires=NOW + 300)
    await at.channel.describe()
    assert len(set(at.server.nonces)) == 2


async def test_an_open_stream_asks_again_when_acceptance_has_expired(at):
    """Before the next row, over the same key, and without a new connection."""
    stream = await at.channel.open_stream()
    await stream.send(b"one")
    at.clock.now += 100
    assert at.channel.attested is None
    at.judge.verdict = lambda good: replace(good, expires=NOW + 300)
    await stream.send(b"two")
    await stream.send(b"three")
    assert at.server.log == ["attest", "open", b"one", "attest", b"two", b"three"]
    assert at.server.pins == 1
    assert len(at.accepted) == 2


async def test_a_stream_ends_when_the_server_is_not_accepted_again(at):
    """The row stays here; reader and writer get the refusal."""
    stream = await at.channel.open_stream()
    await stream.send(b"one")
    reading = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    at.clock.now += 100
    at.judge.verdict = REFUSED
    with pytest.raises(AttestationError):
        await stream.send(b"two")
    with pytest.raises(AttestationError):
        await reading
    with pytest.raises(AttestationError):
        await stream.send(b"three")
    await at.channel.close()
    assert at.server.log == [
        "attest",
        "open",
        b"one",
        "attest",
        "cancel",
        "close",
        "closed for good",
    ]


async def test_a_server_that_cannot_be_asked_again_counts_as_lost(at):
    """The session may go on at another one: the reader sees a broken connection."""
    stream = await at.channel.open_stream()
    reading = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    at.clock.now += 100
    at.server.trouble = [Unreachable("gone")]
    at.server.stream_end = ConnectionLost("cancelled")
    with pytest.raises(Unreachable):
        await stream.send(b"two")
    with pytest.raises(ConnectionLost):
        await reading
    assert b"two" not in at.server.log


@pytest.mark.parametrize("how", ["broken stream", "lost connection", "failed open"])
async def test_a_lost_connection_is_verified_anew(at, how):
    """With a new handshake, a new question and a new verdict before the next stream."""
    stream = await at.channel.open_stream()
    if how == "broken stream":
        at.server.stream_end = ConnectionLost("broken")
        stream._stream.ended.set()
        with pytest.raises(ConnectionLost):
            await stream.receive()
    elif how == "failed open":
        at.server.trouble = [ConnectionLost("broken")]
        with pytest.raises(ConnectionLost):
            await at.channel.open_stream()
    else:
        at.channel._place.channel.lost = True
    at.server.key = "22" * 32
    await at.channel.open_stream()
    assert at.server.pins == 2
    assert [seen.key_sha256 for seen in at.judge.seen] == ["11" * 32, "22" * 32]


async def test_running_streams_outlive_a_new_connection(at):
    """Their connection is closed when the last of them has ended, and not before."""
    first = await at.channel.open_stream()
    at.channel._place.channel.lost = True
    await at.channel.open_stream()
    assert "close" not in at.server.log
    first._stream.ended.set()
    assert await first.receive() is None
    await asyncio.sleep(0)
    assert at.server.log.count("close") == 1
    await at.channel.close()
    assert at.server.log.count("close") == 2


async def test_a_server_that_is_asked_too_often(at):
    """It says when to come back, and the client does; not for ever, and not for long waits."""
    at.server.trouble = [QuotaExceeded("too often", retry_after=0.001) for _ in range(4)]
    await at.channel.describe()
    assert at.server.log == [*["attest"] * 5, "describe"]
    for retry_after, count in ((0.001, 5), (None, 1), (3600.0, 1)):
        other = Setting()
        other.server.trouble = [QuotaExceeded("too often", retry_after) for _ in range(9)]
        with pytest.raises(QuotaExceeded):
            await other.channel.describe()
        assert other.server.log == [*["attest"] * count, "close"]


async def test_a_transport_without_a_key():
    """In memory nothing can be attested, and nothing is sent."""
    channel = AttestedChannel(MemoryChannel(None), Judge(), "memory")  # type: ignore[arg-type]
    with pytest.raises(AttestationError, match="no TLS key"):
        await channel.open_stream()
    await channel.close()


async def test_what_was_accepted_is_known_and_changes_are_told():
    """The first server is what the client says of itself; later changes come as notices."""
    lines: list[str] = []
    judge, servers = Judge(), [Server(), Server()]
    attestation = Attestation(judge, lines.append)
    channels = [
        attestation.guard(f"trunk{i}.test:1", lambda server=server: server)  # type: ignore[misc]
        for i, server in enumerate(servers)
    ]
    assert attestation.latest is None
    judge.verdict = lambda good: replace(good, expires=time.time() + 3600)
    await channels[0].describe()
    assert attestation.latest is not None
    channels[0]._place = None
    await channels[0].describe()
    assert not lines
    judge.verdict = lambda good: replace(good, expires=NOW * 2)
    await channels[1].describe()
    (line,) = lines
    assert line.startswith("trunk1.test:1 attested by https://attest.test: image x; until ")
