"""Two connections joined by a fake link, so that a test of the protocol is a dialogue."""

from __future__ import annotations

from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.connection import Connection
from fedsea.wire.limits import DEFAULT_LIMITS, Limits
from fedsea.wire.messages import Begin, Event, Open, Opened, Role

HIDDEN_SIZE = 4
LEVELS = 5


def an_open(up: Codec = Codec.FP32, down: Codec = Codec.FP32) -> Open:
    """A valid Open."""
    if up is Codec.COUNTS:
        return Open("f00d", 2, 6, up, down, up_levels=LEVELS, up_scale=1.0)
    return Open("f00d", 2, 6, up, down)


def zeros(count: int, codec: Codec = Codec.FP32) -> bytes:
    """Bytes of `count` rows of zeros."""
    if codec is Codec.COUNTS:
        return bytes(count * RowFormat(codec, HIDDEN_SIZE, LEVELS, 1.0).row_bytes)
    return bytes(count * codec.row_bytes(HIDDEN_SIZE))


class ConnectionPair:
    """A client and a server; what one sends, the other receives at once."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.client = Connection(Role.CLIENT, limits, hidden_size=HIDDEN_SIZE)
        self.server = Connection(Role.SERVER, limits, hidden_size=HIDDEN_SIZE)

    def client_sends(self, *events: Event) -> None:
        """Send from the client and check that the server receives the same."""
        self._pass(self.client, self.server, events)

    def server_sends(self, *events: Event) -> None:
        """Send from the server and check that the client receives the same."""
        self._pass(self.server, self.client, events)

    def opened(self, *capacities: int, up: Codec = Codec.FP32, down: Codec = Codec.FP32) -> None:
        """Open the session and begin sequences 0, 1, ... with the given capacities."""
        self.client_sends(an_open(up, down))
        self.server_sends(Opened("s1", 60_000))
        self.client_sends(*(Begin(number, rows) for number, rows in enumerate(capacities)))

    def _pass(self, sender: Connection, receiver: Connection, events: tuple[Event, ...]) -> None:
        for event in events:
            assert receiver.receive(sender.send(event)) == event
            assert sender.state is receiver.state
            assert sender.sequences == receiver.sequences
            assert sender.pending == receiver.pending
