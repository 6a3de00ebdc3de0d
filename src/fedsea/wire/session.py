"""The rules that depend on what happened before: sequences, lengths, capacities, open answers.

`SessionRules` is the same on both sides. It is told of each event before the event counts, either
refuses it and stays as it was, or takes it into account. The error class is passed in: the same
mistake is local when we are about to send it and remote when we have received it. What only training
sessions know is in `fedsea.wire.training`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from fedsea.errors import ConfigError
from fedsea.wire.limits import Limits
from fedsea.wire.messages import (
    PROTOCOL_VERSION,
    Append,
    Begin,
    Drop,
    Event,
    Fork,
    Notice,
    Open,
    Opened,
    OpenTraining,
    Output,
    Rollback,
    Segment,
    Want,
)
from fedsea.wire.text import check_text
from fedsea.wire.training import Fault, TrainingRules

# Most bytes of an Output besides its rows: id, two times and framing; then of one range.
_OUTPUT_BYTES: Final = 64
_RANGE_BYTES: Final = 20


@dataclass(slots=True)
class _Sequence:
    length: int
    capacity: int


@dataclass(frozen=True, slots=True)
class _Pending:
    """An Append that waits for its Output: the rows that will come back."""

    id: int
    ranges: tuple[tuple[int, int, int], ...]  # sequence, start, count
    row_bytes: int


class SessionRules:
    """Bookkeeping of one session; `apply` refuses an event or takes it into account."""

    def __init__(self, hidden_size: int, limits: Limits) -> None:
        self._hidden_size = hidden_size
        self._limits = limits
        self._up_row_bytes = 0
        self._down_row_bytes = 0
        self._last_id = -1
        self._sequences: dict[int, _Sequence] = {}
        self._pending: deque[_Pending] = deque()
        self._training = TrainingRules(hidden_size, limits)

    @property
    def sequences(self) -> frozenset[int]:
        """The sequences that are alive."""
        return frozenset(self._sequences)

    @property
    def pending(self) -> int:
        """Events that wait for their answer."""
        return len(self._pending) + self._training.pending

    @property
    def forwards(self) -> frozenset[int]:
        """The Forwards that are open: a Backward may come for them."""
        return self._training.forwards

    def sequence(self, number: int, fault: Fault) -> _Sequence:
        """The state of a living sequence; raise `fault` for any other."""
        sequence = self._sequences.get(number)
        if sequence is None:
            raise fault(f"sequence {number} is not alive; send Begin or Fork first")
        return sequence

    def apply(self, event: Event, fault: Fault) -> None:
        """Take `event` into account, or raise `fault` and change nothing."""
        rule = _RULES.get(type(event))
        if rule is not None:
            rule(self, event, fault)
        else:
            self._training.apply(event, fault)

    def _open(self, event: Open, fault: Fault) -> None:
        self._check_opening(event, fault)
        check_text("prompt", event.prompt, self._limits.max_text, fault)
        try:
            up, down = event.up_format(self._hidden_size), event.down_format(self._hidden_size)
        except ConfigError as error:
            raise fault(str(error)) from None
        self._up_row_bytes, self._down_row_bytes = up.row_bytes, down.row_bytes

    def _open_training(self, event: OpenTraining, fault: Fault) -> None:
        self._check_opening(event, fault)
        self._training.open(event, fault)

    def _check_opening(self, event: Open | OpenTraining, fault: Fault) -> None:
        if event.protocol != PROTOCOL_VERSION:
            raise fault(
                f"the peers speak protocol {event.protocol} and {PROTOCOL_VERSION}; "
                "install the same fedsea version on both sides"
            )
        if not 0 <= event.first_block < event.end_block:
            raise fault(
                f"blocks {event.first_block} to {event.end_block} are no span; "
                "leave at least one block in the trunk"
            )
        check_text("fingerprint", event.fingerprint, self._limits.max_text, fault)
        check_text("adapter", event.adapter, self._limits.max_text, fault)
        check_text("projection", event.projection, self._limits.max_text, fault)
        self._check_width(event, fault)

    def _check_width(self, event: Open | OpenTraining, fault: Fault) -> None:
        width = event.up_width or self._hidden_size
        if not 1 <= width <= self._hidden_size:
            raise fault(
                f"rows of {width} numbers do not fit a hidden size of {self._hidden_size}; "
                "use a projection for this model"
            )
        if width != self._hidden_size and not event.projection:
            raise fault(
                f"rows of {width} numbers need a projection to {self._hidden_size}; name one"
            )

    def _opened(self, event: Opened, fault: Fault) -> None:
        check_text("session_id", event.session_id, self._limits.max_text, fault)
        if not event.session_id:
            raise fault("the session has no id; give it one")

    def _notice(self, event: Notice, fault: Fault) -> None:
        check_text("message", event.message, self._limits.max_text, fault)

    def _begin(self, event: Begin, fault: Fault) -> None:
        self._check_new(event.sequence, event.capacity, fault)
        self._sequences[event.sequence] = _Sequence(0, event.capacity)

    def _fork(self, event: Fork, fault: Fault) -> None:
        source = self.sequence(event.source, fault)
        self._check_new(event.target, event.capacity, fault)
        if not 0 <= event.length <= source.length:
            raise fault(
                f"Fork takes {event.length} rows of sequence {event.source}, which has "
                f"{source.length}; take no more than it has"
            )
        if event.length > event.capacity:
            raise fault(
                f"Fork takes {event.length} rows into a capacity of {event.capacity}; "
                "give a capacity of at least the length"
            )
        self._sequences[event.target] = _Sequence(event.length, event.capacity)

    def _check_new(self, number: int, capacity: int, fault: Fault) -> None:
        if number in self._sequences:
            raise fault(f"sequence {number} is alive already; Drop it or choose another number")
        if len(self._sequences) >= self._limits.max_sequences:
            raise fault(
                f"the session has {self._limits.max_sequences} sequences, which is the limit; "
                "Drop one first"
            )
        if not 1 <= capacity <= self._limits.max_capacity:
            raise fault(
                f"a capacity of {capacity} rows is outside 1 to {self._limits.max_capacity}; "
                "ask for fewer rows"
            )

    def _rollback(self, event: Rollback, fault: Fault) -> None:
        sequence = self.sequence(event.sequence, fault)
        if not 0 <= event.length <= sequence.length:
            raise fault(
                f"Rollback of sequence {event.sequence} to {event.length} rows, but it has "
                f"{sequence.length}; roll back to a shorter length"
            )
        sequence.length = event.length

    def _drop(self, event: Drop, fault: Fault) -> None:
        self.sequence(event.sequence, fault)
        del self._sequences[event.sequence]

    def _append(self, event: Append, fault: Fault) -> None:
        if event.id <= self._last_id:
            raise fault(f"Append {event.id} comes after {self._last_id}; ids grow within a session")
        if len(self._pending) >= self._limits.max_pending:
            raise fault(
                f"{self._limits.max_pending} Appends are unanswered, which is the limit; "
                "wait for an Output"
            )
        if not 1 <= len(event.segments) <= self._limits.max_segments:
            raise fault(
                f"Append {event.id} has {len(event.segments)} segments; "
                f"send 1 to {self._limits.max_segments}"
            )
        grown = [(self._check_segment(segment, fault), segment.end) for segment in event.segments]
        if len(event.segments) > 1 and len({s.sequence for s in event.segments}) < len(grown):
            raise fault(f"Append {event.id} names a sequence twice; send one segment for each")
        self._check_rows(event, fault)
        answer = self._answer(event, fault)
        for sequence, length in grown:
            sequence.length = length
        self._last_id = event.id
        self._pending.append(answer)

    def _check_segment(self, segment: Segment, fault: Fault) -> _Sequence:
        sequence = self.sequence(segment.sequence, fault)
        if segment.start != sequence.length:
            raise fault(
                f"rows for sequence {segment.sequence} start at {segment.start}, but it has "
                f"{sequence.length}; append at its end or Rollback first"
            )
        if segment.count < 1:
            raise fault(f"a segment of sequence {segment.sequence} has no rows; leave it out")
        if segment.end > sequence.capacity:
            raise fault(
                f"sequence {segment.sequence} would hold {segment.end} rows, over its capacity of "
                f"{sequence.capacity}; begin it with more"
            )
        return sequence

    def _check_rows(self, event: Append, fault: Fault) -> None:
        count = event.count
        if count > self._limits.max_rows_per_message:
            raise fault(
                f"Append {event.id} has {count} rows, over the limit of "
                f"{self._limits.max_rows_per_message}; send it in parts"
            )
        _check_length("Append", event, count * self._up_row_bytes, fault)

    def _answer(self, event: Append, fault: Fault) -> _Pending:
        ranges = tuple(
            [
                (segment.sequence, segment.start, segment.count)
                if segment.want is Want.ALL
                else (segment.sequence, segment.end - 1, 1)
                for segment in event.segments
                if segment.want is not Want.NONE
            ]
        )
        row_bytes = sum([count for _, _, count in ranges]) * self._down_row_bytes
        size = row_bytes + _OUTPUT_BYTES + _RANGE_BYTES * len(ranges)
        if size > self._limits.max_message_bytes:
            raise fault(
                f"the answer to Append {event.id} would take {size} bytes, over the limit of "
                f"{self._limits.max_message_bytes}; want fewer rows back"
            )
        return _Pending(event.id, ranges, row_bytes)

    def _output(self, event: Output, fault: Fault) -> None:
        if not self._pending:
            raise fault(f"Output {event.id} answers nothing; send one Output for each Append")
        expected = self._pending[0]
        if event.id != expected.id:
            raise fault(f"Output {event.id} came before {expected.id}; answer in order")
        ranges = tuple([(s.sequence, s.start, s.count) for s in event.segments])
        if ranges != expected.ranges:
            raise fault(f"Output {event.id} does not hold the wanted rows; answer what was asked")
        _check_length("Output", event, expected.row_bytes, fault)
        self._pending.popleft()


def _check_length(name: str, event: Append | Output, expected: int, fault: Fault) -> None:
    size = memoryview(event.rows).nbytes
    if size != expected:
        raise fault(
            f"{name} {event.id} holds {size} bytes of rows where its segments need {expected}; "
            "check the codec and the hidden size"
        )


_RULES: Final[Mapping[type[Event], Callable[[SessionRules, Any, Fault], None]]] = MappingProxyType(
    {
        Open: SessionRules._open,
        OpenTraining: SessionRules._open_training,
        Opened: SessionRules._opened,
        Notice: SessionRules._notice,
        Begin: SessionRules._begin,
        Fork: SessionRules._fork,
        Rollback: SessionRules._rollback,
        Drop: SessionRules._drop,
        Append: SessionRules._append,
        Output: SessionRules._output,
    }
)
