"""Rows of many possible next tokens after one prefix, computed together.

All candidates share the keys and values of the prefix, so attention is one matrix product for all
of them instead of one read of the prefix for each. The blocks are those of the model; only their
attention function is another one: in `fedsea_shared_prefix` all packed rows stand at the same
position and see the prefix and themselves, or follow each other and see what is before them.

Shapes: T packed rows, H query heads, G key-value heads, D head size, P rows of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter
from fedsea.model.partition import Span
from fedsea.model.spans import BlockSpan, Placement, attention_modules, load_bottom

ATTENTION_NAME = "fedsea_shared_prefix"
CHUNK_ROWS = 2048

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Tokens that are settled: their ids, and keys and values (G, P, D) of every block."""

    ids: tuple[int, ...] = ()
    blocks: tuple[KeysValues, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, dtype: torch.dtype) -> Prefix:
        """The same in another dtype."""
        blocks = tuple((keys.to(dtype), values.to(dtype)) for keys, values in self.blocks)
        return Prefix(self.ids, blocks)


@dataclass(slots=True, eq=False)
class _Step:
    """What the attention function needs to know of the call that now runs."""

    prefix: Prefix = field(default_factory=Prefix)
    is_sweep: bool = False
    new: list[KeysValues] = field(default_factory=list)


class Continuation:
    """The first blocks of a model, asked for the rows of possible next tokens.

    Args:
        span: embedding and blocks; its attention is replaced, so it serves nothing else.
        vocabulary: number of token ids.
        adapter: what the blocks add to their linears, None for nothing.

    Raises:
        ConfigError: the adapter does not fit the blocks.
    """

    def __init__(self, span: BlockSpan, vocabulary: int, adapter: Adapter | None = None) -> None:
        _register()
        self.span = span
        self._adapter = adapter
        if adapter is not None:
            span.accept(adapter)
        self.vocabulary = vocabulary
        self._step = _Step()
        blocks: Any = span.blocks
        blocks.config._attn_implementation = ATTENTION_NAME
        for layer, module in enumerate(attention_modules(span.blocks)):
            attention: Any = module
            attention.config._attn_implementation = ATTENTION_NAME
            module.shared_step, module.shared_layer = self._step, layer  # type: ignore[assignment]

    @property
    def num_blocks(self) -> int:
        """Blocks after the embedding."""
        return len(self.span.span)

    def embedding(self) -> Tensor:
        """Embedding rows [vocabulary, hidden] as the first block gets them."""
        ids = torch.arange(self.vocabulary)
        with torch.inference_mode():
            blocks: Any = self.span.blocks
            rows: Tensor = blocks.embed_tokens(ids)
        return rows

    @torch.inference_mode()
    def candidate_rows(self, prefix: Prefix, candidates: Tensor) -> Tensor:
        """Row [n, hidden] of each candidate id (n,) as the token after the prefix."""
        parts = [self._run(prefix, chunk, is_sweep=True) for chunk in candidates.split(CHUNK_ROWS)]
        return torch.cat(parts)

    @torch.inference_mode()
    def extend(self, prefix: Prefix, ids: Sequence[int]) -> tuple[Prefix, Tensor]:
        """The prefix with more tokens, and the rows [n, hidden] of these."""
        rows = self._run(prefix, torch.tensor(list(ids), dtype=torch.long), is_sweep=False)
        new = self._step.new
        old = prefix.blocks or (None,) * len(new)
        blocks = tuple(
            added if known is None else _appended(known, added)
            for known, added in zip(old, new, strict=True)
        )
        return Prefix((*prefix.ids, *ids), blocks), rows

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows [n, hidden] of a whole text (n,)."""
        return self.extend(Prefix(), ids.tolist())[1]

    def _run(self, prefix: Prefix, ids: Tensor, is_sweep: bool) -> Tensor:
        step = self._step
        step.prefix, step.is_sweep, step.new = prefix, is_sweep, []
        start = len(prefix)
        count = len(ids)
        positions = torch.full((count,), start) if is_sweep else torch.arange(start, start + count)
        if self._adapter is not None:
            self.span.adapters.rows = (AdaptedRows(0, count, self._adapter),)
        return self.span.forward_blocks(self.span.blocks, ids, positions[None])


def load_continuation(
    checkpoint: Checkpoint,
    span: Span,
    dtype: torch.dtype = torch.float32,
    adapter: Adapter | None = None,
) -> Continuation:
    """Embedding and first blocks on the CPU, for an attacker.

    Raises:
        ModelError: the checkpoint lacks the blocks or cannot be cut.
        ConfigError: the adapter does not fit the blocks.
    """
    blocks = load_bottom(checkpoint, span, Placement(dtype=dtype))
    return Continuation(blocks, int(checkpoint.config.vocab_size), adapter)


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
    """Attention of packed rows to a shared prefix, as registered with transformers.

    Args:
        module: the attention layer; `shared_step` and `shared_layer` were set by `Continuation`.
        query: (1, H, T, D). key, value: (1, G, T, D).
        attention_mask: always None.
        scaling: factor on the scores.
        dropout: ignored.
        **kwargs: `sliding_window`, `softcap` and `s_aux` of some families.

    Returns:
        (1, T, H, D) and no weights.
    """
    step: _Step = module.shared_step  # type: ignore[assignment]
    layer: int = module.shared_layer  # type: ignore[assignment]
    keys, values = key[0], value[0]
    if not step.is_sweep:
        step.new.append((keys, values))
    heads, groups, count = query.shape[1], keys.shape[0], query.shape[2]
    folded = query[0].unflatten(0, (groups, heads // groups))
    factor = scaling or query.shape[-1] ** -0.5
    parts = []
    known = step.prefix.blocks[layer] if step.prefix.blocks else None
    if known is not None:
        parts.append(folded @ known[0][:, None].transpose(-1, -2))
    own_row = (folded * keys[:, None]).sum(dim=-1, keepdim=True)
    parts.append(own_row if step.is_sweep else folded @ keys[:, None].transpose(-1, -2))
    scores = torch.cat(parts, dim=-1) * factor
    softcap: float | None = kwargs.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    allowed = _allowed(step, count, kwargs.get("sliding_window") or 0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = _softmax(scores, kwargs.get("s_aux"), groups)
    length = len(step.prefix)
    mixed = (
        weights[..., length:] * values[:, None]
        if step.is_sweep
        else weights[..., length:] @ values[:, None]
    )
    if known is not None:
        mixed = mixed + weights[..., :length] @ known[1][:, None]
    return mixed.flatten(0, 1).transpose(0, 1)[None], None


def _allowed(step: _Step, count: int, window: int) -> Tensor | None:
    """(T, L): which keys a row reads; None when it reads all."""
    length = len(step.prefix)
    if step.is_sweep:
        if not window or length < window:
            return None
        return torch.arange(length + 1)[None] > length - window
    queries = torch.arange(length, length + count)[:, None]
    keys = torch.arange(length + count)[None]
    allowed = keys <= queries
    return allowed & (keys > queries - window) if window else allowed


def _softmax(scores: Tensor, sinks: Tensor | None, groups: int) -> Tensor:
    """Weights (G, H/G, T, L); attention sinks take a share and give nothing."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.reshape(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column.to(scores.dtype)], dim=-1), dim=-1)[..., :-1]


def _appended(known: KeysValues, added: KeysValues) -> KeysValues:
    return torch.cat([known[0], added[0]], dim=1), torch.cat([known[1], added[1]], dim=1)


def _register() -> None:
    AttentionInterface.register(ATTENTION_NAME, attend)
