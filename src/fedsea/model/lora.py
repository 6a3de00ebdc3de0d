"""Low-rank adapters on the linears of a span, those of many tenants in one batch.

An adapter adds ``scaling * B A x`` to the output of a linear (LoRA, arXiv 2106.09685). Each linear
that some adapter targets is wrapped once; which rows of a step use which adapter is said by the
span's `AdapterContext`, as the `KVContext` says where keys and values lie. Rows that name no
adapter are computed as if there were none, and a row's result does not depend on its neighbours'
adapters.

Shapes: T packed rows, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedsea.errors import ConfigError
from fedsea.model.partition import Span

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What an adapter changes, in PEFT's meaning of the words.

    Attributes:
        rank: r, the rows of A.
        alpha: the added part is scaled by alpha / r, or by alpha / sqrt(r) with `rslora`.
        dropout: on the input of A, in training only.
        targets: names of the linears, as the blocks call them.
        blocks: numbers of the blocks in the whole model; None for all.
        rslora: rank-stabilized scaling (arXiv 2312.03732).
        freeze_a: only B is trained, so that the mean of several parties' products B A is the
            product of the mean (FFA-LoRA, arXiv 2403.12313).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    blocks: tuple[int, ...] | None = None
    rslora: bool = False
    freeze_a: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora rank must be 1 or more: it is {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"lora alpha must be positive: it is {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout must be in [0, 1): it is {self.dropout}")
        if not self.targets:
            raise ConfigError(f"lora targets must name a linear, such as {', '.join(TARGETS)}")
        if self.blocks is not None and (not self.blocks or min(self.blocks) < 0):
            raise ConfigError("lora blocks must be block numbers from 0; leave them out for all")

    @property
    def scaling(self) -> float:
        """The factor on B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, block: int) -> bool:
        """Whether a block of the whole model is changed."""
        return self.blocks is None or block in self.blocks


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A linear of the whole model: its block and its path inside the block."""

    block: int
    path: str

    @property
    def target(self) -> str:
        """The last part of the path, which `LoraConfig.targets` name."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Factors:
    """A (r, in) and B (out, r) of one linear."""

    a: nn.Parameter
    b: nn.Parameter


class Adapter(nn.Module):
    """The factors of one adapter for the linears of one span.

    Args:
        config: what it changes.
        span: the blocks that it is for.
        factors: by place; all places are inside the span.

    Attributes:
        version: counts changes of the factors; whoever changes them calls `changed`.
    """

    def __init__(
        self, config: LoraConfig, span: Span, factors: Mapping[Place, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.config = config
        self.span = span
        self.version = 0
        self.factors: dict[Place, Factors] = {}
        for place, (a, b) in sorted(factors.items()):
            found = Factors(nn.Parameter(a, requires_grad=not config.freeze_a), nn.Parameter(b))
            name = f"{place.block}/{place.path}".replace(".", "/")
            self.register_parameter(f"{name}/a", found.a)
            self.register_parameter(f"{name}/b", found.b)
            self.factors[place] = found

    @classmethod
    def fresh(
        cls,
        config: LoraConfig,
        span: Span,
        linears: Mapping[Place, nn.Module],
        generator: torch.Generator,
    ) -> Adapter:
        """An adapter that changes nothing yet: A uniform as in `nn.Linear`, B zero.

        Args:
            config: what it changes.
            span: the blocks that it is for.
            linears: those of the span, see `linears_of`.
            generator: draws A on the CPU, place after place.

        Raises:
            ConfigError: there are linears, and none is a target.
        """
        check_targets(config, linears)
        factors = {}
        for place, layer in sorted(linears.items(), key=lambda entry: entry[0]):
            if place.target in config.targets and config.covers(place.block):
                inner, outer = sizes(layer)
                bound = 1 / math.sqrt(inner)
                a = (torch.rand(config.rank, inner, generator=generator) * 2 - 1) * bound
                factors[place] = (a, torch.zeros(outer, config.rank))
        return cls(config, span, factors)

    def changed(self) -> None:
        """Note that the factors have other values now."""
        self.version += 1

    @torch.no_grad()
    def copy_from(self, other: Adapter) -> None:
        """Take over the values of an adapter of the same places and sizes.

        Raises:
            ConfigError: it has other places or sizes; nothing was changed.
        """
        ours, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if {name: one.shape for name, one in ours.items()} != {
            name: one.shape for name, one in theirs.items()
        }:
            raise ConfigError(
                "the adapters change different linears, or have different ranks; "
                "use the lora options that the other was made with"
            )
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
        self.changed()


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Packed rows ``[start, end)`` of a step that use one adapter."""

    start: int
    end: int
    adapter: Adapter


@dataclass(slots=True)
class AdapterContext:
    """Which rows of the step now running use which adapter; dropout draws from `generator`.

    None means no dropout. A forward that is computed again with a generator of the same state
    draws the same masks.
    """

    rows: tuple[AdaptedRows, ...] = ()
    generator: torch.Generator | None = None


@dataclass(slots=True)
class _Table:
    """Factors of several adapters of one rank on top of each other, for rows that are mixed."""

    adapters: tuple[Adapter, ...]
    versions: tuple[int, ...]
    a: Tensor
    b: Tensor
    scaling: Tensor


class AdaptedLinear(nn.Module):
    """A linear with what the adapters of its rows add."""

    def __init__(self, base: nn.Module, place: Place, context: AdapterContext) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = sizes(base)
        self.place = place
        self._context = [context]  # a list, for a context is no part of the module tree
        self._table: _Table | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """(1, T, in) to (1, T, out)."""
        found: Tensor = self.base(rows)
        context = self._context[0]
        using = [used for used in context.rows if self.place in used.adapter.factors]
        if not using:
            return found
        if len(using) == 1 and using[0].end - using[0].start == rows.shape[-2]:
            return found + self._added(rows, using[0].adapter, context.generator)
        if not torch.is_grad_enabled() and all(used.end - used.start == 1 for used in using):
            return self._mixed(rows, found, using)
        parts = []
        for used in using:
            added = self._added(
                rows[..., used.start : used.end, :], used.adapter, context.generator
            )
            parts.append((used, added))
        return _placed(found, parts)

    def _added(self, rows: Tensor, adapter: Adapter, generator: torch.Generator | None) -> Tensor:
        factors = adapter.factors[self.place]
        inputs = rows.to(factors.a.dtype)
        if generator is not None and adapter.config.dropout:
            inputs = _dropped(inputs, adapter.config.dropout, generator)
        added = linear(linear(inputs, factors.a), factors.b) * adapter.config.scaling
        return added.to(rows.dtype)

    def _mixed(self, rows: Tensor, found: Tensor, using: Sequence[AdaptedRows]) -> Tensor:
        """Single rows of many adapters: two batched products instead of two for each adapter."""
        if len({used.adapter.config.rank for used in using}) > 1:
            parts = [
                (used, self._added(rows[..., used.start : used.end, :], used.adapter, None))
                for used in using
            ]
            return _placed(found, parts)
        table = self._table_of(tuple(dict.fromkeys(used.adapter for used in using)))
        numbers = {adapter: number for number, adapter in enumerate(table.adapters)}
        which = torch.tensor([numbers[used.adapter] for used in using], device=rows.device)
        at = torch.tensor([used.start for used in using], device=rows.device)
        inputs = rows[0, at, :, None].to(table.a.dtype)
        added = torch.bmm(table.b[which], torch.bmm(table.a[which], inputs))[..., 0]
        added = (added * table.scaling[which, None]).to(found.dtype)
        return found.index_add(1, at, added[None])

    def _table_of(self, adapters: tuple[Adapter, ...]) -> _Table:
        """The factors of these adapters together, kept until a step mixes others or they change."""
        versions = tuple(adapter.version for adapter in adapters)
        kept = self._table
        if kept is None or kept.adapters != adapters or kept.versions != versions:
            factors = [adapter.factors[self.place] for adapter in adapters]
            scaling = [adapter.config.scaling for adapter in adapters]
            a = torch.stack([each.a.detach() for each in factors])
            b = torch.stack([each.b.detach() for each in factors])
            kept = _Table(adapters, versions, a, b, torch.tensor(scaling, device=a.device))
            self._table = kept
        return kept


def _dropped(inputs: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Dropout whose mask comes from `generator`: kept numbers are divided by the share kept."""
    mask = torch.empty_like(inputs).bernoulli_(1 - share, generator=generator)
    return inputs * mask.div_(1 - share)


def _placed(found: Tensor, parts: Sequence[tuple[AdaptedRows, Tensor]]) -> Tensor:
    """`found` (1, T, out) with what is added to ranges of its rows."""
    pieces, at = [], 0
    for used, added in sorted(parts, key=lambda part: part[0].start):
        pieces += [found[:, at : used.start], found[:, used.start : used.end] + added]
        at = used.end
    return torch.cat([*pieces, found[:, at:]], dim=1)


def linears_of(blocks: nn.Module, span: Span) -> dict[Place, nn.Module]:
    """The linears inside the blocks of a span, of whatever weight format."""
    return dict(_find(blocks, span))


def _find(blocks: Any, span: Span) -> Iterator[tuple[Place, nn.Module]]:
    for block, layer in zip(range(span.first, span.end), blocks.layers, strict=True):
        for path, module in layer.named_modules():
            if isinstance(module, AdaptedLinear):
                yield module.place, module.base
            elif hasattr(module, "out_features") and not path.endswith(".base"):
                yield Place(block, path), module


def adapt(blocks: nn.Module, span: Span, context: AdapterContext, targets: Sequence[str]) -> None:
    """Wrap the linears of these names that are not wrapped yet."""
    for place, layer in linears_of(blocks, span).items():
        block: Any = blocks.layers[place.block - span.first]  # type: ignore[index]
        parent_path, _, name = place.path.rpartition(".")
        parent = block.get_submodule(parent_path)
        if name in targets and not isinstance(getattr(parent, name), AdaptedLinear):
            setattr(parent, name, AdaptedLinear(layer, place, context))


def check_targets(config: LoraConfig, linears: Mapping[Place, nn.Module]) -> None:
    """Refuse targets of which no linear has any; blocks of one model may differ in their linears.

    Raises:
        ConfigError: with the names that there are.
    """
    known = {place.target for place in linears}
    if linears and not known.intersection(config.targets):
        raise ConfigError(
            f"lora target {config.targets[0]!r} is no linear of these blocks; "
            f"use {', '.join(sorted(known))}"
        )


def sizes(layer: Any) -> tuple[int, int]:
    """Numbers that enter and leave a linear."""
    return int(layer.in_features), int(layer.out_features)
