"""A span and its KV pool: runs new rows of many sequences in one batch."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsea.model.attention import BatchItem, RaggedBatch, RowRun
from fedsea.model.kv_pool import KVPool, Sequence
from fedsea.model.lora import AdaptedRows, Adapter
from fedsea.model.partition import Span
from fedsea.model.spans import BlockSpan, Placement

DEFAULT_PAGE_ROWS = 16


@dataclass(frozen=True, slots=True)
class NewRows:
    """The next `count` rows of a sequence of an account of the pool, and their adapter.

    The first `skip` rows of the sequence in the pool hold nothing and are not read: positions
    begin behind them.
    """

    account: int
    sequence: int
    count: int
    adapter: Adapter | None = None
    skip: int = 0


class SpanRunner:
    """Runs ragged batches through a span, with keys and values in a paged pool.

    Args:
        span: the blocks.
        num_rows: KV rows in all, rounded up to whole pages.
        placement: where the cache lives.
        page_rows: rows in a page.
    """

    def __init__(
        self,
        span: BlockSpan,
        num_rows: int,
        placement: Placement,
        page_rows: int = DEFAULT_PAGE_ROWS,
    ) -> None:
        self.span = span
        self.placement = placement
        self.pool = KVPool(-(-num_rows // page_rows), page_rows)
        self.cache = span.new_cache(self.pool.num_rows, placement)

    def advance(self, new: Rows[NewRows]) -> RaggedBatch:
        """Make room for new rows and describe the step that writes them.

        Every sequence may appear once.
        """
        items: list[BatchItem] = []
        slots: list[int] = []
        positions: list[int] = []
        adapters: list[AdaptedRows] = []
        offset = 0
        for rows in new:
            start = self.pool.sequence(rows.account, rows.sequence).length - rows.skip
            for copy in self.pool.extend(rows.account, rows.sequence, rows.count):
                self.cache.copy_page(copy, self.pool.page_rows)
            run = self._locate(self.pool.sequence(rows.account, rows.sequence), rows.skip)
            items.append(BatchItem(offset, start, rows.count, run))
            positions.extend(range(start, start + rows.count))
            slots.extend(_slots(run, start, rows.count))
            if rows.adapter is not None:
                adapters.append(AdaptedRows(offset, offset + rows.count, rows.adapter))
            offset += rows.count
        device = self.placement.device
        return RaggedBatch(
            tuple(items),
            torch.tensor(positions, device=device)[None],
            torch.tensor(slots, device=device),
            self.cache.num_rows,
            tuple(adapters),
        )

    def slots(self, account: int, sequence: int, start: int, count: int) -> Tensor:
        """Rows of the cache (n,) that hold rows [start, start + count) of a sequence."""
        run = self._locate(self.pool.sequence(account, sequence), 0)
        return torch.tensor(_slots(run, start, count), device=self.placement.device)

    @torch.inference_mode()
    def run(self, rows: Tensor, batch: RaggedBatch, span: Span | None = None) -> Tensor:
        """Run the packed rows of a batch; see `BlockSpan.run`."""
        return self.span.run(rows, batch, span)

    def _locate(self, sequence: Sequence, skip: int) -> RowRun:
        page_rows = self.pool.page_rows
        if sequence.is_one_run:
            return RowRun(sequence.first_page * page_rows + skip, None)
        pages = torch.tensor(sequence.pages, device=self.placement.device)
        within = torch.arange(page_rows, device=self.placement.device)
        return RowRun(0, (pages[:, None] * page_rows + within).reshape(-1)[skip:])


def _slots(run: RowRun, start: int, count: int) -> list[int]:
    if run.rows is None:
        return list(range(run.first + start, run.first + start + count))
    numbers: list[int] = run.rows[start : start + count].tolist()
    return numbers
