"""One open stream to a server: what the sessions of inference and of training do alike with it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

from fedsea.errors import ConnectionLost, DeadlineExceeded, FedseaError, SessionLost
from fedsea.transport.base import ClientStream
from fedsea.wire.connection import Connection
from fedsea.wire.limits import patience_factor
from fedsea.wire.messages import Event, Open, Opened, OpenTraining

Tell = Callable[[str], None]

_Owed = TypeVar("_Owed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the client waits, in seconds.

    `open` bounds the wait for a place at a busy server, `recover` the time without any server
    after a break, `answer` the silence of a server that owes an answer.
    """

    open: float = 30.0
    recover: float = 60.0
    answer: float = 120.0


@dataclass(slots=True)
class Traffic:
    """Messages and bytes of a session, in both directions."""

    messages_up: int = 0
    messages_down: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rows_up: int = 0
    rows_down: int = 0
    compute_us: int = 0

    def since(self, earlier: Traffic) -> Traffic:
        """What was added to an earlier state of the same figures."""
        names = (entry.name for entry in fields(self))
        return Traffic(*(getattr(self, name) - getattr(earlier, name) for name in names))


@dataclass(slots=True, eq=False)
class Link(Generic[_Owed]):
    """A stream, the protocol's state on it, and what the server owes, in order.

    Attributes:
        traffic: of the session; every message that passes is counted.
        owed: what waits for the server's next answers.
        tasks: those that serve the stream.
    """

    stream: ClientStream
    connection: Connection
    address: str
    traffic: Traffic
    owed: deque[_Owed] = field(default_factory=deque, kw_only=True)
    tasks: list[asyncio.Task[None]] = field(default_factory=list, kw_only=True)
    _heard: float = field(default_factory=time.monotonic, kw_only=True)
    _largest: int = field(default=0, kw_only=True)

    async def greet(self, hello: Open | OpenTraining) -> Opened:
        """Ask for the session; the server's answer. A stream that gets none is cancelled.

        Raises:
            ConnectionLost: the stream ended, or something else came.
            FedseaError: what the server objects to.
        """
        try:
            with suppress(ConnectionLost):
                # A refusal can end the stream while we still send; `receive` says why.
                await self.stream.send(self.encoded(hello))
            answer = await self.stream.receive()
            if answer is None:
                raise ConnectionLost(f"{self.address} closed the session at once; try again")
            event = self._decoded(answer)
            if not isinstance(event, Opened):
                raise ConnectionLost(f"{self.address} did not confirm the session; try again")
        except BaseException:
            await self.stream.cancel()
            raise
        return event

    def encoded(self, event: Event) -> bytes:
        """The message of an event that goes out now.

        Raises:
            LocalProtocolError: the event has no place here.
        """
        data = self.connection.send(event)
        self._largest = max(self._largest, len(data))
        self.traffic.messages_up += 1
        self.traffic.bytes_up += len(data)
        return data

    def owe(self, answer: _Owed) -> None:
        """Remember what waits for the answer of an event that goes out now."""
        if not self.owed:
            # Only now does the server begin to owe anything.
            self._heard = time.monotonic()
        self.owed.append(answer)

    async def receive(self) -> Event:
        """The next event.

        Raises:
            SessionLost: the server ended the stream without a reason.
            TransportError: it broke.
            FedseaError: what the server said, or a message that has no place here.
        """
        data = await self.stream.receive()
        if data is None:
            raise SessionLost("the server ended the session")
        self._heard = time.monotonic()
        return self._decoded(data)

    async def silence(self, patience: float) -> DeadlineExceeded:
        """Wait until the server owes an answer for longer than so many seconds; the error of that.

        Large messages, and their answers, need time to travel: they get it in proportion.
        """
        while True:
            await asyncio.sleep(patience / 4)
            most = patience * patience_factor(self._largest)
            if self.owed and time.monotonic() - self._heard > most:
                return DeadlineExceeded(f"{self.address} owes an answer for {most:g} s")

    def _decoded(self, data: bytes) -> Event:
        self.traffic.messages_down += 1
        self.traffic.bytes_down += len(data)
        return self.connection.receive(data)


def defect(error: Exception) -> FedseaError:
    """What callers get who must not wait for ever because of a mistake of ours."""
    return FedseaError(f"the client failed with {type(error).__name__}; please report it")
