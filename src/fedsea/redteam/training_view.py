"""What a server sees of a training: the recorded messages, decoded as a server decodes them.

A step is what was sent between two Steps. A step that is done anew, after a lost connection or a
Reset, replaces what was seen of it: the client sends the same bytes again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.redteam.exchange import Exchange
from fedsea.redteam.view import Chain, decoded, released
from fedsea.transport.recording import Message
from fedsea.wire.codecs import RowFormat
from fedsea.wire.messages import (
    Activations,
    Backward,
    Discard,
    Forward,
    Opened,
    OpenTraining,
    Reset,
    Step,
    Stepped,
)


@dataclass(frozen=True, slots=True, eq=False)
class StepSeen:
    """One step of the optimizer, in the order of its forwards.

    Attributes:
        number: of the step; None for the last one, when it was not finished.
        exchanges: its sequences, of which the server saw rows, activations and gradient.
        scale: gradients are so many times too large.
    """

    number: int | None
    exchanges: tuple[Exchange, ...]
    scale: float = 1.0


@dataclass(eq=False, slots=True)
class _Sent:
    """A Forward and what belongs to it so far."""

    counts: tuple[int, ...]
    rows: Tensor
    activations: Tensor | None = None
    gradient: Tensor | None = None

    def exchanges(self) -> list[Exchange]:
        if self.activations is None or self.gradient is None:
            return []
        parts = (part.split(self.counts) for part in (self.activations, self.gradient, self.rows))
        return [Exchange(*each) for each in zip(*parts, strict=True)]


@dataclass(eq=False, slots=True)
class _Unfinished:
    """What was sent since the last step."""

    forwards: dict[int, _Sent] = field(default_factory=dict)
    scale: float = 1.0

    def clear(self) -> None:
        self.forwards.clear()
        self.scale = 1.0

    def seen(self, number: int | None) -> StepSeen:
        exchanges = [each for sent in self.forwards.values() for each in sent.exchanges()]
        return StepSeen(number, tuple(exchanges), self.scale)


class TrainingView:
    """The training of a recording, as far as it is on the wire.

    Args:
        messages: of one client, in order; streams do not overlap.
        hidden_size: numbers in a row of the model.

    Attributes:
        steps: by number, ascending, an unfinished one last.

    Raises:
        ConfigError: the recording does not begin with the opening of a training, or holds answers
            to what it does not hold.
        RemoteProtocolError: a message is not one of this protocol.
    """

    def __init__(self, messages: Iterable[Message], hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._opened: OpenTraining | None = None
        self._running = _Unfinished()
        self._steps: dict[int, StepSeen] = {}
        self._rows: dict[bytes, Tensor] = {}
        for message in messages:
            self._take(decoded(message))
        if self._opened is None:
            raise ConfigError("the recording is empty: record the training that is to be attacked")

    @property
    def opened(self) -> OpenTraining:
        """What the last session was opened with."""
        if self._opened is None:
            raise ConfigError(
                "the recording does not begin with the opening of a training: keep all its "
                "messages, from the first on"
            )
        return self._opened

    @property
    def steps(self) -> tuple[StepSeen, ...]:
        """What was seen of every step."""
        last = self._running.seen(None)
        done = [self._steps[number] for number in sorted(self._steps)]
        return (*done, last) if last.exchanges else tuple(done)

    def chains(self) -> tuple[Chain, ...]:
        """The sequences that went up, those of evaluations too, each release once."""
        written = self.opened.up_format(self.hidden_size)
        return tuple(
            Chain(written, tuple(row[None] for row in rows), {}) for rows in self._rows.values()
        )

    def _take(self, event: object) -> None:
        if isinstance(event, OpenTraining):
            self._opened = event
            self._running.clear()
            return
        opened, running = self.opened, self._running
        size = self.hidden_size
        match event:
            case Forward():
                self._forward(event, opened.up_format(size))
            case Activations():
                sent = self._sent(event.id)
                sent.activations = opened.down_format(size).decode(event.rows, sum(sent.counts))
            case Backward():
                sent = self._sent(event.id)
                written = opened.backward_format(size)
                sent.gradient = written.decode(event.rows, sum(sent.counts))
            case Discard():
                running.forwards.pop(event.id, None)
            case Opened() | Reset():
                running.clear()
            case Step():
                running.scale = event.scale
            case Stepped() if running.forwards:
                if event.applied:
                    self._steps[event.number] = running.seen(event.number)
                running.clear()

    def _forward(self, event: Forward, written: RowFormat) -> None:
        rows = released(written, event.rows, event.count)
        size, at = written.row_bytes, 0
        data = bytes(event.rows)
        for part in rows.split(event.counts):
            self._rows.setdefault(data[at : at + len(part) * size], part)
            at += len(part) * size
        self._running.forwards[event.id] = _Sent(event.counts, rows)

    def _sent(self, number: int) -> _Sent:
        try:
            return self._running.forwards[number]
        except KeyError:
            raise ConfigError(
                "the recording names forwards that it does not hold: keep all its messages, and "
                "record one stream at a time"
            ) from None
