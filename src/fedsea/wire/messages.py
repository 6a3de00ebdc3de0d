"""The events of a session, and what a server says about itself.

An event is what one protobuf message of `trunk.proto` means. What one side sends is exactly what
the other receives. Rows are left out of every `repr`: an event that ends up in a log or a traceback
shows lengths and positions, never a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

from fedsea.errors import ConfigError
from fedsea.wire.codecs import Codec, RowFormat
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
    """Client: start a session over blocks `first_block` .. `end_block - 1`.

    Rows go up in `up_codec` with `up_width` numbers each, 0 for the hidden size; for counts,
    `up_levels` and `up_scale` say what a count means. Rows of another width than the hidden size
    are widened at the server by its half of `projection`, named by the fingerprint of the pair.
    `adapter` and `prompt` are names that the server has for what its blocks compute with.
    """

    fingerprint: str
    first_block: int
    end_block: int
    up_codec: Codec
    down_codec: Codec
    reserve_rows: int = 0
    adapter: str = ""
    protocol: int = PROTOCOL_VERSION
    up_width: int = 0
    up_levels: int = 0
    up_scale: float = 0.0
    projection: str = ""
    prompt: str = ""

    def up_format(self, hidden_size: int) -> RowFormat:
        """How the rows of every Append are written.

        Raises:
            ConfigError: the fields describe no format.
        """
        return _up_format(self, hidden_size)

    def down_format(self, hidden_size: int) -> RowFormat:
        """How the rows of every Output are written.

        Raises:
            ConfigError: rows come back as counts.
        """
        return _value_format(self.down_codec, hidden_size)


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank adapter on linears of the trunk; the fields mean what they mean in PEFT.

    `blocks` are numbers in the whole model, none for all blocks of the trunk.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    rslora: bool = False
    freeze_a: bool = False


@dataclass(frozen=True, slots=True)
class AdamW:
    """The constants of the optimizer; its learning rate comes with each Step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True, slots=True)
class OpenTraining:
    """Client: start a session that trains the trunk's part, `adapter`, at the server.

    What is trained is a low-rank adapter, `prompt_rows` rows in front of every sequence at the
    entrance of the trunk, or both; with neither the trunk only passes rows and gradients through.
    `resume_steps` are those that the client could go on from, 0 for the start; Opened names the
    one that both sides have. `weight` counts where results of several clients are averaged.
    """

    fingerprint: str
    first_block: int
    end_block: int
    up_codec: Codec
    down_codec: Codec
    gradient_codec: Codec
    adapter: str
    lora: Lora | None = None
    prompt_rows: int = 0
    optimizer: AdamW = AdamW()
    seed: int = 0
    resume_steps: tuple[int, ...] = (0,)
    weight: float = 1.0
    protocol: int = PROTOCOL_VERSION
    up_width: int = 0
    up_levels: int = 0
    up_scale: float = 0.0
    projection: str = ""

    def up_format(self, hidden_size: int) -> RowFormat:
        """How the rows of every Forward are written.

        Raises:
            ConfigError: the fields describe no format.
        """
        return _up_format(self, hidden_size)

    def down_format(self, hidden_size: int) -> RowFormat:
        """How the rows of every Activations are written.

        Raises:
            ConfigError: rows come back as counts.
        """
        return _value_format(self.down_codec, hidden_size)

    def backward_format(self, hidden_size: int) -> RowFormat:
        """How the rows of every Backward are written.

        Raises:
            ConfigError: gradients are counts.
        """
        return _value_format(self.gradient_codec, hidden_size)

    def gradients_format(self, hidden_size: int) -> RowFormat:
        """How the rows of every Gradients are written: as wide as those that went up.

        Raises:
            ConfigError: gradients are counts.
        """
        return _value_format(self.gradient_codec, self.up_width or hidden_size)


def _up_format(event: Open | OpenTraining, hidden_size: int) -> RowFormat:
    width = event.up_width or hidden_size
    return RowFormat(event.up_codec, width, event.up_levels, event.up_scale)


def _value_format(codec: Codec, width: int) -> RowFormat:
    if codec is Codec.COUNTS:
        raise ConfigError(
            "counts go up only; let rows that come back, and gradients, be fp32, bf16, fp16 or int8"
        )
    return RowFormat(codec, width)


@dataclass(frozen=True, slots=True)
class Opened:
    """Server: the session exists; `idle_timeout_ms` of 0 means never evicted when idle.

    `step` is that of a training session: the optimizer steps that are done already.
    """

    session_id: str
    idle_timeout_ms: int = 0
    step: int = 0


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


@dataclass(frozen=True, slots=True)
class Forward:
    """Client: rows of whole sequences from position 0, `counts` rows each, in `up_codec`.

    With `no_grad` no Backward follows, as in an evaluation.
    """

    id: int
    counts: tuple[int, ...]
    rows: bytes | memoryview = field(repr=False)
    no_grad: bool = False

    @property
    def count(self) -> int:
        """Rows in all sequences together."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Activations:
    """Server: all rows of the Forward with the same id behind the trunk, in `down_codec`."""

    id: int
    rows: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Backward:
    """Client: the gradient with regard to the Activations of the same id, in `gradient_codec`."""

    id: int
    rows: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Server: the gradient with regard to the rows of the Forward, in `gradient_codec`."""

    id: int
    rows: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Discard:
    """Client: no Backward will come for an open Forward."""

    id: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Client: forget all open Forwards and the gradients of the step that is not finished."""


@dataclass(frozen=True, slots=True)
class Step:
    """Client: change what is trained by the gradients since the last step.

    `number` is one more than the steps that are done; that of the last step is a repeat, which is
    answered as before and changes nothing. `max_grad_norm` of 0 does not clip; gradients are
    `scale` times too large.
    """

    number: int
    learning_rate: float
    max_grad_norm: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Stepped:
    """Server: what became of a Step.

    `grad_norm` is that of the trunk's part before it was clipped. Without `applied` the gradients
    were not finite: they are gone, nothing changed, and the step is not done.
    """

    number: int
    grad_norm: float
    applied: bool


@dataclass(frozen=True, slots=True)
class Save:
    """Client: keep what is trained, and its optimizer, as they are behind step `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class Saved:
    """Server: the step is durable, unless there is a `problem`, in which case nothing was kept."""

    number: int
    problem: str = ""


ClientEvent = (
    Open
    | Begin
    | Fork
    | Rollback
    | Drop
    | Append
    | Close
    | OpenTraining
    | Forward
    | Backward
    | Discard
    | Reset
    | Step
    | Save
)
ServerEvent = Opened | Output | Notice | Activations | Gradients | Stepped | Saved
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
    allow for. `projections` are the fingerprints of those whose rows this server can widen.
    `max_forwards` of 0 says that nothing is trained here.
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
    projections: tuple[str, ...] = ()
    max_forwards: int = 0
    protocol: int = PROTOCOL_VERSION
