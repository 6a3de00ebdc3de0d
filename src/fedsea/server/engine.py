"""Computes the rows of all sessions, step by step.

The event loop hands work in through a queue and gets all results of a step back in one call; the
engine's thread does the rest. A decoding step of the only session runs on the event loop itself
when the engine has nothing to do: two changes of thread cost more than a small step gains from
them. Whoever computes holds `_turn`: the scheduler, the KV pool and torch belong to its holder. A
step that fails ends the sessions that took part in it; the engine goes on.
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

import torch
from torch import Tensor

from fedsea.errors import ConfigError, FedseaError, LocalProtocolError, RemoteProtocolError
from fedsea.model.lora import Adapter
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import SoftPrompt
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.server import prompts
from fedsea.server.jobs import Job, Piece
from fedsea.server.logs import get_logger
from fedsea.server.metrics import Metrics
from fedsea.server.scheduler import Grant, Scheduler
from fedsea.wire.codecs import Codec, RowFormat, encode
from fedsea.wire.messages import Append, Begin, Drop, Fork, Output, Rollback

INTEGRITY_SECONDS = 1.0
WARM_UP_ROWS = 32
# Appends of at most this many rows may be computed on the event loop.
LOOP_ROWS = 16
STOPPED = "the server has stopped computing: use another address, and tell its operator"
FAILED_STEP = "the server failed to compute a step: open a new session, and tell its operator"

WorkEvent = Begin | Fork | Rollback | Drop | Append
Result: TypeAlias = Output | FedseaError

_log = get_logger(__name__)


class Receiver(Protocol):
    """Who gets the results of a session, on the event loop."""

    def deliver(self, result: Result) -> None:
        """Take an output, or the error with which the engine ended the session."""
        ...


@dataclass(slots=True, eq=False)
class Work:
    """A session as the engine knows it; `account` is that of the KV pool, None while not open.

    Rows come in the format `up`; `projection` widens them when it is not None, and the blocks add
    what `adapter` says. With a `prompt`, every sequence begins behind `first` rows of the KV pool
    that its client does not count.
    """

    tenant: str
    span: Span
    up: RowFormat
    down_codec: Codec
    receiver: Receiver
    projection: Projection | None = None
    adapter: Adapter | None = None
    prompt: SoftPrompt | None = None
    first: int = 0
    number: int = -1
    account: int | None = None
    queue: deque[tuple[WorkEvent, float]] = field(default_factory=deque)
    job: Job | None = None
    submitted: int = 0
    applied: int = 0

    @property
    def entry(self) -> tuple[RowFormat, Projection | None]:
        """How rows become hidden states: those of sessions with the same entry, in one go."""
        return self.up, self.projection

    @property
    def backlog(self) -> int:
        """Events that wait; the loop counts what it submits, the engine what it applies."""
        return self.submitted - self.applied


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
        adapter, prompt = self.work.adapter, self.work.prompt
        skip = 0 if prompt is None else self.work.first - prompt.count
        return [
            NewRows(account, piece.sequence, piece.count, adapter, skip) for piece in self.pieces
        ]


class Engine:
    """The thread that computes.

    Args:
        runner: the blocks and their KV pool.
        scheduler: decides whose rows are computed.
        hidden_size: numbers in a row.
        metrics: counts what happens.
        threads: torch's threads for one operation; 0 for torch's own number.
        clock: seconds that never run backwards.

    Attributes:
        stopped: set when nothing is computed any more, after `stop` or because of a defect.
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
        self._prompts = prompts.PromptRows(runner)
        self._scheduler = scheduler
        self._hidden_size = hidden_size
        self._metrics = metrics
        self._threads = threads
        self._clock = clock
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Commands handed in, counted by the loop, and handled, counted under `_turn`.
        self._handed_in = 0
        self._handled = 0
        # Deliveries to the loop, counted under `_turn`, and those that have arrived there.
        self._deliveries = 0
        self._arrivals = 0
        self._turn = threading.Lock()
        self._works: dict[int, Work] = {}
        self._next_number = 0
        self._results: list[tuple[Receiver, Result]] = []
        self._unchecked = False
        self._checked_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.stopped = asyncio.Event()

    # Called on the event loop

    async def start(self) -> None:
        """Start the thread and wait until a first step has run; results go to the running loop.

        Raises:
            ConfigError: the blocks cannot be computed as configured.
        """
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._set_threads()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        self._hand_in(partial(self._warm_up, ready))
        await ready

    async def stop(self) -> None:
        """End the thread after the step that is running; open sessions get no more results."""
        self.stopped.set()
        self._hand_in(None)
        await asyncio.to_thread(self._thread.join)

    async def open(self, work: Work, reserve_rows: int) -> None:
        """Reserve KV rows for a session; `close` must follow, even after an error.

        A prompt takes whole pages besides.

        Raises:
            Capacity: the pool has too few rows left.
            FedseaError: the engine has stopped, or the prompt cannot be computed.
        """
        assert self._loop is not None
        if self.stopped.is_set():
            raise FedseaError(STOPPED)
        answer: asyncio.Future[None] = self._loop.create_future()
        self._hand_in(partial(self._open, work, reserve_rows, answer))
        await answer

    async def accept(self, adapter: Adapter) -> None:
        """Make the blocks ready for an adapter, between two steps.

        Raises:
            ConfigError: it does not fit the blocks.
        """
        assert self._loop is not None
        answer: asyncio.Future[None] = self._loop.create_future()
        self._hand_in(partial(self._accept_adapter, adapter, answer))
        await answer

    def submit(self, work: Work, event: WorkEvent) -> None:
        """Apply an event of a session after those before it."""
        work.submitted += 1
        accept = partial(self._accept, work, event, self._clock())
        if not (self._is_small_and_alone(event) and self._take_turn_now(accept)):
            self._hand_in(accept)

    def close(self, work: Work) -> None:
        """Forget a session and free its rows; safe to repeat."""
        self._hand_in(partial(self._close, work))

    def _hand_in(self, command: Callable[[], None] | None) -> None:
        self._handed_in += 1
        self._inbox.put(command)

    def _is_small_and_alone(self, event: WorkEvent) -> bool:
        return isinstance(event, Append) and event.count <= LOOP_ROWS and len(self._works) == 1

    def _take_turn_now(self, accept: Callable[[], None]) -> bool:
        """Compute on the event loop, if the engine is idle and nothing was handed in before.

        An answer of an earlier step that is still on its way to the loop must not be overtaken.
        """
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if self._handled != self._handed_in or self._arrivals != self._deliveries:
                return False
            accept()
            self._compute()
            left_over = self._scheduler.is_waiting
        finally:
            self._turn.release()
        if left_over:
            self._hand_in(_nothing)
        return True

    # Called by the holder of `_turn`, in the engine's thread unless said otherwise

    def _set_threads(self) -> None:
        """torch counts its threads for each thread that calls it."""
        if self._threads:
            torch.set_num_threads(self._threads)

    def _main(self) -> None:
        self._set_threads()
        try:
            while self._receive():
                pass
        except Exception as error:  # noqa: BLE001
            # The bookkeeping is broken, so nothing may be computed with it any more.
            _log.critical("engine_stopped", error=type(error).__name__)
            self._call_loop(self._report_failure)

    def _warm_up(self, ready: asyncio.Future[None]) -> None:
        """Run a prompt and two decoding steps, so that the first client need not wait for either.

        The second decoding step is what `StepCost` learns first.
        """
        refusal: FedseaError | None = None
        account = self._pool.open(self._pool.num_rows)
        try:
            self._pool.begin(account, 0, self._pool.num_rows)
            for count in (min(WARM_UP_ROWS, self._pool.num_rows - 2), 1, 1):
                began = self._clock()
                self._run_zeros(account, count)
                seconds = self._clock() - began
            self._scheduler.cost.record(1, 0, seconds)
        except Exception as error:  # noqa: BLE001
            refusal = ConfigError(
                f"the blocks cannot be computed as configured ({type(error).__name__}); "
                "choose another dtype, quantization or device"
            )
        finally:
            self._pool.close(account)
        self._call_loop(_answer, ready, refusal)

    def _run_zeros(self, account: int, count: int) -> None:
        placement = self._runner.placement
        rows = torch.zeros(count, self._hidden_size, dtype=placement.dtype, device=placement.device)
        self._runner.run(rows, self._runner.advance([NewRows(account, 0, count)])).cpu()

    def _receive(self) -> bool:
        """Wait for commands, handle all there are, and compute a step; False to stop."""
        with self._turn:
            patience = self._patience()
        try:
            command = self._inbox.get(timeout=patience)
        except Empty:
            with self._turn:
                self._check_when_idle()
                self._compute()
            return True
        with self._turn:
            going = self._handle(command)
            self._compute()
        return going

    def _handle(self, command: Callable[[], None] | None) -> bool:
        try:
            while True:
                self._handled += 1
                if command is None:
                    return False
                command()
                command = self._inbox.get_nowait()
        except Empty:
            return True

    def _compute(self) -> None:
        self.step()
        self._deliver()

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
            work.account = self._open_account(work, reserve_rows)
        except FedseaError as error:
            refusal = error
        else:
            work.number = self._next_number
            self._next_number += 1
            self._works[work.number] = work
            self._scheduler.add(work.number, work.tenant)
            self._unchecked = True
        self._call_loop(_answer, answer, refusal)

    def _open_account(self, work: Work, reserve_rows: int) -> int:
        if work.prompt is None:
            return self._pool.open(reserve_rows)
        work.first = prompts.reserved_rows(work.prompt, self._pool.page_rows)
        account = self._pool.open(reserve_rows + work.first)
        try:
            self._prompts.lay(account, work.prompt, work.adapter, reserve_rows)
        except Exception as error:  # noqa: BLE001
            # As with a step: torch raises whatever its backend raises.
            self._pool.close(account)
            _log.error("prompt_failed", error=type(error).__name__)
            raise FedseaError(FAILED_STEP) from None
        return account

    def _accept(self, work: Work, event: WorkEvent, arrived: float) -> None:
        if work.account is not None:
            work.queue.append((event, arrived))
            self._advance(work)

    def _accept_adapter(self, adapter: Adapter, answer: asyncio.Future[None]) -> None:
        refusal: FedseaError | None = None
        try:
            self._runner.span.accept(adapter)
        except FedseaError as error:
            refusal = error
        self._call_loop(_answer, answer, refusal)

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
                work.applied += 1
        except FedseaError as error:
            self._fail(work, error)

    def _apply(self, work: Work, event: WorkEvent, arrived: float) -> None:
        account = work.account
        assert account is not None
        match event:
            case Append():
                job = Job.of(event, work.up.row_bytes, arrived)
                self._pool.check_room(account, job.growth())
                self._scheduler.offer(work.number, job.count, arrived)
                work.job = job
            case Begin():
                self._begin(account, event, work.first)
            case Fork(source=source, target=target):
                length, capacity = event.length + work.first, event.capacity + work.first
                self._pool.fork(account, source, target, length, capacity)
            case Rollback():
                self._pool.rollback(account, event.sequence, event.length + work.first)
            case Drop():
                self._pool.drop(account, event.sequence)

    def _begin(self, account: int, event: Begin, first: int) -> None:
        """A new sequence: an empty one, or one that begins as the prompt's `first` rows."""
        if not first:
            self._pool.begin(account, event.sequence, event.capacity)
            return
        self._pool.seal(account, prompts.SEQUENCE)
        self._pool.fork(account, prompts.SEQUENCE, event.sequence, first, event.capacity + first)

    def step(self) -> None:
        """Schedule, run, postprocess."""
        began = self._clock()
        shares = self._schedule(began)
        if not shares:
            return
        self._run(shares)
        self._postprocess(shares, began, self._clock())

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

    def _run(self, shares: list[_Share]) -> None:
        """Compute the rows of all shares and collect the wanted ones in their jobs."""
        try:
            if len(shares) > 1:
                shares.sort(key=_group)
            for span, members in groupby(shares, key=lambda share: share.work.span):
                group, rows = self._decode(list(members))
                if group:
                    batch = self._runner.advance(
                        [new for share in group for new in share.new_rows()]
                    )
                    self._encode(group, self._runner.run(rows, batch, span))
        except Exception as error:  # noqa: BLE001
            # torch raises whatever its backend raises, such as out of memory. The rows of these
            # sessions are in an unknown state; others are untouched. Only the type is logged: the
            # text of a foreign error can hold anything.
            _log.error("step_failed", error=type(error).__name__, sessions=len(shares))
            for share in shares:
                self._fail(share.work, FedseaError(FAILED_STEP))

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
        """Rows of shares sorted by entry: one decoding and one projection for each entry."""
        placement = self._runner.placement
        parts = []
        for (up, projection), members in groupby(group, key=lambda share: share.work.entry):
            sharing = list(members)
            data = sharing[0].data if len(sharing) == 1 else b"".join(s.data for s in sharing)
            count = sum(share.grant.rows for share in sharing)
            if projection is None:
                parts.append(up.decode(data, count, placement.dtype).to(placement.device))
            else:
                parts.append(self._widened(up.decode(data, count), projection))
        return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0)])

    def _widened(self, rows: Tensor, projection: Projection) -> Tensor:
        """Rows of the width of a projection as hidden states, which are finite in the dtype."""
        placement = self._runner.placement
        hidden = projection.decode(rows.to(placement.device)).to(placement.dtype)
        if not bool(hidden.isfinite().all()):
            raise RemoteProtocolError(
                f"projected rows are not finite in {placement.dtype}; send smaller values, or "
                "compute in a wider dtype"
            )
        return hidden

    def _encode(self, group: list[_Share], hidden: Tensor) -> None:
        """Write the wanted rows of a group into the answers of their jobs."""
        offset = 0
        numbers: dict[Codec, list[int]] = {}
        counts: dict[Codec, list[tuple[_Share, int]]] = {}
        for share in group:
            codec = share.work.down_codec
            wanted = numbers.setdefault(codec, [])
            before = len(wanted)
            for piece in share.pieces:
                wanted.extend(range(offset + piece.wanted, offset + piece.count))
                offset += piece.count
            if len(wanted) > before:
                counts.setdefault(codec, []).append((share, len(wanted) - before))
        for codec, parts in counts.items():
            wanted = numbers[codec]
            self._write(parts, hidden if len(wanted) == len(hidden) else hidden[wanted], codec)

    def _write(self, parts: list[tuple[_Share, int]], rows: Tensor, codec: Codec) -> None:
        """Give each share its part of `rows`; one whose rows do not fit the codec ends."""
        try:
            data = encode(rows, codec)
        except LocalProtocolError as error:
            if len(parts) == 1:
                self._fail(
                    parts[0][0].work, ConfigError(f"the trunk's output does not fit: {error}")
                )
                return
            for part, own_rows in zip(parts, rows.split([n for _, n in parts]), strict=True):
                self._write([part], own_rows, codec)
            return
        if len(parts) == 1:
            parts[0][0].job.answer.append(data)
            return
        at, row_bytes = 0, codec.row_bytes(self._hidden_size)
        for share, count in parts:
            end = at + count * row_bytes
            share.job.answer.append(data[at:end])
            at = end

    def _postprocess(self, shares: list[_Share], began: float, now: float) -> None:
        """Send the finished answers, offer what follows them, then count."""
        seconds = now - began
        answered: list[Output] = []
        for share in shares:
            work, job = share.work, share.job
            job.compute += seconds
            if job.is_done and work.job is job:
                output = job.output()
                answered.append(output)
                self._results.append((work.receiver, output))
                work.job = None
                self._scheduler.answered(work.number, now)
                self._advance(work)
        self._deliver()
        self._count(shares, answered, seconds)

    def _count(self, shares: list[_Share], answered: list[Output], seconds: float) -> None:
        prefill_rows = sum(share.grant.rows for share in shares if share.grant.is_prefill)
        decode_rows = sum(share.grant.rows for share in shares) - prefill_rows
        self._scheduler.cost.record(decode_rows, prefill_rows, seconds)
        self._metrics.step(decode_rows, prefill_rows, len(shares), seconds)
        for share in shares:
            self._metrics.rows(share.work.tenant, share.grant.rows)
        for output in answered:
            self._metrics.answered(output)

    def _deliver(self) -> None:
        """Hand all results to the event loop, by whichever thread has the turn."""
        if not self._results:
            return
        results, self._results = self._results, []
        if threading.get_ident() == self._loop_thread:
            _deliver_all(results)
        else:
            self._deliveries += 1
            self._call_loop(self._arrive, results)

    def _arrive(self, results: Iterable[tuple[Receiver, Result]]) -> None:
        """On the loop: results of the engine's thread."""
        self._arrivals += 1
        _deliver_all(results)

    def _call_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)

    def _report_failure(self) -> None:
        self.stopped.set()
        for work in self._works.values():
            work.receiver.deliver(FedseaError(STOPPED))


def _group(share: _Share) -> tuple[object, ...]:
    span, up, projection = share.work.span, share.work.up, share.work.projection
    entry = up.codec.value, up.width, up.levels, up.scale
    return span.first, span.end, *entry, 0 if projection is None else id(projection)


def _answer(answer: asyncio.Future[None], refusal: FedseaError | None) -> None:
    """Settle a request that may have been cancelled in the meantime."""
    if answer.done():
        return
    if refusal is None:
        answer.set_result(None)
    else:
        answer.set_exception(refusal)


def _nothing() -> None:
    """A command that only wakes the engine."""


def _deliver_all(results: Iterable[tuple[Receiver, Result]]) -> None:
    for receiver, result in results:
        receiver.deliver(result)
