"""Trainings of the trunk: which there are, who takes part, and from which step they go on.

A training is a tenant's under a name. One session at a time takes part in it; when the tenant opens
another, as after a broken connection, the earlier one ends. Between sessions the run stays in memory
for a while, at its last step; afterwards it goes on from what was saved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from fedsea.errors import ConfigError, FedseaError, QuotaExceeded, SessionLost, StaleStep
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import SoftPrompt
from fedsea.model.quantization import is_own
from fedsea.model.spans import embedding_factor
from fedsea.server.config import TrainingSection
from fedsea.server.loading import Trunk
from fedsea.server.metrics import Metrics
from fedsea.server.training_member import Formats, Live, Member, Services, SoloMember
from fedsea.server.training_rows import RowBudget
from fedsea.server.training_run import Recipe, TrainingRun
from fedsea.server.training_store import (
    RunKey,
    Trained,
    TrainingStore,
    check_name,
    check_same,
)
from fedsea.server.training_workers import Line, Workers
from fedsea.wire.messages import OpenTraining

REPLACED: Final = (
    "another session of this tenant has taken over the training; open it again to take it back"
)

Fail = Callable[[FedseaError], None]


@dataclass(slots=True)
class _Entry:
    """A run in memory, who takes part in it, and what will forget it."""

    live: Live
    member: Member | None = None
    fail: Fail | None = None
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class Seat:
    """A session's part in a training: its member, and the steps that were done when it opened."""

    member: Member
    step: int
    _leave: Callable[[], None] = field(repr=False)

    def leave(self) -> None:
        """The session has ended; safe to repeat."""
        self._leave()


class Training:
    """All trainings of one server.

    Args:
        section: the settings; its folder is given.
        trunk: the blocks.
        metrics: counts what happens.

    Raises:
        ConfigError: the weights give no gradients.
    """

    def __init__(self, section: TrainingSection, trunk: Trunk, metrics: Metrics) -> None:
        assert section.folder is not None
        placement = trunk.runner.placement
        if is_own(placement.quantization, placement.device):
            raise ConfigError(
                f"model.quantization {placement.quantization} gives no gradients, which training "
                "needs; leave it out, or leave training.folder out"
            )
        self._section = section
        self._trunk = trunk
        self._factor = embedding_factor(trunk.checkpoint.config)
        store = TrainingStore(section.folder, section.keep, trunk.checkpoint.name, self._factor)
        budget = RowBudget(section.kept_rows, section.pending_rows)
        self._services = Services(store, budget, metrics)
        self._workers: Workers | None = None
        self._entries: dict[RunKey, _Entry] = {}
        self._opening = asyncio.Lock()
        self._adapters: WeakValueDictionary[tuple[RunKey, int], Adapter] = WeakValueDictionary()
        self._prompts: WeakValueDictionary[tuple[RunKey, int], SoftPrompt] = WeakValueDictionary()
        self._watch(metrics)

    def start(self) -> None:
        """Take the folder and make the workers; `stop` must follow.

        Raises:
            ConfigError: the folder cannot be used.
        """
        self._services.store.open()
        section = self._section
        self._workers = Workers(self._trunk.runner.span, section.workers, section.threads)

    async def stop(self) -> None:
        """End the workers; no session is open any more."""
        for entry in self._entries.values():
            if entry.timer is not None:
                entry.timer.cancel()
        self._entries.clear()
        if self._workers is not None:
            await self._workers.stop()
        self._services.store.close()

    async def open(
        self,
        tenant: str,
        request: OpenTraining,
        projection: Projection | None,
        fail: Fail,
    ) -> Seat:
        """Take part in a training.

        Args:
            tenant: who asks.
            request: for what; its model and span have been checked.
            projection: what widens its rows.
            fail: ends the session.

        Raises:
            ConfigError: it cannot be trained as asked.
            QuotaExceeded: the tenant has as many trainings as it may have.
            StaleStep: there is no step that both sides can go on from.
            CheckpointError: a saved step cannot be read.
        """
        recipe = self._recipe(request)
        key = RunKey(tenant, check_name(request.adapter))
        formats = Formats.of(request, self._trunk.checkpoint.hidden_size, projection)
        async with self._opening:
            await self._take_over(key)
            try:
                await self._check_quota(key)
                live = await self._resumed(key, recipe, request.resume_steps)
            except BaseException:
                self._forget_later(key)
                raise
            member = SoloMember(tenant, live, formats, self._services)
            self._entries[key] = _Entry(live, member, fail)
        return Seat(member, live.run.steps, lambda: self._leave(key, member))

    async def adapter(self, tenant: str, name: str) -> Adapter | None:
        """The adapter that a tenant has trained and saved under a name; None when there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        found = await self._saved(tenant, name)
        if found is None or found[1].adapter is None:
            return None
        adapter = found[1].adapter.to(self._trunk.runner.placement.device).requires_grad_(False)
        return self._adapters.setdefault(found[0], adapter)

    async def prompt(self, tenant: str, name: str) -> SoftPrompt | None:
        """The soft prompt that a tenant has trained and saved under a name, or None.

        Raises:
            CheckpointError: it cannot be read.
            ConfigError, FingerprintMismatch: it was trained for another model.
        """
        found = await self._saved(tenant, name)
        if found is None or found[1].prompt is None:
            return None
        prompt = found[1].prompt
        hidden_size = self._trunk.checkpoint.hidden_size
        prompt.check_fits(hidden_size, prompt.entrance, self._trunk.fingerprint)
        prompt = prompt.to(self._trunk.runner.placement.device).requires_grad_(False)
        return self._prompts.setdefault(found[0], prompt)

    async def _saved(self, tenant: str, name: str) -> tuple[tuple[RunKey, int], Trained] | None:
        """What a tenant has saved last under a name, and where it came from."""
        try:
            key = RunKey(tenant, check_name(name))
        except ConfigError:
            return None
        found = await asyncio.to_thread(self._services.store.trained, key, self._trunk.span)
        return None if found is None else ((key, found[0]), found[1])

    async def _take_over(self, key: RunKey) -> None:
        """End the session that takes part, and wait for what it had begun."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.timer is not None:
            entry.timer.cancel()
        if entry.member is not None and entry.fail is not None:
            entry.fail(SessionLost(REPLACED))
            entry.member.leave()
            entry.member = None
        await entry.live.line.idle()

    async def _check_quota(self, key: RunKey) -> None:
        names = await asyncio.to_thread(self._services.store.names, key.owner)
        names |= {other.name for other in self._entries if other.owner == key.owner}
        if key.name not in names and len(names) >= self._section.max_adapters:
            raise QuotaExceeded(
                f"the tenant has {len(names)} trainings at this server, which is its quota; go on "
                "with one of them, or ask the operator to remove one"
            )

    async def _resumed(self, key: RunKey, recipe: Recipe, offers: tuple[int, ...]) -> Live:
        """The run at the highest step that both sides have; step 0 is everybody's."""
        store = self._services.store
        saved = set(await asyncio.to_thread(store.steps, key))
        entry = self._entries.get(key)
        live = None if entry is None or entry.live.run.is_broken else entry.live
        here = {0} | saved | (set() if live is None else {live.run.steps})
        common = here & set(offers)
        if not common:
            raise StaleStep(
                f"the client can go on from {_listed(offers)} and the server from {_listed(here)}; "
                "begin anew, or use the client's files of the same training"
            )
        step = max(common)
        if live is not None and live.run.steps == step:
            if live.run.recipe == recipe:
                return live
            if step and step not in saved:
                check_same(live.run.recipe, recipe)
        run = self._fresh(recipe)
        if step:
            await asyncio.to_thread(store.load, key, step, run)
        assert self._workers is not None
        return Live(key, run, Line(self._workers), saved=step or None)

    def _fresh(self, recipe: Recipe) -> TrainingRun:
        runner, hidden_size = self._trunk.runner, self._trunk.checkpoint.hidden_size
        linears = runner.span.linears()
        return TrainingRun.fresh(recipe, linears, hidden_size, self._factor, runner.placement)

    def _recipe(self, request: OpenTraining) -> Recipe:
        section = self._section
        if request.lora is not None and request.lora.rank > section.max_rank:
            raise ConfigError(
                f"a rank of {request.lora.rank} is above {section.max_rank}, the most of this "
                "server; use a smaller one, or ask the operator to raise training.max_rank"
            )
        if request.prompt_rows > section.max_prompt_rows:
            raise ConfigError(
                f"{request.prompt_rows} prompt rows are above {section.max_prompt_rows}, the most "
                "of this server; train fewer, or ask the operator to raise training.max_prompt_rows"
            )
        optimizer = request.optimizer
        return Recipe(
            model=self._trunk.fingerprint,
            span=Span(request.first_block, request.end_block),
            lora=_lora(request),
            prompt_rows=request.prompt_rows,
            optimizer=AdamWConfig(
                (optimizer.beta1, optimizer.beta2), optimizer.eps, optimizer.weight_decay
            ),
            seed=request.seed,
        )

    def _leave(self, key: RunKey, member: Member) -> None:
        member.leave()
        entry = self._entries.get(key)
        if entry is None or entry.member is not member:
            return
        entry.member = entry.fail = None
        self._forget_later(key)

    def _forget_later(self, key: RunKey) -> None:
        """Let a run without a member go when nobody has taken part in it for a while."""
        entry = self._entries.get(key)
        if entry is not None:
            loop = asyncio.get_running_loop()
            entry.timer = loop.call_later(self._section.grace_s, self._entries.pop, key, None)

    def _watch(self, metrics: Metrics) -> None:
        budget = self._services.budget
        watch = metrics.watch
        watch("training_runs", "Trainings in memory", lambda: len(self._entries))
        watch("training_kept_rows", "Rows whose activations are kept", lambda: budget.kept)
        watch("training_pending_rows", "Rows of open Forwards", lambda: budget.pending)


def _lora(request: OpenTraining) -> LoraConfig | None:
    lora = request.lora
    if lora is None:
        return None
    return LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=tuple(sorted(set(lora.targets))),
        blocks=tuple(sorted(set(lora.blocks))) or None,
        rslora=lora.rslora,
        freeze_a=lora.freeze_a,
    )


def _listed(steps: set[int] | tuple[int, ...]) -> str:
    return "step " + ", ".join(str(step) for step in sorted(steps))
