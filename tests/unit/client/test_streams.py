"""Streams of text: every way to read one, and every way in which one ends."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future

import pytest

from fedsea.client.streams import Feed, Stream
from fedsea.errors import ConnectionLost


class Source:
    """A feed and the stream that reads it."""

    def __init__(self) -> None:
        self.feed: Feed[str] = Feed()
        self.summary: Future[int] = Future()
        self.cancelled = False
        self.stream: Stream[str, int] = Stream(self.feed, self.summary, self.cancel)

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def source():
    """A feed, its stream and its summary."""
    return Source()


def test_items_are_read_in_order(source):
    """A reader gets every item once and then the summary."""
    for item in "abc":
        source.feed.put(item)
    source.feed.end()
    source.summary.set_result(3)
    assert list(source.stream) == ["a", "b", "c"]
    assert source.stream.result(1) == 3


def test_every_reader_gets_everything(source):
    """Two readers, one of them late, see the same items."""
    source.feed.put("a")
    early = iter(source.stream)
    assert next(early) == "a"
    source.feed.put("b")
    source.feed.end()
    assert list(early) == ["b"]
    assert list(source.stream) == ["a", "b"]


def test_async_readers_get_the_same(source):
    """`async for` reads what `for` reads, from a loop that is not the producer's."""

    async def read():
        return [item async for item in source.stream]

    def produce():
        for item in "xyz":
            source.feed.put(item)
        source.feed.end()

    producer = threading.Thread(target=produce)
    producer.start()
    assert asyncio.run(read()) == ["x", "y", "z"]
    producer.join()


def test_an_error_comes_after_the_items(source):
    """What arrived before the error is not lost."""
    source.feed.put("a")
    source.feed.fail(ConnectionLost("the connection broke: reconnect"))
    seen = []
    with pytest.raises(ConnectionLost):
        seen.extend(source.stream)
    reader = iter(source.stream)
    assert next(reader) == "a"
    with pytest.raises(ConnectionLost):
        next(reader)


def test_async_readers_get_the_error_too(source):
    """The error is the same for both kinds of readers."""
    source.feed.put("a")
    source.feed.fail(ConnectionLost("the connection broke: reconnect"))

    async def read():
        seen = []
        reader = aiter(source.stream)
        seen.append(await anext(reader))
        with pytest.raises(ConnectionLost):
            await anext(reader)
        return seen

    assert asyncio.run(read()) == ["a"]


@pytest.mark.parametrize("end", ["end", "fail"])
def test_what_comes_after_the_end_is_dropped(source, end):
    """A late item or a second end does no harm: text may still be on its way when it is cut off."""
    source.feed.put("a")
    if end == "end":
        source.feed.end()
    else:
        source.feed.fail(ConnectionLost("the connection broke: reconnect"))
    source.feed.put("b")
    source.feed.end()
    source.feed.fail(ConnectionLost("late"))
    reader = iter(source.stream)
    assert next(reader) == "a"
    with pytest.raises((StopIteration, ConnectionLost)):
        next(reader)


def test_cancel_reaches_the_producer(source):
    """The reader can say that it wants no more."""
    source.stream.cancel()
    assert source.cancelled


def test_a_summary_can_be_waited_for_with_a_limit(source):
    """`result` with a timeout does not wait for ever."""
    with pytest.raises(TimeoutError):
        source.stream.result(0.01)


def test_a_reader_that_leaves_early_leaves_the_rest(source):
    """Breaking off a loop neither loses nor repeats items for the next reader."""
    for item in "abc":
        source.feed.put(item)
    source.feed.end()
    for item in source.stream:
        assert item == "a"
        break
    assert list(source.stream) == ["a", "b", "c"]


def test_a_cancelled_summary_is_the_standard_error(source):
    """Who waits for a cancelled answer gets an error that `except Exception` catches."""
    source.feed.end()
    source.summary.cancel()
    with pytest.raises(CancelledError):
        source.stream.result(1)
