from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fedsea.privacy.placeholders.spans import Kind, Span, merged

SPANS = st.lists(
    st.builds(
        lambda start, size, kind: Span(start, start + size, kind),
        st.integers(0, 40),
        st.integers(1, 12),
        st.sampled_from([*Kind, "PROJECT"]),
    )
)


def covered(spans):
    """The characters in spans."""
    return {at for span in spans for at in range(span.start, span.end)}


@given(SPANS)
def test_everything_found_stays_covered(spans):
    """Merging loses no character, adds none, and leaves no overlap."""
    result = merged(spans)
    assert covered(result) == covered(spans)
    assert all(left.end <= right.start for left, right in itertools.pairwise(result))


@given(SPANS, st.randoms())
def test_the_order_of_detectors_does_not_matter(spans, rng):
    """The same spans in any order give the same result."""
    mixed = list(spans)
    rng.shuffle(mixed)
    assert merged(mixed) == merged(spans)


def test_the_longest_span_gives_the_kind():
    """Of equally long ones a custom kind, then the first of the list."""
    assert merged([Span(0, 9, Kind.URL), Span(2, 5, Kind.NAME)]) == [Span(0, 9, Kind.URL)]
    assert merged([Span(0, 4, Kind.NAME), Span(0, 4, "PROJECT")]) == [Span(0, 4, "PROJECT")]
    assert merged([Span(0, 4, Kind.NAME), Span(0, 4, Kind.CARD)]) == [Span(0, 4, Kind.CARD)]


def test_neighbours_stay_apart():
    """Spans that touch are two spans."""
    spans = [Span(0, 3, Kind.NAME), Span(3, 5, Kind.NAME)]
    assert merged(spans) == spans
