"""Drawing parts of a data set: seeded, whole groups, whole sources."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import ConfigError, DataError
from fedsea.tasks.records import Entry, Record, sampled, split, trainable

GROUPS = st.lists(st.integers(0, 5), min_size=1, max_size=20)


def entries(groups: list[int]) -> list[Entry]:
    """One entry for each number, which is its group."""
    return [Entry({"at": str(at)}, "s", str(group)) for at, group in enumerate(groups)]


@given(groups=GROUPS, limit=st.integers(1, 25), seed=st.integers(0, 3))
def test_a_sample_keeps_groups_whole_and_the_order(groups, limit, seed) -> None:
    """At most so many, no question cut, and in the order of the file."""
    everything = entries(groups)
    smallest = min(groups.count(group) for group in groups)
    if limit < smallest:
        with pytest.raises(ConfigError, match="holds no question whole"):
            sampled(everything, limit, seed)
        return

    taken = sampled(everything, limit, seed)

    names = {entry.group for entry in taken}
    assert 0 < len(taken) <= limit
    assert taken == [entry for entry in everything if entry.group in names]


def test_the_seed_decides_alone() -> None:
    """The same seed draws the same, another one differs."""
    everything = entries(list(range(50)))

    assert sampled(everything, 10, 1) == sampled(everything, 10, 1)
    assert sampled(everything, 10, 1) != sampled(everything, 10, 2)


@given(sources=GROUPS, share=st.floats(0.05, 0.95), seed=st.integers(0, 3))
def test_a_split_keeps_sources_whole(sources, share, seed) -> None:
    """No passage is on both sides, nothing is lost, and both sides have something."""
    records = [
        Record("p", "c", source=str(source), group=str(at)) for at, source in enumerate(sources)
    ]
    try:
        training, evaluation = split(records, share, seed)
    except DataError:
        count = len(set(sources))
        assert max(1, round(share * count)) >= count
        return

    assert training
    assert evaluation
    assert sorted(training + evaluation, key=lambda r: int(r.group)) == records
    assert not {r.source for r in training} & {r.source for r in evaluation}


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_leaves_nothing(share: float) -> None:
    """A share must leave both sides something."""
    with pytest.raises(ConfigError, match="share"):
        split([Record("p", "c", source=str(at)) for at in range(4)], share, 0)


def test_what_can_be_learned() -> None:
    """Records without a completion are for evaluation only."""
    known, unknown = Record("p", " c"), Record("p", "")

    assert trainable([known, unknown]) == [known]


def test_texts_are_not_in_what_is_printed() -> None:
    """A record in a log shows no text."""
    record = Record("secret", "secret", group="g", gold=("secret",))

    assert "secret" not in repr(record)
    assert "secret" not in repr(Entry({"a": "secret"}, "s", "g", ("secret",), ("secret",)))
