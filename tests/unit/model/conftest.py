"""A split model in one process: bottom, trunk and top with their KV caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tests.tiny_models import save_tiny
from torch import Tensor

from fedsea.model.checkpoint import Checkpoint
from fedsea.model.partition import Partition
from fedsea.model.runner import NewRows, SpanRunner
from fedsea.model.spans import BlockSpan, Placement, Top, load_bottom, load_top, load_trunk

PAGE_ROWS = 4
CAPACITY = 64


class Split:
    """Three spans of one checkpoint that advance together."""

    def __init__(
        self, folder: Path, partition: Partition, placement: Placement | None = None
    ) -> None:
        placement = placement or Placement()
        checkpoint = Checkpoint.open(folder)
        blocks = checkpoint.num_blocks
        self.bottom: BlockSpan = load_bottom(checkpoint, partition.bottom_span(), placement)
        self.trunk: BlockSpan = load_trunk(checkpoint, partition.trunk_span(blocks), placement)
        self.top: Top = load_top(checkpoint, partition.top_span(blocks), placement)
        self.runners = [
            SpanRunner(span, 8 * CAPACITY, placement, PAGE_ROWS)
            for span in (self.bottom, self.trunk, self.top.span)
        ]
        self.accounts = [runner.pool.open(4 * CAPACITY) for runner in self.runners]

    def begin(self, *sequences: int) -> None:
        for runner, account in zip(self.runners, self.accounts, strict=True):
            for sequence in sequences:
                runner.pool.begin(account, sequence, CAPACITY)

    def rollback(self, sequence: int, length: int) -> None:
        for runner, account in zip(self.runners, self.accounts, strict=True):
            runner.pool.rollback(account, sequence, length)

    def fork(self, source: int, target: int, length: int) -> None:
        for runner, account in zip(self.runners, self.accounts, strict=True):
            runner.pool.fork(account, source, target, length, CAPACITY)

    def drop_all(self) -> None:
        for runner, account in zip(self.runners, self.accounts, strict=True):
            for sequence in runner.pool.sequences(account):
                runner.pool.drop(account, sequence)

    def feed(self, ids: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Append ids (n,) to sequences in one call; logits (n, vocabulary) of each."""
        rows = torch.cat(list(ids.values()))
        for runner, account in zip(self.runners, self.accounts, strict=True):
            new = [NewRows(account, sequence, len(part)) for sequence, part in ids.items()]
            rows = runner.run(rows, runner.advance(new))
        with torch.inference_mode():
            logits = self.top.logits(rows)
        counts = [len(part) for part in ids.values()]
        return dict(zip(ids, logits.split(counts), strict=True))

    def feed_in_chunks(self, ids: Tensor, chunks: Sequence[int], sequence: int = 0) -> Tensor:
        """Append ids (n,) to one sequence piece by piece; logits (n, vocabulary)."""
        return torch.cat([self.feed({sequence: part})[sequence] for part in ids.split(chunks)])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[..., Path]:
    """Folder of a tiny random checkpoint of a family, made once per session."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder
