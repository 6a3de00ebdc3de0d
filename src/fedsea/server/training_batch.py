"""Members that share one run and one batch: the strategy `client-batch`.

Forwards that come together are one pass through the blocks, and so are their gradients, once
everybody who was in the pass has sent its own. A step is taken when all members have asked for it,
with the mean of the gradients of those who sent any. Whoever the others waited for until the
deadline is sent away; what it had sent counts.

The gradients of a pass cannot be taken apart again: a member that starts its step anew, after a
Reset or in a new session, gets the gradients of its rows, and the shared adapter keeps what the
member contributed before.

Rows of a pass are held, and counted against the members whose they are, until all of its gradients
have come or will not come: what one of them gave up cannot be freed alone.

Used on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from fedsea.errors import Capacity, ConfigError, FedseaError, RemoteProtocolError, StaleStep
from fedsea.server.config import GroupSection
from fedsea.server.logs import get_logger
from fedsea.server.timers import Deadline
from fedsea.server.training_member import Formats, Held, Live, Member, Services, rows_of
from fedsea.server.training_run import Part, Pass
from fedsea.server.training_workers import Worker
from fedsea.wire.messages import (
    Activations,
    Backward,
    Discard,
    Forward,
    Gradients,
    Save,
    Saved,
    Step,
    Stepped,
)

RETRY_AFTER = 5.0

_T = TypeVar("_T")

_log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Arrival:
    """A Forward that waits for others."""

    member: BatchMember
    event: Forward
    keeps: bool
    answer: asyncio.Future[Activations]


@dataclass(slots=True, eq=False)
class _Owner:
    """A member's part of a joint pass: its gradient, once it has come, or that none will."""

    member: BatchMember
    number: int
    event: Backward | None = None
    answer: asyncio.Future[Gradients] | None = None
    is_gone: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is waited for."""
        return self.is_gone or self.event is not None


@dataclass(slots=True, eq=False)
class _Joint:
    """A pass of several members, between its forward and its backward."""

    passed: Pass
    owners: list[_Owner]
    counts: bool
    deadline: Deadline


@dataclass(slots=True, eq=False)
class _Asked:
    """A Step that waits for the other members'."""

    event: Step
    answer: asyncio.Future[Stepped]


@dataclass(slots=True, eq=False)
class BatchRun:
    """What the members of a group do together to one run.

    Attributes:
        live: the run.
        section: the group's settings.
        services: what all members use.
    """

    live: Live
    section: GroupSection
    services: Services
    _members: set[BatchMember] = field(default_factory=set)
    _arrivals: list[_Arrival] = field(default_factory=list)
    _joints: list[_Joint] = field(default_factory=list)
    _computing: Counter[BatchMember] = field(default_factory=Counter)
    _asked: dict[BatchMember, _Asked] = field(default_factory=dict)
    _contributed: set[str] = field(default_factory=set)
    _again: set[str] = field(default_factory=set)
    _gathering: Deadline = field(init=False)
    _stepping: Deadline = field(init=False)
    _is_launching: bool = False
    _has_begun: bool = False

    def __post_init__(self) -> None:
        """Make the deadlines."""
        self._gathering = Deadline(self._gathered)
        self._stepping = Deadline(self._late_for_step)

    def join(self, member: BatchMember) -> None:
        """A session of a member begins."""
        self._members.add(member)
        if member.tenant in self._contributed:
            self._again.add(member.tenant)
        self._gathering.stop()
        self._look_at_arrivals()

    def leave(self, member: BatchMember) -> None:
        """It has ended: nobody waits for it any more; safe to repeat."""
        self._members.discard(member)
        for arrival in [each for each in self._arrivals if each.member is member]:
            self._arrivals.remove(arrival)
            member.release(arrival.event.id)
        self._asked.pop(member, None)
        self._give_up(member)
        if not self._asked:
            self._stepping.stop()
        if not self._arrivals:
            self._gathering.stop()
        self._look()
        if not self._members:
            self.live.line.put_on_loop(self._clear)

    def forward(
        self, member: BatchMember, event: Forward, keeps: bool
    ) -> asyncio.Future[Activations]:
        """Compute rows together with those of others."""
        answer: asyncio.Future[Activations] = asyncio.get_running_loop().create_future()
        self._arrivals.append(_Arrival(member, event, keeps, answer))
        self._look_at_arrivals()
        return answer

    def evaluate(self, member: BatchMember, event: Forward) -> asyncio.Future[Activations]:
        """Compute rows without gradients, by themselves."""
        run, formats = self.live.run, member.formats

        def job(worker: Worker) -> Activations:
            part = formats.part(event, run.placement)
            _, (hidden,) = run.forward(worker, [part], trains=False)
            return formats.activations(event, hidden)

        return self.live.put(job)

    def backward(self, member: BatchMember, event: Backward) -> asyncio.Future[Gradients]:
        """Compute gradients together with those of others."""
        joint, owner = self._find(member, event.id)
        owner.event = event
        owner.answer = asyncio.get_running_loop().create_future()
        if joint.counts:
            self._contributed.add(member.tenant)
        joint.deadline.start(self.section.deadline_s)
        self._look_at(joint)
        return owner.answer

    def forget(self, member: BatchMember, number: int) -> None:
        """No gradient will come for a forward, whether it is computed yet or not."""
        for joint in tuple(self._joints):
            for owner in joint.owners:
                if owner.member is member and owner.number == number:
                    owner.is_gone = True
            self._look_at(joint)

    def reset(self, member: BatchMember) -> None:
        """A member starts its step anew."""
        if member.tenant in self._contributed:
            self._again.add(member.tenant)

    def step(self, member: BatchMember, event: Step) -> asyncio.Future[Stepped]:
        """Change what is trained, once all members have asked for it.

        Raises:
            StaleStep: it is neither the member's next step nor its last.
        """
        answer: asyncio.Future[Stepped] = asyncio.get_running_loop().create_future()
        repeated = self.live.repeated(member.tenant, event)
        if repeated is not None:
            answer.set_result(repeated)
            return answer
        self._asked[member] = _Asked(event, answer)
        self._stepping.start(self.section.deadline_s)
        self._look()
        return answer

    # What is waited for

    def _look(self) -> None:
        """Go on with whatever nobody has to be waited for any more."""
        for joint in tuple(self._joints):
            self._look_at(joint)
        self._look_at_arrivals()
        if self._asked and len(self._asked) == len(self._members):
            self._take_step()

    def _look_at_arrivals(self) -> None:
        if not self._arrivals or self._is_launching:
            return
        here = {arrival.member for arrival in self._arrivals}
        owners = [owner for joint in self._joints for owner in joint.owners]
        busy = {owner.member for owner in owners if not owner.is_settled} | self._computing.keys()
        expected = self._members - busy - self._asked.keys()
        if expected <= here and self._is_complete():
            self._launch_next()
        else:
            section = self.section
            self._gathering.start(section.gather_s if self._is_complete() else section.deadline_s)

    def _is_complete(self) -> bool:
        """Whether as many members have come as the first step waits for."""
        self._has_begun |= len(self._members) >= self.section.min_members
        return self._has_begun

    def _gathered(self) -> None:
        if self._is_complete():
            self._launch_next()
            return
        for member in tuple(self._members):
            member.fail(
                Capacity(
                    f"{len(self._members)} of {self.section.min_members} members have come to train "
                    "together; try again when the others do",
                    retry_after=RETRY_AFTER,
                )
            )

    def _launch_next(self) -> None:
        """Compute what has arrived when the run is free, and what arrives until then."""
        self._gathering.stop()
        if self._arrivals and not self._is_launching:
            self._is_launching = True
            self.live.line.put_on_loop(self._launch)

    def _launch(self) -> None:
        self._is_launching = False
        # Sums of floats depend on their order: the same Forwards give the same bits.
        arrivals = sorted(self._arrivals, key=lambda each: (each.member.tenant, each.event.id))
        self._arrivals = []
        again = [each for each in arrivals if each.member.tenant in self._again]
        first = [each for each in arrivals if each not in again]
        for members, counts in ((first, True), (again, False)):
            for group in _passes(members, self.services.max_rows):
                self._computing.update(arrival.member for arrival in group)
                job = self.live.put(lambda worker, group=group: self._forwards(worker, group))  # type: ignore[misc]
                job.add_done_callback(
                    lambda done, group=group, counts=counts: self._computed(done, group, counts)  # type: ignore[misc]
                )

    def _find(self, member: BatchMember, number: int) -> tuple[_Joint, _Owner]:
        for joint in self._joints:
            for owner in joint.owners:
                if owner.member is member and owner.number == number:
                    return joint, owner
        raise FedseaError("a forward is unknown to its group; open the training again")

    def _look_at(self, joint: _Joint) -> None:
        """Compute the gradients of a pass that nobody has to be waited for any more."""
        if joint in self._joints and all(owner.is_settled for owner in joint.owners):
            self._joints.remove(joint)
            joint.deadline.stop()
            if any(owner.event is not None and not owner.is_gone for owner in joint.owners):
                job = self.live.put(lambda worker: self._backwards(worker, joint))
                job.add_done_callback(lambda done: self._gone_back(done, joint))
            else:
                joint.passed.hidden = None
                _release(joint.owners)

    def _late(self, owners: Sequence[_Owner]) -> None:
        self._send_away({owner.member for owner in owners if not owner.is_settled})

    def _late_for_step(self) -> None:
        self._send_away(self._members - self._asked.keys())

    def _send_away(self, late: set[BatchMember]) -> None:
        _log.warning("group_deadline", members=len(self._members), late=len(late))
        for member in late:
            member.fail(
                StaleStep(
                    f"the group waited {self.section.deadline_s:g} s for this member and goes on "
                    "without it; open the training again"
                )
            )
            member.leave()

    def _give_up(self, member: BatchMember) -> None:
        """No gradients will come from a member for what is open now."""
        for joint in tuple(self._joints):
            for owner in joint.owners:
                if owner.member is member and owner.event is None:
                    owner.is_gone = True
            self._look_at(joint)

    def _take_step(self) -> None:
        self._stepping.stop()
        asked, self._asked = self._asked, {}
        wanted = {member: replace(each.event, number=1) for member, each in asked.items()}
        # What most want, and of several such what came first: no one member decides for the others.
        [(common, _)] = Counter(wanted.values()).most_common(1)
        agreeing = {}
        for member, each in asked.items():
            if wanted[member] == common:
                agreeing[member] = each
            else:
                member.fail(
                    ConfigError(
                        "the members of a group take a step with the same learning rate, largest "
                        "norm and scale, and this one's differ; use the group's options"
                    )
                )
        contributed = len(self._contributed)
        self._contributed, self._again = set(), set()
        job = self.live.put(lambda _: self._stepped(common, max(1, contributed), agreeing))
        job.add_done_callback(
            lambda done: _settle(done, [each.answer for each in agreeing.values()])
        )

    def _clear(self) -> None:
        """The last member has gone: the step that it was in begins anew."""
        if not self._members:
            self._contributed, self._again = set(), set()
            self.live.run.clear()

    # In the threads of workers

    def _forwards(
        self, worker: Worker, arrivals: Sequence[_Arrival]
    ) -> tuple[Pass | None, list[_Arrival], list[Activations | FedseaError]]:
        """One pass for all whose rows can be read: those, and an answer for every arrival."""
        run = self.live.run
        parts: dict[int, Part] = {}
        answers: dict[int, Activations | FedseaError] = {}
        for arrival in arrivals:
            try:
                parts[id(arrival)] = arrival.member.formats.part(arrival.event, run.placement)
            except RemoteProtocolError as error:
                answers[id(arrival)] = error
        sound = [arrival for arrival in arrivals if id(arrival) in parts]
        passed, hidden = None, list[Tensor]()
        if sound:
            keeps = all(arrival.keeps for arrival in sound)
            passed, hidden = run.forward(worker, list(parts.values()), trains=True, keeps=keeps)
        for arrival, rows in zip(sound, hidden, strict=True):
            try:
                answers[id(arrival)] = arrival.member.formats.activations(arrival.event, rows)
            except FedseaError as error:
                answers[id(arrival)] = error
        return passed, sound, [answers[id(arrival)] for arrival in arrivals]

    def _backwards(self, worker: Worker, joint: _Joint) -> list[Gradients | FedseaError | None]:
        run = self.live.run
        given: list[Tensor | None] = []
        answers: list[Gradients | FedseaError | None] = []
        for owner in joint.owners:
            gradient, answer = None, None
            if owner.event is not None:
                try:
                    gradient = owner.member.formats.gradient(owner.event)
                except RemoteProtocolError as error:
                    answer = error
            given.append(gradient)
            answers.append(answer)
        found = run.backward(worker, joint.passed, given, counts=joint.counts)
        for place, (owner, rows) in enumerate(zip(joint.owners, found, strict=True)):
            if owner.event is not None and answers[place] is None:
                answers[place] = owner.member.formats.answer(owner.event, rows, run)
        return answers

    def _stepped(
        self, event: Step, members: int, asked: dict[BatchMember, _Asked]
    ) -> list[Stepped]:
        live = self.live
        stepped = live.run.step(replace(event, number=live.run.steps + 1), members)
        for member in asked:
            self.services.metrics.stepped(member.tenant, applied=stepped.applied)
        return [live.count(member.tenant, stepped) for member in asked]

    # Back on the loop

    def _computed(
        self,
        done: asyncio.Future[tuple[Pass | None, list[_Arrival], list[Activations | FedseaError]]],
        arrivals: Sequence[_Arrival],
        counts: bool,
    ) -> None:
        self._computing -= Counter(arrival.member for arrival in arrivals)
        lost = list(arrivals)
        if not done.cancelled() and done.exception() is None:
            passed, sound, _ = done.result()
            if passed is not None:
                lost = [each for each in arrivals if each not in sound]
                owners = [
                    _Owner(
                        each.member, each.event.id, is_gone=not each.member.has_open(each.event.id)
                    )
                    for each in sound
                ]
                deadline = Deadline(lambda: self._late(owners))
                self._joints.append(_Joint(passed, owners, counts, deadline))
        for arrival in lost:
            arrival.member.release(arrival.event.id)
        _settle(done, [each.answer for each in arrivals], lambda result: result[2])
        self._look()

    def _gone_back(
        self, done: asyncio.Future[list[Gradients | FedseaError | None]], joint: _Joint
    ) -> None:
        _release(joint.owners)
        _settle(done, [owner.answer for owner in joint.owners])


class BatchMember(Member):
    """A session's part in a shared run."""

    def __init__(
        self,
        tenant: str,
        shared: BatchRun,
        formats: Formats,
        fail: Callable[[FedseaError], None],
    ) -> None:
        self.tenant = tenant
        self.formats = formats
        self.fail = fail
        self._shared = shared
        self._held = Held(tenant, shared.services.budget)
        self._open: set[int] = set()
        self._answers: set[asyncio.Future[Any]] = set()
        self._has_left = False
        shared.join(self)

    def has_open(self, number: int) -> bool:
        """Whether a gradient may still come for a forward."""
        return number in self._open

    def forward(self, event: Forward) -> asyncio.Future[Activations]:
        """Compute rows, those with gradients together with others'."""
        shared = self._shared
        shared.services.metrics.forward(self.tenant, event.count)
        if event.no_grad:
            return self._track(shared.evaluate(self, event))
        keeps = self._held.take(event.id, rows_of(event, shared.live.run))
        self._open.add(event.id)
        return self._track(shared.forward(self, event, keeps))

    def backward(self, event: Backward) -> asyncio.Future[Gradients]:
        """Compute gradients together with others'."""
        self._open.discard(event.id)
        self._shared.services.metrics.backward(self.tenant)
        return self._track(self._shared.backward(self, event))

    async def discard(self, event: Discard) -> None:
        """Forget a forward."""
        self._forget([event.id])

    async def reset(self) -> None:
        """Forget all forwards; see the module about gradients."""
        self._shared.reset(self)
        self._forget(list(self._open))

    def step(self, event: Step) -> asyncio.Future[Stepped]:
        """Change what is trained, together with the others."""
        return self._track(self._shared.step(self, event))

    def save(self, event: Save) -> asyncio.Future[Saved]:
        """Make it durable; once for all members."""
        live, store = self._shared.live, self._shared.services.store
        return self._track(
            live.put(lambda _: live.save(store, event, live.members.get(self.tenant, 0)))
        )

    def leave(self) -> None:
        """Free everything; nobody waits for this member any more."""
        if self._has_left:
            return
        self._has_left = True
        for answer in tuple(self._answers):
            answer.cancel()
        self._open.clear()
        self._shared.leave(self)

    def release(self, number: int) -> None:
        """The rows of a Forward are held no longer."""
        self._held.give_back(number)

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._open.discard(number)
            self._shared.forget(self, number)

    def _track(self, answer: asyncio.Future[_T]) -> asyncio.Future[_T]:
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        return answer


def _passes(arrivals: Sequence[_Arrival], max_rows: int) -> list[list[_Arrival]]:
    """Who shares a pass: as many as come to no more rows than one Forward alone may have."""
    found: list[list[_Arrival]] = []
    rows = 0
    for arrival in arrivals:
        rows += arrival.event.count
        if not found or rows > max_rows:
            found.append([])
            rows = arrival.event.count
        found[-1].append(arrival)
    return found


def _release(owners: Sequence[_Owner]) -> None:
    for owner in owners:
        owner.member.release(owner.number)


def _settle(
    done: asyncio.Future[Any],
    answers: Sequence[asyncio.Future[Any] | None],
    results: Callable[[Any], Sequence[Any]] = lambda result: result,
) -> None:
    """Answer everybody with his own result, or with the error of all."""
    error = None if done.cancelled() else done.exception()
    found = (
        [error] * len(answers) if done.cancelled() or error is not None else results(done.result())
    )
    for answer, result in zip(answers, found, strict=True):
        if answer is None or answer.done():
            continue
        if result is None:
            answer.cancel()
        elif isinstance(result, BaseException):
            answer.set_exception(result)
        else:
            answer.set_result(result)
