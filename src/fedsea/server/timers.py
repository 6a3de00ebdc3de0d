"""A deadline on the event loop that may be started and stopped at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls a function once, some time after it was started, unless it was stopped."""

    def __init__(self, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Start, unless it is running already."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(seconds, self._expire)

    def stop(self) -> None:
        """Do not call the function; safe to repeat."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _expire(self) -> None:
        self._handle = None
        self._expired()
