"""Adapters of the trunk: which tenant may name which.

An adapter was made from a tenant's text, so that nobody else may compute with it, or learn whether
it exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsea.errors import PermissionDenied
from fedsea.model.adapters import read_adapter
from fedsea.model.lora import Adapter
from fedsea.model.spans import BlockSpan, Placement
from fedsea.server.config import AdapterSection


@dataclass(frozen=True, slots=True)
class Owned:
    """An adapter and the tenants that may use it."""

    adapter: Adapter
    tenants: frozenset[str]


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """The adapters of a server by name."""

    entries: Mapping[str, Owned] = field(default_factory=dict)

    @classmethod
    def load(
        cls, sections: Mapping[str, AdapterSection], blocks: BlockSpan, placement: Placement
    ) -> AdapterTable:
        """Read the trunk's part of every adapter, and make the blocks ready for it.

        Raises:
            CheckpointError: a file is missing or corrupt.
            ConfigError: an adapter is of another kind, or for another model.
        """
        entries = {}
        for name, section in sections.items():
            adapter = read_adapter(section.folder, blocks.span)
            adapter = adapter.to(placement.device).requires_grad_(False)
            blocks.accept(adapter)
            entries[name] = Owned(adapter, frozenset(section.tenants))
        return cls(entries)

    def of(self, tenant: str, name: str) -> Adapter | None:
        """The adapter that a tenant means by a name; None when it has none of that name."""
        found = self.entries.get(name)
        return found.adapter if found is not None and tenant in found.tenants else None


def unknown_adapter() -> PermissionDenied:
    """There is none of that name for this tenant, whoever else has one."""
    return PermissionDenied(
        "no adapter of that name is served to this tenant; ask the operator for its names"
    )
