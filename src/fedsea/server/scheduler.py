"""Which rows are computed in the next step: plain bookkeeping, no tensors, no clock.

Every session offers one Append at a time. Small Appends are decoding: all of them go into the next
step. What is left of the step goes to larger ones, prompts, in chunks. While somebody decodes, a
chunk is only as long as the step may grow by `stall_factor`; `StepCost` learns what rows cost.

A session that decodes is away for a moment after each answer, while its client makes the next row.
A step waits a little for rows that are about to come, because all of them together take hardly
longer than one. A prompt uses a gap only if it will be out of the way in time.

Fairness: each tenant, and within it each session, is served in the order of the rows it has had so
far, least first. One that comes back after a pause starts level with the least served one that
waits, so that nobody saves up a claim. A tenant with a rate quota takes no more rows than its
bucket holds; its sessions wait.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from fedsea.server.config import SchedulerSection
from fedsea.server.quotas import TokenBucket

# A session that decoded less than so long ago is expected to go on.
MEMORY_SECONDS = 1.0
# How late a row may be, beyond twice its usual time, before a prompt takes its place.
PATIENCE_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Grant:
    """A session's next `rows` rows are part of the step."""

    session: int
    rows: int
    is_prefill: bool


@dataclass(slots=True)
class _Claim:
    """A session: rows of its Append that wait, and rows that it has had."""

    session: int
    tenant: _Tenant
    waiting: int = 0
    is_prefill: bool = False
    served: int = 0
    arrived: float = 0.0
    answered: float | None = None
    away: float = 0.0

    def came(self, now: float) -> None:
        """Learn from the arrival of a row how long the client takes for one, pauses left out."""
        if self.answered is not None and now - self.answered < MEMORY_SECONDS:
            away = max(0.0, now - self.answered)
            self.away = (self.away + away) / 2 if self.away else away
        self.arrived, self.answered = now, None

    def due(self, now: float) -> tuple[float, float] | None:
        """When the next row is expected, and when no more; None while there is no such row."""
        if self.answered is None or now - self.answered > MEMORY_SECONDS:
            return None
        return self.answered + self.away, self.answered + 2 * self.away + PATIENCE_SECONDS


@dataclass(slots=True)
class _Tenant:
    name: str
    bucket: TokenBucket | None
    sessions: int = 0
    served: int = 0
    claims: dict[int, _Claim] = field(default_factory=dict)


_T = TypeVar("_T", _Claim, _Tenant)


class StepCost:
    """What rows cost, learned from measured steps; medians, so that one slow step teaches nothing.

    A step of d decode rows alone is looked up by the magnitude of d: up to a point its time is that
    of reading the weights. What a mixed step takes beyond that is the cost of its prefill rows.
    """

    SAMPLES = 7
    MIXED_STEPS = 64  # after so many, a step that only decodes is due, to be measured

    def __init__(self) -> None:
        self._decode: dict[int, deque[float]] = {}
        self._prefill_row: deque[float] = deque(maxlen=self.SAMPLES)
        self._mixed_steps = 0

    @property
    def is_stale(self) -> bool:
        """Whether the next step should only decode, so that its time is known."""
        return not self._decode or self._mixed_steps >= self.MIXED_STEPS

    def record(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """Learn from one step."""
        if not prefill_rows:
            size = decode_rows.bit_length()
            self._decode.setdefault(size, deque(maxlen=self.SAMPLES)).append(seconds)
            self._mixed_steps = 0
        elif decode_rows:
            self._mixed_steps += 1
            alone = self.decode_seconds(decode_rows)
            self._prefill_row.append(max(seconds - alone, 0.0) / prefill_rows)
        elif not self._prefill_row:
            self._prefill_row.append(seconds / prefill_rows)

    def decode_seconds(self, rows: int) -> float:
        """Time of a step that only decodes; 0 while nothing is known."""
        if not self._decode:
            return 0.0
        size = rows.bit_length()
        return median(self._decode[min(self._decode, key=lambda known: abs(known - size))])

    def prefill_rows(self, decode_rows: int, stall_factor: float) -> int:
        """Prefill rows that make a step of `decode_rows` at most `stall_factor` times as long."""
        return self._rows_for((stall_factor - 1.0) * self.decode_seconds(decode_rows))

    def rows_in(self, gap: float, stall_factor: float) -> int:
        """Prefill rows of a step that ends before a decoding row that comes after `gap` seconds.

        It may end as much later as a decoding step may become longer.
        """
        return self._rows_for(gap + (stall_factor - 2.0) * self.decode_seconds(1))

    def _rows_for(self, seconds: float) -> int:
        if not self._prefill_row or seconds <= 0.0:
            return 0
        return int(seconds / max(median(self._prefill_row), 1e-9))


class Scheduler:
    """Fills steps with the rows of many sessions.

    Args:
        options: sizes of steps.
        bucket: makes the rate bucket of a tenant, None for a tenant without a rate quota.
    """

    def __init__(
        self,
        options: SchedulerSection,
        bucket: Callable[[str], TokenBucket | None] = lambda _: None,
    ) -> None:
        self._options = options
        self._bucket = bucket
        self._tenants: dict[str, _Tenant] = {}
        self._claims: dict[int, _Claim] = {}
        self._is_running = False
        self._free_since = 0.0
        self._hold_until = 0.0
        self.cost = StepCost()

    @property
    def waiting_rows(self) -> int:
        """Rows of all sessions that wait."""
        return sum(claim.waiting for claim in self._waiting())

    @property
    def is_waiting(self) -> bool:
        """Whether any session waits."""
        return any(tenant.claims for tenant in self._tenants.values())

    def add(self, session: int, tenant: str) -> None:
        """A session opens."""
        owner = self._tenants.get(tenant)
        if owner is None:
            owner = self._tenants[tenant] = _Tenant(tenant, self._bucket(tenant))
        owner.sessions += 1
        self._claims[session] = _Claim(session, owner)

    def remove(self, session: int) -> None:
        """A session ends; what it waited for is forgotten."""
        claim = self._claims.pop(session)
        owner = claim.tenant
        owner.claims.pop(session, None)
        owner.sessions -= 1
        # The bucket outlives the sessions while it owes rows: opening anew refills nothing.
        if not owner.sessions and owner.bucket is None:
            del self._tenants[owner.name]

    def offer(self, session: int, rows: int, now: float) -> None:
        """The session's next Append of `rows` rows came at `now`; the one before it is done."""
        claim = self._claims[session]
        claim.came(now)
        owner = claim.tenant
        if not owner.claims:
            waiting = [tenant for tenant in self._tenants.values() if tenant.claims]
            _catch_up(owner, waiting)
        _catch_up(claim, owner.claims.values())
        claim.waiting = rows
        claim.is_prefill = rows > self._options.small_append_rows
        owner.claims[session] = claim

    def answered(self, session: int, now: float) -> None:
        """The session's Append is computed and its answer on the way."""
        claim = self._claims[session]
        claim.answered = None if claim.is_prefill else now

    def schedule(self, now: float) -> list[Grant]:
        """The rows of the next step, decoding first; empty when nobody may be served."""
        if self._is_running:
            self._is_running, self._free_since = False, now
        self._hold_until = self._gathered_at(now)
        if self._hold_until > now:
            return []
        allowed = {
            tenant.name: tenant.bucket.available(now)
            for tenant in self._tenants.values()
            if tenant.bucket is not None and tenant.claims
        }
        prefill_waits = any(claim.is_prefill for claim in self._waiting())
        reserve = self._options.min_prefill_rows if prefill_waits else 0
        budget = self._options.max_step_rows - reserve
        grants = self._fill(budget, allowed, is_prefill=False)
        if prefill_waits:
            decode_rows = sum(grant.rows for grant in grants)
            chunk = self._chunk(decode_rows) if decode_rows else self._gap_chunk(now)
            grants += self._fill(chunk, allowed, is_prefill=True)
        self._is_running = bool(grants)
        return grants

    def next_ready(self, now: float) -> float | None:
        """When somebody who waits may be served; None when nobody waits."""
        ready = min(
            (
                now if tenant.bucket is None else tenant.bucket.ready_at()
                for tenant in self._tenants.values()
                if tenant.claims
            ),
            default=None,
        )
        return None if ready is None else max(ready, self._hold_until)

    def _waiting(self) -> Iterable[_Claim]:
        return (claim for tenant in self._tenants.values() for claim in tenant.claims.values())

    def _gathered_at(self, now: float) -> float:
        """When the decoding rows that are there should be computed: now, or with those to come."""
        arrived = [claim.arrived for claim in self._waiting() if not claim.is_prefill]
        if not arrived:
            return now
        patience = self._options.gather_factor * self.cost.decode_seconds(len(arrived))
        limit = max(min(arrived), self._free_since) + patience
        if now >= limit:
            return now
        dues = (claim.due(now) for claim in self._claims.values())
        awaited = [due[1] for due in dues if due is not None and due[0] <= limit and now < due[1]]
        return min(limit, max(awaited)) if awaited else now

    def _chunk(self, decode_rows: int) -> int:
        """Prefill rows beside `decode_rows`."""
        if self.cost.is_stale:
            return 0
        bearable = self.cost.prefill_rows(decode_rows, self._options.stall_factor)
        left = self._options.max_step_rows - decode_rows
        return min(left, max(bearable, self._options.min_prefill_rows))

    def _gap_chunk(self, now: float) -> int:
        """Prefill rows while no decoding row is there; 0 to wait for one that is about to come."""
        dues = [due for claim in self._claims.values() if (due := claim.due(now)) is not None]
        if not dues:
            return self._options.max_step_rows
        coming = [due for due in dues if now < due[1]]
        if not coming:
            return max(self._chunk(1), self._options.min_prefill_rows)
        left = min(expected for expected, _ in coming) - now
        rows = self.cost.rows_in(left, self._options.stall_factor)
        if rows < self._options.min_prefill_rows:
            self._hold_until = min(given_up for _, given_up in coming)
            return 0
        return min(rows, self._options.max_step_rows)

    def _fill(self, budget: int, allowed: dict[str, int], *, is_prefill: bool) -> list[Grant]:
        """Grant up to `budget` rows to the claims of one kind, least served tenants first."""
        grants: list[Grant] = []
        tenants = _queue(tenant for tenant in self._tenants.values() if tenant.claims)
        order = itertools.count(len(tenants))
        sessions = {
            tenant.name: _queue(
                claim for claim in tenant.claims.values() if claim.is_prefill is is_prefill
            )
            for _, _, tenant in tenants
        }
        while budget > 0 and tenants:
            tenant = heapq.heappop(tenants)[2]
            queue = sessions[tenant.name]
            rows_left = allowed.get(tenant.name, budget)
            if not queue or rows_left <= 0:
                continue
            claim = heapq.heappop(queue)[2]
            rows = min(claim.waiting, budget, rows_left)
            budget -= rows
            if tenant.name in allowed:
                allowed[tenant.name] -= rows
            self._serve(claim, rows)
            grants.append(Grant(claim.session, rows, is_prefill))
            heapq.heappush(tenants, (tenant.served, next(order), tenant))
        return grants

    def _serve(self, claim: _Claim, rows: int) -> None:
        tenant = claim.tenant
        claim.waiting -= rows
        claim.served += rows
        tenant.served += rows
        if tenant.bucket is not None:
            tenant.bucket.take(rows)
        if not claim.waiting:
            del tenant.claims[claim.session]


def _queue(members: Iterable[_T]) -> list[tuple[int, int, _T]]:
    """A heap of members by rows served; among equal ones, those first that came first."""
    queue = [(member.served, index, member) for index, member in enumerate(members)]
    heapq.heapify(queue)
    return queue


def _catch_up(member: _T, waiting: Iterable[_T]) -> None:
    """Start level with the least served one that waits."""
    member.served = max(member.served, min((other.served for other in waiting), default=0))
