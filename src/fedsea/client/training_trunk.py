"""The trunk that is trained, wherever it is: one training session at a server.

Rows of whole sequences go up and come back transformed, gradients take the same way, and the
server's part takes its optimizer steps when it is told to. Nothing is sent again by itself: when
the connection breaks, everybody who waits gets `ConnectionLost`, and whoever trains opens the
session again with the steps that it could go on from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fedsea.client.link import Link, Patience, Tell, Traffic, defect
from fedsea.client.servers import Endpoint, Expectation, first_that_takes
from fedsea.errors import (
    CheckpointError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    FedseaError,
    PromptTooLong,
    SessionLost,
    TrainingError,
    TransportError,
)
from fedsea.model.lora import LoraConfig
from fedsea.model.optimization import AdamWConfig
from fedsea.wire.codecs import RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.description import limits_for
from fedsea.wire.limits import DEFAULT_LIMITS, TRAINING_LIMITS, Limits
from fedsea.wire.messages import (
    Activations,
    AdamW,
    Backward,
    Close,
    Discard,
    Event,
    Forward,
    Gradients,
    Lora,
    Notice,
    OpenTraining,
    Reset,
    Role,
    Save,
    Saved,
    Step,
    Stepped,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What a training session asks for.

    Attributes:
        expectation: the model and its blocks.
        up: how rows go up.
        down: how they come back.
        gradient: how gradients go up; they come back as wide as the rows went up.
        adapter: the name of what is trained, at the server.
        lora: the adapter, of blocks of the trunk; None for none there.
        prompt_rows: rows of a soft prompt at the entrance of the trunk.
        optimizer: constants of AdamW.
        seed: of the first factors and of dropout, at the server.
        weight: what this client counts where several are averaged.
    """

    expectation: Expectation
    up: RowFormat
    down: RowFormat
    gradient: RowFormat
    adapter: str
    lora: LoraConfig | None = None
    prompt_rows: int = 0
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    seed: int = 0
    weight: float = 1.0

    @property
    def trains_trunk(self) -> bool:
        """Whether anything at the server changes by training."""
        return self.lora is not None or self.prompt_rows > 0

    @property
    def returned(self) -> RowFormat:
        """How gradients come back."""
        return RowFormat(self.gradient.codec, self.up.width)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the widest of the four directions."""
        formats = (self.up, self.down, self.gradient, self.returned)
        return max(one.row_bytes for one in formats)


@dataclass(slots=True, eq=False)
class _Link(Link[asyncio.Future[Event]]):
    """A link with what the server of it takes."""

    room: asyncio.Semaphore
    first_id: int
    longest: int
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)


class TrainingTrunk:
    """A training session. All methods belong to the client's event loop.

    Several forwards may be on their way at once; answers come in order.

    Args:
        endpoints: servers in order of preference.
        plan: what to ask for.
        patience: how long to wait.
        tell: called with one line when a server is about to stop.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        plan: TrainingPlan,
        patience: Patience,
        tell: Tell,
        limits: Limits = TRAINING_LIMITS,
    ) -> None:
        self.plan = plan
        self.traffic = Traffic()
        self._endpoints = endpoints
        self._patience = patience
        self._tell_caller = tell
        self._limits = limits
        self._preferred = 0
        self._link: _Link | None = None
        self._failure: FedseaError = ConnectionLost("the training session is not open; open it")
        self._next_id = 1
        self._resume_steps: tuple[int, ...] = (0,)
        self._step = 0

    @property
    def address(self) -> str | None:
        """The server in use; None while there is none."""
        return self._link.address if self._link else None

    @property
    def longest(self) -> int | None:
        """Most rows of one sequence that the server in use takes; None while there is none."""
        return self._link.longest if self._link else None

    def check(self, counts: Sequence[int]) -> None:
        """Refuse sequences that the server in use would not take.

        Raises:
            PromptTooLong: one has too many rows.
        """
        longest = self.longest
        if longest is not None and max(counts, default=0) > longest:
            raise PromptTooLong(
                f"a sequence of {max(counts)} rows does not fit: context and messages of this server "
                f"take {longest}; shorten the examples, or raise kv.max_context, "
                "limits.max_rows_per_message or limits.max_message_bytes there"
            )

    async def open(self, resume_steps: Sequence[int] = (0,), within: float | None = None) -> int:
        """Open the session at the first server that takes it, in place of the one before.

        Args:
            resume_steps: those that this side could go on from; 0 for the start.
            within: seconds; None for `Patience.open`.

        Returns:
            The step that both sides go on from.

        Raises:
            StaleStep: the server has none of the steps.
            Unreachable, Capacity, QuotaExceeded, Draining: no server took it in time.
            FedseaError: what a server objected to for good.
        """
        await self._let_go()
        self._resume_steps = tuple(resume_steps)
        self._preferred = await first_that_takes(
            self._endpoints,
            self._preferred,
            self._patience.open if within is None else within,
            self._open_at,
        )
        return self._step

    async def forward(
        self, data: bytes, counts: Sequence[int], no_grad: bool
    ) -> tuple[tuple[int, ...], bytes]:
        """Send rows of whole sequences through the trunk, in as many messages as they need.

        Args:
            data: rows in the format `plan.up`, sequence after sequence.
            counts: rows of each sequence.
            no_grad: no `backward` will follow.

        Returns:
            The number of each message, and all rows in the format `plan.down`.

        Raises:
            PromptTooLong: a sequence does not fit in a message.
            ConnectionLost: the session can be opened again.
        """
        link = self._current()
        events = []
        at = 0
        for part in self._messages(counts, link.connection.limits):
            size = sum(part) * self.plan.up.row_bytes
            events.append(Forward(self._next_id, part, data[at : at + size], no_grad))
            self._next_id += 1
            at += size
        answers = await asyncio.gather(*(self._ask(link, event) for event in events))
        self.traffic.rows_up += sum(counts)
        self.traffic.rows_down += sum(counts)
        rows = [bytes(answer.rows) for answer in answers if isinstance(answer, Activations)]
        return tuple(event.id for event in events), _joined(rows)

    async def backward(self, ids: Sequence[int], counts: Sequence[int], data: bytes) -> bytes:
        """Send the gradients for the rows that came back from `forward`.

        Args:
            ids: what `forward` returned.
            counts: rows of each sequence of it.
            data: gradients in the format `plan.gradient`.

        Returns:
            The gradients for the rows that went up, in the format `plan.returned`.

        Raises:
            ConnectionLost: the session can be opened again; the step has to be done anew.
            TrainingError: the forward is over: its gradient was sent, or its step is.
        """
        link = self._current()
        if ids[0] < link.first_id:
            raise ConnectionLost("the connection broke since the forward; do the step anew")
        if not link.connection.forwards.issuperset(ids):
            raise TrainingError(
                "this forward is over, because its gradient was sent already or its step is done; "
                "compute it again before its gradient"
            )
        events = []
        at = 0
        for number, part in zip(ids, self._messages(counts, link.connection.limits), strict=True):
            size = sum(part) * self.plan.gradient.row_bytes
            events.append(Backward(number, data[at : at + size]))
            at += size
        answers = await asyncio.gather(*(self._ask(link, event) for event in events))
        self.traffic.rows_up += sum(counts)
        self.traffic.rows_down += sum(counts)
        return _joined([bytes(answer.rows) for answer in answers if isinstance(answer, Gradients)])

    async def reset(self) -> None:
        """Forget the gradients of the step that is not finished, and all open forwards."""
        await self._tell(self._current(), Reset())

    async def step(
        self, number: int, learning_rate: float, max_grad_norm: float | None, scale: float
    ) -> Stepped:
        """Let the server take an optimizer step; forwards that are still open are discarded.

        Raises:
            StaleStep: it is at another step.
            ConnectionLost: it is not known whether the step was taken; `open` will tell.
        """
        link = self._current()
        for open_forward in sorted(link.connection.forwards):
            await self._tell(link, Discard(open_forward))
        answer = await self._ask(link, Step(number, learning_rate, max_grad_norm or 0.0, scale))
        assert isinstance(answer, Stepped)
        if answer.applied:
            self._step = answer.number
        return answer

    async def save(self, number: int) -> None:
        """Let the server save its part behind step `number`; durable on return.

        Raises:
            CheckpointError: the server could not; training can go on.
        """
        answer = await self._ask(self._current(), Save(number))
        assert isinstance(answer, Saved)
        if answer.problem:
            raise CheckpointError(f"the server did not save step {number}: {answer.problem}")

    async def close(self) -> None:
        """End the session; what is trained stays at the server for a while."""
        link = self._link
        if link is not None:
            with suppress(FedseaError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._tell(link, Close())
                    await link.stream.half_close()
        await self._let_go()

    async def _open_at(self, endpoint: Endpoint, within: float) -> None:
        try:
            async with asyncio.timeout(within):
                served = await endpoint.describe(self.plan.expectation)
                if not served.max_forwards:
                    raise ConfigError(
                        f"{endpoint.address} trains nothing; "
                        "let its operator add [training] to its configuration"
                    )
                limits = limits_for(served, self._limits)
                hidden_size = self.plan.expectation.hidden_size
                connection = Connection(Role.CLIENT, limits, hidden_size=hidden_size)
                stream = await endpoint.channel().open_stream()
                room = asyncio.Semaphore(limits.max_pending)
                longest = self._rows_that_fit(limits)
                if served.max_context:
                    longest = min(longest, served.max_context - self.plan.prompt_rows)
                link = _Link(
                    stream, connection, endpoint.address, self.traffic, room, self._next_id, longest
                )
                self._step = (await link.greet(self._hello())).step
        except TimeoutError as error:
            raise DeadlineExceeded(f"{endpoint.address} did not answer in time") from error
        self._link = link
        link.tasks = [
            asyncio.create_task(self._read(link)),
            asyncio.create_task(self._watch(link)),
        ]

    def _hello(self) -> OpenTraining:
        plan = self.plan
        hidden_size = plan.expectation.hidden_size
        return OpenTraining(
            fingerprint=plan.expectation.fingerprint,
            first_block=plan.expectation.trunk.first,
            end_block=plan.expectation.trunk.end,
            up_codec=plan.up.codec,
            down_codec=plan.down.codec,
            gradient_codec=plan.gradient.codec,
            adapter=plan.adapter,
            lora=None if plan.lora is None else _wire_lora(plan.lora),
            prompt_rows=plan.prompt_rows,
            optimizer=AdamW(*plan.optimizer.betas, plan.optimizer.eps, plan.optimizer.weight_decay),
            seed=plan.seed,
            resume_steps=self._resume_steps,
            weight=plan.weight,
            up_width=0 if plan.up.width == hidden_size else plan.up.width,
            up_levels=plan.up.levels,
            up_scale=plan.up.scale,
            projection=plan.expectation.projection,
        )

    def _messages(self, counts: Sequence[int], limits: Limits) -> Iterator[tuple[int, ...]]:
        """Sequences that share a message, in order; only one that is long alone has a large one."""
        self.check(counts)
        most = min(self._rows_that_fit(limits), self._rows_that_fit(DEFAULT_LIMITS))
        part: list[int] = []
        for count in counts:
            if part and (sum(part) + count > most or len(part) == limits.max_segments):
                yield tuple(part)
                part = []
            part.append(count)
        if part:
            yield tuple(part)

    def _rows_that_fit(self, limits: Limits) -> int:
        room = limits.max_message_bytes - limits.frame_bytes
        return min(limits.max_rows_per_message, max(1, room // self.plan.row_bytes))

    def _current(self) -> _Link:
        if self._link is None:
            raise self._failure
        return self._link

    async def _ask(self, link: _Link, event: Event) -> Event:
        """Send an event that is answered, when there is room for it; its answer."""
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        async with link.room:
            async with link.sending:
                if self._link is not link:
                    raise self._failure
                data = link.encoded(event)
                link.owe(answer)
                await self._send(link, data)
            return await answer

    async def _tell(self, link: _Link, event: Event) -> None:
        """Send an event that has no answer."""
        async with link.sending:
            await self._send(link, link.encoded(event))

    async def _send(self, link: _Link, data: bytes) -> None:
        try:
            await link.stream.send(data)
        except TransportError as error:
            if self._link is not link:
                raise
            # The reader meets the same end and knows the reason, if there is one.
            await asyncio.sleep(0)
            self._break(link, error)

    async def _read(self, link: _Link) -> None:
        try:
            while True:
                event = await link.receive()
                if isinstance(event, Activations | Gradients | Stepped | Saved):
                    answer = link.owed.popleft()
                    if not answer.done():
                        answer.set_result(event)
                elif isinstance(event, Notice):
                    self._notify(
                        f"{link.address} is shutting down; the training will be opened anew"
                    )
        except FedseaError as error:
            self._break(link, error)
            with suppress(FedseaError):
                await link.stream.cancel()
        except Exception as error:
            self._break(link, defect(error))
            raise

    async def _watch(self, link: _Link) -> None:
        """Break a link whose server owes an answer for too long."""
        self._break(link, await link.silence(self._patience.answer))

    def _notify(self, line: str) -> None:
        """Tell the caller, whose mistakes must not become ours."""
        asyncio.get_running_loop().call_soon(self._tell_caller, line)

    def _break(self, link: _Link, error: FedseaError) -> None:
        """The stream ended: everybody who waits is told why."""
        if self._link is not link:
            return
        self._link = None
        self._failure = _lost(link.address, error)
        for endpoint in self._endpoints:
            if endpoint.address == link.address:
                endpoint.forget()
        for answer in link.owed:
            if not answer.done():
                answer.set_exception(self._failure)
                answer.exception()  # seen: a caller that was cancelled will not look
        current = asyncio.current_task()
        for task in link.tasks:
            if task is not current:
                task.cancel()

    async def _let_go(self) -> None:
        link = self._link
        if link is not None:
            self._break(link, ConnectionLost("the training session was closed; open it again"))
            # The reader's end is that of the stream.
            await asyncio.gather(*link.tasks, return_exceptions=True)


def _wire_lora(lora: LoraConfig) -> Lora:
    return Lora(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        blocks=lora.blocks or (),
        rslora=lora.rslora,
        freeze_a=lora.freeze_a,
    )


def _lost(address: str, error: FedseaError) -> FedseaError:
    """What callers get: one error for whatever opening again may cure, others as they are."""
    if isinstance(error, TransportError | SessionLost | Draining):
        lost = ConnectionLost(f"the training session at {address} broke ({error.code}): {error}")
        lost.__cause__ = error
        return lost
    return error


def _joined(rows: Sequence[bytes]) -> bytes:
    return rows[0] if len(rows) == 1 else b"".join(rows)
