"""What only the transport within a process does."""

from __future__ import annotations

import asyncio

import pytest

from fedsea.errors import ConnectionLost, FedseaError
from fedsea.transport.base import Peer
from fedsea.transport.memory import QUEUED_MESSAGES, MemoryChannel

pytestmark = pytest.mark.anyio


async def test_the_given_identity_is_the_peer(handler):
    """Tests choose who they are."""
    peer = Peer("acme", "test", "ab")
    async with MemoryChannel(handler, peer) as channel:
        await channel.describe()
    assert handler.peers == [peer]


async def test_a_cut_is_a_lost_connection(handler):
    """A cut ends every open stream on both sides and drops what was under way; new ones work."""
    async with MemoryChannel(handler) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await stream.send(b"lost")
        await channel.cut()
        assert handler.cancelled.is_set()
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="broke"):
                await stream.receive()
        with pytest.raises(ConnectionLost, match="broke"):
            await stream.send(b"more")
        again = await channel.open_stream()
        await again.send(b"hello")
        assert await again.receive() == b"hello"


async def test_a_stream_cut_before_it_ran(handler):
    """A stream that is cancelled at once leaves nothing behind."""
    async with MemoryChannel(handler) as channel:
        stream = await channel.open_stream()
        await stream.cancel()
        with pytest.raises(ConnectionLost, match="cancelled"):
            await stream.receive()
    assert not handler.peers


async def test_a_slow_server_holds_the_client_back(monkeypatch, handler):
    """Sending waits when the queue is full, and ends when the session does."""
    leave = asyncio.Event()

    async def deaf(*_) -> None:
        await leave.wait()

    monkeypatch.setattr(handler, "session", deaf)
    async with MemoryChannel(handler) as channel:
        stream = await channel.open_stream()
        for _ in range(QUEUED_MESSAGES):
            await stream.send(b"x")
        waiting = asyncio.create_task(stream.send(b"one too many"))
        await asyncio.sleep(0)
        assert not waiting.done()
        leave.set()
        with pytest.raises(ConnectionLost):
            await waiting


async def test_a_slow_client_holds_the_server_back(handler):
    """A handler that floods waits until the client reads."""
    async with MemoryChannel(handler) as channel:
        stream = await channel.open_stream()
        await stream.send(b"flood")
        for _ in range(3 * QUEUED_MESSAGES):
            assert await stream.receive() == bytes(100_000)
        assert not handler.finished.is_set()


async def test_a_failing_description_is_mapped(monkeypatch, handler):
    """Describe takes the same way for errors as a session."""

    async def broken(_peer: Peer) -> bytes:
        raise KeyError("secret")

    monkeypatch.setattr(handler, "describe", broken)
    async with MemoryChannel(handler) as channel:
        with pytest.raises(FedseaError, match="the server failed"):
            await channel.describe()
