"""Tenants that train together: one after another, or each a copy whose mean is taken now and then.

Members count their own steps: what a member sends and is told are the steps that it has taken,
however many the others have. The strategy whose members share one batch is in
`fedsea.server.training_batch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsea.errors import FedseaError
from fedsea.server.config import GroupSection
from fedsea.server.logs import get_logger
from fedsea.server.timers import Deadline
from fedsea.server.training_member import FAILED, Formats, Live, Services, SoloMember
from fedsea.server.training_run import TrainingRun, parameters_of
from fedsea.server.training_store import check_same
from fedsea.server.training_workers import Workers
from fedsea.wire.messages import Save, Saved, Step, Stepped

_log = get_logger(__name__)


class SequentialMember(SoloMember):
    """A member that has the group's run to itself while its session lasts."""

    def _stepped(self, event: Step) -> Stepped:
        live = self._live
        repeated = live.repeated(self._tenant, event)
        if repeated is not None:
            return repeated
        stepped = super()._stepped(replace(event, number=live.run.steps + 1))
        return live.count(self._tenant, stepped)

    def _saved(self, event: Save) -> Saved:
        live = self._live
        return live.save(self._services.store, event, live.members.get(self._tenant, 0))


@dataclass(slots=True, eq=False)
class _Waiting:
    """A member at a step where the copies become their mean, and the answer that waits for it."""

    stepped: Stepped
    answer: asyncio.Future[Stepped]


class Averaging:
    """The copies of a group, which become their weighted mean at every so many steps.

    All members that take part are waited for until the deadline; those who have come by then go on
    with the mean of theirs. Used on the event loop.

    Args:
        section: the group's settings.
        workers: compute the mean.
    """

    def __init__(self, section: GroupSection, workers: Workers) -> None:
        self.every = section.average_every
        self._seconds = section.deadline_s
        self._deadline = Deadline(self._average)
        self._workers = workers
        self._members: set[HierarchicalMember] = set()
        self._waiting: dict[HierarchicalMember, _Waiting] = {}
        self._mean: dict[str, Tensor] | None = None

    def join(self, member: HierarchicalMember) -> None:
        """Take part; a copy of which no step is done begins as the last mean of those who do.

        Raises:
            ConfigError: it is trained with other options than the others'.
        """
        run = member.live.run
        for other in self._members:
            check_same(other.live.run.recipe, run.recipe)
        self._members.add(member)
        if self._mean is not None and not run.steps:
            assign(run, self._mean)

    def leave(self, member: HierarchicalMember) -> None:
        """Take part no longer; safe to repeat."""
        self._members.discard(member)
        if not self._members:
            self._mean = None
        if self._waiting.pop(member, None) is not None:
            member.live.line.release()
        self._look()

    def arrive(
        self, member: HierarchicalMember, stepped: Stepped, answer: asyncio.Future[Stepped]
    ) -> None:
        """Wait for the mean; the member's line is held until then."""
        if member not in self._members:
            return
        member.live.line.hold()
        self._waiting[member] = _Waiting(stepped, answer)
        self._deadline.start(self._seconds)
        self._look()

    def _look(self) -> None:
        if len(self._waiting) == len(self._members) or not self._waiting:
            self._average()

    def _average(self) -> None:
        """Let those who wait go on with their mean."""
        self._deadline.stop()
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        late = len(self._members) - len(waiting)
        if late:
            _log.warning("group_deadline", members=len(self._members), late=late)
        members = sorted(waiting, key=lambda member: member.tenant)
        loop = asyncio.get_running_loop()
        done = self._workers.submit(lambda _: _averaged(members))
        asyncio.wrap_future(done, loop=loop).add_done_callback(
            lambda mean: self._go_on(waiting, mean)
        )

    def _go_on(
        self,
        waiting: Mapping[HierarchicalMember, _Waiting],
        mean: asyncio.Future[dict[str, Tensor]],
    ) -> None:
        error = None if mean.cancelled() else mean.exception()
        if error is not None:
            _log.error("mean_failed", error=type(error).__name__)
        elif not mean.cancelled() and not self._members.isdisjoint(waiting):
            self._mean = mean.result() or self._mean
        for member, each in waiting.items():
            if error is not None:  # some copies may be the mean already, and others not
                member.live.run.is_broken = True
            if not each.answer.done():
                if error is None:
                    each.answer.set_result(each.stepped)
                else:
                    each.answer.set_exception(FedseaError(FAILED))
            member.live.line.release()


class HierarchicalMember(SoloMember):
    """A member with a copy of its own."""

    def __init__(
        self,
        tenant: str,
        live: Live,
        formats: Formats,
        services: Services,
        averaging: Averaging,
        weight: float,
    ) -> None:
        super().__init__(tenant, live, formats, services)
        self.weight = weight
        self._averaging = averaging
        self._is_new = False
        averaging.join(self)

    @property
    def tenant(self) -> str:
        """Whose copy it is."""
        return self._tenant

    def step(self, event: Step) -> asyncio.Future[Stepped]:
        """Change the copy; at some steps the answer waits for the other members."""
        inner = super().step(event)
        answer: asyncio.Future[Stepped] = self._track(asyncio.get_running_loop().create_future())
        self._live.line.put_on_loop(lambda: self._pass_on(inner, answer))
        return answer

    def leave(self) -> None:
        """Take part no longer, and free everything."""
        self._averaging.leave(self)
        super().leave()

    def _stepped(self, event: Step) -> Stepped:
        before = self._live.run.steps
        stepped = super()._stepped(event)
        self._is_new = self._live.run.steps > before
        return stepped

    def _pass_on(self, inner: asyncio.Future[Stepped], answer: asyncio.Future[Stepped]) -> None:
        if inner.cancelled() or answer.done():
            return
        error = inner.exception()
        if error is not None:
            answer.set_exception(error)
        elif self._is_new and not inner.result().number % self._averaging.every:
            self._averaging.arrive(self, inner.result(), answer)
        else:
            answer.set_result(inner.result())


@torch.no_grad()
def _averaged(members: Sequence[HierarchicalMember]) -> dict[str, Tensor]:
    """Give every copy the weighted mean of all that are finite; the mean, empty when none is."""
    named = {member: _values(member.live.run) for member in members}
    sound = [
        member
        for member in members
        if all(bool(value.isfinite().all()) for value in named[member].values())
    ]
    if not sound:
        return {}
    # Relative to the greatest, for the sum of large weights may overflow.
    greatest = max(member.weight for member in sound)
    total = sum(member.weight / greatest for member in sound)
    mean: dict[str, Tensor] = {}
    for name, first in named[sound[0]].items():
        found = torch.zeros_like(first, dtype=torch.float64)
        for member in sound:
            found += named[member][name].double() * (member.weight / greatest / total)
        mean[name] = found.to(first.dtype)
    for member in members:
        assign(member.live.run, mean)
    return mean


def _values(run: TrainingRun) -> dict[str, Tensor]:
    """The values of what a run trains, by name."""
    return {name: one.detach() for name, one in parameters_of(run.adapter, run.prompt).items()}


@torch.no_grad()
def assign(run: TrainingRun, values: Mapping[str, Tensor]) -> None:
    """Give what a run trains other values; its optimizer goes on."""
    for name, parameter in parameters_of(run.adapter, run.prompt).items():
        parameter.copy_(values[name])
    run.prompt_drawn = True
    if run.adapter is not None:
        run.adapter.changed()
