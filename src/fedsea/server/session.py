"""One session on the event loop: messages in, work to the engine, outputs out.

A reader and a writer share the stream. The client may send while outputs wait for it, up to a
bound; beyond that nothing more is read, so that a slow client blocks only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fedsea.errors import FedseaError, PromptTooLong, SessionLost
from fedsea.server.engine import Engine, Result, Work
from fedsea.transport.base import ServerStream
from fedsea.wire.connection import Connection
from fedsea.wire.messages import Begin, Close, Event, Fork, Notice

MAX_BACKLOG = 1024
BACKLOG_PAUSE = 0.01


class Session:
    """Serves a session that has been opened.

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
        self._stream = stream
        self._connection = connection
        self._engine = engine
        self._max_context = max_context
        self._idle_timeout = idle_timeout
        self._loop = asyncio.get_running_loop()
        self._last_message = self._loop.time()
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._no_more_messages = False

    async def serve(self, work: Work) -> None:
        """Serve until the client closes the session and has all its outputs.

        Raises:
            FedseaError: what ended the session instead.
        """
        self._watch_idleness()
        tasks = [self._task(self._read(work)), self._task(self._write())]
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

    def deliver(self, result: Result) -> None:
        """Take a result of the engine."""
        if self._ended.done():
            return
        if isinstance(result, FedseaError):
            self.fail(result)
            return
        try:
            self.send(result)
        except FedseaError as error:
            self.fail(error)
        self._finish_when_answered()

    def fail(self, error: BaseException) -> None:
        """End the session with an error."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _read(self, work: Work) -> None:
        while (data := await self._stream.receive()) is not None:
            self._last_message = self._loop.time()
            event = self._connection.receive(data)
            if isinstance(event, Close):
                break
            self._check(event)
            self._engine.submit(work, event)  # type: ignore[arg-type]  # a server receives no other
            await self._room_for_more(work)
        self._no_more_messages = True
        self._finish_when_answered()

    async def _write(self) -> None:
        while (data := await self._outbox.get()) is not None:
            await self._stream.send(data)
            if self._outbox.empty():
                self._room.set()
        if not self._ended.done():
            self._ended.set_result(None)

    async def _room_for_more(self, work: Work) -> None:
        """Wait while too many outputs wait for the client, or too many events for the engine."""
        if self._outbox.qsize() >= self._connection.limits.max_pending:
            self._room.clear()
            await self._room.wait()
        while work.backlog > MAX_BACKLOG:  # noqa: ASYNC110 - so rare that the engine tells nobody
            await asyncio.sleep(BACKLOG_PAUSE)

    def _check(self, event: Event) -> None:
        if isinstance(event, Begin | Fork) and event.capacity > self._max_context:
            raise PromptTooLong(
                f"a sequence of {event.capacity} rows was asked for and this server holds "
                f"{self._max_context}; shorten the prompt or ask for fewer new tokens"
            )

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
