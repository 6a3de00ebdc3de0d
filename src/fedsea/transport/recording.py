"""Sees what crosses the wire: a channel that shows every message of a client to an observer.

The observer gets exactly the bytes that the server gets, and those that come back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from fedsea.errors import ConfigError
from fedsea.transport.base import Channel, ClientStream, PinnedChannel

DEFAULT_KEPT = 1024


class Direction(Enum):
    """Which way a message goes."""

    UP = "up"
    """From the client to the server."""
    DOWN = "down"
    """From the server to the client."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a session stream; `seconds` is a monotonic time."""

    direction: Direction
    seconds: float
    data: bytes = field(repr=False)


Observer = Callable[[Message], None]


@dataclass(slots=True)
class Total:
    """Messages and bytes of one direction."""

    messages: int = 0
    bytes: int = 0


class Recorder:
    """An observer that counts all messages and keeps the last `kept` of them."""

    def __init__(self, kept: int = DEFAULT_KEPT) -> None:
        if kept < 0:
            raise ConfigError(f"a recorder cannot keep {kept} messages: give 0 or more")
        self.messages: deque[Message] = deque(maxlen=kept)
        self._totals = {direction: Total() for direction in Direction}

    def __call__(self, message: Message) -> None:
        """Take a message."""
        total = self._totals[message.direction]
        total.messages += 1
        total.bytes += len(message.data)
        self.messages.append(message)

    @property
    def up(self) -> Total:
        """What the client sent."""
        return self._totals[Direction.UP]

    @property
    def down(self) -> Total:
        """What the server sent."""
        return self._totals[Direction.DOWN]


class RecordingChannel(Channel):
    """A channel that hands on everything and shows it to `observer`.

    A message up is shown before it is sent, a message down when it has arrived.
    """

    def __init__(self, channel: Channel, observer: Observer) -> None:
        self._channel = channel
        self._observer = observer

    async def describe(self) -> bytes:
        return await self._channel.describe()

    async def open_stream(self) -> ClientStream:
        return _RecordingStream(await self._channel.open_stream(), self._observer)

    async def close(self) -> None:
        await self._channel.close()

    async def pin(self) -> PinnedChannel:
        return _RecordingPinned(await self._channel.pin(), self._observer)


class _RecordingPinned(RecordingChannel, PinnedChannel):
    def __init__(self, channel: PinnedChannel, observer: Observer) -> None:
        super().__init__(channel, observer)
        self._pinned = channel

    @property
    def key_sha256(self) -> str:
        return self._pinned.key_sha256

    @property
    def is_lost(self) -> bool:
        return self._pinned.is_lost

    async def attest(self, request: bytes) -> bytes:
        return await self._pinned.attest(request)


class _RecordingStream(ClientStream):
    def __init__(self, stream: ClientStream, observer: Observer) -> None:
        self._stream = stream
        self._observer = observer

    async def send(self, data: bytes) -> None:
        self._observer(Message(Direction.UP, time.monotonic(), data))
        await self._stream.send(data)

    async def receive(self) -> bytes | None:
        data = await self._stream.receive()
        if data is not None:
            self._observer(Message(Direction.DOWN, time.monotonic(), data))
        return data

    async def half_close(self) -> None:
        await self._stream.half_close()

    async def cancel(self) -> None:
        await self._stream.cancel()
