"""Soft prompts of the trunk: which tenant may name which, and their rows in front of sequences.

A session that names a prompt gets its keys and values once, in whole pages of its own account, and
every sequence begins as a fork of them. The prompt's rows end where a page ends, so that a
sequence of n rows takes the pages that it takes without a prompt: a client needs to know nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from fedsea.errors import ConfigError, PermissionDenied
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.kv_pool import pages_for
from fedsea.model.lora import Adapter
from fedsea.model.partition import Span
from fedsea.model.prompts import SoftPrompt, read_prompt
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import Placement, embedding_factor
from fedsea.server.config import EVERY_TENANT, PromptSection

SEQUENCE: Final = -1
"""The prompt's sequence in an account; clients count from 0."""
_CHUNK_ROWS = 256
_KEPT_SHARE = 16
"""Kept rows of prompts take at most one part in so many of the memory of the KV pool, again."""


@dataclass(frozen=True, slots=True)
class Owned:
    """A prompt and the tenants that may use it."""

    prompt: SoftPrompt
    tenants: frozenset[str]

    def is_for(self, tenant: str) -> bool:
        """Whether a tenant may name it."""
        return tenant in self.tenants or EVERY_TENANT in self.tenants


@dataclass(frozen=True, slots=True)
class PromptTable:
    """The prompts of a server by name."""

    entries: Mapping[str, Owned] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        sections: Mapping[str, PromptSection],
        checkpoint: Checkpoint,
        span: Span,
        placement: Placement,
        max_context: int,
    ) -> PromptTable:
        """Read all prompts.

        Raises:
            CheckpointError: a file is missing or corrupt.
            ConfigError, FingerprintMismatch: one is for another model or for blocks that are not
                served, or leaves no room for rows of clients.
        """
        entries = {}
        for name, section in sections.items():
            prompt = read_prompt(section.folder, embedding_factor(checkpoint.config))
            prompt.check_fits(checkpoint.hidden_size, prompt.entrance, checkpoint.fingerprint())
            if not span.first <= prompt.entrance < span.end:
                raise ConfigError(
                    f"the soft prompt {name} enters block {prompt.entrance} and this server has "
                    f"{span}; serve a span that holds it"
                )
            if prompt.count >= max_context:
                raise ConfigError(
                    f"the soft prompt {name} has {prompt.count} rows of the {max_context} that a "
                    "sequence may have; train a shorter one, or raise kv.max_context"
                )
            prompt = prompt.to(placement.device).requires_grad_(False)
            entries[name] = Owned(prompt, frozenset(section.tenants))
        return cls(entries)

    def of(self, tenant: str, name: str) -> SoftPrompt | None:
        """The prompt of that name that a tenant may use; None when there is none."""
        found = self.entries.get(name)
        return found.prompt if found is not None and found.is_for(tenant) else None


def unknown_prompt() -> PermissionDenied:
    """The answer to a name that this tenant has no prompt for, whoever else has one."""
    return PermissionDenied(
        "no soft prompt of that name is served to this tenant; ask the operator for its names"
    )


def check_entrance(prompt: SoftPrompt, first_block: int) -> None:
    """Refuse a prompt for a trunk that begins elsewhere.

    Raises:
        ConfigError: with the partition that it is for.
    """
    if prompt.entrance != first_block:
        raise ConfigError(
            f"the soft prompt enters block {prompt.entrance} and the trunk was asked to begin with "
            f"block {first_block}; use bottom={prompt.entrance}"
        )


def reserved_rows(prompt: SoftPrompt | None, page_rows: int) -> int:
    """KV rows that a prompt takes in an account, in whole pages."""
    return 0 if prompt is None else pages_for(prompt.count, page_rows) * page_rows


@dataclass(frozen=True, slots=True)
class _Kept:
    """Keys and values of a prompt; it is held beside the adapter that it was computed with."""

    prompt: SoftPrompt
    adapter: Adapter | None
    rows: list[Tensor]


class PromptRows:
    """Keys and values of prompts, computed once and copied into the accounts that use them.

    Those of the prompts that were used last are kept, up to a share of the pool's rows.
    """

    def __init__(self, runner: SpanRunner) -> None:
        self._runner = runner
        self._most_rows = runner.pool.num_rows // _KEPT_SHARE
        self._kept: OrderedDict[tuple[int, int, int], _Kept] = OrderedDict()

    def lay(self, account: int, prompt: SoftPrompt, adapter: Adapter | None, capacity: int) -> None:
        """Give an account the sequence of its prompt; `capacity` rows may follow in one run."""
        runner, pool = self._runner, self._runner.pool
        taken = reserved_rows(prompt, pool.page_rows)
        skip = taken - prompt.count
        pool.begin(account, SEQUENCE, taken + capacity)
        pool.extend(account, SEQUENCE, skip)
        key = (id(prompt), id(adapter), 0 if adapter is None else adapter.version)
        kept = self._kept.get(key)
        if kept is None:
            self._compute(account, prompt, adapter, skip)
            slots = runner.slots(account, SEQUENCE, skip, prompt.count)
            self._kept[key] = _Kept(prompt, adapter, runner.cache.read(slots))
            while sum(each.prompt.count for each in self._kept.values()) > self._most_rows:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
            pool.extend(account, SEQUENCE, prompt.count)
            slots = runner.slots(account, SEQUENCE, skip, prompt.count)
            runner.cache.write(slots, kept.rows)

    def _compute(
        self, account: int, prompt: SoftPrompt, adapter: Adapter | None, skip: int
    ) -> None:
        """Run the prompt through all blocks behind its place of entry, whatever a session asks."""
        runner = self._runner
        span = Span(prompt.entrance, runner.span.span.end)
        for rows in prompt.entering(runner.placement.dtype).split(_CHUNK_ROWS):
            new = NewRows(account, SEQUENCE, len(rows), adapter, skip)
            runner.run(rows, runner.advance([new]), span)
