"""A transport within one process: the same interfaces over queues, for tests and demos.

Errors take the same way through `Ending` as over gRPC, so a client sees the same classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeAlias

from fedsea.errors import ConnectionLost, LocalProtocolError
from fedsea.transport.base import (
    LOCAL_TENANT,
    MAX_MESSAGE_BYTES,
    Channel,
    ClientStream,
    Handler,
    Peer,
    ServerStream,
    check_size,
)
from fedsea.transport.endings import Ending, ending_of, error_of, outcome

QUEUED_MESSAGES = 64
DEFAULT_PEER = Peer(tenant=LOCAL_TENANT, address="memory")


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in a queue; `ending` is None for a clean end."""

    ending: Ending | None = None

    def result(self) -> None:
        if self.ending is not None:
            raise error_of(self.ending)


_Queue: TypeAlias = "asyncio.Queue[bytes | _End]"

_CUT = ending_of(ConnectionLost("the connection was cut: reconnect"))
_CANCELLED = ending_of(ConnectionLost("this side cancelled the stream: open a new one"))


class MemoryChannel(Channel):
    """A channel to a handler in this process, under a given identity.

    Args:
        handler: what to serve.
        peer: the identity under which the handler sees this channel.
        max_message_bytes: the cap on one message in either direction.
    """

    def __init__(
        self,
        handler: Handler,
        peer: Peer = DEFAULT_PEER,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._handler = handler
        self._peer = peer
        self._max_message_bytes = max_message_bytes
        self._streams: set[_MemoryClientStream] = set()

    async def describe(self) -> bytes:
        answer = await outcome(self._handler.describe(self._peer))
        if isinstance(answer, Ending):
            raise error_of(answer)
        return answer

    async def open_stream(self) -> ClientStream:
        stream = _MemoryClientStream(self._handler, self._peer, self._max_message_bytes)
        self._streams.add(stream)
        stream.session.add_done_callback(lambda _: self._streams.discard(stream))
        return stream

    async def cut(self) -> None:
        """Break all open streams as a lost connection would."""
        await asyncio.gather(*(stream.end(_CUT) for stream in tuple(self._streams)))

    async def close(self) -> None:
        await asyncio.gather(*(stream.cancel() for stream in tuple(self._streams)))


class _MemoryServerStream(ServerStream):
    def __init__(self, up: _Queue, down: _Queue, max_message_bytes: int) -> None:
        self._up = up
        self._down = down
        self._max_message_bytes = max_message_bytes
        self._finished = False

    async def receive(self) -> bytes | None:
        if self._finished:
            return None
        item = await self._up.get()
        self._finished = isinstance(item, _End)
        return None if isinstance(item, _End) else item

    async def send(self, data: bytes) -> None:
        check_size(data, self._max_message_bytes)
        await self._down.put(data)


class _MemoryClientStream(ClientStream):
    """Owns the task that runs the handler's session."""

    def __init__(self, handler: Handler, peer: Peer, max_message_bytes: int) -> None:
        self._up: _Queue = asyncio.Queue(QUEUED_MESSAGES)
        self._down: _Queue = asyncio.Queue(QUEUED_MESSAGES)
        self._max_message_bytes = max_message_bytes
        self._half_closed = False
        self._end: _End | None = None
        stream = _MemoryServerStream(self._up, self._down, max_message_bytes)
        self.session = asyncio.create_task(self._run(handler.session(peer, stream)))

    async def _run(self, session: Awaitable[None]) -> Ending | None:
        ending = await outcome(session)
        await self._down.put(_End(ending))
        return ending

    async def send(self, data: bytes) -> None:
        check_size(data, self._max_message_bytes)
        if self._half_closed:
            raise LocalProtocolError("this side has finished sending: open a new stream")
        await self._put(data)

    async def half_close(self) -> None:
        if not self._half_closed:
            self._half_closed = True
            if not self.session.done():
                await self._put(_End())

    async def _put(self, item: bytes | _End) -> None:
        if not self.session.done() and self._up.full():
            put = asyncio.create_task(self._up.put(item))
            try:
                await asyncio.wait((put, self.session), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not put.done():
                    put.cancel()
        elif not self.session.done():
            self._up.put_nowait(item)
        if self.session.done():
            self._raise_ended()

    def _raise_ended(self) -> None:
        end = self._end or _End(None if self.session.cancelled() else self.session.result())
        end.result()
        raise ConnectionLost("the server has finished the session: open a new stream")

    async def receive(self) -> bytes | None:
        if self._end is None:
            try:
                item = await self._down.get()
            except asyncio.CancelledError:
                await self.cancel()
                raise
            if not isinstance(item, _End):
                return item
            self._end = self._end or item
        self._end.result()
        return None

    async def cancel(self) -> None:
        await self.end(_CANCELLED)

    async def end(self, ending: Ending) -> None:
        """Stop the session and let this side see `ending`, unless it has ended already."""
        if self._end is not None:
            return
        self._end = _End(ending)
        self.session.cancel()
        await asyncio.wait((self.session,))
        while not self._down.empty():
            self._down.get_nowait()
        self._down.put_nowait(self._end)
