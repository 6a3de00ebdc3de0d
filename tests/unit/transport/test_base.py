"""The contract of every transport: the same dialogues over memory, plaintext gRPC and TLS gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fedsea.errors import Capacity, ConnectionLost, FedseaError, LocalProtocolError
from fedsea.transport.base import Channel
from fedsea.transport.credentials import Plaintext
from fedsea.transport.grpc_client import ClientOptions, GrpcChannel
from fedsea.transport.grpc_server import GrpcServer, ServerOptions
from fedsea.transport.memory import MemoryChannel

pytestmark = pytest.mark.anyio

CAP = 200_000


@pytest.fixture(params=["memory", "plaintext", "tls"])
async def channel(request, handler, server_tls, client_tls) -> AsyncIterator[Channel]:
    """A channel to `handler`, over each transport in turn."""
    if request.param == "memory":
        async with MemoryChannel(handler, max_message_bytes=CAP) as channel:
            yield channel
        return
    plaintext = Plaintext(allow_insecure=True)
    tls = request.param == "tls"
    server = GrpcServer(
        handler,
        "127.0.0.1:0",
        server_tls if tls else plaintext,
        options=ServerOptions(max_message_bytes=CAP),
    )
    address = await server.start()
    options = ClientOptions(max_message_bytes=CAP)
    async with GrpcChannel(
        str(address), client_tls if tls else plaintext, options=options
    ) as channel:
        yield channel
    await server.stop()


async def test_describe_returns_the_handlers_answer(channel, handler):
    """Describe reaches the handler under the peer's identity and its bytes come back."""
    assert await channel.describe() == handler.peers[0].tenant.encode()


async def test_messages_keep_their_bounds_and_order(channel):
    """Every message comes back whole and in the order sent, empty and large ones included."""
    stream = await channel.open_stream()
    sent = [b"first", b"", bytes(range(256)) * 700, b"last"]
    for message in sent:
        await stream.send(message)
    assert [await stream.receive() for _ in sent] == sent
    await stream.cancel()


async def test_half_close_lets_the_server_finish(channel):
    """After half_close the server sees the end, may still answer, and its return is a clean end."""
    stream = await channel.open_stream()
    await stream.send(b"hello")
    await stream.half_close()
    assert [await stream.receive() for _ in range(4)] == [b"hello", b"bye", None, None]


async def test_sending_after_half_close_is_our_own_error(channel):
    """This side cannot send after it said that it has finished."""
    stream = await channel.open_stream()
    await stream.half_close()
    with pytest.raises(LocalProtocolError, match="finished sending"):
        await stream.send(b"more")
    await stream.cancel()


async def test_a_refusal_arrives_as_the_same_class(channel):
    """An error of the handler keeps its class, message and retry time."""
    stream = await channel.open_stream()
    await stream.send(b"refuse")
    with pytest.raises(Capacity, match="the pool is full: try again") as caught:
        await stream.receive()
    assert caught.value.retry_after == 1.5


async def test_a_refusal_is_not_lost_in_the_middle_of_sending(channel):
    """A client that is still sending when the server refuses sees the refusal, from both calls."""
    stream = await channel.open_stream()
    await stream.send(b"refuse")

    async def keep_sending() -> None:
        while True:
            await stream.send(bytes(2000))
            await asyncio.sleep(0)

    with pytest.raises(Capacity):
        await keep_sending()
    with pytest.raises(Capacity):
        await stream.receive()


async def test_messages_before_a_refusal_are_delivered(channel, handler):
    """What the server sent before it ended the stream is read first, however late."""
    stream = await channel.open_stream()
    await stream.send(b"two then refuse")
    await asyncio.wait_for(handler.finished.wait(), 5)
    assert [await stream.receive(), await stream.receive()] == [b"one", b"two"]
    with pytest.raises(Capacity):
        await stream.receive()


async def test_a_defect_of_the_handler_leaks_nothing(channel, caplog):
    """Any other exception is an internal error without details, on the wire and in the log."""
    stream = await channel.open_stream()
    await stream.send(b"defect")
    with pytest.raises(FedseaError, match="the server failed") as caught:
        await stream.receive()
    assert type(caught.value) is FedseaError
    assert "secret" not in str(caught.value) + caplog.text
    assert "ValueError" in caplog.text


async def test_sending_into_a_finished_session_is_a_lost_connection(channel):
    """When the server ends the session cleanly, receive gives None and send says so."""
    stream = await channel.open_stream()
    await stream.send(b"return")
    assert await stream.receive() is None
    with pytest.raises(ConnectionLost, match="finished the session"):
        await stream.send(b"more")


async def test_a_message_over_the_cap_is_not_sent(channel):
    """A message over the cap fails at the sender and leaves the stream in order."""
    stream = await channel.open_stream()
    with pytest.raises(LocalProtocolError, match="over the cap"):
        await stream.send(bytes(CAP + 1))
    await stream.send(bytes(CAP))
    assert await stream.receive() == bytes(CAP)
    await stream.cancel()


async def test_a_server_cannot_send_over_its_cap(channel):
    """A handler that sends too much ends its stream with the protocol error it made."""
    stream = await channel.open_stream()
    await stream.send(b"large")
    await stream.send(str(CAP + 1).encode())
    with pytest.raises(LocalProtocolError, match="over the cap"):
        await stream.receive()


async def test_cancel_stops_the_server_side(channel, handler):
    """Cancelling a stream cancels the running session and frees what it holds."""
    stream = await channel.open_stream()
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"
    await stream.cancel()
    await stream.cancel()
    await asyncio.wait_for(handler.cancelled.wait(), 5)
    assert handler.running == 0
    with pytest.raises(ConnectionLost, match="cancelled"):
        await stream.receive()
    with pytest.raises(ConnectionLost, match="cancelled"):
        await stream.send(b"more")


async def test_cancel_wakes_a_waiting_receive(channel):
    """A receive that waits in another task ends with ConnectionLost, not with CancelledError."""
    stream = await channel.open_stream()
    waiting = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    await stream.cancel()
    with pytest.raises(ConnectionLost):
        await waiting


async def test_a_cancelled_receive_cancels_the_stream(channel, handler):
    """A deadline around receive ends the stream on both sides: no message can fall between."""
    stream = await channel.open_stream()
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.receive(), 0.01)
    await asyncio.wait_for(handler.cancelled.wait(), 5)


async def test_close_cancels_open_streams(channel, handler):
    """Closing a channel ends its sessions at the server and wakes whoever waits here."""
    stream = await channel.open_stream()
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"
    waiting = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    await channel.close()
    with pytest.raises(ConnectionLost):
        await waiting
    await asyncio.wait_for(handler.cancelled.wait(), 5)
    await channel.close()


async def test_many_streams_share_a_channel(channel):
    """Fifty streams at once each get their own answers."""

    async def dialogue(number: int) -> None:
        stream = await channel.open_stream()
        for step in range(5):
            message = f"{number}.{step}".encode()
            await stream.send(message)
            assert await stream.receive() == message
        await stream.half_close()
        assert await stream.receive() == b"bye"
        assert await stream.receive() is None

    await asyncio.gather(*(dialogue(number) for number in range(50)))


async def test_concurrent_sends_do_not_mix(channel):
    """Messages sent by several tasks at once all arrive, whole."""
    stream = await channel.open_stream()
    await stream.send(b"hello")
    sent = [bytes([number]) * 5000 for number in range(20)]
    await asyncio.gather(*(stream.send(message) for message in sent))
    received = [await stream.receive() for _ in range(21)]
    assert sorted(m for m in received if m is not None) == sorted([b"hello", *sent])
    await stream.cancel()
