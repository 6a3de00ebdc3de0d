"""Where a model is cut: spans of blocks and the partition into bottom, trunk and top."""

from __future__ import annotations

from dataclasses import dataclass

from fedsea.errors import PartitionError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The half-open range of blocks ``[first, end)``."""

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.end:
            raise PartitionError(
                f"span {self.first}:{self.end} is not a range of blocks; use FIRST:END"
            )

    def __len__(self) -> int:
        return self.end - self.first

    def __str__(self) -> str:
        return f"{self.first}:{self.end}"

    def __contains__(self, other: Span) -> bool:
        return self.first <= other.first and other.end <= self.end

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``FIRST:END``."""
        first, colon, end = text.partition(":")
        if not (colon and first.isdigit() and end.isdigit()):
            raise PartitionError(f"span '{text}' is not of the form FIRST:END, as in 1:7")
        return cls(int(first), int(end))


@dataclass(frozen=True, slots=True)
class Partition:
    """How many outer blocks stay with the data owner.

    `bottom` blocks after the embedding and `top` blocks before the final norm are the client's;
    the blocks between them are the trunk.
    """

    bottom: int
    top: int

    def __post_init__(self) -> None:
        if self.bottom < 0 or self.top < 0:
            raise PartitionError(
                f"bottom={self.bottom}, top={self.top}: neither can be negative; use 0 or more"
            )

    def bottom_span(self) -> Span:
        """Blocks that run before the first cut."""
        return Span(0, self.bottom)

    def trunk_span(self, num_blocks: int) -> Span:
        """Blocks that the server runs; at least one."""
        if self.bottom + self.top >= num_blocks:
            raise PartitionError(
                f"bottom={self.bottom} and top={self.top} leave no trunk in a model of "
                f"{num_blocks} blocks; keep bottom + top below {num_blocks}"
            )
        return Span(self.bottom, num_blocks - self.top)

    def top_span(self, num_blocks: int) -> Span:
        """Blocks that run after the second cut."""
        return Span(self.trunk_span(num_blocks).end, num_blocks)
