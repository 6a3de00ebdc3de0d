"""Framing: every event survives the trip, and no message makes the parser allocate out of proportion."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.wire.strategies import client_events, damaged, server_events

from fedsea.errors import LocalProtocolError, RemoteProtocolError
from fedsea.wire import framing
from fedsea.wire import trunk_pb2 as pb
from fedsea.wire.codecs import Codec
from fedsea.wire.framing import (
    MAX_OPENING_BYTES,
    MAX_PLAIN_FIELDS,
    MAX_SEGMENT_BYTES,
    decode_event,
    encode_event,
)
from fedsea.wire.limits import DEFAULT_LIMITS, Limits
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Drop,
    Forward,
    Notice,
    Open,
    OpenTraining,
    Output,
    Reset,
    Role,
    Segment,
    Want,
)

SEGMENT = Segment(0, 0, 1, Want.LAST)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


@settings(max_examples=200)
@given(event=client_events)
def test_client_events_survive_the_trip(event):
    """decode(encode(event)) is the event."""
    assert decode_event(encode_event(event, DEFAULT_LIMITS), Role.CLIENT, DEFAULT_LIMITS) == event


@settings(max_examples=200)
@given(event=server_events)
def test_server_events_survive_the_trip(event):
    """decode(encode(event)) is the event."""
    assert decode_event(encode_event(event, DEFAULT_LIMITS), Role.SERVER, DEFAULT_LIMITS) == event


@settings(max_examples=300)
@given(
    data=st.binary(max_size=200)
    | damaged((client_events | server_events).map(lambda e: encode_event(e, DEFAULT_LIMITS))),
    role=st.sampled_from(Role),
)
def test_any_bytes_are_an_event_or_refused(data, role):
    """Random and damaged messages give an event or a remote error, nothing else."""
    with suppress(RemoteProtocolError):
        decode_event(data, role, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "event", [Close(), Drop(0), Begin(0, 0), Append(0, (), b""), Reset(), Forward(0, (), b"")]
)
def test_an_event_of_defaults_is_still_an_event(event):
    """protobuf leaves out zeros, but the event itself is on the wire."""
    data = encode_event(event, DEFAULT_LIMITS)
    assert decode_event(data, Role.CLIENT, DEFAULT_LIMITS) == event


def test_rows_may_be_a_memoryview():
    """Rows can be sent from a larger buffer; they arrive as bytes."""
    data = encode_event(Append(1, (SEGMENT,), memoryview(b"abcd")[1:3]), DEFAULT_LIMITS)
    event = decode_event(data, Role.CLIENT, DEFAULT_LIMITS)
    assert isinstance(event, Append)
    assert event.rows == b"bc"
    assert type(event.rows) is bytes


@pytest.mark.parametrize(
    "event",
    [
        Begin(-1, 1),
        Begin(2**32, 1),
        Begin("one", 1),  # type: ignore[arg-type]
        Append(2**64, (), b""),
        Append(0, (), "rows"),  # type: ignore[arg-type]
        Append(0, (replace(SEGMENT, want=1),), b""),  # type: ignore[arg-type]
        Notice("draining"),  # type: ignore[arg-type]
        Open("\ud800", 0, 1, Codec.FP32, Codec.FP32),
        Open("f", 0, 1, "fp32", Codec.FP32),  # type: ignore[arg-type]
        Forward(0, (2**32,), b""),
        OpenTraining("f", 0, 1, Codec.FP32, Codec.FP32, Codec.FP32, "a", resume_steps=(-1,)),
    ],
)
def test_values_outside_the_schema_are_local_errors(event):
    """What a field cannot carry is refused before anything is sent, without quoting the value."""
    with pytest.raises(LocalProtocolError, match="wrong type or out of range") as caught:
        encode_event(event, DEFAULT_LIMITS)
    assert caught.value.__cause__ is None


def test_size_is_checked_on_both_sides():
    """The cap is inclusive, and one byte over is refused: locally with a fix, remotely unread."""
    event = Append(1, (SEGMENT,), bytes(100))
    size = len(encode_event(event, DEFAULT_LIMITS))
    exact, small = Limits(max_message_bytes=size), Limits(max_message_bytes=size - 1)
    assert decode_event(encode_event(event, exact), Role.CLIENT, exact) == event
    with pytest.raises(LocalProtocolError, match="fewer rows"):
        encode_event(event, small)
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        decode_event(encode_event(event, exact), Role.CLIENT, small)


def test_oversized_rows_are_refused_before_they_are_copied():
    """A message that cannot be sent costs no second copy of its rows."""
    event = Output(1, (SEGMENT,), bytes(2**22))
    tracemalloc.start()
    with pytest.raises(LocalProtocolError):
        encode_event(event, Limits(max_message_bytes=2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def valid(**changes: object) -> pb.ClientMessage:
    """A valid Open as a protobuf message, with changes."""
    body = pb.Open(protocol=1, fingerprint="f", end_block=1, up_codec="CODEC_FP32", down_codec=1)  # type: ignore[arg-type]
    for name, value in changes.items():
        setattr(body, name, value)
    return pb.ClientMessage(open=body)


@pytest.mark.parametrize("number", [0, 6, 2**31 - 1, -1])
def test_unknown_enum_values_are_refused(number):
    """An enum of zero means that the peer forgot it; a large one is from another version."""
    with pytest.raises(RemoteProtocolError, match=r"codec .* is unknown"):
        decode_event(valid(up_codec=number).SerializeToString(), Role.CLIENT, DEFAULT_LIMITS)


def test_unknown_fields_inside_an_event_are_ignored():
    """A later minor version may add fields to an event."""
    data = field(2, b"\x08\x03\x10\x07" + varint(100 << 3) + b"\x05")
    assert decode_event(data, Role.CLIENT, DEFAULT_LIMITS) == Begin(3, 7)


BEGIN = field(2, b"\x08\x01")
REFUSED = {
    "empty": b"",
    "unknown event": field(15, b""),
    "field number zero": field(0, b""),
    "event as a number": b"\x10\x01",
    "two events": BEGIN + BEGIN,
    "trailing bytes": BEGIN + b"\x00",
    "truncated": BEGIN[:-1],
    "truncated length": b"\x12",
    "endless number": b"\x12" + b"\x80" * 20,
    "length over all": b"\x12" + varint(2**63),
    "group": field(2, b"\x0b\x0c"),
    "end of group": field(2, b"\x0c"),
    "field after the end": field(2, b"\x0a\x7f"),
    "fixed64 after the end": field(2, b"\x09\x00"),
    "fixed32 after the end": field(2, b"\x0d\x00"),
    "text that is no UTF-8": field(1, field(2, b"\xff")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_messages_are_refused(name):
    """Each way of being no message of ours is a remote error of one line."""
    with pytest.raises(RemoteProtocolError) as caught:
        decode_event(REFUSED[name], Role.CLIENT, DEFAULT_LIMITS)
    assert "\n" not in str(caught.value)


CAP = DEFAULT_LIMITS.max_message_bytes - 16
BOMBS = {
    "empty segments": field(3, b"\x12\x00" * (CAP // 2)),
    "alternating events": b"\x1a\x00\x22\x00" * (CAP // 4),
    "repeated event": b"\x1a\x00" * (CAP // 2),
    "numbers between unknown fields": field(3, b"\x08\x01\x78\x01" * (CAP // 4)),
    "unknown fields in one segment": field(3, field(2, b"\x08\x01\x78\x01" * (CAP // 4 - 4))),
    "repeated text": field(1, b"\x12\x00" * (CAP // 2)),
    "nested groups": field(3, b"\x7b" * CAP),
    "a million counts": field(17, field(2, b"\x01" * (CAP - 16))),
    "counts without a field": field(17, b"\x10\x01" * (CAP // 2)),
    "empty targets": field(16, field(13, b"\x22\x00" * (CAP // 2 - 8))),
    "a million steps to resume from": field(16, field(17, b"\x01" * (CAP - 16))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_the_parser_sees_them(name, monkeypatch):
    """Messages under the size cap that would grow tenfold in memory never reach protobuf."""
    monkeypatch.setattr(framing, "pb", None)
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError):
        decode_event(BOMBS[name], Role.CLIENT, DEFAULT_LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_largest_shape_that_passes_is_small():
    """As many segments and fields as fit: a bound on what a parse may cost besides its bytes."""
    limits = Limits(max_segments=4)
    segment = field(2, b"\x08\x01" * (MAX_SEGMENT_BYTES // 2 - 1) + b"\x20\x01")
    full = segment * (4 + MAX_PLAIN_FIELDS)
    event = decode_event(field(3, full), Role.CLIENT, limits)
    assert isinstance(event, Append)
    assert len(event.segments) == 4 + MAX_PLAIN_FIELDS
    with pytest.raises(RemoteProtocolError, match="too many fields"):
        decode_event(field(3, full + segment), Role.CLIENT, limits)
    with pytest.raises(RemoteProtocolError, match="a segment takes more"):
        decode_event(field(3, field(2, bytes(MAX_SEGMENT_BYTES + 1))), Role.CLIENT, limits)


def test_counts_in_several_fields_are_read():
    """A library that does not pack a few numbers is understood."""
    event = decode_event(field(17, b"\x10\x03\x10\x04"), Role.CLIENT, DEFAULT_LIMITS)
    assert event == Forward(0, (3, 4), b"")


def test_an_opening_of_many_names_is_refused_before_it_is_sent():
    """The cap on OpenTraining holds for the sender too, and says what to leave out."""
    steps = tuple(range(2**60, 2**60 + MAX_OPENING_BYTES // 8))
    event = OpenTraining("f", 0, 1, Codec.FP32, Codec.FP32, Codec.FP32, "a", resume_steps=steps)
    with pytest.raises(LocalProtocolError, match="name fewer targets, blocks or steps"):
        encode_event(event, DEFAULT_LIMITS)


def test_a_message_has_room_for_every_field_of_the_schema():
    """The caps on shape are above what the schema can fill."""
    longest = max(
        len(descriptor.fields) for descriptor in pb.DESCRIPTOR.message_types_by_name.values()
    )
    assert longest <= MAX_PLAIN_FIELDS
    largest = pb.Segment(sequence=2**32 - 1, start=2**32 - 1, count=2**32 - 1, want="WANT_NONE")
    assert largest.ByteSize() == 20 <= MAX_SEGMENT_BYTES
