"""The events of a session, and what a server says about itself.

An event is what one protobuf message of `trunk.proto` means. What one side sends is exactly what
the other receives. Rows are left out of every `repr`: an event that ends up in a log or a traceback
shows lengths and positions, never a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

from fedsea.wire.codecs import Codec
from fedsea.wire.limits import DEFAULT_LIMITS

PROTOCOL_VERSION = 1


class Want(IntEnum):
    """Which rows of an appended segment come back; numbers as in the schema."""

    LAST = 1
    ALL = 2
    NONE = 3


class NoticeKind(IntEnum):
    """What a server tells without being asked; numbers as in the schema."""

    DRAINING = 1


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` rows at positions `start` .. `start + count - 1` of one sequence.

    In an Output every row of the range is present, so `want` says nothing there and does not
    travel.
    """

    sequence: int
    start: int
    count: int
    want: Want = Want.ALL

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.count

    def answer(self) -> Segment | None:
        """The range that an Output brings back for this segment; None when nothing is wanted."""
        if self.want is Want.NONE:
            return None
        if self.want is Want.LAST:
            return Segment(self.sequence, self.end - 1, 1)
        return Segment(self.sequence, self.start, self.count)


@dataclass(frozen=True, slots=True)
class Open:
    """Client: start a session over blocks `first_block` .. `end_block - 1`."""

    fingerprint: str
    first_block: int
    end_block: int
    up_codec: Codec
    down_codec: Codec
    reserve_rows: int = 0
    adapter: str = ""
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Opened:
    """Server: the session exists; `idle_timeout_ms` of 0 means never evicted when idle."""

    session_id: str
    idle_timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class Begin:
    """Client: a new, empty sequence that will hold at most `capacity` rows."""

    sequence: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Client: `target` is new and starts as the first `length` rows of `source`."""

    source: int
    target: int
    length: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Rollback:
    """Client: forget the rows at positions >= `length`."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Client: the sequence is no longer needed."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Append:
    """Client: rows for one or more sequences, in the order of the segments, in `up_codec`."""

    id: int
    segments: tuple[Segment, ...]
    rows: bytes | memoryview = field(repr=False)

    @property
    def count(self) -> int:
        """Rows in all segments together."""
        return sum(segment.count for segment in self.segments)

    def answer(self) -> tuple[Segment, ...]:
        """The segments of the Output that answers this Append."""
        answers = (segment.answer() for segment in self.segments)
        return tuple(answer for answer in answers if answer is not None)


@dataclass(frozen=True, slots=True)
class Output:
    """Server: the wanted rows of the Append with the same id, in `down_codec`; times in µs."""

    id: int
    segments: tuple[Segment, ...]
    rows: bytes | memoryview = field(repr=False)
    queue_us: int = 0
    compute_us: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """Client: the session is over."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Server: something the client should know; the session goes on."""

    kind: NoticeKind
    message: str = ""


ClientEvent = Open | Begin | Fork | Rollback | Drop | Append | Close
ServerEvent = Opened | Output | Notice
Event = ClientEvent | ServerEvent


class Role(Enum):
    """Which side of a session a `Connection` plays."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def peer(self) -> Role:
        """The other side."""
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


@dataclass(frozen=True, slots=True)
class Description:
    """What a server serves: the model by name and fingerprint, the widest span, and its caps.

    `model` is a name to show; only `fingerprint` identifies the checkpoint. `quantization` is empty
    for none. Each sequence takes KV rows in whole pages of `page_rows`, which a reservation has to
    allow for.
    """

    model: str
    family: str
    fingerprint: str
    hidden_size: int
    num_blocks: int
    first_block: int
    end_block: int
    codecs: tuple[Codec, ...]
    max_context: int
    max_rows_per_message: int
    max_message_bytes: int
    dtype: str
    quantization: str = ""
    server_version: str = ""
    page_rows: int = 1
    max_segments: int = DEFAULT_LIMITS.max_segments
    max_sequences: int = DEFAULT_LIMITS.max_sequences
    max_pending: int = DEFAULT_LIMITS.max_pending
    protocol: int = PROTOCOL_VERSION
