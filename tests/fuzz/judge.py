"""What must hold for any bytes that a stranger sends: our own errors only, rows always finite."""

from __future__ import annotations

from contextlib import suppress

from fedsea.errors import RemoteProtocolError
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.description import decode_describe_request, decode_description
from fedsea.wire.limits import Limits
from fedsea.wire.messages import Append, Begin, Event, Open, Opened, Output, Role, Segment, Want

HIDDEN_SIZE = 4
LIMITS = Limits(max_message_bytes=2**16, max_segments=8, max_capacity=64)
OPENS = (
    Open("f", 0, 1, Codec.INT8, Codec.FP32),
    Open(
        "f", 0, 1, Codec.COUNTS, Codec.FP32, up_levels=5, up_scale=1.0, up_width=3, projection="p"
    ),
)


def judge(data: bytes) -> None:
    """Feed one message to every parser that meets a stranger's bytes; raise if a rule is broken."""
    for role in Role:
        _receive(_connection(role, None), data, None)
        for greeting in OPENS:
            _receive(_connection(role, greeting), data, greeting)
    for read in (decode_description, decode_describe_request):
        with suppress(RemoteProtocolError):
            read(data)


def _connection(role: Role, greeting: Open | None) -> Connection:
    """A side of a session that has just begun, or that has one Append unanswered."""
    side = Connection(role, LIMITS, hidden_size=HIDDEN_SIZE)
    if greeting is not None:
        peer = Connection(role.peer, LIMITS, hidden_size=HIDDEN_SIZE)
        client, server = (side, peer) if role is Role.CLIENT else (peer, side)
        server.receive(client.send(greeting))
        client.receive(server.send(Opened("s")))
        server.receive(client.send(Begin(0, 8)))
        rows = bytes(2 * greeting.up_format(HIDDEN_SIZE).row_bytes)
        server.receive(client.send(Append(0, (Segment(0, 0, 2, Want.LAST),), rows)))
    return side


def _receive(side: Connection, data: bytes, greeting: Open | None) -> None:
    try:
        event = side.receive(data)
        if isinstance(event, Open):
            _use_formats(event)
        elif greeting is not None:
            _decode_rows(event, greeting)
    except RemoteProtocolError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 400:
            raise AssertionError("an error is one printable line of bounded length") from error


def _use_formats(event: Open) -> None:
    """What a connection has accepted can be read: no width, level or scale is surprising later."""
    for chosen in (event.up_format(HIDDEN_SIZE), event.down_format(HIDDEN_SIZE)):
        _read_rows(bytes(chosen.row_bytes), chosen, 1)


def _decode_rows(event: Event, greeting: Open) -> None:
    if isinstance(event, Append | Output):
        is_up = isinstance(event, Append)
        chosen = (greeting.up_format if is_up else greeting.down_format)(HIDDEN_SIZE)
        _read_rows(event.rows, chosen, sum(segment.count for segment in event.segments))


def _read_rows(data: bytes | memoryview, chosen: RowFormat, count: int) -> None:
    rows = chosen.decode(data, count)
    if not bool(rows.isfinite().all()):
        raise AssertionError("decoded rows are finite")
