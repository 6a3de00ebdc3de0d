from __future__ import annotations

import pytest

from fedsea.errors import Capacity, ConfigError
from fedsea.transport.memory import MemoryChannel
from fedsea.transport.recording import Direction, Message, Recorder, RecordingChannel


class Echo:
    """Answers every message with twice its bytes; refuses a session that begins with `refuse`."""

    async def describe(self, peer):
        return b"description"

    async def session(self, peer, stream):
        while (data := await stream.receive()) is not None:
            if data == b"refuse":
                raise Capacity("the pool is full: try again", retry_after=1.0)
            await stream.send(data * 2)


@pytest.fixture
def recorder():
    """Keeps three messages."""
    return Recorder(kept=3)


@pytest.fixture
def anyio_backend():
    """The transport runs on asyncio only."""
    return "asyncio"


@pytest.mark.anyio
async def test_all_messages_are_shown_in_order_and_unchanged(recorder):
    """The observer sees exactly what goes up and what comes down, and so do both ends."""
    async with RecordingChannel(MemoryChannel(Echo()), recorder) as channel:
        stream = await channel.open_stream()
        await stream.send(b"abc")
        assert await stream.receive() == b"abcabc"
        await stream.half_close()
        assert await stream.receive() is None

    assert [(message.direction, message.data) for message in recorder.messages] == [
        (Direction.UP, b"abc"),
        (Direction.DOWN, b"abcabc"),
    ]
    assert recorder.messages[0].seconds <= recorder.messages[1].seconds


@pytest.mark.anyio
async def test_describe_and_errors_pass_through(recorder):
    """What is no message of a session is not recorded, and refusals stay what they are."""
    async with RecordingChannel(MemoryChannel(Echo()), recorder) as channel:
        assert await channel.describe() == b"description"
        stream = await channel.open_stream()
        await stream.send(b"refuse")
        with pytest.raises(Capacity):
            await stream.receive()
        await stream.cancel()

    assert (recorder.up.messages, recorder.down.messages) == (1, 0)


def test_totals_count_everything_and_the_list_is_bounded(recorder):
    """Only the last messages are kept; the totals cover all of them."""
    for size in range(1, 6):
        recorder(Message(Direction.UP, float(size), b"x" * size))
    recorder(Message(Direction.DOWN, 6.0, b"yy"))

    assert [len(message.data) for message in recorder.messages] == [4, 5, 2]
    assert (recorder.up.messages, recorder.up.bytes) == (5, 15)
    assert (recorder.down.messages, recorder.down.bytes) == (1, 2)


def test_a_recorder_may_keep_nothing():
    """Counting alone needs no memory."""
    recorder = Recorder(kept=0)
    recorder(Message(Direction.UP, 0.0, b"abc"))

    assert (len(recorder.messages), recorder.up.bytes) == (0, 3)
    with pytest.raises(ConfigError):
        Recorder(kept=-1)


def test_bytes_stay_out_of_a_message_repr():
    """A message in a log or traceback shows no row."""
    assert "secret" not in repr(Message(Direction.UP, 0.0, b"secret"))
