"""What one training session does to a run.

A member is called on the event loop, in the order of its session's events; what computes is put
into the run's line. Whatever a member makes the server hold is counted against its tenant, and is
free again when the gradient was computed, when the client gives it up, and when the session ends.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsea.errors import FedseaError, LocalProtocolError, NotFinite, StaleStep
from fedsea.model.projection import Projection
from fedsea.model.spans import Placement
from fedsea.server.logs import get_logger
from fedsea.server.metrics import Metrics
from fedsea.server.training_rows import RowBudget
from fedsea.server.training_run import Part, Pass, TrainingRun
from fedsea.server.training_store import RunKey, TrainingStore
from fedsea.server.training_workers import Job, Line, Worker
from fedsea.wire.codecs import RowFormat
from fedsea.wire.messages import (
    Activations,
    Backward,
    Discard,
    Forward,
    Gradients,
    OpenTraining,
    Save,
    Saved,
    Step,
    Stepped,
)

FAILED = "the server failed to compute for a training: open it again, and tell its operator"

_T = TypeVar("_T")

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """How the rows of one session are written, and what widens those that go up."""

    up: RowFormat
    down: RowFormat
    backward: RowFormat
    gradients: RowFormat
    projection: Projection | None

    @classmethod
    def of(cls, request: OpenTraining, hidden_size: int, projection: Projection | None) -> Formats:
        """Those that a client asked for."""
        return cls(
            up=request.up_format(hidden_size),
            down=request.down_format(hidden_size),
            backward=request.backward_format(hidden_size),
            gradients=request.gradients_format(hidden_size),
            projection=projection,
        )

    def part(self, event: Forward, placement: Placement) -> Part:
        """The rows of a Forward.

        Raises:
            RemoteProtocolError: they are not finite.
        """
        dtype = placement.dtype if self.projection is None else torch.float32
        rows = self.up.decode(event.rows, event.count, dtype).to(placement.device)
        return Part(rows, event.counts, self.projection)

    def activations(self, event: Forward, hidden: Tensor) -> Activations:
        """The answer to a Forward.

        Raises:
            NotFinite: the rows cannot be sent.
        """
        try:
            return Activations(event.id, self.down.encode(hidden))
        except LocalProtocolError as error:
            raise NotFinite(f"what the trunk makes of forward {event.id}: {error}") from None

    def gradient(self, event: Backward) -> Tensor:
        """The rows of a Backward in fp32; what the blocks make of them is judged at the Step.

        Raises:
            RemoteProtocolError: they are not finite.
        """
        count = memoryview(event.rows).nbytes // self.backward.row_bytes
        return self.backward.decode(event.rows, count)

    def answer(self, event: Backward, found: Tensor, run: TrainingRun) -> Gradients:
        """The answer to a Backward; zeros, and a step that will not be applied, when not finite."""
        try:
            rows = self.gradients.encode(found)
        except LocalProtocolError:
            run.spoil()
            rows = self.gradients.encode(torch.zeros_like(found))
        return Gradients(event.id, rows)


@dataclass(frozen=True, slots=True)
class Services:
    """What the members of all runs use; a pass has `max_rows` rows at most."""

    store: TrainingStore
    budget: RowBudget
    metrics: Metrics
    max_rows: int


@dataclass(slots=True, eq=False)
class Live:
    """A run in memory.

    Attributes:
        key: its place in the store.
        run: what is trained.
        line: its jobs, one after another.
        saved: the last step that was saved.
        members: steps that each member of a group has taken. Members count for themselves, for each
            has begun at another time.
        last: the answer to each member's last step.
    """

    key: RunKey
    run: TrainingRun
    line: Line
    saved: int | None = None
    members: dict[str, int] = field(default_factory=dict)
    last: dict[str, Stepped] = field(default_factory=dict)

    def put(self, job: Job[_T]) -> asyncio.Future[_T]:
        """Run a job on a worker; a defect in it breaks the run and no more than that."""
        return self.line.put(lambda worker: self._guarded(job, worker))

    def save(self, store: TrainingStore, event: Save, done: int) -> Saved:
        """Make the step that the run is at durable; once, however many members ask.

        Args:
            store: where.
            event: what the client asked for.
            done: the steps that are done, as the client counts them.

        Raises:
            StaleStep: the client means another step.
        """
        if event.number != done:
            raise StaleStep(
                f"step {event.number} is to be saved and the server is at {done}; "
                "open the training again and go on from the step that it says"
            )
        problem = ""
        if self.saved != self.run.steps:
            problem = store.save(self.key, self.run, self.members)
        if not problem:
            self.saved = self.run.steps
        return Saved(event.number, problem)

    def repeated(self, tenant: str, event: Step) -> Stepped | None:
        """The answer to a step that a member has taken already; None when it is the next.

        Raises:
            StaleStep: it is neither.
        """
        done = self.members.get(tenant, 0)
        if event.number == done and tenant in self.last:
            return self.last[tenant]
        if event.number != done + 1:
            raise StaleStep(
                f"step {event.number} was asked for and {done} are done here; open the training "
                "again and go on from the step that it says"
            )
        return None

    def count(self, tenant: str, stepped: Stepped) -> Stepped:
        """The answer to a member whose step this was, in its own numbers."""
        done = self.members.get(tenant, 0) + 1
        answer = replace(stepped, number=done)
        if stepped.applied:
            self.members[tenant] = done
            self.last[tenant] = answer
        return answer

    def _guarded(self, job: Job[_T], worker: Worker) -> _T:
        if self.run.is_broken:  # nothing of it may be computed with, or saved
            raise FedseaError(FAILED)
        try:
            return job(worker)
        except FedseaError:
            raise
        except Exception as error:  # noqa: BLE001
            # torch raises whatever its backend raises, such as out of memory; its text can hold
            # anything, so that only the type is told.
            self.run.is_broken = True
            _log.error("training_failed", owner=self.key.owner, error=type(error).__name__)
            raise FedseaError(FAILED) from None


class Member(ABC):
    """One session's part in a run."""

    @abstractmethod
    def forward(self, event: Forward) -> asyncio.Future[Activations]:
        """Compute rows.

        Raises:
            QuotaExceeded: the tenant makes the server hold too much.
        """

    @abstractmethod
    def backward(self, event: Backward) -> asyncio.Future[Gradients]:
        """Compute gradients."""

    @abstractmethod
    async def discard(self, event: Discard) -> None:
        """Forget a forward. Until this returns nothing more is read from the client."""

    @abstractmethod
    async def reset(self) -> None:
        """Forget all forwards, and the gradients of the unfinished step; returns as `discard`."""

    @abstractmethod
    def step(self, event: Step) -> asyncio.Future[Stepped]:
        """Change what is trained."""

    @abstractmethod
    def save(self, event: Save) -> asyncio.Future[Saved]:
        """Make it durable."""

    @abstractmethod
    def leave(self) -> None:
        """Free everything, for the session has ended; safe to repeat."""


class Held:
    """What a member makes the server hold, by the id of its Forward."""

    def __init__(self, tenant: str, budget: RowBudget) -> None:
        self._tenant = tenant
        self._budget = budget
        self._rows: dict[int, tuple[int, bool]] = {}

    def take(self, number: int, rows: int) -> bool:
        """Hold the rows of a Forward; whether their activations may be kept.

        Raises:
            QuotaExceeded: the tenant holds too many.
        """
        keeps = self._budget.take(self._tenant, rows)
        self._rows[number] = rows, keeps
        return keeps

    def give_back(self, number: int) -> None:
        """Hold them no longer; safe to repeat."""
        held = self._rows.pop(number, None)
        if held is not None:
            self._budget.give_back(self._tenant, held[0], kept=held[1])

    def give_back_all(self) -> None:
        """Hold nothing."""
        for number in tuple(self._rows):
            self.give_back(number)


class SoloMember(Member):
    """The only member of a run."""

    def __init__(self, tenant: str, live: Live, formats: Formats, services: Services) -> None:
        self._tenant = tenant
        self._live = live
        self._formats = formats
        self._services = services
        self._held = Held(tenant, services.budget)
        self._passes: dict[int, Pass] = {}
        self._answers: set[asyncio.Future[Any]] = set()
        self._has_left = False

    @property
    def live(self) -> Live:
        """The run that it is a member of."""
        return self._live

    def forward(self, event: Forward) -> asyncio.Future[Activations]:
        """Compute rows; with their gradients in view unless the event says otherwise."""
        run, trains, keeps = self._live.run, not event.no_grad, False
        if trains:
            keeps = self._held.take(event.id, rows_of(event, run))

        def job(worker: Worker) -> Activations:
            part = self._formats.part(event, run.placement)
            passed, (hidden,) = run.forward(worker, [part], trains=trains, keeps=keeps)
            if passed is not None:
                self._passes[event.id] = passed
            return self._formats.activations(event, hidden)

        self._services.metrics.forward(self._tenant, event.count)
        return self._put(job)

    def backward(self, event: Backward) -> asyncio.Future[Gradients]:
        """Compute gradients; what the Forward held is free then."""
        run = self._live.run

        def job(worker: Worker) -> Gradients:
            passed = self._passes.pop(event.id)
            (found,) = run.backward(worker, passed, [self._formats.gradient(event)])
            return self._formats.answer(event, found, run)

        self._services.metrics.backward(self._tenant)
        answer = self._put(job)
        answer.add_done_callback(lambda _: self._held.give_back(event.id))
        return answer

    async def discard(self, event: Discard) -> None:
        """Forget a forward in its turn."""
        await self._live.line.put_on_loop(lambda: self._forget(event.id))

    async def reset(self) -> None:
        """Forget everything of the unfinished step in its turn."""
        await self._live.line.put_on_loop(self._clear)

    def step(self, event: Step) -> asyncio.Future[Stepped]:
        """Change what is trained."""
        return self._put(lambda _: self._stepped(event))

    def save(self, event: Save) -> asyncio.Future[Saved]:
        """Make it durable."""
        return self._put(lambda _: self._saved(event))

    def leave(self) -> None:
        """Give up what waits, and free the rest behind what is being computed."""
        if self._has_left:
            return
        self._has_left = True
        for answer in tuple(self._answers):
            answer.cancel()
        self._live.line.put_on_loop(self._clear)

    def _stepped(self, event: Step) -> Stepped:
        stepped = self._live.run.step(event)
        self._services.metrics.stepped(self._tenant, applied=stepped.applied)
        return stepped

    def _saved(self, event: Save) -> Saved:
        return self._live.save(self._services.store, event, self._live.run.steps)

    def _forget(self, number: int) -> None:
        self._passes.pop(number, None)
        self._held.give_back(number)

    def _clear(self) -> None:
        self._passes.clear()
        self._held.give_back_all()
        self._live.run.clear()

    def _put(self, job: Callable[[Worker], _T]) -> asyncio.Future[_T]:
        return self._track(self._live.put(job))

    def _track(self, answer: asyncio.Future[_T]) -> asyncio.Future[_T]:
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        return answer


def rows_of(event: Forward, run: TrainingRun) -> int:
    """Rows that pass the blocks for a Forward, those of the prompt included."""
    return event.count + run.recipe.prompt_rows * len(event.counts)
