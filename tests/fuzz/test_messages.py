"""The fuzz target of messages under hypothesis: random bytes and damaged messages."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.fuzz.judge import LIMITS, OPENS, TRAINING_OPENS, judge
from tests.unit.wire.strategies import client_events, damaged, server_events

from fedsea.wire.framing import encode_event
from fedsea.wire.messages import (
    Activations,
    Append,
    Backward,
    Begin,
    Close,
    Discard,
    Forward,
    Gradients,
    Opened,
    Output,
    Reset,
    Save,
    Segment,
    Step,
    Want,
)

messages = (client_events | server_events).map(lambda event: encode_event(event, LIMITS))
near_valid = st.sampled_from(
    [
        encode_event(event, LIMITS)
        for event in (
            Begin(1, 4),
            *OPENS,
            Append(1, (Segment(0, 2, 1),), bytes(6)),
            Append(1, (Segment(0, 2, 1),), bytes(2)),
            Append(1, (Segment(0, 2, 1, Want.NONE),), b"\x5a\x01"),
            Output(0, (Segment(0, 1, 1),), bytes(16)),
            Opened("s"),
            Close(),
            *TRAINING_OPENS,
            Forward(3, (1, 2), bytes(18)),
            Forward(3, (2,), b"\x5a\x01\x5a\x01"),
            Activations(2, bytes(32)),
            Activations(2, bytes(16)),
            Backward(1, bytes(16)),
            Backward(1, bytes(12)),
            Gradients(0, bytes(16)),
            Gradients(0, bytes(10)),
            Discard(2),
            Reset(),
            Step(1, 0.1, 1.0, 2.0),
            Save(1),
        )
    ]
)


@settings(max_examples=200)
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=bytes(2**16 + 1))
@example(data=b"\x1a\x00\x22\x00" * 2**14)
def test_random_bytes(data):
    """Random bytes give an event or a remote error."""
    judge(data)


@settings(max_examples=300)
@given(data=messages | damaged(messages) | near_valid | damaged(near_valid))
def test_damaged_messages(data):
    """Messages that are valid up to a few bytes give an event or a remote error."""
    judge(data)
