"""One side of one session: events in, bytes out, and back, with every rule enforced.

    data = connection.send(event)      LocalProtocolError when we may not send this
    event = connection.receive(data)   RemoteProtocolError when the peer may not say this

`data` is one whole message. After a LocalProtocolError nothing was sent and nothing changed: the
session goes on. After a RemoteProtocolError the two sides no longer agree, so the connection is
FAILED and takes no more events. Any other exception out of `receive` is a bug in this package.
A `Connection` holds no lock: calls on one connection come one at a time.
"""

from __future__ import annotations

from fedsea.errors import ConfigError, LocalProtocolError, ProtocolError, RemoteProtocolError
from fedsea.wire.framing import decode_event, encode_event
from fedsea.wire.limits import DEFAULT_LIMITS, Limits
from fedsea.wire.messages import Event, Role
from fedsea.wire.session import SessionRules
from fedsea.wire.states import SENDERS, TRANSITIONS, State


class Connection:
    """The protocol as one side of a session sees it.

    Args:
        role: the side that we play.
        limits: what we accept, and what we know the peer accepts; the smaller of both.
        hidden_size: numbers in a row, from the model.
    """

    def __init__(self, role: Role, limits: Limits = DEFAULT_LIMITS, *, hidden_size: int) -> None:
        if hidden_size < 1:
            raise ConfigError(f"hidden_size is {hidden_size}; give the hidden size of the model")
        self._role = role
        self._limits = limits
        self._state = State.IDLE
        self._rules = SessionRules(hidden_size, limits)

    @property
    def role(self) -> Role:
        """The side that we play."""
        return self._role

    @property
    def limits(self) -> Limits:
        """The caps in force."""
        return self._limits

    @property
    def state(self) -> State:
        """Where the session is."""
        return self._state

    @property
    def sequences(self) -> frozenset[int]:
        """The sequences that are alive."""
        return self._rules.sequences

    @property
    def pending(self) -> int:
        """Events without their answer; another of their kind is allowed below the cap."""
        return self._rules.pending

    @property
    def forwards(self) -> frozenset[int]:
        """Forwards of a training session that are open: neither Backward nor Discard came."""
        return self._rules.forwards

    def length(self, sequence: int) -> int:
        """Rows of a living sequence, those of unanswered Appends included.

        Raises:
            LocalProtocolError: no such sequence is alive.
        """
        return self._rules.sequence(sequence, LocalProtocolError).length

    def capacity(self, sequence: int) -> int:
        """Most rows that a living sequence may hold.

        Raises:
            LocalProtocolError: no such sequence is alive.
        """
        return self._rules.sequence(sequence, LocalProtocolError).capacity

    def send(self, event: Event) -> bytes:
        """The bytes of one message that tells `event` to the peer.

        Raises:
            LocalProtocolError: the event is not allowed now; nothing has changed.
        """
        state = self._next_state(event, self._role, LocalProtocolError)
        data = encode_event(event, self._limits)
        self._rules.apply(event, LocalProtocolError)
        self._state = state
        return data

    def receive(self, data: bytes) -> Event:
        """What one whole message of the peer says.

        Raises:
            RemoteProtocolError: the message is not allowed; the connection is FAILED from then on.
        """
        try:
            event = decode_event(data, self._role.peer, self._limits)
            state = self._next_state(event, self._role.peer, RemoteProtocolError)
            self._rules.apply(event, RemoteProtocolError)
        except RemoteProtocolError:
            self._state = State.FAILED
            raise
        self._state = state
        return event

    def _next_state(self, event: Event, sender: Role, fault: type[ProtocolError]) -> State:
        kind = type(event)
        if SENDERS.get(kind) is not sender:
            raise fault(
                f"{kind.__name__} is not an event of a {sender.value}; see docs/protocol.md"
            )
        state = TRANSITIONS[self._state].get(kind)
        if state is None:
            raise fault(
                f"{kind.__name__} is not allowed while the session is {self._state.value}; "
                "see the table of states in docs/protocol.md"
            )
        return state
