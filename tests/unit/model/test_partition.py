"""A partition covers the model without gap or overlap, and says what is wrong with a bad one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import PartitionError
from fedsea.model.partition import Partition, Span


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20))
def test_parts_cover_every_block_once(bottom, top, trunk):
    """Bottom, trunk and top are consecutive and together all blocks."""
    blocks = bottom + trunk + top
    partition = Partition(bottom, top)
    spans = partition.bottom_span(), partition.trunk_span(blocks), partition.top_span(blocks)
    covered = [block for span in spans for block in range(span.first, span.end)]
    assert covered == list(range(blocks))
    assert [len(span) for span in spans] == [bottom, trunk, top]


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 20))
def test_partition_without_trunk_is_refused(bottom, top, blocks):
    """A partition that leaves the server nothing names the largest sum that fits."""
    if bottom + top < blocks:
        assert len(Partition(bottom, top).trunk_span(blocks)) >= 1
        return
    with pytest.raises(PartitionError, match=f"keep bottom \\+ top below {blocks}"):
        Partition(bottom, top).trunk_span(blocks)
    with pytest.raises(PartitionError):
        Partition(bottom, top).top_span(blocks)


@pytest.mark.parametrize(("bottom", "top"), [(-1, 0), (0, -1)])
def test_negative_sides_are_refused(bottom, top):
    """Neither side can have fewer than no blocks."""
    with pytest.raises(PartitionError, match="neither can be negative"):
        Partition(bottom, top)


@given(st.integers(0, 99), st.integers(0, 99))
def test_span_reads_what_it_prints(first, length):
    """The text form of a span parses to the same span."""
    span = Span(first, first + length)
    assert Span.parse(str(span)) == span


@pytest.mark.parametrize("text", ["", "1", "1-7", ":7", "1:", "a:b", "-1:7", "1:7:9", "1.0:2"])
def test_unreadable_span_is_refused(text):
    """Whatever is not FIRST:END is refused with an example."""
    with pytest.raises(PartitionError, match="as in 1:7"):
        Span.parse(text)


@pytest.mark.parametrize(("first", "end"), [(-1, 2), (3, 2)])
def test_backward_span_is_refused(first, end):
    """A span starts at 0 or later and never ends before it starts."""
    with pytest.raises(PartitionError, match="is not a range"):
        Span(first, end)


@pytest.mark.parametrize(
    ("inner", "is_inside"),
    [("1:7", True), ("2:6", True), ("4:4", True), ("0:7", False), ("1:8", False), ("8:9", False)],
)
def test_span_contains_narrower_spans(inner, is_inside):
    """A server of 1:7 can serve exactly the spans inside it."""
    assert (Span.parse(inner) in Span(1, 7)) == is_inside
