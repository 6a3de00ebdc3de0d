"""How many rows of open Forwards each tenant may make the server hold.

Plain bookkeeping, no tensors. A row whose activations are kept costs every block's intermediate
results; beyond `kept` only the row itself is held, and its forward is computed again when the
gradient comes. Beyond `pending` nothing is held.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsea.errors import QuotaExceeded


@dataclass(slots=True)
class _Held:
    kept: int = 0
    pending: int = 0


class RowBudget:
    """Counts rows by tenant.

    Args:
        kept: rows of one tenant whose activations are kept.
        pending: rows of one tenant that are held in all.
    """

    def __init__(self, kept: int, pending: int) -> None:
        self._most_kept = kept
        self._most_pending = pending
        self._held: dict[str, _Held] = {}

    @property
    def kept(self) -> int:
        """Rows of all tenants whose activations are kept."""
        return sum(held.kept for held in self._held.values())

    @property
    def pending(self) -> int:
        """Rows of all tenants that are held."""
        return sum(held.pending for held in self._held.values())

    def take(self, tenant: str, rows: int) -> bool:
        """Hold rows; whether their activations may be kept too.

        Raises:
            QuotaExceeded: the tenant would hold too many.
        """
        held = self._held.get(tenant, _Held())
        if held.pending + rows > self._most_pending:
            raise QuotaExceeded(
                f"the tenant holds {held.pending} rows of open forwards and asks for {rows} more, "
                f"over its quota of {self._most_pending}; send a Backward or a Discard first, or "
                "smaller batches"
            )
        keeps = held.kept + rows <= self._most_kept
        held.pending += rows
        held.kept += rows if keeps else 0
        self._held[tenant] = held
        return keeps

    def give_back(self, tenant: str, rows: int, *, kept: bool) -> None:
        """Undo `take`, with what it said."""
        held = self._held[tenant]
        held.pending -= rows
        held.kept -= rows if kept else 0
        if not held.pending:
            del self._held[tenant]
