"""Text on its way to the caller: produced on the client's loop, read from anywhere.

A stream is a chain of futures, so that one object serves `for` and `async for` alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Link(Generic[T]):
    """One item, and the future of the next; the item is None at the end."""

    item: T | None
    next: Future[_Link[T]] | None


class Feed(Generic[T]):
    """The producing end. All methods belong to one thread. What comes after the end is dropped."""

    def __init__(self) -> None:
        self.first: Future[_Link[T]] = Future()
        self._next = self.first
        self._ended = False

    def put(self, item: T) -> None:
        """Hand one item to every reader."""
        if self._ended:
            return
        following: Future[_Link[T]] = Future()
        current, self._next = self._next, following
        current.set_result(_Link(item, following))

    def end(self) -> None:
        """No more items."""
        if not self._ended:
            self._ended = True
            self._next.set_result(_Link(None, None))

    def fail(self, error: BaseException) -> None:
        """Readers get the error after the items so far."""
        if not self._ended:
            self._ended = True
            self._next.set_exception(error)


class Stream(Generic[T, R]):
    """Items as they come, then a summary.

    Iterate with `for` or `async for`; `result()` waits for the end and returns the summary.
    """

    def __init__(self, feed: Feed[T], summary: Future[R], cancel: Callable[[], None]) -> None:
        self._first = feed.first
        self._summary = summary
        self._cancel = cancel

    def __iter__(self) -> Iterator[T]:
        link = self._first.result()
        while link.next is not None:
            if link.item is not None:
                yield link.item
            link = link.next.result()

    async def __aiter__(self) -> AsyncIterator[T]:
        link = await asyncio.wrap_future(self._first)
        while link.next is not None:
            if link.item is not None:
                yield link.item
            link = await asyncio.wrap_future(link.next)

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end."""
        return self._summary.result(timeout)

    def cancel(self) -> None:
        """End early; what was produced so far stays readable, and `result` raises CancelledError."""
        self._cancel()
