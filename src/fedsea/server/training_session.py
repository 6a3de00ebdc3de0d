"""A training session on the event loop: events to the member, answers to the client.

Events are handed to the member in the order in which they come. Answers go out in that order too,
as soon as they and all before them are ready.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from fedsea.errors import FedseaError, PromptTooLong
from fedsea.server.logs import get_logger
from fedsea.server.session import Session
from fedsea.server.training_member import FAILED, Member
from fedsea.transport.base import ServerStream
from fedsea.wire.connection import Connection
from fedsea.wire.messages import (
    Activations,
    Backward,
    Discard,
    Event,
    Forward,
    Gradients,
    Reset,
    Save,
    Saved,
    Step,
    Stepped,
)

Answer = Activations | Gradients | Stepped | Saved

_log = get_logger(__name__)


class TrainingSession(Session):
    """A session whose events go to a member of a run.

    Args:
        stream: the client.
        connection: the protocol, at the point where `Opened` may be sent.
        max_context: most rows of one sequence.
        idle_timeout: seconds without a message after which the session ends; 0 for never.
    """

    def __init__(
        self,
        stream: ServerStream,
        connection: Connection,
        *,
        max_context: int,
        idle_timeout: float,
    ) -> None:
        super().__init__(stream, connection, idle_timeout=idle_timeout)
        self._max_context = max_context
        self._member: Member | None = None
        self._answers: deque[asyncio.Future[Answer]] = deque()

    async def run(self, member: Member) -> None:
        """Serve with this member of a run, as `serve` does."""
        self._member = member
        await self.serve()

    async def take(self, event: Event) -> None:
        """Hand an event to the member."""
        member = self._member
        assert member is not None
        if self._ended.done():  # the member has left already
            return
        match event:
            case Forward():
                self._check_length(event)
                self._expect(member.forward(event))
            case Backward():
                self._expect(member.backward(event))
            case Discard():
                await member.discard(event)
            case Reset():
                await member.reset()
            case Step():
                self._expect(member.step(event))
            case Save():
                self._expect(member.save(event))

    def _check_length(self, event: Forward) -> None:
        longest = max(event.counts)
        if longest > self._max_context:
            raise PromptTooLong(
                f"a sequence of {longest} rows was sent and this server holds {self._max_context}; "
                "cut the examples"
            )

    def _expect(self, answer: asyncio.Future[Any]) -> None:
        self._answers.append(answer)
        answer.add_done_callback(self._look)

    def _look(self, done: asyncio.Future[Answer]) -> None:
        """Send what is ready; an error ends the session at once."""
        error = None if done.cancelled() else done.exception()
        if error is not None:
            if not isinstance(error, FedseaError):
                _log.error("training_failed", error=type(error).__name__)
                error = FedseaError(FAILED)
            self.fail(error)
            return
        while self._answers and self._answers[0].done():
            first = self._answers.popleft()
            if first.cancelled() or first.exception() is not None:
                return
            self.answer(first.result())
