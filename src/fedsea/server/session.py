"""A session on the event loop: messages in, work to whoever computes, answers out.

A reader and a writer share the stream. The client may send while outputs wait for it, up to a
bound; beyond that nothing more is read, so that a slow client blocks only itself.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from fedsea.errors import FedseaError, PromptTooLong, SessionLost
from fedsea.server.engine import Engine, Result, Work
from fedsea.transport.base import ServerStream
from fedsea.wire.connection import Connection
from fedsea.wire.messages import Begin, Close, Event, Fork, Notice

MAX_BACKLOG = 1024
BACKLOG_PAUSE = 0.01


class Session(ABC):
    """Serves a session that has been opened; subclasses say what its events do.

    Args:
        stream: the client.
        connection: the protocol, at the point where `Opened` may be sent.
        idle_timeout: seconds without a message after which the session ends; 0 for never.
    """

    def __init__(
        self, stream: ServerStream, connection: Connection, *, idle_timeout: float
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._idle_timeout = idle_timeout
        self._loop = asyncio.get_running_loop()
        self._last_message = self._loop.time()
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._no_more_messages = False

    @abstractmethod
    async def take(self, event: Event) -> None:
        """Do what an event of the client asks for; until this returns nothing more is read.

        Raises:
            FedseaError: what ends the session.
        """

    async def serve(self) -> None:
        """Serve until the client closes the session and has all its outputs.

        Raises:
            FedseaError: what ended the session instead.
        """
        self._watch_idleness()
        tasks = [self._task(self._read()), self._task(self._write())]
        try:
            await self._ended
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Whatever else went wrong in the meantime is of no interest any more.
            if not self._ended.cancel() and not self._ended.cancelled():
                self._ended.exception()

    def send(self, event: Event) -> None:
        """Queue an event of ours for the client."""
        self._outbox.put_nowait(self._connection.send(event))

    def notify(self, notice: Notice) -> None:
        """Tell the client something, unless the session is ending anyway."""
        if not self._ended.done():
            self.send(notice)

    def answer(self, event: Event) -> None:
        """Send an answer, unless the session is ending anyway."""
        if self._ended.done():
            return
        try:
            self.send(event)
        except FedseaError as error:
            self.fail(error)
        self._finish_when_answered()

    def fail(self, error: BaseException) -> None:
        """End the session with an error."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _read(self) -> None:
        while (data := await self._stream.receive()) is not None:
            self._last_message = self._loop.time()
            event = self._connection.receive(data)
            if isinstance(event, Close):
                break
            await self.take(event)
            await self._room_for_more()
        self._no_more_messages = True
        self._finish_when_answered()

    async def _write(self) -> None:
        while (data := await self._outbox.get()) is not None:
            await self._stream.send(data)
            if self._outbox.empty():
                self._room.set()
        if not self._ended.done():
            self._ended.set_result(None)

    async def _room_for_more(self) -> None:
        """Wait while too many answers wait for the client."""
        if self._outbox.qsize() >= self._connection.limits.max_pending:
            self._room.clear()
            await self._room.wait()

    def _finish_when_answered(self) -> None:
        if self._no_more_messages and not self._connection.pending:
            self._outbox.put_nowait(None)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.fail(error)

    def _watch_idleness(self) -> None:
        """End the session when it is idle, or look again when it could be."""
        if not self._idle_timeout or self._ended.done():
            return
        now = self._loop.time()
        if self._connection.pending:
            self._last_message = now
        ends = self._last_message + self._idle_timeout
        if now >= ends:
            self.fail(
                SessionLost(
                    f"the session was idle for {self._idle_timeout:g} s and has ended; open it again"
                )
            )
        else:
            self._timer = self._loop.call_at(ends, self._watch_idleness)


class InferenceSession(Session):
    """A session whose rows the engine computes.

    Args:
        stream: the client.
        connection: the protocol, at the point where `Opened` may be sent.
        engine: computes.
        max_context: most rows of one sequence.
        idle_timeout: seconds without a message after which the session ends; 0 for never.
    """

    def __init__(
        self,
        stream: ServerStream,
        connection: Connection,
        engine: Engine,
        *,
        max_context: int,
        idle_timeout: float,
    ) -> None:
        super().__init__(stream, connection, idle_timeout=idle_timeout)
        self._engine = engine
        self._max_context = max_context
        self._work: Work | None = None

    async def run(self, work: Work) -> None:
        """Serve with this work of the engine, as `serve` does."""
        self._work = work
        await self.serve()

    async def take(self, event: Event) -> None:
        """Hand an event to the engine; wait while too many wait there."""
        work = self._work
        assert work is not None
        if isinstance(event, Begin | Fork) and event.capacity > self._max_context:
            raise PromptTooLong(
                f"a sequence of {event.capacity} rows was asked for and this server holds "
                f"{self._max_context}; shorten the prompt or ask for fewer new tokens"
            )
        self._engine.submit(work, event)  # type: ignore[arg-type]  # a server receives no other
        while work.backlog > MAX_BACKLOG:  # noqa: ASYNC110 - so rare that the engine tells nobody
            await asyncio.sleep(BACKLOG_PAUSE)

    def deliver(self, result: Result) -> None:
        """Take a result of the engine."""
        if isinstance(result, FedseaError):
            self.fail(result)
        else:
            self.answer(result)
