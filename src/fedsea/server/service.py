"""What the transport serves: describes the trunk, admits sessions, runs them.

A `TrunkService` owns the engine. It is an async context manager: inside, the engine runs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from types import TracebackType
from typing import Self

from fedsea.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    FedseaError,
    FingerprintMismatch,
    PartitionError,
    SessionLost,
)
from fedsea.model.lora import Adapter
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import SoftPrompt
from fedsea.server import loading
from fedsea.server.adapters import unknown_adapter
from fedsea.server.config import ServerConfig
from fedsea.server.engine import Engine, Work
from fedsea.server.logs import get_logger
from fedsea.server.metrics import Metrics
from fedsea.server.prompts import check_entrance, reserved_rows, unknown_prompt
from fedsea.server.quotas import Admissions, TokenBucket
from fedsea.server.scheduler import Scheduler
from fedsea.server.session import InferenceSession, Session
from fedsea.server.training import Training
from fedsea.server.training_session import TrainingSession
from fedsea.transport.base import Peer, ServerStream
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.description import encode_description
from fedsea.wire.limits import LARGEST_MESSAGE, Limits
from fedsea.wire.messages import Description, Notice, NoticeKind, Open, Opened, OpenTraining, Role

RETRY_WHEN_DRAINING = 5.0
SHORT_FINGERPRINT = 12

_log = get_logger(__name__)


class TrunkService:
    """Serves a loaded trunk to the sessions of a transport.

    Args:
        config: all settings.
        trunk: the span and its KV pool.
        metrics: counts what happens.

    Attributes:
        limits: the caps of every session.
    """

    def __init__(
        self, config: ServerConfig, trunk: loading.Trunk, metrics: Metrics | None = None
    ) -> None:
        self.trunk = trunk
        self.metrics = metrics or Metrics()
        self._config = config.server
        self._page_rows = config.kv.page_rows
        self.limits = wire_limits(config, trunk)
        self._hidden_size = trunk.checkpoint.hidden_size
        self.description = _describe(config, trunk, self.limits)
        self._encoded_description = encode_description(self.description)
        self._scheduler = Scheduler(config.scheduler, _buckets(config))
        self.engine = Engine(
            trunk.runner,
            self._scheduler,
            self._hidden_size,
            self.metrics,
            threads=config.model.threads,
        )
        self._admissions = Admissions(
            config.quotas, config.server.max_sessions, config.kv.page_rows
        )
        self.training: Training | None = None
        if config.training.folder is not None:
            most = self.limits.max_rows_per_message
            self.training = Training(config.training, trunk, self.metrics, most)
        self._sessions: set[Session] = set()
        self._no_sessions = asyncio.Event()
        self._no_sessions.set()
        self._draining = False
        self._watch()

    @classmethod
    def load(cls, config: ServerConfig) -> TrunkService:
        """Load what the configuration names; raises what `fedsea.server.loading.load` does."""
        return cls(config, loading.load(config))

    async def __aenter__(self) -> Self:
        if self.training is not None:
            self.training.start()
        await self.engine.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for session in tuple(self._sessions):
            session.fail(SessionLost("the server has stopped; open the session again"))
        await self._no_sessions.wait()
        if self.training is not None:
            await self.training.stop()
        await self.engine.stop()

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    async def describe(self, peer: Peer) -> bytes:
        """What is served, the same for everybody."""
        _log.debug("described", tenant=peer.tenant)
        return self._encoded_description

    async def session(self, peer: Peer, stream: ServerStream) -> None:
        """Serve one session from its Open to its end."""
        session_id = secrets.token_hex(8)
        log = _log.bind(tenant=peer.tenant, session=session_id)
        try:
            await self._serve(peer, stream, session_id)
        except FedseaError as error:
            self.metrics.ended(error.code)
            log.info("session_failed", code=error.code)
            raise
        log.info("session_closed")

    def drain(self) -> None:
        """Take no new sessions and tell the open ones to move."""
        self._draining = True
        notice = Notice(NoticeKind.DRAINING, "the server is stopping; move to another address")
        for session in self._sessions:
            session.notify(notice)

    async def _serve(self, peer: Peer, stream: ServerStream, session_id: str) -> None:
        connection = Connection(Role.SERVER, self.limits, hidden_size=self._hidden_size)
        request = await self._request(stream, connection)
        if request is None:
            return
        self._check(request)
        projection = self._projection(request)
        if isinstance(request, OpenTraining):
            await self._train(peer.tenant, stream, connection, request, projection, session_id)
        else:
            await self._infer(peer.tenant, stream, connection, request, projection, session_id)

    async def _infer(
        self,
        tenant: str,
        stream: ServerStream,
        connection: Connection,
        request: Open,
        projection: Projection | None,
        session_id: str,
    ) -> None:
        adapter = await self._adapter(tenant, request.adapter)
        prompt = await self._prompt(tenant, request)
        session = InferenceSession(
            stream,
            connection,
            self.engine,
            max_context=self.trunk.max_context - (0 if prompt is None else prompt.count),
            idle_timeout=self._config.idle_timeout_s,
        )
        up, span = request.up_format(self._hidden_size), _span(request)
        work = Work(tenant, span, up, request.down_codec, session, projection, adapter, prompt)
        taken = request.reserve_rows + reserved_rows(prompt, self._page_rows)
        with self._admissions.admitted(tenant, taken):
            try:
                await self.engine.open(work, request.reserve_rows)
                with self._opened(tenant, session, session_id, request):
                    await session.run(work)
            finally:
                self.engine.close(work)

    async def _train(
        self,
        tenant: str,
        stream: ServerStream,
        connection: Connection,
        request: OpenTraining,
        projection: Projection | None,
        session_id: str,
    ) -> None:
        if self.training is None:
            raise ConfigError(
                "this server trains nothing; its operator sets training.folder, where what is "
                "trained is kept"
            )
        session = TrainingSession(
            stream,
            connection,
            max_context=self.trunk.max_context - request.prompt_rows,
            idle_timeout=self._config.idle_timeout_s,
        )
        with self._admissions.admitted(tenant, 0):
            seat = await self.training.open(tenant, request, projection, session.fail)
            try:
                with self._opened(tenant, session, session_id, request, seat.step):
                    await session.run(seat.member)
            finally:
                seat.leave()

    @contextmanager
    def _opened(
        self,
        tenant: str,
        session: Session,
        session_id: str,
        request: Open | OpenTraining,
        step: int = 0,
    ) -> Iterator[None]:
        """Tell the client that its session is open, and count it for as long as the block runs."""
        self._check_draining()
        session.send(Opened(session_id, round(self._config.idle_timeout_s * 1000), step))
        self._sessions.add(session)
        self._no_sessions.clear()
        self.metrics.opened(tenant)
        log = _log.bind(tenant=tenant, session=session_id, span=str(_span(request)))
        if isinstance(request, Open):
            log.info("session_opened", reserved=request.reserve_rows)
        else:
            log.info("training_opened", adapter=request.adapter, step=step)
        try:
            yield
        finally:
            self._sessions.discard(session)
            if not self._sessions:
                self._no_sessions.set()

    async def _adapter(self, tenant: str, name: str) -> Adapter | None:
        """The adapter that a session named, the operator's before the tenant's own.

        Raises:
            PermissionDenied: the tenant has none of that name.
        """
        if not name:
            return None
        found = self.trunk.adapters.of(tenant, name)
        if found is None and self.training is not None:
            found = await self.training.adapter(tenant, name)
            if found is not None:
                await self.engine.accept(found)
        if found is None:
            raise unknown_adapter()
        return found

    async def _prompt(self, tenant: str, request: Open) -> SoftPrompt | None:
        """The soft prompt that a session named, the operator's before the tenant's own.

        Raises:
            PermissionDenied: the tenant has none of that name.
            ConfigError: it is for another cut.
        """
        if not request.prompt:
            return None
        found = self.trunk.prompts.of(tenant, request.prompt)
        if found is None and self.training is not None:
            found = await self.training.prompt(tenant, request.prompt)
        if found is None:
            raise unknown_prompt()
        check_entrance(found, request.first_block)
        return found

    async def _request(
        self, stream: ServerStream, connection: Connection
    ) -> Open | OpenTraining | None:
        """The client's first message; None when it went away without one."""
        self._check_draining()
        try:
            async with asyncio.timeout(self._config.open_timeout_s):
                data = await stream.receive()
        except TimeoutError:
            raise DeadlineExceeded("the stream said nothing; send Open at once") from None
        if data is None:
            return None
        request = connection.receive(data)
        assert isinstance(request, Open | OpenTraining)  # the table of states allows nothing else
        return request

    def _check_draining(self) -> None:
        if self._draining:
            raise Draining("the server is stopping; use another address", RETRY_WHEN_DRAINING)

    def _check(self, request: Open | OpenTraining) -> None:
        if request.fingerprint != self.trunk.fingerprint:
            raise FingerprintMismatch(
                f"the server serves {self.trunk.checkpoint.name} "
                f"({self.trunk.fingerprint[:SHORT_FINGERPRINT]}) and the client holds another "
                f"checkpoint ({request.fingerprint[:SHORT_FINGERPRINT]}); "
                "use the same files on both sides"
            )
        span = _span(request)
        if span not in self.trunk.span:
            raise PartitionError(
                f"blocks {span} were asked for and this server serves {self.trunk.span}; "
                "choose bottom and top so that the trunk lies inside"
            )

    def _projection(self, request: Open | OpenTraining) -> Projection | None:
        """What widens the rows of a session; None when they come in the hidden size.

        Raises:
            ConfigError: it is not served, or is for another width or cut.
        """
        if not request.projection:
            return None
        projection = self.trunk.projections.get(request.projection)
        if projection is None:
            served = ", ".join(name[:SHORT_FINGERPRINT] for name in self.trunk.projections)
            raise ConfigError(
                f"the projection {request.projection[:SHORT_FINGERPRINT]} is not served here "
                f"({served or 'there is none'}); ask the operator to add it"
            )
        width = request.up_width or self._hidden_size
        if (width, request.first_block) != (projection.width, projection.bottom):
            raise ConfigError(
                f"the projection is for rows of {projection.width} numbers that enter block "
                f"{projection.bottom}, and rows of {width} for block {request.first_block} were "
                "announced; use the client's half of the same projection"
            )
        return projection

    def _watch(self) -> None:
        pool = self.trunk.runner.pool
        watch = self.metrics.watch
        watch("sessions", "Open sessions", lambda: len(self._sessions))
        watch("kv_rows", "KV rows in all", lambda: pool.num_rows)
        watch("kv_rows_unreserved", "KV rows that can be reserved", lambda: pool.unreserved_rows)


def _span(request: Open | OpenTraining) -> Span:
    return Span(request.first_block, request.end_block)


def wire_limits(config: ServerConfig, trunk: loading.Trunk) -> Limits:
    """The caps of every session."""
    section = config.limits
    limits = Limits(
        max_rows_per_message=section.max_rows_per_message,
        max_segments=section.max_segments,
        max_sequences=section.max_sequences,
        max_pending=section.max_pending,
        max_forwards=section.max_forwards,
    )
    size = section.max_message_bytes
    if size is None:
        size = limits.max_message_bytes
        if config.training.folder is not None:
            rows = min(trunk.max_context, limits.max_rows_per_message)
            whole = rows * RowFormat(Codec.FP32, trunk.checkpoint.hidden_size).row_bytes
            size = min(max(size, whole + limits.frame_bytes), LARGEST_MESSAGE)
    return replace(limits, max_message_bytes=size)


def _describe(config: ServerConfig, trunk: loading.Trunk, limits: Limits) -> Description:
    checkpoint, quantization = trunk.checkpoint, config.model.quantization
    return Description(
        model=checkpoint.name,
        family=str(checkpoint.config.model_type),
        fingerprint=trunk.fingerprint,
        hidden_size=checkpoint.hidden_size,
        num_blocks=checkpoint.num_blocks,
        first_block=trunk.span.first,
        end_block=trunk.span.end,
        codecs=tuple(Codec),
        max_context=trunk.max_context,
        max_rows_per_message=limits.max_rows_per_message,
        max_message_bytes=limits.max_message_bytes,
        max_segments=limits.max_segments,
        max_sequences=limits.max_sequences,
        max_pending=limits.max_pending,
        dtype=config.model.dtype,
        quantization="" if quantization == "none" else quantization,
        server_version=version("fedsea"),
        page_rows=config.kv.page_rows,
        projections=tuple(trunk.projections),
        max_forwards=0 if config.training.folder is None else limits.max_forwards,
    )


def _buckets(config: ServerConfig) -> Callable[[str], TokenBucket | None]:
    def bucket(tenant: str) -> TokenBucket | None:
        rate = config.quotas.of(tenant).rows_per_second
        return None if rate is None else TokenBucket(rate, time.perf_counter())

    return bucket
