"""A load without a model: sessions that send rows made before and only wait for the answers.

It speaks the protocol through the same connection and channel classes as a real client, in one
event loop, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from fedsea.errors import FedseaError, RemoteProtocolError
from fedsea.transport.base import ClientStream
from fedsea.transport.credentials import ClientTLS
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.wire.codecs import Codec, encode
from fedsea.wire.connection import Connection
from fedsea.wire.description import decode_description
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Description,
    Notice,
    Open,
    Output,
    Role,
    Segment,
    Want,
)

CHUNK = 256
_CHUNKS_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Step:
    """When an answer came, on the monotonic clock, and how long the wait for it was."""

    at: float
    seconds: float


class Lane:
    """One session with one sequence."""

    def __init__(self, stream: ClientStream, about: Description, codec: Codec) -> None:
        self._stream = stream
        self._connection = Connection(Role.CLIENT, hidden_size=about.hidden_size)
        self._codec = codec
        self._id = 0
        generator = torch.Generator().manual_seed(0)
        made = torch.randn(CHUNK, about.hidden_size, generator=generator)
        self._rows = encode(made, codec)
        self._row_bytes = codec.row_bytes(about.hidden_size)

    @classmethod
    async def open(cls, channel: GrpcChannel, codec: Codec, capacity: int) -> Lane:
        """Open a session whose sequence holds `capacity` rows."""
        about = decode_description(await channel.describe())
        lane = cls(await channel.open_stream(), about, codec)
        pages = -(-capacity // about.page_rows)
        span = about.first_block, about.end_block
        reserve = pages * about.page_rows
        hello = Open(about.fingerprint, *span, codec, codec, reserve_rows=reserve)
        await lane._stream.send(lane._connection.send(hello))
        await lane._receive()
        await lane._stream.send(lane._connection.send(Begin(0, capacity)))
        return lane

    async def append(self, count: int) -> None:
        """Send the next rows without waiting; all of them are wanted back."""
        self._id += 1
        start = self._connection.length(0)
        data = self._rows[: count * self._row_bytes]
        event = Append(self._id, (Segment(0, start, count, Want.ALL),), data)
        await self._stream.send(self._connection.send(event))

    async def output(self) -> Output:
        """The next answer."""
        event = await self._receive()
        if not isinstance(event, Output):
            raise RemoteProtocolError("the server ended the session; look into its log")
        return event

    async def prefill(self, count: int) -> None:
        """A prompt in chunks, several on their way at once."""
        chunks = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
        for number, chunk in enumerate(chunks):
            await self.append(chunk)
            if number >= _CHUNKS_AHEAD:
                await self.output()
        for _ in range(min(len(chunks), _CHUNKS_AHEAD)):
            await self.output()

    async def steps(self, count: int) -> list[Step]:
        """Decode: one row after the other."""
        return [await self.step() for _ in range(count)]

    async def step(self) -> Step:
        """One row and its answer."""
        began = time.monotonic()
        await self.append(1)
        await self.output()
        at = time.monotonic()
        return Step(at, at - began)

    async def close(self) -> None:
        """End the session."""
        with suppress(FedseaError):
            await self._stream.send(self._connection.send(Close()))
            while await self._stream.receive() is not None:
                pass

    async def _receive(self) -> object:
        while (data := await self._stream.receive()) is not None:
            event = self._connection.receive(data)
            if not isinstance(event, Notice):
                return event
        return None


class Load:
    """Lanes of one tenant over one channel."""

    def __init__(self, address: str, tls: ClientTLS, codec: Codec) -> None:
        self._channel = GrpcChannel(address, tls)
        self._codec = codec
        self.lanes: list[Lane] = []

    async def add(self, capacity: int, prompt: int = 0) -> Lane:
        """One more lane, with `prompt` rows already there."""
        lane = await Lane.open(self._channel, self._codec, capacity)
        self.lanes.append(lane)
        if prompt:
            await lane.prefill(prompt)
        return lane

    async def close(self) -> None:
        """End all sessions and disconnect."""
        await asyncio.gather(*(lane.close() for lane in self.lanes))
        await self._channel.close()


async def decode_together(lanes: Sequence[Lane], steps: int) -> None:
    """All lanes decode at the same time, each at its own pace."""
    await asyncio.gather(*(lane.steps(steps) for lane in lanes))
