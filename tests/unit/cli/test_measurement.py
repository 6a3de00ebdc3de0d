from __future__ import annotations

from typing import Any

import pytest

from fedsea.cli.measurement import Measurement, Spread, measure, steps
from fedsea.errors import RequestError
from fedsea.transport.recording import Direction, Message, Recorder
from fedsea.wire.framing import encode_event
from fedsea.wire.limits import DEFAULT_LIMITS
from fedsea.wire.messages import Append, Begin, Output, Segment


def up(seconds, start, count=1):
    """An Append of `count` rows of 4 bytes."""
    event = Append(start + 1, (Segment(0, start, count),), b"\0" * 4 * count)
    return Message(Direction.UP, seconds, encode_event(event, DEFAULT_LIMITS))


def down(seconds, start, compute_us):
    """The Output of one row."""
    event = Output(start + 1, (Segment(0, start, 1),), b"\0" * 4, compute_us=compute_us)
    return Message(Direction.DOWN, seconds, encode_event(event, DEFAULT_LIMITS))


def test_steps_are_taken_apart_at_the_wire():
    """A step begins with the last answer; its parts add up to it."""
    begin = Message(Direction.UP, 0.0, encode_event(Begin(0, 9), DEFAULT_LIMITS))
    found = steps(
        [begin, up(0.1, 0, 5), down(1.0, 5, 9), up(1.25, 5), down(2.0, 5, 500_000),
         up(2.5, 6), down(4.0, 6, 1_000_000)]
    )  # fmt: skip

    assert [(step.total, step.client, step.server, step.wire) for step in found] == [
        (1.0, 0.25, 0.5, 0.25),
        (2.0, 0.5, 1.0, 0.5),
    ]
    assert {(step.bytes_up > 4, step.bytes_down > 4) for step in found} == {(True, True)}


def test_nothing_was_decoded():
    """One answer after the prompt is no decoding step."""
    assert steps([]) == []
    assert steps([up(0.0, 0, 3), down(1.0, 2, 5)]) == []


def test_spread_is_median_and_range():
    """Of an even number of values the median lies between the middle ones."""
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0)


@pytest.mark.parametrize("lengths", [(0, 8, 1), (8, 2, 1), (8, 8, 0)])
def test_nothing_to_measure_is_refused(lengths):
    """Lengths that leave no decoding step are refused before anything is sent."""
    prompt_tokens, new_tokens, rounds = lengths
    nobody: Any = None
    with pytest.raises(RequestError, match="nothing to measure"):
        next(
            measure(
                nobody, Recorder(), prompt_tokens=prompt_tokens, new_tokens=new_tokens,
                rounds=rounds, seconds=1.0,
            )
        )  # fmt: skip


def test_rounds_are_counted():
    """A measurement knows how many answers it holds."""
    found = Measurement(1, 3, first_token=[0.1, 0.2])

    assert found.rounds == 2
