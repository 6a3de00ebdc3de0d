"""Compiled decoding: one graph per number of sequences, attention and products opaque inside it.

Lengths live outside the graph (in the `KVContext`), so growing sequences never recompile; numbers
of sequences are padded to a few sizes. Prefill stays as it is: there the products dominate.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.nn.functional import pad

from fedsea.model.attention import BatchItem, RaggedBatch, RowRun
from fedsea.model.spans import BlockSpan

BATCH_SIZES = (1, 2, 4, 8, 16, 32)

Progress = Callable[[int, int], None]
Step = Callable[[Tensor, Tensor], Tensor]

_log = logging.getLogger(__name__)


class CompiledDecode:
    """Decode steps of one span through `torch.compile`.

    Steps of more sequences than the largest size, and everything after a failure to compile, run
    uncompiled.

    Args:
        span: the blocks.
        sizes: numbers of sequences to compile for, ascending.
    """

    def __init__(self, span: BlockSpan, sizes: Sequence[int] = BATCH_SIZES) -> None:
        self._span = span
        self._sizes = tuple(sizes)
        self._steps: dict[tuple[nn.Module, int], Step] = {}
        self._works = True

    def __call__(self, blocks: nn.Module, rows: Tensor, position_ids: Tensor) -> Tensor:
        """(T,) or (T, hidden) to (T, hidden), one row of each sequence."""
        count = position_ids.shape[1]
        index = bisect_left(self._sizes, count)
        if not self._works or index == len(self._sizes) or torch.is_grad_enabled():
            return self._span.forward_blocks(blocks, rows, position_ids)
        size = self._sizes[index]
        missing = size - count
        if missing:
            row_padding = (0, missing) if rows.ndim == 1 else (0, 0, 0, missing)
            rows, position_ids = pad(rows, row_padding), pad(position_ids, (0, missing))
        try:
            return self._step(blocks, size)(rows, position_ids)[:count]
        except (TorchDynamoException, InductorError) as error:
            self._give_up(error)
            return self._span.forward_blocks(blocks, rows, position_ids)[:count]

    def _step(self, blocks: nn.Module, size: int) -> Step:
        key = blocks, size
        if key not in self._steps:
            self._steps[key] = _compile(self._span, blocks)
        return self._steps[key]

    def _give_up(self, error: Exception) -> None:
        self._works = False
        reason = str(error).strip().split("\n", 1)[0]
        _log.warning("decoding runs uncompiled: torch.compile failed (%s)", reason)


def compile_decode(
    span: BlockSpan, sizes: Sequence[int] = BATCH_SIZES, progress: Progress | None = None
) -> None:
    """Compile the decode steps of a span that has a cache, for every number of sequences.

    `progress` is called with how many of how many sizes are done. Row 0 of the cache is written:
    call this before the first sequence begins. Falls back to uncompiled steps with one line in
    the log.
    """
    if not len(span.span):
        return
    span.decode = CompiledDecode(span, sizes)
    weight = next(span.blocks.parameters())
    for done, size in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        _warm_up(span, size, weight.device)
    if progress is not None:
        progress(len(sizes), len(sizes))


@torch.inference_mode()
def _warm_up(span: BlockSpan, size: int, device: torch.device) -> None:
    config: Any = span.blocks.config
    if span.takes_ids:
        rows = torch.zeros(size, dtype=torch.int64, device=device)
    else:
        assert span.context.cache is not None
        dtype = span.context.cache.keys[0].dtype
        rows = torch.zeros(size, config.hidden_size, dtype=dtype, device=device)
    items = tuple(BatchItem(index, 0, 1, RowRun(0, None)) for index in range(size))
    places = torch.zeros(size, dtype=torch.int64, device=device)
    span.run(rows, RaggedBatch(items, places[None], places))


def _compile(span: BlockSpan, blocks: nn.Module) -> Step:
    def step(rows: Tensor, position_ids: Tensor) -> Tensor:
        return span.forward_blocks(blocks, rows, position_ids)

    # torch keeps compiled variants per code object and gives up after a few: one object each.
    own = FunctionType(step.__code__.replace(), globals(), step.__name__, None, step.__closure__)
    compiled: Step = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled
