"""The connection: dialogues that are allowed, and each rule broken on both sides."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
from tests.unit.wire.pair import HIDDEN_SIZE, ConnectionPair, an_open, zeros

from fedsea.errors import ConfigError, LocalProtocolError, ProtocolError, RemoteProtocolError
from fedsea.wire.codecs import Codec
from fedsea.wire.connection import Connection
from fedsea.wire.framing import encode_event
from fedsea.wire.limits import DEFAULT_LIMITS, Limits
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Drop,
    Event,
    Fork,
    Notice,
    NoticeKind,
    Open,
    Opened,
    Output,
    Role,
    Rollback,
    Segment,
    Want,
)
from fedsea.wire.states import State


def refused(pair: ConnectionPair, sender: Role, event: Event, match: str) -> None:
    """Both sides refuse `event`: its sender stays as it was, its receiver fails."""
    here, there = (
        (pair.client, pair.server) if sender is Role.CLIENT else (pair.server, pair.client)
    )
    before = (here.state, here.pending, {s: here.length(s) for s in here.sequences})
    with pytest.raises(LocalProtocolError, match=match):
        here.send(event)
    assert (here.state, here.pending, {s: here.length(s) for s in here.sequences}) == before
    with pytest.raises(RemoteProtocolError, match=match):
        there.receive(encode_event(event, DEFAULT_LIMITS))
    assert there.state is State.FAILED


def test_prefill_decode_and_close():
    """The plain life of a session: one prompt, two tokens, the end."""
    pair = ConnectionPair()
    pair.opened(16)
    prompt = Append(0, (Segment(0, 0, 5, Want.LAST),), zeros(5))
    pair.client_sends(prompt)
    assert pair.client.length(0) == 5
    pair.server_sends(Output(0, prompt.answer(), zeros(1), 10, 20))
    for step in (1, 2):
        token = Append(step, (Segment(0, 4 + step, 1, Want.LAST),), zeros(1))
        pair.client_sends(token)
        pair.server_sends(Output(step, token.answer(), zeros(1)))
    pair.client_sends(Close())
    assert pair.server.state is State.CLOSING


def test_the_first_append_need_not_wait_for_opened():
    """Begin and Append may follow Open at once; the answer still comes after Opened."""
    pair = ConnectionPair()
    append = Append(0, (Segment(7, 0, 2),), zeros(2))
    pair.client_sends(an_open(), Begin(7, 4), append)
    assert pair.client.state is State.OPENING
    pair.server_sends(Opened("s1"), Output(0, append.answer(), zeros(2)))


def test_unequal_prompts_in_one_append():
    """A batch needs no padding rows: each sequence has its own count and wants."""
    pair = ConnectionPair()
    pair.opened(8, 8, 8)
    append = Append(
        0,
        (Segment(2, 0, 1, Want.LAST), Segment(0, 0, 4, Want.NONE), Segment(1, 0, 2, Want.ALL)),
        zeros(7),
    )
    pair.client_sends(append)
    pair.server_sends(Output(0, (Segment(2, 0, 1), Segment(1, 0, 2)), zeros(3)))
    assert [pair.server.length(sequence) for sequence in range(3)] == [4, 2, 1]


def test_rows_that_nobody_wants_are_answered_without_rows():
    """Every Append has its Output, also when nothing comes back."""
    pair = ConnectionPair()
    pair.opened(8)
    pair.client_sends(Append(0, (Segment(0, 0, 3, Want.NONE),), zeros(3)))
    pair.server_sends(Output(0, (), b""))
    assert pair.client.pending == 0


def test_fork_rollback_and_drop():
    """A fork starts with a prefix; the two sequences then live on their own."""
    pair = ConnectionPair()
    pair.opened(8)
    pair.client_sends(
        Append(0, (Segment(0, 0, 5, Want.NONE),), zeros(5)),
        Fork(0, 9, 3, 4),
        Rollback(0, 1),
        Append(1, (Segment(9, 3, 1), Segment(0, 1, 1)), zeros(2)),
        Drop(0),
        Begin(0, 2),
    )
    assert (pair.server.length(9), pair.server.capacity(9)) == (4, 4)
    assert (pair.server.length(0), pair.server.capacity(0)) == (0, 2)
    pair.server_sends(Output(0, (), b""))


def test_an_answer_on_its_way_outlives_its_sequence():
    """What was asked before Drop or Rollback is still answered as it was asked."""
    pair = ConnectionPair()
    pair.opened(8)
    append = Append(4, (Segment(0, 0, 2),), zeros(2))
    pair.client_sends(append, Rollback(0, 0), Drop(0))
    pair.server_sends(Output(4, append.answer(), zeros(2)))


def test_answers_may_come_after_close():
    """An Output that was on its way when the client closed is no error."""
    pair = ConnectionPair()
    pair.opened(8)
    append = Append(0, (Segment(0, 0, 1),), zeros(1))
    pair.client_sends(append, Close())
    pair.server_sends(
        Output(0, append.answer(), zeros(1)), Notice(NoticeKind.DRAINING, "stops at 12:00")
    )


def test_codecs_differ_by_direction():
    """Rows up and rows down are measured with their own codec."""
    pair = ConnectionPair()
    pair.opened(8, up=Codec.INT8, down=Codec.BF16)
    append = Append(0, (Segment(0, 0, 2),), zeros(2, Codec.INT8))
    pair.client_sends(append)
    pair.server_sends(Output(0, append.answer(), zeros(2, Codec.BF16)))


@pytest.mark.parametrize("levels", [1, 2, 15, 255])
def test_counts_of_a_narrow_row_are_measured_in_bits(levels):
    """Width and levels of Open say how many bytes a row takes."""
    pair = ConnectionPair()
    greeting = replace(
        an_open(), up_codec=Codec.COUNTS, up_width=3, up_levels=levels, up_scale=0.5, projection="p"
    )
    pair.client_sends(greeting)
    pair.server_sends(Opened("s"))
    row_bytes = greeting.up_format(HIDDEN_SIZE).row_bytes
    assert row_bytes == -(-3 * levels.bit_length() // 8)
    pair.client_sends(Begin(0, 8), Append(0, (Segment(0, 0, 2),), bytes(2 * row_bytes)))
    with pytest.raises(LocalProtocolError, match="its segments need"):
        pair.client.send(Append(1, (Segment(0, 2, 1),), bytes(row_bytes + 1)))


def test_several_appends_wait_and_are_answered_in_order():
    """Appends may be sent ahead up to the limit; Outputs come in their order."""
    pair = ConnectionPair(Limits(max_pending=2))
    pair.opened(8)
    first, second = (Append(n, (Segment(0, n, 1),), zeros(1)) for n in (0, 1))
    pair.client_sends(first, second)
    with pytest.raises(LocalProtocolError, match="unanswered"):
        pair.client.send(Append(2, (Segment(0, 2, 1),), zeros(1)))
    refused(pair, Role.SERVER, Output(1, second.answer(), zeros(1)), "answer in order")


OPENS = [
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, protocol=99), "protocol 99 and 1"),
    (Open("f", 6, 6, Codec.FP32, Codec.FP32), "no span"),
    (Open("f" * 600, 2, 6, Codec.FP32, Codec.FP32), "fingerprint"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, adapter="a\nb"), "adapter"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, projection="a\nb"), "projection"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, prompt="a\nb"), "prompt"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, up_width=3), "need a projection"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, up_width=5, projection="p"), "do not fit"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, up_levels=3), "belong to the codec counts"),
    (Open("f", 2, 6, Codec.FP32, Codec.FP32, up_scale=1.0), "belong to the codec counts"),
    (Open("f", 2, 6, Codec.COUNTS, Codec.FP32, up_levels=0, up_scale=1.0), "0 levels"),
    (Open("f", 2, 6, Codec.COUNTS, Codec.FP32, up_levels=256, up_scale=1.0), "256 levels"),
    (Open("f", 2, 6, Codec.COUNTS, Codec.FP32, up_levels=3, up_scale=math.nan), "scale"),
    (Open("f", 2, 6, Codec.COUNTS, Codec.FP32, up_levels=3, up_scale=math.inf), "scale"),
    (Open("f", 2, 6, Codec.FP32, Codec.COUNTS), "go up only"),
]


@pytest.mark.parametrize(("event", "match"), OPENS)
def test_a_wrong_open_is_refused(event, match):
    """Another protocol version, an empty span and unprintable names end before they begin."""
    refused(ConnectionPair(), Role.CLIENT, event, match)


ROWS_OF_3 = zeros(3)
CLIENT_FAULTS = [
    (an_open(), "not allowed while the session is active"),
    (Opened("s2"), "not an event of a client"),
    (Begin(0, 4), "alive already"),
    (Begin(1, 0), "capacity of 0"),
    (Begin(1, 2**21), "outside 1 to"),
    (Fork(5, 1, 0, 4), "sequence 5 is not alive"),
    (Fork(0, 0, 1, 4), "alive already"),
    (Fork(0, 1, 4, 4), "which has 3"),
    (Fork(0, 1, 3, 2), "capacity of 2"),
    (Fork(0, 1, 3, 2**21), "outside 1 to"),
    (Rollback(0, 4), "shorter length"),
    (Rollback(5, 0), "sequence 5 is not alive"),
    (Drop(5), "sequence 5 is not alive"),
    (Append(0, (Segment(0, 3, 1),), zeros(1)), "ids grow"),
    (Append(1, (), b""), "has 0 segments"),
    (Append(1, (Segment(5, 0, 1),), zeros(1)), "sequence 5 is not alive"),
    (Append(1, (Segment(0, 2, 1),), zeros(1)), "start at 2, but it has 3"),
    (Append(1, (Segment(0, 3, 0),), b""), "no rows"),
    (Append(1, (Segment(0, 3, 6),), zeros(6)), "over its capacity of 8"),
    (Append(1, (Segment(0, 3, 2**32 - 1),), zeros(1)), "over its capacity of 8"),
    (Append(1, (Segment(0, 3, 1), Segment(0, 3, 1)), zeros(2)), "twice"),
    (Append(1, (Segment(0, 3, 2),), zeros(1)), "segments need 32"),
    (Append(1, (Segment(0, 3, 2),), zeros(2) + b"\0"), "segments need 32"),
    (Append(1, (Segment(0, 3, 1),), b""), "holds 0 bytes"),
]


@pytest.mark.parametrize(("event", "match"), CLIENT_FAULTS)
def test_faults_of_a_client(event, match):
    """Each rule for client events, broken once, with 3 of 8 rows in sequence 0."""
    pair = ConnectionPair()
    pair.opened(8)
    pair.client_sends(Append(0, (Segment(0, 0, 3, Want.NONE),), ROWS_OF_3))
    if type(event) is Opened:  # its bytes would be those of another event to the server
        with pytest.raises(LocalProtocolError, match=match):
            pair.client.send(event)
        return
    refused(pair, Role.CLIENT, event, match)


SERVER_FAULTS = [
    (Opened("s2"), "not allowed while the session is active"),
    (Output(8, (Segment(0, 0, 3),), ROWS_OF_3), "answer in order"),
    (Output(7, (Segment(0, 0, 2),), zeros(2)), "wanted rows"),
    (Output(7, (Segment(1, 0, 3),), ROWS_OF_3), "wanted rows"),
    (Output(7, (), b""), "wanted rows"),
    (Output(7, (Segment(0, 0, 3),), zeros(2)), "segments need 48"),
    (Notice(NoticeKind.DRAINING, "x" * 600), "over the limit of 512"),
    (Notice(NoticeKind.DRAINING, "a\nb"), "control characters"),
]


@pytest.mark.parametrize(("event", "match"), SERVER_FAULTS)
def test_faults_of_a_server(event, match):
    """Each rule for server events, broken once, with Append 7 of 3 rows unanswered."""
    pair = ConnectionPair()
    pair.opened(8)
    pair.client_sends(Append(7, (Segment(0, 0, 3, Want.ALL),), ROWS_OF_3))
    refused(pair, Role.SERVER, event, match)


def test_an_output_without_an_append_is_refused():
    """One Output answers one Append, not more."""
    pair = ConnectionPair()
    pair.opened(8)
    refused(pair, Role.SERVER, Output(0, (), b""), "answers nothing")


@pytest.mark.parametrize("session_id", ["", "a\x00", "x" * 600])
def test_an_unusable_session_id_is_refused(session_id):
    """A session has a short printable id."""
    pair = ConnectionPair()
    pair.client_sends(an_open())
    refused(pair, Role.SERVER, Opened(session_id), "id")


LIMITED = [
    (Limits(max_sequences=1), Begin(1, 4), "1 sequences, which is the limit"),
    (Limits(max_sequences=1), Fork(0, 1, 0, 4), "1 sequences, which is the limit"),
    (Limits(max_capacity=64), Begin(1, 65), "outside 1 to 64"),
    (
        Limits(max_rows_per_message=3),
        Append(0, (Segment(0, 0, 4),), zeros(4)),
        "over the limit of 3; send it in parts",
    ),
    (
        Limits(max_segments=1),
        Append(0, (Segment(0, 0, 1), Segment(1, 0, 1)), zeros(2)),
        "has 2 segments; send 1 to 1",
    ),
]


@pytest.mark.parametrize(("limits", "event", "match"), LIMITED)
def test_limits_hold_on_both_sides(limits, event, match):
    """Each cap refuses one more than it allows."""
    pair = ConnectionPair(limits)
    pair.opened(64)
    refused(pair, Role.CLIENT, event, match)


def test_an_answer_that_would_not_fit_is_refused_when_it_is_asked_for():
    """Rows that are small on the way up and large on the way down are caught before they are computed."""
    pair = ConnectionPair(Limits(max_message_bytes=400))
    pair.opened(64, up=Codec.INT8, down=Codec.FP32)
    append = Append(0, (Segment(0, 0, 20, Want.ALL),), zeros(20, Codec.INT8))
    refused(pair, Role.CLIENT, append, "want fewer rows back")


@pytest.mark.parametrize("state", [State.IDLE, State.OPENING, State.CLOSING])
def test_order_of_events_is_that_of_the_table(state):
    """Append needs an open session, an Output needs Opened, and Close ends what a client sends."""
    pair = ConnectionPair()
    event: Event = Append(0, (Segment(0, 0, 1),), zeros(1))
    sender = Role.CLIENT
    if state is State.OPENING:
        pair.client_sends(an_open())
        event, sender = Output(0, (), b""), Role.SERVER
    if state is State.CLOSING:
        pair.opened(8)
        pair.client_sends(Close())
    refused(pair, sender, event, f"not allowed while the session is {state.value}")


def test_a_failed_connection_takes_nothing_more():
    """After a peer's mistake both directions are shut, each with its own error."""
    pair = ConnectionPair()
    pair.opened(8)
    good = pair.client.send(Begin(5, 4))
    with pytest.raises(RemoteProtocolError):
        pair.server.receive(b"\xff")
    with pytest.raises(RemoteProtocolError, match="failed"):
        pair.server.receive(good)
    with pytest.raises(LocalProtocolError, match="failed"):
        pair.server.send(Notice(NoticeKind.DRAINING))


def test_a_local_error_leaves_the_session_usable():
    """Nothing was sent, so the next correct event is accepted by both sides."""
    pair = ConnectionPair(Limits(max_message_bytes=200))
    pair.opened(64)
    for event in (
        Append(0, (Segment(0, 0, 60),), zeros(60)),
        Append(2**64, (Segment(0, 0, 1),), zeros(1)),
        Begin(2**32, 1),
    ):
        with pytest.raises(ProtocolError):
            pair.client.send(event)
    pair.client_sends(Append(0, (Segment(0, 0, 1),), zeros(1)))


def test_length_of_a_sequence_that_is_not_alive():
    """Asking for a sequence that does not exist is a local error with its number."""
    pair = ConnectionPair()
    for ask in (pair.client.length, pair.client.capacity):
        with pytest.raises(LocalProtocolError, match="sequence 3"):
            ask(3)


def test_errors_never_hold_rows():
    """The bytes of rows do not end up in an error message."""
    pair = ConnectionPair()
    pair.opened(8)
    rows = struct.pack("<4f", *[1.25] * HIDDEN_SIZE) + b"secret"
    with pytest.raises(LocalProtocolError) as caught:
        pair.client.send(Append(0, (Segment(0, 0, 1),), rows))
    assert "secret" not in str(caught.value)


def test_construction():
    """A connection knows its role and limits, starts idle, and needs a hidden size."""
    connection = Connection(Role.SERVER, hidden_size=8)
    assert (connection.role, connection.state) == (Role.SERVER, State.IDLE)
    assert connection.limits is DEFAULT_LIMITS
    with pytest.raises(ConfigError, match="hidden_size"):
        Connection(Role.CLIENT, hidden_size=0)
