"""What must hold for any bytes that a stranger sends: our own errors only, rows always finite."""

from __future__ import annotations

from contextlib import suppress

from fedsea.errors import RemoteProtocolError
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.description import decode_describe_request, decode_description
from fedsea.wire.limits import Limits
from fedsea.wire.messages import (
    Activations,
    Append,
    Backward,
    Begin,
    Event,
    Forward,
    Gradients,
    Lora,
    Open,
    Opened,
    OpenTraining,
    Output,
    Role,
    Segment,
    Step,
    Want,
)

HIDDEN_SIZE = 4
LIMITS = Limits(max_message_bytes=2**16, max_segments=8, max_capacity=64)
OPENS = (
    Open("f", 0, 1, Codec.INT8, Codec.FP32),
    Open(
        "f", 0, 1, Codec.COUNTS, Codec.FP32, up_levels=5, up_scale=1.0, up_width=3, projection="p"
    ),
)
TRAINING_OPENS = (
    OpenTraining(
        "f", 0, 1, Codec.INT8, Codec.FP32, Codec.BF16, "a", lora=Lora(targets=("q_proj",))
    ),
    OpenTraining(
        *("f", 0, 1, Codec.COUNTS, Codec.FP16, Codec.INT8, "a"),
        up_levels=5, up_scale=1.0, up_width=3, projection="p",
    ),
)  # fmt: skip
Greeting = Open | OpenTraining


def judge(data: bytes) -> None:
    """Feed one message to every parser that meets a stranger's bytes; raise if a rule is broken."""
    for role in Role:
        _receive(_connection(role, None), data, None)
        for greeting in (*OPENS, *TRAINING_OPENS):
            _receive(_connection(role, greeting), data, greeting)
    for read in (decode_description, decode_describe_request):
        with suppress(RemoteProtocolError):
            read(data)


def _connection(role: Role, greeting: Greeting | None) -> Connection:
    """A side of a session that has just begun, or that has work unanswered."""
    side = Connection(role, LIMITS, hidden_size=HIDDEN_SIZE)
    if greeting is not None:
        peer = Connection(role.peer, LIMITS, hidden_size=HIDDEN_SIZE)
        client, server = (side, peer) if role is Role.CLIENT else (peer, side)
        server.receive(client.send(greeting))
        client.receive(server.send(Opened("s")))
        rows = bytes(2 * greeting.up_format(HIDDEN_SIZE).row_bytes)
        if isinstance(greeting, Open):
            server.receive(client.send(Begin(0, 8)))
            server.receive(client.send(Append(0, (Segment(0, 0, 2, Want.LAST),), rows)))
        else:
            _train(client, server, greeting, rows)
    return side


def _train(client: Connection, server: Connection, greeting: OpenTraining, rows: bytes) -> None:
    """Forward 0 waits for its Gradients, Forward 1 is open, Forward 2 waits for its Activations."""
    for number in range(2):
        server.receive(client.send(Forward(number, (2,), rows)))
        down = bytes(2 * greeting.down_format(HIDDEN_SIZE).row_bytes)
        client.receive(server.send(Activations(number, down)))
    back = bytes(2 * greeting.backward_format(HIDDEN_SIZE).row_bytes)
    server.receive(client.send(Backward(0, back)))
    server.receive(client.send(Forward(2, (1, 1), rows)))


def _receive(side: Connection, data: bytes, greeting: Greeting | None) -> None:
    try:
        event = side.receive(data)
        if isinstance(event, Open | OpenTraining):
            _use_formats(event)
        elif greeting is not None:
            _decode_rows(event, greeting)
        if isinstance(event, Step) and not event.scale > 0:
            raise AssertionError("gradients can be divided by an accepted scale")
    except RemoteProtocolError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 400:
            raise AssertionError("an error is one printable line of bounded length") from error


def _use_formats(event: Greeting) -> None:
    """What a connection has accepted can be read: no width, level or scale is surprising later."""
    formats = [event.up_format(HIDDEN_SIZE), event.down_format(HIDDEN_SIZE)]
    if isinstance(event, OpenTraining):
        formats += [event.backward_format(HIDDEN_SIZE), event.gradients_format(HIDDEN_SIZE)]
    for chosen in formats:
        _read_rows(bytes(chosen.row_bytes), chosen, 1)


def _decode_rows(event: Event, greeting: Greeting) -> None:
    if isinstance(event, Append | Output):
        is_up = isinstance(event, Append)
        chosen = (greeting.up_format if is_up else greeting.down_format)(HIDDEN_SIZE)
        _read_rows(event.rows, chosen, sum(segment.count for segment in event.segments))
    elif isinstance(event, Forward):
        _read_rows(event.rows, greeting.up_format(HIDDEN_SIZE), event.count)
    elif isinstance(event, Activations):
        chosen = greeting.down_format(HIDDEN_SIZE)
        _read_rows(event.rows, chosen, memoryview(event.rows).nbytes // chosen.row_bytes)
    elif isinstance(greeting, OpenTraining) and isinstance(event, Backward | Gradients):
        is_up = isinstance(event, Backward)
        chosen = (greeting.backward_format if is_up else greeting.gradients_format)(HIDDEN_SIZE)
        _read_rows(event.rows, chosen, memoryview(event.rows).nbytes // chosen.row_bytes)


def _read_rows(data: bytes | memoryview, chosen: RowFormat, count: int) -> None:
    rows = chosen.decode(data, count)
    if not bool(rows.isfinite().all()):
        raise AssertionError("decoded rows are finite")
