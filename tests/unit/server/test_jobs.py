"""A job hands out its rows in any chunks, each once, and knows which of them come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedsea.server.jobs import Job
from fedsea.wire.messages import Append, Segment, Want

ROW_BYTES = 2


@st.composite
def appends(draw):
    """An Append of one to four segments; each row is its number as two bytes."""
    segments = tuple(
        Segment(sequence, draw(st.integers(0, 9)), draw(st.integers(1, 12)), want)
        for sequence, want in enumerate(
            draw(st.lists(st.sampled_from(Want), min_size=1, max_size=4))
        )
    )
    count = sum(segment.count for segment in segments)
    return Append(7, segments, b"".join(n.to_bytes(2, "little") for n in range(count)))


@given(append=appends(), data=st.data())
def test_any_chunking_gives_the_same_answer(append, data):
    """Chunks of any size cover all rows in order, and the wanted ones are those of the Append."""
    job = Job.of(append, ROW_BYTES, arrived=1.0)
    lengths = {segment.sequence: segment.start for segment in append.segments}
    wanted: list[tuple[int, int]] = []
    seen = b""

    while not job.is_done:
        chunk, pieces = job.take(data.draw(st.integers(1, job.count - job.done)))
        seen += bytes(chunk)
        assert len({piece.sequence for piece in pieces}) == len(pieces)
        assert len(chunk) == ROW_BYTES * sum(piece.count for piece in pieces)
        for piece in pieces:
            start = lengths[piece.sequence]
            wanted += [(piece.sequence, start + i) for i in range(piece.wanted, piece.count)]
            lengths[piece.sequence] += piece.count

    assert seen == append.rows
    assert lengths == {segment.sequence: segment.end for segment in append.segments}
    assert wanted == [
        (answer.sequence, position)
        for answer in append.answer()
        for position in range(answer.start, answer.end)
    ]


def test_output_joins_what_was_collected():
    """The answer carries the collected bytes and the times in microseconds."""
    job = Job.of(Append(3, (Segment(0, 0, 2, Want.ALL),), b"abcd"), ROW_BYTES, arrived=1.0)
    job.take(2)
    job.started, job.compute, job.answer = 1.25, 0.5, [b"xy", b"z"]

    output = job.output()

    assert (output.id, output.rows) == (3, b"xyz")
    assert (output.queue_us, output.compute_us) == (250_000, 500_000)
