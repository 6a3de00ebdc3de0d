"""The trunk, wherever it is: one session that survives broken connections.

Rows are appended to sequences and come back transformed. All appends of one turn of the event loop
travel in one message. When the connection breaks, the session opens again, at the same server or at
the next address, sends the kept releases again byte for byte, and goes on; callers only wait.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsea.client.link import Link, Patience, Tell, Traffic, defect
from fedsea.client.releases import ReleaseLog, ReleaseStore
from fedsea.client.servers import Endpoint, Expectation, first_that_takes
from fedsea.errors import (
    DeadlineExceeded,
    Draining,
    FedseaError,
    SessionLost,
    TransportError,
)
from fedsea.wire.codecs import RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.description import limits_for
from fedsea.wire.limits import DEFAULT_LIMITS, Limits
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Drop,
    Fork,
    Notice,
    Open,
    Output,
    Role,
    Rollback,
    Segment,
    Want,
)

# Pieces of at most this many rows share a message; larger ones, the chunks of a prompt, go alone.
_SMALL_PIECE = 8


@dataclass(slots=True, eq=False)
class _Piece:
    """Released rows of one sequence on their way; nobody waits for them."""

    sequence: int
    start: int
    count: int
    want: Want
    data: bytes | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.count

    @property
    def wanted(self) -> int:
        """Rows that come back."""
        return {Want.ALL: self.count, Want.LAST: 1, Want.NONE: 0}[self.want]


@dataclass(slots=True, eq=False)
class _OwedPiece(_Piece):
    """A piece whose rows somebody waits for."""

    arrived: asyncio.Future[Tensor] = field(kw_only=True)


@dataclass(slots=True, eq=False)
class _Part(_Piece):
    """A part of an owed piece that is too large for one message; `received` is what came so far."""

    whole: _OwedPiece = field(kw_only=True)
    received: list[Tensor] = field(kw_only=True)


@dataclass(slots=True)
class _Chain:
    """A sequence as this side knows it."""

    capacity: int
    log: ReleaseLog


@dataclass(slots=True, eq=False)
class _Link(Link[list[_Piece]]):
    """A link with what waits to be sent over it."""

    outbox: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """What a session asks for: its blocks, the formats of its rows, and reserved rows.

    Rows that go up narrower than the hidden size are widened by the expected projection.
    """

    expectation: Expectation
    reserve_rows: int
    up: RowFormat
    down: RowFormat
    adapter: str = ""
    prompt: str = ""


class RemoteTrunk:
    """A session at a server, with its sequences.

    Args:
        endpoints: servers in order of preference.
        plan: what to ask for.
        store: where releases are kept.
        patience: how long to wait.
        tell: called with one line when the connection breaks or comes back.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        plan: SessionPlan,
        store: ReleaseStore,
        patience: Patience,
        tell: Tell,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._endpoints = endpoints
        self._plan = plan
        self._store = store
        self._patience = patience
        self._tell = tell
        self._limits = limits
        self._preferred = 0
        self._link: _Link | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._resuming = asyncio.Lock()
        self._lapsed: tuple[_Link, SessionLost] | None = None
        self._failure: FedseaError | None = None
        self._closed = False
        self._chains: dict[int, _Chain] = {}
        self._waiting: deque[_Piece] = deque()
        self._unanswered: deque[_OwedPiece] = deque()
        self._ids = itertools.count(1)
        self._pump_is_due = False
        self._max_rows = limits.max_rows_per_message
        self._max_segments = limits.max_segments
        self.traffic = Traffic()

    @property
    def address(self) -> str | None:
        """The server in use; None while there is none."""
        return self._link.address if self._link else None

    async def open(self) -> None:
        """Open the session at the first server that takes it.

        Raises:
            Unreachable, Capacity, QuotaExceeded, Draining: no server took it in time.
            FedseaError: what a server objected to for good.
        """
        await self._open_somewhere(self._patience.open)

    def begin(self, sequence: int, capacity: int) -> None:
        """Start an empty sequence of at most `capacity` rows."""
        log = ReleaseLog(self._store, self._plan.up.row_bytes)
        self._say(Begin(sequence, capacity))
        self._chains[sequence] = _Chain(capacity, log)

    def fork(self, source: int, target: int, length: int, capacity: int) -> None:
        """Start `target` as the first `length` rows of `source`."""
        log = self._chains[source].log.fork(length)
        if self._link is None or self._link.connection.length(source) >= length:
            self._say(Fork(source, target, length, capacity))
        else:
            # Some of these rows still wait here; the new sequence gets a copy of its own.
            self._say(Begin(target, capacity))
            self._waiting.extend(self._again(target, 0, length))
        self._chains[target] = _Chain(capacity, log)

    def rollback(self, sequence: int, length: int) -> None:
        """Forget the rows from `length` on; a future of such rows is cancelled."""
        self._take_back(sequence, length)
        self._chains[sequence].log.truncate(length)

    def drop(self, sequence: int) -> None:
        """Forget a sequence; a future of its rows is cancelled."""
        self._forget(sequence, 0)
        self._say(Drop(sequence))
        del self._chains[sequence]

    def length(self, sequence: int) -> int:
        """Rows released for a sequence."""
        return len(self._chains[sequence].log)

    def append(self, sequence: int, rows: Tensor, want: Want) -> asyncio.Future[Tensor]:
        """Release the next rows (n, width) of a sequence as they are.

        Returns what `send` does.

        Raises:
            LocalProtocolError: the rows cannot be sent.
        """
        return self.send(sequence, self._plan.up.encode(rows), rows.shape[0], want)

    def send(self, sequence: int, data: bytes, count: int, want: Want) -> asyncio.Future[Tensor]:
        """Release the next `count` rows of a sequence, as bytes in the format of the session.

        Returns a future of the wanted rows: (n, hidden) for ALL, (1, hidden) for LAST,
        (0, hidden) for NONE. The future raises what ended the session for good.
        """
        if self._failure is not None:
            raise self._failure
        log = self._chains[sequence].log
        start = len(log)
        log.append(data)
        piece = self._owed(sequence, start, count, want, data)
        self._waiting.extend(self._parts(piece))
        if len(self._chains) == 1:
            self._pump()
        else:
            self._pump_soon()
        return piece.arrived

    def ask_again(self, sequence: int, start: int) -> asyncio.Future[Tensor]:
        """Send the rows from `start` on again, unchanged, and return a future of all of them."""
        self._take_back(sequence, start)
        piece = self._owed(sequence, start, self.length(sequence) - start, Want.ALL)
        self._waiting.extend(self._parts(piece))
        self._pump_soon()
        return piece.arrived

    async def resume(self) -> None:
        """Open again after no server was in reach; every release goes out again unchanged.

        Raises:
            Unreachable, Refused: as for `open`; the session can be resumed later still.
        """
        async with self._resuming:
            if self._failure is not None:
                await self._open_somewhere(self._patience.recover)
                self._failure = None

    async def close(self) -> None:
        """End the session; the server frees its rows."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        link, self._link = self._link, None
        if link is None:
            return
        with suppress(FedseaError, TimeoutError):
            async with asyncio.timeout(1.0):
                await link.stream.send(link.connection.send(Close()))
                await link.stream.half_close()
        await self._drop_link(link)

    @property
    def _hidden_size(self) -> int:
        return self._plan.expectation.hidden_size

    def _say(self, event: Begin | Fork | Rollback | Drop) -> None:
        """Send a message that has no answer; while there is no link, replay will say it all."""
        if self._link is not None:
            self._post(self._link, event)

    def _post(self, link: _Link, event: Open | Begin | Fork | Rollback | Drop | Append) -> None:
        link.outbox.put_nowait(link.encoded(event))

    def _owed(
        self, sequence: int, start: int, count: int, want: Want, data: bytes | None = None
    ) -> _OwedPiece:
        arrived: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        piece = _OwedPiece(sequence, start, count, want, data, arrived=arrived)
        self._unanswered.append(piece)
        return piece

    def _parts(self, piece: _OwedPiece) -> Sequence[_Piece]:
        """The piece itself, or the parts in which it travels."""
        if piece.count <= self._max_rows:
            return (piece,)
        received: list[Tensor] = []
        parts = []
        for start in range(piece.start, piece.end, self._max_rows):
            count = min(self._max_rows, piece.end - start)
            is_last = start + count == piece.end
            want = piece.want if is_last or piece.want is not Want.LAST else Want.NONE
            parts.append(_Part(piece.sequence, start, count, want, whole=piece, received=received))
        return parts

    def _again(self, sequence: int, first: int, end: int) -> list[_Piece]:
        """Rows ``[first, end)`` of a sequence once more, without an answer."""
        return [
            _Piece(sequence, start, min(self._max_rows, end - start), Want.NONE)
            for start in range(first, end, self._max_rows)
        ]

    def _take_back(self, sequence: int, length: int) -> None:
        """Rows from `length` on are wanted neither here nor at the server."""
        self._forget(sequence, length)
        if self._link is not None and self._link.connection.length(sequence) > length:
            self._say(Rollback(sequence, length))

    def _forget(self, sequence: int, length: int) -> None:
        """Nobody waits any more for rows from `length` on, and they are not sent."""
        owed, self._unanswered = self._unanswered, deque()
        for piece in owed:
            if piece.sequence == sequence and piece.end > length:
                piece.arrived.cancel()
            else:
                self._unanswered.append(piece)
        waiting, self._waiting = self._waiting, deque()
        for unsent in waiting:
            if unsent.sequence != sequence or unsent.end <= length:
                self._waiting.append(unsent)
            elif unsent.start < length:
                rest = _Piece(sequence, unsent.start, length - unsent.start, Want.NONE)
                self._waiting.append(rest)

    def _pump_soon(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Send what waits, as far as the protocol lets us run ahead of the answers."""
        self._pump_is_due = False
        link = self._link
        if link is None:
            self._wake()
            return
        try:
            self._send_waiting(link)
        except FedseaError as error:
            self._break(link, error)

    def _send_waiting(self, link: _Link) -> None:
        while self._waiting and link.connection.pending < link.connection.limits.max_pending:
            pieces = self._next_pieces()
            segments = tuple(Segment(p.sequence, p.start, p.count, p.want) for p in pieces)
            rows = b"".join(map(self._bytes_of, pieces))
            link.owe(pieces)
            self.traffic.rows_up += sum(piece.count for piece in pieces)
            self._post(link, Append(next(self._ids), segments, rows))

    def _bytes_of(self, piece: _Piece) -> bytes:
        """What was released for the piece; bytes just made are not read back."""
        data, piece.data = piece.data, None
        if data is not None:
            return data
        return self._chains[piece.sequence].log.read(piece.start, piece.start + piece.count)

    def _next_pieces(self) -> list[_Piece]:
        """The longest run of waiting pieces that share a message."""
        pieces = [self._waiting.popleft()]
        sequences = {pieces[0].sequence}
        rows = pieces[0].count
        small = rows <= _SMALL_PIECE
        while small and self._waiting and len(pieces) < self._max_segments:
            candidate = self._waiting[0]
            rows += candidate.count
            if candidate.count > _SMALL_PIECE or rows > self._max_rows:
                break
            if candidate.sequence in sequences:
                break
            sequences.add(candidate.sequence)
            pieces.append(self._waiting.popleft())
        return pieces

    async def _open_somewhere(self, within: float) -> None:
        """Try the servers in turn until one takes the session, or time is up."""
        self._preferred = await first_that_takes(
            self._endpoints, self._preferred, within, self._open_at
        )

    async def _open_at(self, endpoint: Endpoint, within: float) -> None:
        try:
            async with asyncio.timeout(within):
                description = await endpoint.describe(self._plan.expectation)
                limits = limits_for(description, self._limits)
                stream = await endpoint.channel().open_stream()
                connection = Connection(Role.CLIENT, limits, hidden_size=self._hidden_size)
                link = _Link(stream, connection, endpoint.address, self.traffic)
                await link.greet(self._hello())
        except TimeoutError as error:
            raise DeadlineExceeded(f"{endpoint.address} did not answer in time") from error
        self._link = link
        self._max_rows = self._rows_per_message(limits)
        self._max_segments = limits.max_segments
        link.tasks = [
            asyncio.create_task(self._write(link)),
            asyncio.create_task(self._read(link)),
            asyncio.create_task(self._watch(link)),
        ]
        self._replay(link)
        self._pump_soon()

    def _hello(self) -> Open:
        expected, up = self._plan.expectation, self._plan.up
        return Open(
            fingerprint=expected.fingerprint,
            first_block=expected.trunk.first,
            end_block=expected.trunk.end,
            up_codec=up.codec,
            down_codec=self._plan.down.codec,
            reserve_rows=self._plan.reserve_rows,
            adapter=self._plan.adapter,
            prompt=self._plan.prompt,
            up_width=0 if up.width == self._hidden_size else up.width,
            up_levels=up.levels,
            up_scale=up.scale,
            projection=expected.projection,
        )

    def _replay(self, link: _Link) -> None:
        """Say again what the server must know: sequences, answered rows, then unanswered pieces.

        Between unanswered pieces there can be rows that nobody waits for any more.
        """
        again: list[_Piece] = []
        owed: list[_Piece] = []
        reached = dict.fromkeys(self._chains, 0)
        for piece in self._unanswered:
            start = reached[piece.sequence]
            (owed if start else again).extend(self._again(piece.sequence, start, piece.start))
            owed.extend(self._parts(piece))
            reached[piece.sequence] = piece.end
        for sequence, chain in self._chains.items():
            self._post(link, Begin(sequence, chain.capacity))
            start = reached[sequence]
            (owed if start else again).extend(self._again(sequence, start, len(chain.log)))
        self._waiting = deque([*again, *owed])

    def _rows_per_message(self, limits: Limits) -> int:
        """Rows that fit into one message in both directions, with room to spare."""
        row_bytes = max(self._plan.up.row_bytes, self._plan.down.row_bytes)
        return max(1, min(limits.max_rows_per_message, limits.max_message_bytes // (2 * row_bytes)))

    async def _write(self, link: _Link) -> None:
        try:
            while True:
                await link.stream.send(await link.outbox.get())
        except FedseaError:
            # The reader meets the same end and knows the reason.
            return

    async def _read(self, link: _Link) -> None:
        try:
            while True:
                event = await link.receive()
                if isinstance(event, Output):
                    self._arrive(link, event)
                elif isinstance(event, Notice):
                    self._notify(f"{link.address} is shutting down; it finishes what it can")
        except FedseaError as error:
            self._break(link, error)
        except Exception as error:
            self._break(link, defect(error))
            raise

    async def _watch(self, link: _Link) -> None:
        """Break a link whose server owes an answer for too long."""
        self._break(link, await link.silence(self._patience.answer))

    def _arrive(self, link: _Link, output: Output) -> None:
        pieces = link.owed.popleft()
        count = sum(segment.count for segment in output.segments)
        self.traffic.rows_down += count
        self.traffic.compute_us += output.compute_us
        rows = self._plan.down.decode(output.rows, count)
        offset = 0
        for piece in pieces:
            back = rows[offset : offset + piece.wanted]
            offset += piece.wanted
            if isinstance(piece, _OwedPiece):
                self._hand_over(piece, back)
            elif isinstance(piece, _Part):
                piece.received.append(back)
                if piece.end == piece.whole.end:
                    self._hand_over(piece.whole, torch.cat(piece.received))
        if self._waiting:
            self._pump_soon()

    def _hand_over(self, piece: _OwedPiece, rows: Tensor) -> None:
        with suppress(ValueError):  # nobody wants the rows any more
            self._unanswered.remove(piece)
        if not piece.arrived.done():
            piece.arrived.set_result(rows)

    def _notify(self, line: str) -> None:
        """Tell the caller, whose mistakes must not become ours."""
        asyncio.get_running_loop().call_soon(self._tell, line)

    def _break(self, link: _Link, error: FedseaError) -> None:
        """The stream ended: recover in the background, or end for good."""
        if self._closed or self._link is not link:
            return
        self._link = None
        if isinstance(error, SessionLost) and not self._unanswered:
            # Nobody waits: an idle session leaves its place to others until it is used again.
            self._lapsed = link, error
            self._recovery = asyncio.create_task(self._drop_link(link))
        elif isinstance(error, TransportError | SessionLost | Draining):
            self._recovery = asyncio.create_task(self._recover(link, error))
        else:
            self._recovery = asyncio.create_task(self._drop_link(link))
            self._fail(error)

    def _wake(self) -> None:
        """Open a lapsed session again, now that something is to be sent."""
        if self._lapsed is not None:
            link, error = self._lapsed
            self._lapsed = None
            self._recovery = asyncio.create_task(self._recover(link, error))

    async def _recover(self, broken: _Link, error: FedseaError) -> None:
        began = time.monotonic()
        self._notify(f"connection to {broken.address} lost ({error.code}); resuming")
        await self._drop_link(broken)
        for number, endpoint in enumerate(self._endpoints):
            if endpoint.address == broken.address:
                endpoint.forget()
                if isinstance(error, DeadlineExceeded):
                    # A silent server is tried last: it may still take calls and not answer them.
                    self._preferred = number + 1
        try:
            await self._open_somewhere(self._patience.recover)
        except FedseaError as final:
            self._fail(final)
            return
        except Exception as error_of_ours:
            self._fail(defect(error_of_ours))
            raise
        rows = sum(len(chain.log) for chain in self._chains.values())
        self._notify(
            f"resumed at {self.address} after {time.monotonic() - began:.1f} s; "
            f"{rows} rows sent again"
        )

    def _fail(self, error: FedseaError) -> None:
        """Give the error to everyone who waits; releases stay for `resume`."""
        self._failure = error
        waiting, self._unanswered = self._unanswered, deque()
        self._waiting.clear()
        for piece in waiting:
            if not piece.arrived.done():
                piece.arrived.set_exception(error)
                piece.arrived.exception()  # seen: a caller that was cancelled will not look

    async def _drop_link(self, link: _Link) -> None:
        current = asyncio.current_task()
        for task in link.tasks:
            if task is not current:
                task.cancel()
        with suppress(FedseaError):
            await link.stream.cancel()
