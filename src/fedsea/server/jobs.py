"""One Append on its way through the blocks: which rows come next, which rows come back.

Plain bookkeeping, no tensors. Rows are numbered over all segments of the Append, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsea.wire.messages import Append, Output, Segment, Want


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `count` rows of one segment; of them, those from `wanted` on come back."""

    sequence: int
    count: int
    wanted: int


@dataclass(slots=True)
class Job:
    """An Append and how far it is.

    `arrived` and `started` are times in seconds, `compute` a duration; `answer` collects encoded
    rows until the last one is there.
    """

    append: Append
    rows: memoryview
    row_bytes: int
    arrived: float
    count: int
    done: int = 0
    started: float | None = None
    compute: float = 0.0
    answer: list[bytes] = field(default_factory=list)
    _segment: int = 0
    _offset: int = 0

    @classmethod
    def of(cls, append: Append, row_bytes: int, arrived: float) -> Job:
        """A job of which nothing is done."""
        return cls(append, memoryview(append.rows), row_bytes, arrived, append.count)

    @property
    def is_done(self) -> bool:
        """Whether all rows have been taken."""
        return self.done == self.count

    def growth(self) -> dict[int, int]:
        """Rows by sequence."""
        return {segment.sequence: segment.count for segment in self.append.segments}

    def take(self, count: int) -> tuple[memoryview, list[Piece]]:
        """The next `count` rows as bytes, and what they are; each sequence appears once."""
        start = self.done * self.row_bytes
        self.done += count
        data = self.rows[start : self.done * self.row_bytes]
        pieces: list[Piece] = []
        while count:
            segment = self.append.segments[self._segment]
            rows = min(count, segment.count - self._offset)
            self._offset += rows
            is_last = self._offset == segment.count
            pieces.append(Piece(segment.sequence, rows, _wanted(segment, rows, is_last)))
            if is_last:
                self._segment, self._offset = self._segment + 1, 0
            count -= rows
        return data, pieces

    def output(self) -> Output:
        """The answer to the whole Append."""
        started = self.arrived if self.started is None else self.started
        return Output(
            id=self.append.id,
            segments=self.append.answer(),
            rows=self.answer[0] if len(self.answer) == 1 else b"".join(self.answer),
            queue_us=round((started - self.arrived) * 1e6),
            compute_us=round(self.compute * 1e6),
        )


def _wanted(segment: Segment, rows: int, is_last: bool) -> int:
    """The first row of a piece of `rows` rows that comes back; `rows` for none."""
    if segment.want is Want.ALL:
        return 0
    return rows - 1 if segment.want is Want.LAST and is_last else rows
