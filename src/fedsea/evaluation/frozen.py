"""A whole model in one process, cut like a split one, for training what stands at the cuts.

Weights are frozen and fp32; gradients flow through the trunk and the top to what they are given,
and to the adapters and the soft prompt that they compute with. Only the parts that are used are
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedsea.errors import UnsafeRows
from fedsea.model.attention import RaggedBatch
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import AdaptedRows, Adapter
from fedsea.model.partition import Partition
from fedsea.model.prompts import SoftPrompt
from fedsea.model.spans import BlockSpan, Placement, Top, load_bottom, load_top, load_trunk

_PLACEMENT = Placement()
_MOST_NATS = 700.0


class FrozenModel:
    """Bottom, trunk and top of one checkpoint, over windows of B texts with T tokens each.

    Raises:
        PartitionError: bottom and top leave no trunk.
    """

    def __init__(self, checkpoint: Checkpoint, partition: Partition) -> None:
        partition.trunk_span(checkpoint.num_blocks)
        self.checkpoint, self.partition = checkpoint, partition

    @cached_property
    def fingerprint(self) -> str:
        """Of the checkpoint."""
        return self.checkpoint.fingerprint()

    @cached_property
    def bottom(self) -> BlockSpan:
        """Embedding and first blocks."""
        return load_bottom(self.checkpoint, self.partition.bottom_span(), _PLACEMENT)

    @cached_property
    def trunk(self) -> BlockSpan:
        """Middle blocks."""
        span = self.partition.trunk_span(self.checkpoint.num_blocks)
        return load_trunk(self.checkpoint, span, _PLACEMENT)

    @cached_property
    def top(self) -> Top:
        """Last blocks, norm and head."""
        span = self.partition.top_span(self.checkpoint.num_blocks)
        return load_top(self.checkpoint, span, _PLACEMENT)

    def rows(self, windows: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Token ids (B, T) to rows at the first cut (B, T, hidden).

        Without an adapter that is trained nothing takes gradients here.

        Raises:
            UnsafeRows: NaN or infinity.
        """
        found = self.bottom.run(windows.flatten(), _whole(windows.shape, adapter))
        if not bool(torch.isfinite(found).all()):
            raise UnsafeRows("rows of public text hold NaN or infinity; check the checkpoint")
        return found.view(*windows.shape, -1)

    def outputs(
        self, rows: Tensor, prompt: SoftPrompt | None = None, adapter: Adapter | None = None
    ) -> Tensor:
        """Rows at the first cut to rows at the second, (B, T, hidden); a prompt's stay inside."""
        flat, counts = rows.flatten(0, 1), [rows.shape[1]] * rows.shape[0]
        if prompt is None:
            return self.trunk.run(flat, _whole(rows.shape, adapter)).view(rows.shape)
        batch = _whole((len(counts), prompt.count + rows.shape[1]), adapter)
        found = self.trunk.run(prompt.prepended(flat, counts), batch)
        return prompt.stripped(found, counts).view(rows.shape)

    def logits(self, outputs: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Rows at the second cut to logits (B, T, vocabulary)."""
        flat, keep = outputs.flatten(0, 1), torch.arange(outputs.shape[0] * outputs.shape[1])
        return self.top.run(flat, _whole(outputs.shape, adapter), keep).view(*outputs.shape[:2], -1)


def perplexity(nats: float) -> float:
    """exp of the mean loss per token, as far as a float holds it."""
    return math.exp(min(nats, _MOST_NATS))


def _whole(shape: Sequence[int], adapter: Adapter | None) -> RaggedBatch:
    """A batch of B texts with T rows each, for a shape (B, T, ...)."""
    texts, length = shape[0], shape[1]
    adapted = () if adapter is None else (AdaptedRows(0, texts * length, adapter),)
    return RaggedBatch.whole([length] * texts, torch.device("cpu"), adapted)
