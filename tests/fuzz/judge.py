"""What must hold for any bytes that a stranger sends: our own errors only, rows always finite."""

from __future__ import annotations

from contextlib import suppress

from fedsea.errors import RemoteProtocolError
from fedsea.wire.codecs import Codec, decode
from fedsea.wire.connection import Connection
from fedsea.wire.description import decode_describe_request, decode_description
from fedsea.wire.limits import Limits
from fedsea.wire.messages import Append, Begin, Event, Open, Opened, Output, Role, Segment, Want

HIDDEN_SIZE = 4
LIMITS = Limits(max_message_bytes=2**16, max_segments=8, max_capacity=64)


def judge(data: bytes) -> None:
    """Feed one message to every parser that meets a stranger's bytes; raise if a rule is broken."""
    for opened in (False, True):
        for role in Role:
            _receive(_connection(role, opened), data)
    for read in (decode_description, decode_describe_request):
        with suppress(RemoteProtocolError):
            read(data)


def _connection(role: Role, opened: bool) -> Connection:
    """A side of a session that has just begun, or that has one Append unanswered."""
    side = Connection(role, LIMITS, hidden_size=HIDDEN_SIZE)
    if opened:
        peer = Connection(role.peer, LIMITS, hidden_size=HIDDEN_SIZE)
        client, server = (side, peer) if role is Role.CLIENT else (peer, side)
        server.receive(client.send(Open("f", 0, 1, Codec.INT8, Codec.FP32)))
        client.receive(server.send(Opened("s")))
        server.receive(client.send(Begin(0, 8)))
        rows = bytes(2 * Codec.INT8.row_bytes(HIDDEN_SIZE))
        server.receive(client.send(Append(0, (Segment(0, 0, 2, Want.LAST),), rows)))
    return side


def _receive(side: Connection, data: bytes) -> None:
    try:
        event = side.receive(data)
        _decode_rows(event)
    except RemoteProtocolError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 400:
            raise AssertionError("an error is one printable line of bounded length") from error


def _decode_rows(event: Event) -> None:
    if isinstance(event, Append | Output):
        codec = Codec.INT8 if isinstance(event, Append) else Codec.FP32
        count = sum(segment.count for segment in event.segments)
        rows = decode(event.rows, codec, count, HIDDEN_SIZE)
        if not bool(rows.isfinite().all()):
            raise AssertionError("decoded rows are finite")
