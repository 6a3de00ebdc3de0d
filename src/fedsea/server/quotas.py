"""What each tenant may take: sessions and KV rows are refused beyond it, rows per second wait.

Plain bookkeeping: no tensors, and time is a number that the caller passes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedsea.errors import Capacity, QuotaExceeded
from fedsea.server.config import QuotasSection

RETRY_AFTER = 1.0


@dataclass(slots=True)
class Usage:
    """What a tenant holds now."""

    sessions: int = 0
    kv_rows: int = 0


class Admissions:
    """Counts open sessions and reserved rows, and refuses what is over a quota.

    Args:
        quotas: limits of each tenant.
        max_sessions: sessions of all tenants together.
        page_rows: reservations are counted in whole pages of so many rows.
    """

    def __init__(self, quotas: QuotasSection, max_sessions: int, page_rows: int) -> None:
        self._quotas = quotas
        self._max_sessions = max_sessions
        self._page_rows = page_rows
        self._usage: dict[str, Usage] = {}
        self._sessions = 0

    @property
    def sessions(self) -> int:
        """Open sessions of all tenants."""
        return self._sessions

    def usage(self, tenant: str) -> Usage:
        """What a tenant holds now."""
        return self._usage.get(tenant, Usage())

    @contextmanager
    def admitted(self, tenant: str, rows: int) -> Iterator[None]:
        """Count a session that reserves `rows` KV rows, for as long as the block runs.

        Raises:
            Capacity: the session table is full.
            QuotaExceeded: the tenant is over its quota.
        """
        rows = -(-rows // self._page_rows) * self._page_rows
        self._check(tenant, rows)
        usage = self._usage.setdefault(tenant, Usage())
        self._sessions += 1
        usage.sessions += 1
        usage.kv_rows += rows
        try:
            yield
        finally:
            self._sessions -= 1
            usage.sessions -= 1
            usage.kv_rows -= rows
            if not usage.sessions:
                del self._usage[tenant]

    def _check(self, tenant: str, rows: int) -> None:
        if self._sessions >= self._max_sessions:
            raise Capacity(
                f"all {self._max_sessions} sessions of this server are taken; retry later",
                retry_after=RETRY_AFTER,
            )
        quota, usage = self._quotas.of(tenant), self.usage(tenant)
        if quota.sessions is not None and usage.sessions >= quota.sessions:
            raise QuotaExceeded(
                f"the tenant has {usage.sessions} sessions open, which is its quota; "
                "close one or retry later",
                retry_after=RETRY_AFTER,
            )
        if quota.kv_rows is not None and usage.kv_rows + rows > quota.kv_rows:
            raise QuotaExceeded(
                f"the tenant holds {usage.kv_rows} KV rows and asks for {rows} more, over its "
                f"quota of {quota.kv_rows}; ask for a shorter context or close a session",
                retry_after=None if rows > quota.kv_rows else RETRY_AFTER,
            )


class TokenBucket:
    """A rate with a burst of one second: what was not used in the last second is lost.

    `now` is in seconds and never runs backwards.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._burst = max(rate, 1.0)
        self._level = self._burst
        self._seen = now

    def available(self, now: float) -> int:
        """Whole units that may be taken now."""
        self._level = min(self._burst, self._level + (now - self._seen) * self._rate)
        self._seen = now
        return int(self._level)

    def take(self, units: int) -> None:
        """Count units as used; no more than were just available."""
        self._level -= units

    def ready_at(self) -> float:
        """When the next unit is available, given what has been taken."""
        return self._seen + max(0.0, 1.0 - self._level) / self._rate
