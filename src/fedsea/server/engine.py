"""Computes the rows of all sessions, step by step, in one thread of its own.

The event loop hands work in through a queue and gets all results of a step back in one call. Only
the engine's thread touches the scheduler, the KV pool and torch. A step that fails ends the
sessions that took part in it; the engine goes on.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeAlias

import structlog
import torch
from torch import Tensor

from fedsea.errors import ConfigError, FedseaError, LocalProtocolError, RemoteProtocolError
from fedsea.model.partition import Span
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.server.jobs import Job, Piece
from fedsea.server.metrics import Metrics
from fedsea.server.scheduler import Grant, Scheduler
from fedsea.wire.codecs import Codec, decode, encode
from fedsea.wire.messages import Append, Begin, Drop, Fork, Output, Rollback

INTEGRITY_SECONDS = 1.0
FAILED_STEP = "the server failed to compute a step: open a new session, and tell its operator"

WorkEvent = Begin | Fork | Rollback | Drop | Append
Result: TypeAlias = Output | FedseaError

_log = structlog.get_logger(__name__)


class Receiver(Protocol):
    """Who gets the results of a session, on the event loop."""

    def deliver(self, result: Result) -> None:
        """Take an output, or the error with which the engine ended the session."""
        ...


@dataclass(slots=True, eq=False)
class Work:
    """A session as the engine knows it; `account` is that of the KV pool, None while not open."""

    tenant: str
    span: Span
    up_codec: Codec
    down_codec: Codec
    receiver: Receiver
    number: int = -1
    account: int | None = None
    queue: deque[tuple[WorkEvent, float]] = field(default_factory=deque)
    job: Job | None = None


@dataclass(slots=True)
class _Share:
    """What one session contributes to a step."""

    work: Work
    job: Job
    grant: Grant
    data: memoryview
    pieces: list[Piece]

    def new_rows(self) -> list[NewRows]:
        account = self.work.account
        assert account is not None
        return [NewRows(account, piece.sequence, piece.count) for piece in self.pieces]


class Engine:
    """The thread that computes.

    Args:
        runner: the blocks and their KV pool.
        scheduler: decides whose rows are computed.
        hidden_size: numbers in a row.
        metrics: counts what happens.
        threads: torch's threads for one operation; 0 for torch's own number.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        runner: SpanRunner,
        scheduler: Scheduler,
        hidden_size: int,
        metrics: Metrics,
        *,
        threads: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._pool = runner.pool
        self._scheduler = scheduler
        self._hidden_size = hidden_size
        self._metrics = metrics
        self._threads = threads
        self._clock = clock
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._works: dict[int, Work] = {}
        self._next_number = 0
        self._results: list[tuple[Receiver, Result]] = []
        self._unchecked = False
        self._checked_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.failed: asyncio.Future[None] | None = None

    # Called on the event loop

    def start(self) -> None:
        """Start the thread; results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.failed = self._loop.create_future()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step that is running; open sessions get no more results."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        if self.failed is not None:
            self.failed.cancel()

    async def open(self, work: Work, reserve_rows: int) -> None:
        """Reserve KV rows for a session; `close` must follow, even after an error.

        Raises:
            Capacity: the pool has too few rows left.
        """
        assert self._loop is not None
        answer: asyncio.Future[None] = self._loop.create_future()
        self._inbox.put(partial(self._open, work, reserve_rows, answer))
        await answer

    def submit(self, work: Work, event: WorkEvent) -> None:
        """Apply an event of a session after those before it."""
        self._inbox.put(partial(self._accept, work, event, self._clock()))

    def close(self, work: Work) -> None:
        """Forget a session and free its rows; safe to repeat."""
        self._inbox.put(partial(self._close, work))

    # Called in the engine's thread

    def _main(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            while self._receive():
                self.step()
                self._deliver()
        except Exception as error:  # noqa: BLE001
            # The bookkeeping is broken, so nothing may be computed with it any more. Only the
            # type is logged: the text of a foreign error can hold anything.
            _log.critical("engine_stopped", error=type(error).__name__)
            self._call_loop(self._report_failure)

    def _receive(self) -> bool:
        """Handle what has come in, waiting when there is nothing to compute; False to stop."""
        try:
            command = self._inbox.get(timeout=self._patience())
            while command is not None:
                command()
                command = self._inbox.get_nowait()
        except Empty:
            self._check_when_idle()
            return True
        return False

    def _patience(self) -> float | None:
        """Seconds to wait for work; None for as long as it takes."""
        ready = self._scheduler.next_ready(self._clock())
        if ready is not None:
            return max(0.0, ready - self._clock())
        return INTEGRITY_SECONDS if self._unchecked else None

    def _check_when_idle(self) -> None:
        now = self._clock()
        if (
            self._unchecked
            and not self._scheduler.is_waiting
            and now - self._checked_at > INTEGRITY_SECONDS
        ):
            self._pool.check_integrity()
            self._unchecked, self._checked_at = False, now

    def _open(self, work: Work, reserve_rows: int, answer: asyncio.Future[None]) -> None:
        refusal: FedseaError | None = None
        try:
            work.account = self._pool.open(reserve_rows)
        except FedseaError as error:
            refusal = error
        else:
            work.number = self._next_number
            self._next_number += 1
            self._works[work.number] = work
            self._scheduler.add(work.number, work.tenant)
            self._unchecked = True
        self._call_loop(_answer, answer, refusal)

    def _accept(self, work: Work, event: WorkEvent, arrived: float) -> None:
        if work.account is not None:
            work.queue.append((event, arrived))
            self._advance(work)

    def _close(self, work: Work) -> None:
        if work.account is None:
            return
        self._scheduler.remove(work.number)
        del self._works[work.number]
        self._pool.close(work.account)
        work.account, work.job = None, None
        work.queue.clear()
        self._unchecked = True

    def _fail(self, work: Work, error: FedseaError) -> None:
        self._close(work)
        self._results.append((work.receiver, error))

    def _advance(self, work: Work) -> None:
        """Apply the events of a session up to its next Append, and offer that one."""
        try:
            while work.job is None and work.queue:
                self._apply(work, *work.queue.popleft())
        except FedseaError as error:
            self._fail(work, error)

    def _apply(self, work: Work, event: WorkEvent, arrived: float) -> None:
        account = work.account
        assert account is not None
        match event:
            case Append():
                job = Job.of(event, work.up_codec.row_bytes(self._hidden_size), arrived)
                self._pool.check_room(account, job.growth())
                self._scheduler.offer(work.number, job.count)
                work.job = job
            case Begin():
                self._pool.begin(account, event.sequence, event.capacity)
            case Fork():
                self._pool.fork(account, event.source, event.target, event.length, event.capacity)
            case Rollback():
                self._pool.rollback(account, event.sequence, event.length)
            case Drop():
                self._pool.drop(account, event.sequence)

    def step(self) -> None:
        """Schedule, run, postprocess."""
        began = self._clock()
        shares = self._schedule(began)
        if not shares:
            return
        try:
            shares = self._run(shares)
        except Exception as error:  # noqa: BLE001
            # torch raises whatever its backend raises, such as out of memory. The rows of these
            # sessions are in an unknown state; others are untouched.
            _log.error("step_failed", error=type(error).__name__, sessions=len(shares))
            for share in shares:
                self._fail(share.work, FedseaError(FAILED_STEP))
            return
        self._postprocess(shares, self._clock() - began)

    def _schedule(self, now: float) -> list[_Share]:
        shares = []
        for grant in self._scheduler.schedule(now):
            work = self._works[grant.session]
            job = work.job
            assert job is not None
            if job.started is None:
                job.started = now
            data, pieces = job.take(grant.rows)
            shares.append(_Share(work, job, grant, data, pieces))
        return shares

    def _run(self, shares: list[_Share]) -> list[_Share]:
        """Compute the rows of all shares; returns those that went well."""
        if len(shares) > 1:
            shares.sort(key=_group)
        finished: list[_Share] = []
        for span, members in groupby(shares, key=lambda share: share.work.span):
            group, rows = self._decode(list(members))
            if not group:
                continue
            batch = self._runner.advance([new for share in group for new in share.new_rows()])
            hidden = self._runner.run(rows, batch, span)
            finished += self._encode(group, hidden)
        return finished

    def _decode(self, group: list[_Share]) -> tuple[list[_Share], Tensor]:
        """The rows of a group as one tensor, without the shares whose rows are refused."""
        try:
            return group, self._join(group)
        except RemoteProtocolError as error:
            if len(group) == 1:
                self._fail(group[0].work, error)
                return [], torch.empty(0)
        sound = [share for share in group if self._decode([share])[0]]
        return sound, self._join(sound)

    def _join(self, group: list[_Share]) -> Tensor:
        """Rows of shares sorted by codec: one decoding for each codec."""
        placement = self._runner.placement
        parts = []
        for codec, members in groupby(group, key=lambda share: share.work.up_codec):
            sharing = list(members)
            data = sharing[0].data if len(sharing) == 1 else b"".join(s.data for s in sharing)
            count = sum(share.grant.rows for share in sharing)
            parts.append(decode(data, codec, count, self._hidden_size, placement.dtype))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0)])
        return rows.to(placement.device)

    def _encode(self, group: list[_Share], hidden: Tensor) -> list[_Share]:
        """Write the wanted rows of a group into the answers; returns the shares that went well."""
        offset = 0
        wanted: dict[Codec, list[int]] = {}
        counts: dict[Codec, list[tuple[_Share, int]]] = {}
        for share in group:
            codec = share.work.down_codec
            numbers = wanted.setdefault(codec, [])
            before = len(numbers)
            for piece in share.pieces:
                numbers.extend(range(offset + piece.wanted, offset + piece.count))
                offset += piece.count
            counts.setdefault(codec, []).append((share, len(numbers) - before))
        failed: set[int] = set()
        for codec, numbers in wanted.items():
            if numbers:
                rows = hidden if len(numbers) == len(hidden) else hidden[numbers]
                failed |= self._write(counts[codec], rows, codec)
        return [share for share in group if share.work.number not in failed] if failed else group

    def _write(self, counts: list[tuple[_Share, int]], rows: Tensor, codec: Codec) -> set[int]:
        """Give each share its part of `rows`; returns the sessions whose rows cannot be written."""
        try:
            data = encode(rows, codec)
        except LocalProtocolError as error:
            if len(counts) == 1:
                self._fail(counts[0][0].work, ConfigError(f"rows of the trunk do not fit: {error}"))
                return {counts[0][0].work.number}
            failed: set[int] = set()
            for entry, part in zip(counts, rows.split([n for _, n in counts]), strict=True):
                if entry[1]:
                    failed |= self._write([entry], part, codec)
            return failed
        size = codec.row_bytes(self._hidden_size)
        at = 0
        for share, count in counts:
            if count:
                end = at + count * size
                share.job.answer.append(data if end - at == len(data) else data[at:end])
                at = end
        return set()

    def _postprocess(self, shares: list[_Share], seconds: float) -> None:
        prefill_rows = sum(share.grant.rows for share in shares if share.grant.is_prefill)
        decode_rows = sum(share.grant.rows for share in shares) - prefill_rows
        if not shares:
            return
        self._scheduler.cost.record(decode_rows, prefill_rows, seconds)
        self._metrics.step(decode_rows, prefill_rows, len(shares), seconds)
        for share in shares:
            job = share.job
            job.compute += seconds
            self._metrics.rows(share.work.tenant, share.grant.rows)
            if job.is_done:
                output = job.output()
                self._metrics.answered(output)
                self._results.append((share.work.receiver, output))
                share.work.job = None
                self._advance(share.work)

    def _deliver(self) -> None:
        if self._results:
            results, self._results = self._results, []
            self._call_loop(_deliver_all, results)

    def _call_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)

    def _report_failure(self) -> None:
        for work in self._works.values():
            work.receiver.deliver(FedseaError(FAILED_STEP))
        if self.failed is not None and not self.failed.done():
            self.failed.set_result(None)


def _group(share: _Share) -> tuple[int, int, str]:
    span = share.work.span
    return span.first, span.end, share.work.up_codec.value


def _answer(answer: asyncio.Future[None], refusal: FedseaError | None) -> None:
    """Settle an `open` that may have been cancelled in the meantime."""
    if answer.done():
        return
    if refusal is None:
        answer.set_result(None)
    else:
        answer.set_exception(refusal)


def _deliver_all(results: Iterable[tuple[Receiver, Result]]) -> None:
    for receiver, result in results:
        receiver.deliver(result)
