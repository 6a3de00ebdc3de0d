"""A transport within one process: the same interfaces over queues, for tests and demos.

Errors take the same way through `Ending` as over gRPC, so a client sees the same classes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from fedsea.errors import ConnectionLost, LocalProtocolError
from fedsea.transport.base import (
    LOCAL_TENANT,
    Channel,
    ClientStream,
    Handler,
    Peer,
    ServerStream,
    check_size,
)
from fedsea.transport.endings import Ending, ending_of, error_of, outcome
from fedsea.wire.limits import LARGEST_MESSAGE

QUEUED_MESSAGES = 64
DEFAULT_PEER = Peer(tenant=LOCAL_TENANT, address="memory")


_CUT = ending_of(ConnectionLost("the connection broke: reconnect"))
_CANCELLED = ending_of(ConnectionLost("the stream was cancelled: open a new one"))


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
        max_message_bytes: int = LARGEST_MESSAGE,
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


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a pipe; `ending` is None for a clean one."""

    ending: Ending | None = None


class _Pipe:
    """One direction of a stream: a bounded queue of messages, then its end."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._end: _End | None = None
        self._changed = asyncio.Event()

    async def put(self, data: bytes) -> bool:
        """Add a message, waiting for room; False when the pipe has ended and takes no more."""
        while self._end is None and len(self._messages) >= QUEUED_MESSAGES:
            await self._change()
        if self._end is None:
            self._messages.append(data)
            self._changed.set()
        return self._end is None

    async def get(self) -> bytes | _End:
        """The next message, or the end when there is none left."""
        while self._end is None and not self._messages:
            await self._change()
        if self._messages:
            self._changed.set()
            return self._messages.popleft()
        assert self._end is not None
        return self._end

    def end(self, end: _End, *, discard: bool = False) -> None:
        """End the pipe; the first end counts. `discard` drops what nobody has taken yet."""
        self._end = self._end or end
        if discard:
            self._messages.clear()
        self._changed.set()

    @property
    def ended(self) -> _End | None:
        return self._end

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _MemoryServerStream(ServerStream):
    def __init__(self, up: _Pipe, down: _Pipe, max_message_bytes: int) -> None:
        self._up = up
        self._down = down
        self._max_message_bytes = max_message_bytes

    async def receive(self) -> bytes | None:
        item = await self._up.get()
        return None if isinstance(item, _End) else item

    async def send(self, data: bytes) -> None:
        check_size(data, self._max_message_bytes)
        if not await self._down.put(data):
            raise ConnectionLost("the client is gone")


class _MemoryClientStream(ClientStream):
    """Owns the task that runs the handler's session."""

    def __init__(self, handler: Handler, peer: Peer, max_message_bytes: int) -> None:
        self._up = _Pipe()
        self._down = _Pipe()
        self._max_message_bytes = max_message_bytes
        self._half_closed = False
        stream = _MemoryServerStream(self._up, self._down, max_message_bytes)
        self.session = asyncio.create_task(self._run(handler, peer, stream))

    async def _run(self, handler: Handler, peer: Peer, stream: ServerStream) -> None:
        ending: Ending | None = _CUT
        try:
            ending = await outcome(handler.session(peer, stream))
        finally:
            self._down.end(_End(ending))
            self._up.end(_End())

    async def send(self, data: bytes) -> None:
        check_size(data, self._max_message_bytes)
        if self._half_closed:
            raise LocalProtocolError("this side has finished sending: open a new stream")
        if not await self._up.put(data):
            _raise_ending(self._down.ended)
            raise ConnectionLost("the server has finished the session: open a new stream")

    async def receive(self) -> bytes | None:
        try:
            item = await self._down.get()
        except asyncio.CancelledError:
            await self.cancel()
            raise
        if not isinstance(item, _End):
            return item
        _raise_ending(item)
        return None

    async def half_close(self) -> None:
        self._half_closed = True
        self._up.end(_End())

    async def cancel(self) -> None:
        await self.end(_CANCELLED)

    async def end(self, ending: Ending) -> None:
        """Stop the session and let this side see `ending`, unless it has ended already."""
        self._down.end(_End(ending), discard=True)
        self.session.cancel()
        await asyncio.wait((self.session,))


def _raise_ending(end: _End | None) -> None:
    if end is not None and end.ending is not None:
        raise error_of(end.ending)
