"""Attention for a ragged batch: rows of many sequences in one call, keys and values in the pool.

The rows of all sequences are packed along the sequence axis of a batch of one. transformers calls
`attend` in place of its own attention; the layer's module knows its `KVContext`, which knows
the batch now running and where its keys and values lie.

Sequences that add one row each are read together where their keys begin at equal distances, in
one strided view padded to the longest. A row past the end of a sequence has weight zero; it may
belong to someone else, so what is kept is always finite (zero times a number is zero).

Shapes: T packed rows, H query heads, G key-value heads, D head size, L rows of one sequence,
B sequences read together, n new rows of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fedsea.model.kv_cache import KVCache
from fedsea.model.lora import AdaptedRows

ATTENTION_NAME = "fedsea_ragged"

# Reading together pads to the longest: worth it up to this factor, or up to this length.
_MOST_PADDING = 2
_SHORT = 256


@dataclass(frozen=True, slots=True)
class RowRun:
    """Where the rows of one sequence lie in the cache: one slice, or row numbers."""

    first: int
    rows: Tensor | None


@dataclass(frozen=True, slots=True)
class BatchItem:
    """New rows of one sequence: packed rows ``[offset, offset + count)`` at position `start`."""

    offset: int
    start: int
    count: int
    run: RowRun

    @property
    def end(self) -> int:
        """Rows of the sequence after this step."""
        return self.start + self.count

    def first_key(self, window: int) -> int:
        """First key position that any new row can read; window 0 means no window."""
        return max(0, self.start + 1 - window) if window else 0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one kernel call reads: B sequences with n new rows each, L keys each.

    `packed` are the packed rows of the queries. Keys of sequence b begin at row
    ``first + b * stride``, or are the rows `gathered` (L,). `mask` is (B, n, L); None lets every
    query read every key, or the keys up to its own when `is_causal`.
    """

    packed: slice | Tensor
    sequences: int
    count: int
    length: int
    first: int = 0
    stride: int = 0
    gathered: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False

    def queries(self, rows: Tensor) -> Tensor:
        """(T, H, D) to (B, n, H, D)."""
        queries: Tensor = rows[self.packed].unflatten(0, (self.sequences, self.count))
        return queries

    def keys(self, store: Tensor) -> Tensor:
        """(rows, G, D) to (B, L, G, D), a view unless rows are gathered."""
        if self.gathered is not None:
            return store[self.gathered][None]
        if self.sequences == 1:
            return store[self.first : self.first + self.length][None]
        row, head, element = store.stride()
        together: Tensor = store.as_strided(
            (self.sequences, self.length, *store.shape[1:]),
            (self.stride * row, row, head, element),
            store.storage_offset() + self.first * row,
        )
        return together


@dataclass(frozen=True, slots=True)
class Plan:
    """All readings of a step; `order` puts their joined results in packed order, None is as is."""

    readings: tuple[Reading, ...]
    order: Tensor | None


@dataclass(slots=True)
class RaggedBatch:
    """One step: its items, their positions and the cache rows that they are written to.

    `position_ids` is (1, T). `slots` is (T,), or None when nothing is kept: then every item
    starts at 0 and its rows attend to each other only, which is differentiable. `store_rows` is
    the number of rows of the cache that reading together may touch; `adapters` says which rows
    use which adapter.
    """

    items: tuple[BatchItem, ...]
    position_ids: Tensor
    slots: Tensor | None
    store_rows: int = 0
    adapters: tuple[AdaptedRows, ...] = ()
    plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Packed rows, T."""
        return int(self.position_ids.shape[1])

    @property
    def is_decode(self) -> bool:
        """Whether every sequence adds exactly one row to what is kept."""
        return self.slots is not None and len(self.items) == self.num_rows

    @classmethod
    def whole(
        cls,
        counts: Iterable[int],
        device: torch.device,
        adapters: tuple[AdaptedRows, ...] = (),
    ) -> RaggedBatch:
        """Whole sequences of the given lengths, run without a cache, as in training."""
        items, positions = [], []
        offset = 0
        for count in counts:
            items.append(BatchItem(offset, 0, count, RowRun(offset, None)))
            positions.append(torch.arange(count, device=device))
            offset += count
        return cls(tuple(items), torch.cat(positions)[None], None, adapters=adapters)

    def plan(self, window: int) -> Plan:
        """How the layers with this sliding window read; made once per step."""
        if window not in self.plans:
            self.plans[window] = make_plan(
                self.items, window, self.store_rows, self.position_ids.device
            )
        return self.plans[window]


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer makes scores: their factor, their soft cap and its sliding window (0: none)."""

    scaling: float
    softcap: float | None = None
    window: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class KVContext:
    """What the attention of one span reads and writes.

    `number` names the context inside compiled code, which cannot hold Python objects.
    """

    cache: KVCache | None = None
    batch: RaggedBatch | None = None
    number: int = field(init=False)

    def __post_init__(self) -> None:
        self.number = next(_numbers)
        _contexts[self.number] = self

    def keep(
        self, batch: RaggedBatch, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values (1, G, T, D); return the stores (rows, G, D) to read from."""
        new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if batch.slots is None:
            return new_keys, new_values
        if self.cache is None:
            raise RuntimeError("the span has no cache yet; call new_cache first")
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(0, batch.slots, _finite(new_keys))
        values.index_copy_(0, batch.slots, _finite(new_values))
        return keys, values


def _finite(rows: Tensor) -> Tensor:
    return torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)


def make_plan(
    items: Sequence[BatchItem], window: int, store_rows: int, device: torch.device
) -> Plan:
    """Join what can be read together; the rest is read one sequence at a time."""
    readings: list[Reading] = []
    joined: list[int] = []
    single = [item for item in items if item.count == 1 and item.run.rows is None]
    for group in _groups(single, window, store_rows):
        readings.append(_read_together(group, window, device))
        joined.extend(item.offset for item in group)
    for item in items:
        if item.count > 1 or item.run.rows is not None:
            readings.append(_read_alone(item, window, device))
            joined.extend(range(item.offset, item.offset + item.count))
    if joined == list(range(len(joined))):
        return Plan(tuple(readings), None)
    return Plan(tuple(readings), torch.tensor(joined, device=device).argsort())


def _groups(items: Sequence[BatchItem], window: int, store_rows: int) -> Iterator[list[BatchItem]]:
    """Runs of items whose keys begin at equal distances and whose lengths are alike."""
    group: list[BatchItem] = []
    for item in sorted(items, key=lambda item: item.run.first + item.first_key(window)):
        if group and not _fits([*group, item], window, store_rows):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _fits(group: Sequence[BatchItem], window: int, store_rows: int) -> bool:
    begins = [item.run.first + item.first_key(window) for item in group]
    lengths = [item.end - item.first_key(window) for item in group]
    longest = max(lengths)
    return (
        begins[-1] - begins[-2] == begins[1] - begins[0]
        and begins[-1] + longest <= store_rows
        and (longest <= _SHORT or longest * len(group) <= _MOST_PADDING * sum(lengths))
    )


def _read_together(group: Sequence[BatchItem], window: int, device: torch.device) -> Reading:
    """One new row of each item; equal lengths need no mask."""
    begins = [item.run.first + item.first_key(window) for item in group]
    lengths = [item.end - item.first_key(window) for item in group]
    longest, offsets = max(lengths), [item.offset for item in group]
    mask = None
    if min(lengths) < longest:
        ends = torch.tensor(lengths, device=device)[:, None, None]
        mask = torch.arange(longest, device=device) < ends
    in_order = offsets == list(range(offsets[0], offsets[0] + len(offsets)))
    return Reading(
        packed=slice(offsets[0], offsets[0] + len(offsets))
        if in_order
        else torch.tensor(offsets, device=device),
        sequences=len(group),
        count=1,
        length=longest,
        first=begins[0],
        stride=begins[1] - begins[0] if len(group) > 1 else 0,
        mask=mask,
    )


def _read_alone(item: BatchItem, window: int, device: torch.device) -> Reading:
    low = item.first_key(window)
    is_causal = item.start == 0 and item.count > 1 and not (window and window < item.count)
    masked = item.count > 1 and not is_causal
    rows = item.run.rows
    return Reading(
        packed=slice(item.offset, item.offset + item.count),
        sequences=1,
        count=item.count,
        length=item.end - low,
        first=item.run.first + low,
        gathered=None if rows is None else rows[low : item.end],
        mask=causal_mask(item, window, device)[None] if masked else None,
        is_causal=is_causal,
    )


def causal_mask(item: BatchItem, window: int, device: torch.device) -> Tensor:
    """(n, L): True where row ``start + i`` may read a key; keys before the window are left out."""
    queries = torch.arange(item.start, item.end, device=device)[:, None]
    keys = torch.arange(item.first_key(window), item.end, device=device)[None, :]
    allowed = keys <= queries
    if window:
        allowed &= keys > queries - window
    return allowed


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers' signature
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - transformers' signature
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with transformers.

    Args:
        module: the attention layer; `kv_context` and `kv_layer` were set when the span was loaded.
        query: (1, H, T, D). key, value: (1, G, T, D).
        attention_mask: always None; causality follows from the batch.
        scaling: factor on the scores.
        dropout: ignored; a served model has none.
        **kwargs: `sliding_window`, `softcap` and `s_aux` (attention sinks) of some families.

    Returns:
        (1, T, H, D) and no weights.
    """
    context: KVContext = module.kv_context  # type: ignore[assignment]
    layer: int = module.kv_layer  # type: ignore[assignment]
    scores = Scores(
        scaling or query.shape[-1] ** -0.5, kwargs.get("softcap"), kwargs.get("sliding_window") or 0
    )
    sinks: Tensor | None = kwargs.get("s_aux")
    if torch.compiler.is_compiling():
        found = torch.ops.fedsea.attend(
            query,
            key,
            value,
            sinks,
            context.number,
            layer,
            scores.scaling,
            scores.softcap,
            scores.window,
        )
        return found, None
    return mix(context, layer, query, key, value, sinks, scores), None


def mix(
    context: KVContext,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scores: Scores,
) -> Tensor:
    """Keep the new rows and mix the values that each query reads: (1, T, H, D)."""
    batch = context.batch
    if batch is None:
        raise RuntimeError("attention was called outside BlockSpan.run")
    keys, values = context.keep(batch, layer, key, value)
    plan = batch.plan(scores.window)
    rows = query[0].transpose(0, 1)
    parts = []
    for reading in plan.readings:
        inputs = reading.queries(rows), reading.keys(keys), reading.keys(values)
        if scores.softcap is None and sinks is None:
            mixed = _fused(*inputs, reading, scores)
        else:
            mixed = _explicit(*inputs, reading, scores, sinks)
        parts.append(mixed.flatten(0, 1))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (joined if plan.order is None else joined[plan.order])[None]


def _fused(query: Tensor, keys: Tensor, values: Tensor, reading: Reading, scores: Scores) -> Tensor:
    """Scores through torch's fused kernel: (B, n, H, D), keys and values (B, L, G, D)."""
    heads, groups = query.shape[2], keys.shape[2]
    mask = None if reading.mask is None else reading.mask[:, None]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if reading.count == 1:
        # One row reads every key, so the query heads of a group are simply more rows.
        folded = query.reshape(-1, groups, heads // groups, query.shape[3])
        mixed = scaled_dot_product_attention(
            folded, keys, values, attn_mask=mask, scale=scores.scaling
        )
        return mixed.reshape(-1, 1, heads, values.shape[3])
    mixed = scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=mask,
        is_causal=reading.is_causal,
        scale=scores.scaling,
        enable_gqa=groups != heads,
    )
    return mixed.transpose(1, 2)


def _explicit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reading: Reading,
    scores: Scores,
    sinks: Tensor | None,
) -> Tensor:
    """Scores written out, for soft-capped logits (Gemma 2) and attention sinks (gpt-oss)."""
    heads, groups = query.shape[2], keys.shape[2]
    folded = query.unflatten(2, (groups, heads // groups))
    scored = torch.einsum("bnghd,blgd->bghnl", folded, keys) * scores.scaling
    if scores.softcap is not None:
        scored = torch.tanh(scored / scores.softcap) * scores.softcap
    mask = reading.mask
    if reading.is_causal:
        mask = torch.ones(scored.shape[-2:], dtype=torch.bool, device=scored.device).tril()[None]
    if mask is not None:
        scored = scored.masked_fill(~mask[:, None, None], torch.finfo(scored.dtype).min)
    if sinks is not None:
        column = sinks.reshape(groups, -1, 1, 1).expand(*scored.shape[:-1], 1)
        scored = torch.cat([scored, column.to(scored.dtype)], dim=-1)
    weights = torch.softmax(scored, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.einsum("bghnl,blgd->bnghd", weights, values).flatten(2, 3)


def register() -> None:
    """Make `attend` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attend)


def _attend_compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    context: int,
    layer: int,
    scaling: float,
    softcap: float | None,
    window: int,
) -> Tensor:
    """`mix` as one opaque step of compiled code, whose last rows may be padding."""
    owner = _contexts[context]
    rows = owner.batch.num_rows if owner.batch is not None else 0
    scores = Scores(scaling, softcap, window)
    new = query[:, :, :rows], key[:, :, :rows], value[:, :, :rows]
    mixed = mix(owner, layer, *new, sinks, scores)
    if rows == query.shape[2]:
        return mixed.contiguous()
    padded = mixed.new_zeros(1, query.shape[2], *mixed.shape[2:])
    padded[:, :rows] = mixed
    return padded


def _attend_shape(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_numbers = itertools.count()
_contexts: WeakValueDictionary[int, KVContext] = WeakValueDictionary()
_library = torch.library.Library("fedsea", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, int context, int layer, "
    "float scaling, float? softcap, int window) -> Tensor"
)
_library.impl("attend", _attend_compiled, "CompositeExplicitAutograd")
_library.impl("attend", _attend_shape, "Meta")
