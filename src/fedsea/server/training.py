"""Trainings of the trunk: which there are, who takes part, and from which step they go on.

A training is a tenant's under a name, or a group's whose members the operator has named. A tenant
takes part in it with one session; when it opens another, as after a broken connection, the earlier
one ends. Without sessions the run stays in memory for a while, at its last step; afterwards it goes
on from what was saved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from fedsea.errors import (
    Capacity,
    ConfigError,
    FedseaError,
    QuotaExceeded,
    SessionLost,
    StaleStep,
)
from fedsea.model.lora import Adapter, LoraConfig
from fedsea.model.optimization import AdamWConfig
from fedsea.model.partition import Span
from fedsea.model.projection import Projection
from fedsea.model.prompts import SoftPrompt
from fedsea.model.quantization import is_own
from fedsea.model.spans import embedding_factor
from fedsea.server.config import GroupSection, TrainingSection
from fedsea.server.loading import Trunk
from fedsea.server.metrics import Metrics
from fedsea.server.training_batch import BatchMember, BatchRun
from fedsea.server.training_groups import Averaging, HierarchicalMember, SequentialMember
from fedsea.server.training_member import Formats, Live, Member, Services, SoloMember
from fedsea.server.training_rows import RowBudget
from fedsea.server.training_run import Recipe, TrainingRun
from fedsea.server.training_store import (
    GROUPS,
    RunKey,
    Trained,
    TrainingStore,
    Version,
    check_name,
    check_same,
)
from fedsea.server.training_workers import Line, Workers
from fedsea.wire.messages import OpenTraining

REPLACED: Final = (
    "another session of this tenant has taken over the training; open it again to take it back"
)

RETRY_AFTER: Final = 5.0

Fail = Callable[[FedseaError], None]

_S = TypeVar("_S")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a training is kept, and the group whose it is; None when it is a tenant's own."""

    key: RunKey
    group: GroupSection | None = None

    @property
    def is_shared(self) -> bool:
        """Whether several members train one run."""
        return self.group is not None and self.group.strategy != "server-hierarchical"


@dataclass(frozen=True, slots=True)
class _Seated:
    """A session's member, and what ends the session."""

    member: Member
    fail: Fail


@dataclass(slots=True)
class _Entry:
    """A run in memory, the tenants that take part in it, and what will forget it."""

    live: Live
    seated: dict[str, _Seated] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    batch: BatchRun | None = None


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
        max_rows: most rows of one Forward, and of several that are computed together.

    Raises:
        ConfigError: the weights give no gradients.
    """

    def __init__(
        self, section: TrainingSection, trunk: Trunk, metrics: Metrics, max_rows: int
    ) -> None:
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
        self._services = Services(store, budget, metrics, max_rows)
        self._workers: Workers | None = None
        self._entries: dict[RunKey, _Entry] = {}
        self._averaging: dict[str, Averaging] = {}
        self._opening: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._reading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._adapters: WeakValueDictionary[tuple[RunKey, Version], Adapter] = WeakValueDictionary()
        self._prompts: WeakValueDictionary[tuple[RunKey, Version], SoftPrompt] = (
            WeakValueDictionary()
        )
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
            Capacity: another member of its group has the run to itself.
            StaleStep: there is no step that both sides can go on from.
            CheckpointError: a saved step cannot be read.
        """
        place = self._place(tenant, check_name(request.adapter))
        recipe = self._recipe(request, place.group)
        formats = Formats.of(request, self._trunk.checkpoint.hidden_size, projection)
        async with self._opens(place):
            try:
                await self._make_room(place, tenant)
                live, step = await self._joined(place, tenant, recipe, request.resume_steps)
                entry = self._entries.get(place.key)
                if entry is None or entry.live is not live:
                    entry = self._entries[place.key] = _Entry(live)
                member = self._member(place, entry, tenant, formats, fail, request.weight)
                entry.seated[tenant] = _Seated(member, fail)
            except BaseException:
                self._forget_later(place.key)
                raise
        return Seat(member, step, lambda: self._leave(place.key, tenant, member))

    async def adapter(self, tenant: str, name: str) -> Adapter | None:
        """The adapter that a tenant has trained and saved under a name; None when there is none.

        Raises:
            CheckpointError: it cannot be read.
        """

        def ready(trained: Trained) -> Adapter | None:
            if trained.adapter is None:
                return None
            return trained.adapter.to(self._trunk.runner.placement.device).requires_grad_(False)

        return await self._saved(tenant, name, self._adapters, ready)

    async def prompt(self, tenant: str, name: str) -> SoftPrompt | None:
        """The soft prompt that a tenant has trained and saved under a name, or None.

        Raises:
            CheckpointError: it cannot be read.
            ConfigError, FingerprintMismatch: it was trained for another model.
        """

        def ready(trained: Trained) -> SoftPrompt | None:
            prompt = trained.prompt
            if prompt is None:
                return None
            hidden_size = self._trunk.checkpoint.hidden_size
            prompt.check_fits(hidden_size, prompt.entrance, self._trunk.fingerprint)
            return prompt.to(self._trunk.runner.placement.device).requires_grad_(False)

        return await self._saved(tenant, name, self._prompts, ready)

    async def _saved(
        self,
        tenant: str,
        name: str,
        known: WeakValueDictionary[tuple[RunKey, Version], _S],
        ready: Callable[[Trained], _S | None],
    ) -> _S | None:
        """What a tenant has saved last under a name; read once while sessions use it.

        One after another: however many sessions open, one copy is in memory.
        """
        try:
            key = self._place(tenant, check_name(name)).key
        except ConfigError:
            return None
        store = self._services.store
        async with self._reading.setdefault(key.owner, asyncio.Lock()):
            version = await asyncio.to_thread(store.version, key)
            found = None if version is None else known.get((key, version))
            if found is not None or version is None:
                return found
            read = await asyncio.to_thread(store.trained, key, self._trunk.span)
            if read is not None:
                found = ready(read[1])
                if found is not None:
                    known[key, read[0]] = found
            return found

    def _opens(self, place: _Place) -> asyncio.Lock:
        """Held by whoever opens a training of this tenant or group: one after another."""
        owner = place.key.owner, "" if place.group is None else place.key.name
        return self._opening.setdefault(owner, asyncio.Lock())

    def _place(self, tenant: str, name: str) -> _Place:
        """What a tenant means by a name: a group that it belongs to, or a training of its own."""
        group = self._section.groups.get(name)
        if group is None or tenant not in group.tenants:
            return _Place(RunKey(tenant, name))
        has_copies = group.strategy == "server-hierarchical"
        return _Place(RunKey(GROUPS, name, tenant if has_copies else ""), group)

    def _member(
        self,
        place: _Place,
        entry: _Entry,
        tenant: str,
        formats: Formats,
        fail: Fail,
        weight: float,
    ) -> Member:
        live, services, group = entry.live, self._services, place.group
        if group is None:
            return SoloMember(tenant, live, formats, services)
        if group.strategy == "sequential":
            return SequentialMember(tenant, live, formats, services)
        if group.strategy == "server-hierarchical":
            assert self._workers is not None
            averaging = self._averaging.setdefault(place.key.name, Averaging(group, self._workers))
            counts = weight if group.weigh else 1.0
            return HierarchicalMember(tenant, live, formats, services, averaging, counts)
        if entry.batch is None:
            entry.batch = BatchRun(live, group, services)
        return BatchMember(tenant, entry.batch, formats, fail)

    async def _make_room(self, place: _Place, tenant: str) -> None:
        """End the tenant's earlier session, and wait for what it had begun."""
        entry = self._entries.get(place.key)
        if entry is None:
            await self._check_quota(place.key)
            return
        if entry.timer is not None:
            entry.timer.cancel()
        earlier = entry.seated.pop(tenant, None)
        if earlier is not None:
            earlier.fail(SessionLost(REPLACED))
            earlier.member.leave()
        is_alone = place.group is not None and place.group.strategy == "sequential"
        if is_alone and entry.seated:
            raise Capacity(
                "another member of the group trains now; try again when it has finished",
                retry_after=RETRY_AFTER,
            )
        if not entry.seated:
            await entry.live.line.idle()

    async def _check_quota(self, key: RunKey) -> None:
        if key.owner == GROUPS:
            return
        names = await asyncio.to_thread(self._services.store.names, key.owner)
        names |= {other.name for other in self._entries if other.owner == key.owner}
        if key.name not in names and len(names) >= self._section.max_adapters:
            raise QuotaExceeded(
                f"the tenant has {len(names)} trainings at this server, which is its quota; go on "
                "with one of them, or ask the operator to remove one"
            )

    async def _joined(
        self, place: _Place, tenant: str, recipe: Recipe, offers: tuple[int, ...]
    ) -> tuple[Live, int]:
        """The run to take part in, and the steps that are done in it as the tenant counts them."""
        entry = self._entries.get(place.key)
        live = None if entry is None or entry.live.run.is_broken else entry.live
        if not place.is_shared:
            live = await self._resumed(place.key, live, recipe, offers)
            return live, live.run.steps
        if live is not None and entry is not None and entry.seated:
            check_same(live.run.recipe, recipe)
        else:
            live = await self._shared(place, live, tenant, recipe, offers)
        step = live.members.get(tenant, 0)
        if step not in offers:
            # The others have gone on: the member goes on from what it has.
            step = max(offers)
        live.members[tenant] = step
        return live, step

    async def _resumed(
        self, key: RunKey, live: Live | None, recipe: Recipe, offers: tuple[int, ...]
    ) -> Live:
        """The run at the highest step that both sides have; step 0 is everybody's."""
        saved = set(await asyncio.to_thread(self._services.store.steps, key))
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
        return await self._loaded(key, step, recipe)

    async def _shared(
        self,
        place: _Place,
        live: Live | None,
        tenant: str,
        recipe: Recipe,
        offers: tuple[int, ...],
    ) -> Live:
        """The run of a group in which nobody takes part now.

        It goes on where it was, unless the tenant has to go back to a step that was saved: then it
        goes back too, but in a sequence of members not behind what others have done since. To the
        start it goes back only while nothing has been saved.
        """
        store, key = self._services.store, place.key
        saved = await asyncio.to_thread(store.steps, key)
        known = {step: await asyncio.to_thread(store.members, key, step) for step in saved}
        if not saved:
            known[0] = {}
        newest = max(saved, default=0)
        if live is not None and live.run.steps >= newest:
            newest, known[live.run.steps] = live.run.steps, dict(live.members)
        assert place.group is not None
        others = _without(tenant, known.get(newest, {}))
        fitting = [
            step
            for step, members in known.items()
            if members.get(tenant, None if step else 0) in offers
            and (place.group.strategy != "sequential" or _without(tenant, members) == others)
        ]
        step = max(fitting, default=newest)
        if live is not None and live.run.steps == step:
            check_same(live.run.recipe, recipe)
            return live
        return await self._loaded(key, step, recipe, known.get(step))

    async def _loaded(
        self, key: RunKey, step: int, recipe: Recipe, members: Mapping[str, int] | None = None
    ) -> Live:
        """A run as it was saved; new when the step is 0."""
        run = await asyncio.to_thread(self._fresh, recipe)
        if step:
            await asyncio.to_thread(self._services.store.load, key, step, run)
        assert self._workers is not None
        live = Live(key, run, Line(self._workers), saved=step or None, members=dict(members or {}))
        if run.last is not None:
            live.last = {
                tenant: replace(run.last, number=done) for tenant, done in live.members.items()
            }
        return live

    def _fresh(self, recipe: Recipe) -> TrainingRun:
        runner, hidden_size = self._trunk.runner, self._trunk.checkpoint.hidden_size
        linears = runner.span.linears()
        return TrainingRun.fresh(recipe, linears, hidden_size, self._factor, runner.placement)

    def _recipe(self, request: OpenTraining, group: GroupSection | None) -> Recipe:
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
            seed=request.seed if group is None else group.seed,
        )

    def _leave(self, key: RunKey, tenant: str, member: Member) -> None:
        member.leave()
        entry = self._entries.get(key)
        seated = None if entry is None else entry.seated.get(tenant)
        if entry is not None and seated is not None and seated.member is member:
            del entry.seated[tenant]
            self._forget_later(key)

    def _forget_later(self, key: RunKey) -> None:
        """Let a run go when nobody has taken part in it for a while."""
        entry = self._entries.get(key)
        if entry is not None and not entry.seated:
            loop = asyncio.get_running_loop()
            # Of a run without steps nothing is lost: it begins as it began.
            seconds = self._section.grace_s if entry.live.run.steps else 0.0
            entry.timer = loop.call_later(seconds, self._forget, key, entry)

    def _forget(self, key: RunKey, entry: _Entry) -> None:
        """Let a run go behind what it still computes: a save may be under way."""

        def forget() -> None:
            if self._entries.get(key) is entry and not entry.seated:
                del self._entries[key]

        entry.live.line.put_on_loop(forget)

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


def _without(tenant: str, members: Mapping[str, int]) -> dict[str, int]:
    return {other: done for other, done in members.items() if other != tenant}


def _listed(steps: set[int] | tuple[int, ...]) -> str:
    return "step " + ", ".join(str(step) for step in sorted(steps))
