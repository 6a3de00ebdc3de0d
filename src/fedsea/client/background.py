"""One event loop in a thread of its own: the one place where synchronous code meets asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

from fedsea.errors import RequestError

T = TypeVar("T")


class Background:
    """Runs coroutines in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def start(self, work: Coroutine[Any, Any, T]) -> Pending[T]:
        """Begin work and return at once.

        Raises:
            RequestError: the loop was stopped.
        """
        with self._starting:
            if self._stopped:
                work.close()
                raise RequestError("this client is closed; connect again")
            return Pending(asyncio.run_coroutine_threadsafe(work, self._loop), self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work and wait for its result."""
        return self.start(work).result()

    def stop(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Cancel what is under way, do `last`, and end the loop."""
        with self._starting:
            if self._stopped:
                if last is not None:
                    last.close()
                return
            self._stopped = True
        asyncio.run_coroutine_threadsafe(_finish(last), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


class Pending(Generic[T]):
    """A result on its way: call `result()`, or `await` it in any event loop."""

    def __init__(self, future: Future[T], loop: asyncio.AbstractEventLoop) -> None:
        self._future = future
        self._loop = loop

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; raises what the work raised."""
        return self._future.result(timeout)

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def cancel(self) -> None:
        """Stop the work. It has begun in any case, so that its own clean-up runs."""
        with suppress(RuntimeError):  # the loop is closed, and with it all work
            self._loop.call_soon_threadsafe(self._future.cancel)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._future).__await__()


async def _finish(last: Coroutine[Any, Any, None] | None) -> None:
    await _cancel_others()
    if last is not None:
        await last
        await _cancel_others()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
