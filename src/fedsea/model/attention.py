"""Attention for a ragged batch: rows of many sequences in one call, keys and values in the pool.

The rows of all sequences are packed along the sequence axis of a batch of one. transformers calls
`attend` in place of its own attention; the layer's module knows its `KVContext`, which knows
the batch now running and where its keys and values lie.

Shapes: T packed rows, H query heads, G key-value heads, D head size, L rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fedsea.model.kv_cache import KVCache

ATTENTION_NAME = "fedsea_ragged"


@dataclass(frozen=True, slots=True)
class RowRun:
    """Where the rows of one sequence lie in the cache: one slice, or row numbers."""

    first: int
    rows: Tensor | None

    def read(self, store: Tensor, start: int, end: int) -> Tensor:
        """Rows ``[start, end)`` of the sequence, a view when they lie in one run."""
        if self.rows is None:
            return store[self.first + start : self.first + end]
        return store[self.rows[start:end]]


@dataclass(frozen=True, slots=True)
class BatchItem:
    """New rows of one sequence: packed rows ``[offset, offset + count)`` at position `start`."""

    offset: int
    start: int
    count: int
    run: RowRun


@dataclass(slots=True)
class RaggedBatch:
    """One step: its items, their positions and the cache rows that they are written to.

    `position_ids` is (1, T). `slots` is (T,), or None when nothing is kept: then every item
    starts at 0 and its rows attend to each other only, which is differentiable.
    """

    items: tuple[BatchItem, ...]
    position_ids: Tensor
    slots: Tensor | None
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def whole(cls, counts: Iterable[int], device: torch.device) -> RaggedBatch:
        """Whole sequences of the given lengths, run without a cache, as in training."""
        items, positions = [], []
        offset = 0
        for count in counts:
            items.append(BatchItem(offset, 0, count, RowRun(offset, None)))
            positions.append(torch.arange(count, device=device))
            offset += count
        return cls(tuple(items), torch.cat(positions)[None], None)

    def mask(self, index: int, window: int) -> Tensor:
        """Boolean mask (count, L) of item `index`; window 0 means no window."""
        key = (index, window)
        if key not in self.masks:
            self.masks[key] = causal_mask(self.items[index], window, self.position_ids.device)
        return self.masks[key]


@dataclass(slots=True)
class KVContext:
    """What the attention of one span reads and writes."""

    cache: KVCache | None = None
    batch: RaggedBatch | None = None

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
        keys.index_copy_(0, batch.slots, new_keys)
        values.index_copy_(0, batch.slots, new_values)
        return keys, values


def causal_mask(item: BatchItem, window: int, device: torch.device) -> Tensor:
    """True where row `start + i` may read key position j; keys before the window are cut off."""
    low = first_key(item, window)
    queries = torch.arange(item.start, item.start + item.count, device=device)[:, None]
    keys = torch.arange(low, item.start + item.count, device=device)[None, :]
    allowed = keys <= queries
    if window:
        allowed &= keys > queries - window
    return allowed


def first_key(item: BatchItem, window: int) -> int:
    """First key position that any row of the item can read."""
    return max(0, item.start + 1 - window) if window else 0


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
    batch = context.batch
    if batch is None:
        raise RuntimeError("attention was called outside BlockSpan.run")
    keys, values = context.keep(batch, module.kv_layer, key, value)  # type: ignore[arg-type]
    window = kwargs.get("sliding_window") or 0
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    parts = []
    for index, item in enumerate(batch.items):
        end = item.start + item.count
        low = first_key(item, window)
        item_query = query[0, :, item.offset : item.offset + item.count]
        item_keys = item.run.read(keys, low, end)
        item_values = item.run.read(values, low, end)
        if softcap is None and sinks is None:
            mask = None if item.count == 1 else batch.mask(index, window)
            parts.append(_fused(item_query, item_keys, item_values, mask, scaling))
        else:
            parts.append(
                _explicit(
                    item_query,
                    item_keys,
                    item_values,
                    batch.mask(index, window),
                    scaling or query.shape[-1] ** -0.5,
                    softcap,
                    sinks,
                )
            )
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Scores through torch's fused kernel: query (H, n, D), keys and values (L, G, D)."""
    heads, count, size = query.shape
    groups = keys.shape[1]
    if count == 1:
        # One row reads every key, so the query heads of a group are simply more rows.
        folded = query.reshape(1, groups, heads // groups, size)
        mixed = scaled_dot_product_attention(
            folded, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=scaling
        )
        return mixed.reshape(1, 1, heads, values.shape[-1])
    mixed = scaled_dot_product_attention(
        query[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scaling,
        enable_gqa=groups != heads,
    )
    return mixed.transpose(1, 2)


def _explicit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores written out, for soft-capped logits (Gemma 2) and attention sinks (gpt-oss)."""
    heads, count, size = query.shape
    groups = keys.shape[1]
    folded = query.reshape(groups, heads // groups, count, size)
    scores = torch.einsum("ghnd,lgd->ghnl", folded, keys) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(groups, heads // groups, 1, 1).expand(-1, -1, count, 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    mixed = torch.einsum("ghnl,lgd->nghd", weights, values)
    return mixed.reshape(1, count, heads, values.shape[-1])


def register() -> None:
    """Make `attend` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attend)
