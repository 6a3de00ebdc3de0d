"""A link to a server: the greeting, what is counted, and silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fedsea.client.link import Link, Traffic
from fedsea.errors import Capacity, ConnectionLost, FedseaError, SessionLost
from fedsea.transport.base import Peer, ServerStream
from fedsea.transport.memory import MemoryChannel
from fedsea.wire.codecs import Codec
from fedsea.wire.connection import Connection
from fedsea.wire.messages import Notice, NoticeKind, Open, Opened, Role

HELLO = Open("f" * 64, 0, 1, Codec.FP32, Codec.FP32)
Session = Callable[[ServerStream, Connection], Awaitable[None]]


class _Server:
    """Serves one session, as the test says."""

    def __init__(self, serve: Session) -> None:
        self._serve = serve

    async def describe(self, peer: Peer) -> bytes:
        raise NotImplementedError

    async def session(self, peer: Peer, stream: ServerStream) -> None:
        connection = Connection(Role.SERVER, hidden_size=4)
        data = await stream.receive()
        assert data is not None
        assert connection.receive(data) == HELLO
        await self._serve(stream, connection)


async def _linked(serve: Session) -> Link[str]:
    stream = await MemoryChannel(_Server(serve)).open_stream()
    return Link(stream, Connection(Role.CLIENT, hidden_size=4), "server", Traffic())


async def _opens(stream: ServerStream, connection: Connection) -> None:
    await stream.send(connection.send(Opened("id", step=7)))


async def _closes(stream: ServerStream, connection: Connection) -> None:
    """Says nothing."""


async def _refuses(stream: ServerStream, connection: Connection) -> None:
    raise Capacity("full")


def test_a_greeting_is_answered_and_counted() -> None:
    """What was opened comes back, and both messages count; then the server ends the stream."""

    async def work() -> None:
        link = await _linked(_opens)
        assert (await link.greet(HELLO)).step == 7
        traffic = link.traffic
        assert (traffic.messages_up, traffic.messages_down) == (1, 1)
        assert traffic.bytes_up > len(HELLO.fingerprint)
        assert traffic.bytes_down > 0
        with pytest.raises(SessionLost):
            await link.receive()

    asyncio.run(work())


@pytest.mark.parametrize(("serve", "error"), [(_closes, ConnectionLost), (_refuses, Capacity)])
def test_a_session_that_is_not_opened_cancels_its_stream(
    serve: Session, error: type[FedseaError]
) -> None:
    """The reason is what the server said, if it said any; nothing can be sent any more."""

    async def work() -> None:
        link = await _linked(serve)
        with pytest.raises(error):
            await link.greet(HELLO)
        with pytest.raises(FedseaError):
            await link.stream.send(b"more")

    asyncio.run(work())


def test_only_a_server_that_owes_an_answer_is_silent() -> None:
    """However long ago it was last heard, its time begins with what it owes."""

    async def work() -> None:
        answered = asyncio.Event()

        async def serve(stream: ServerStream, connection: Connection) -> None:
            await _opens(stream, connection)
            await answered.wait()
            await stream.send(connection.send(Notice(NoticeKind.DRAINING)))

        link = await _linked(serve)
        await link.greet(HELLO)
        silence = asyncio.create_task(link.silence(0.02))
        await asyncio.sleep(0.1)
        assert not silence.done()
        answered.set()
        assert isinstance(await link.receive(), Notice)
        link.owe("an answer")
        assert "owes an answer for 0.02 s" in str(await silence)

    asyncio.run(work())
