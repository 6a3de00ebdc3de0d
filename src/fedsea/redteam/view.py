"""What a server sees: the recorded messages of a client, decoded as a server decodes them.

Rows are kept as a tree. A row's parent is the row before it in its sequence; a rollback or a fork
goes back to an earlier row, and what follows is another branch. The same bytes after the same row
are the same release, sent again: after a lost connection, or for a second sequence with the same
beginning. A path from the root to a leaf is a text, a `Chain`.

A client that computes everything again for each new token releases each position many times with
fresh noise. No message says so, but the positions do: `Repeats` is what the attacker supposes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from fedsea.errors import ConfigError
from fedsea.transport.recording import Direction, Message
from fedsea.wire.codecs import Codec, RowFormat
from fedsea.wire.framing import decode_event
from fedsea.wire.limits import TRAINING_LIMITS
from fedsea.wire.messages import (
    Append,
    Begin,
    Drop,
    Event,
    Fork,
    Open,
    OpenTraining,
    Output,
    Role,
    Rollback,
)


class Repeats(Enum):
    """Which releases at one position an attacker takes for releases of one token."""

    APART = "apart"
    """None: every branch is a text of its own."""
    SEQUENCE = "sequence"
    """All of one sequence: a rollback is followed by the same text."""
    SESSION = "session"
    """All of one session: every sequence in it is the same text, computed again."""


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """The releases of one text, by position.

    Attributes:
        format: how the rows were written.
        releases: for each position [n, width], the n different releases of its row in the order
            they came, as the mechanism made them: uint8 counts, or floats.
        returned: rows [hidden] that the server sent back, by position.
    """

    format: RowFormat
    releases: tuple[Tensor, ...]
    returned: Mapping[int, Tensor]

    def __len__(self) -> int:
        return len(self.releases)

    def values(self, position: int) -> Tensor:
        """[n, width]: the releases at a position as the numbers that a server computes with."""
        found = self.releases[position]
        return found if found.is_floating_point() else self.format.values(found)

    def means(self) -> Tensor:
        """[length, width]: the mean value of the releases at each position."""
        return torch.stack([self.values(position).mean(dim=0) for position in range(len(self))])


@dataclass(eq=False, slots=True)
class _Node:
    """A released row; `children` by the bytes that were released."""

    row: Tensor | None
    children: dict[bytes, _Node] = field(default_factory=dict)
    returned: Tensor | None = None


@dataclass(eq=False, slots=True)
class _Sequence:
    """A path of the tree, and in `columns` all rows that ever stood at each position."""

    path: list[_Node] = field(default_factory=list)
    columns: list[list[_Node]] = field(default_factory=list)

    def fork(self, length: int) -> _Sequence:
        path = self.path[:length]
        return _Sequence(path, [[node] for node in path])

    def append(self, node: _Node) -> None:
        position = len(self.path)
        self.path.append(node)
        if position == len(self.columns):
            self.columns.append([])
        self.columns[position].append(node)


@dataclass(eq=False, slots=True)
class _Session:
    """One stream: its living sequences by number, and all that it ever had."""

    opened: Open
    alive: dict[int, _Sequence] = field(default_factory=dict)
    ever: list[_Sequence] = field(default_factory=list)
    pending: dict[int, dict[tuple[int, int], _Node]] = field(default_factory=dict)

    def begin(self, number: int, sequence: _Sequence) -> None:
        self.alive[number] = sequence
        self.ever.append(sequence)


class ServerView:
    """The text of a recording, as far as it is on the wire.

    Args:
        messages: of one client, in order; a stream begins with its Open, streams do not overlap.
        hidden_size: numbers in a row of the model.

    Raises:
        ConfigError: the recording does not begin with an Open or streams overlap in it.
        RemoteProtocolError: a message is not one of this protocol.
    """

    def __init__(self, messages: Iterable[Message], hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._root = _Node(None)
        self._sessions: list[_Session] = []
        for message in messages:
            self._take(message)
        if not self._sessions:
            raise ConfigError("the recording is empty: record the session that is to be attacked")

    @property
    def opened(self) -> Open:
        """What the first session was opened with."""
        return self._sessions[0].opened

    def chains(self, repeats: Repeats = Repeats.APART) -> tuple[Chain, ...]:
        """The texts that were released, those that begin alike apart."""
        if repeats is Repeats.APART:
            return tuple(self._chain([[node] for node in path]) for path in _paths(self._root))
        return tuple(self._chain(columns) for columns in self._columns(repeats))

    def _columns(self, repeats: Repeats) -> Iterator[list[list[_Node]]]:
        for session in self._sessions:
            columns = [sequence.columns for sequence in session.ever]
            if repeats is Repeats.SESSION:
                columns = [_joined(columns)]
            yield from (found for found in columns if found)

    def _chain(self, columns: list[list[_Node]]) -> Chain:
        releases = []
        returned: dict[int, Tensor] = {}
        for position, nodes in enumerate(columns):
            rows = [node.row for node in nodes if node.row is not None]
            releases.append(torch.stack(_distinct(rows)))
            for node in nodes:
                if node.returned is not None:
                    returned.setdefault(position, node.returned)
        return Chain(self.opened.up_format(self.hidden_size), tuple(releases), returned)

    def _take(self, message: Message) -> None:
        event = decoded(message)
        if isinstance(event, OpenTraining):
            raise ConfigError("the recording is of a training: attack it with --training")
        if isinstance(event, Open):
            self._check_same_format(event)
            self._sessions.append(_Session(event))
            return
        if not self._sessions:
            raise ConfigError(
                "the recording does not begin with the opening of a session: "
                "keep all its messages, from the first on"
            )
        session = self._sessions[-1]
        try:
            self._apply(session, event)
        except (KeyError, IndexError):
            raise ConfigError(
                "the recording names rows or sequences that it does not hold: keep all its "
                "messages, and record one stream at a time"
            ) from None

    def _check_same_format(self, opened: Open) -> None:
        if self._sessions and opened.up_format(self.hidden_size) != self.opened.up_format(
            self.hidden_size
        ):
            raise ConfigError(
                "the sessions of the recording write rows differently: attack them one by one"
            )

    def _apply(self, session: _Session, event: object) -> None:
        match event:
            case Begin():
                session.begin(event.sequence, _Sequence())
            case Fork():
                session.begin(event.target, session.alive[event.source].fork(event.length))
            case Rollback():
                del session.alive[event.sequence].path[event.length :]
            case Drop():
                del session.alive[event.sequence]
            case Append():
                session.pending[event.id] = self._append(session, event)
            case Output():
                self._output(session, event)

    def _append(self, session: _Session, event: Append) -> dict[tuple[int, int], _Node]:
        written = session.opened.up_format(self.hidden_size)
        rows = released(written, event.rows, event.count)
        size = written.row_bytes
        data = bytes(event.rows)
        added: dict[tuple[int, int], _Node] = {}
        for segment in event.segments:
            sequence = session.alive[segment.sequence]
            for position in range(segment.start, segment.end):
                parent = sequence.path[position - 1] if position else self._root
                index = len(added)
                key = data[index * size : (index + 1) * size]
                node = parent.children.setdefault(key, _Node(rows[index]))
                sequence.append(node)
                added[segment.sequence, position] = node
        return added

    def _output(self, session: _Session, event: Output) -> None:
        sent = session.pending.pop(event.id)
        count = sum(segment.count for segment in event.segments)
        rows = session.opened.down_format(self.hidden_size).decode(event.rows, count)
        places = (
            (segment.sequence, position)
            for segment in event.segments
            for position in range(segment.start, segment.end)
        )
        for place, row in zip(places, rows, strict=True):
            sent[place].returned = row


def decoded(message: Message) -> Event:
    """The event of a recorded message.

    Raises:
        RemoteProtocolError: it is not one of this protocol.
    """
    sender = Role.CLIENT if message.direction is Direction.UP else Role.SERVER
    return decode_event(message.data, sender, TRAINING_LIMITS)


def released(written: RowFormat, data: bytes | memoryview, count: int) -> Tensor:
    """Rows [count, width] as the mechanism made them: uint8 counts, or floats."""
    is_counted = written.codec is Codec.COUNTS
    return written.counts(data, count) if is_counted else written.decode(data, count)


def _paths(root: _Node) -> Iterator[list[_Node]]:
    """From the root to every leaf, in the order of first release."""
    pending: list[list[_Node]] = [[child] for child in reversed(root.children.values())]
    while pending:
        path = pending.pop()
        children = path[-1].children.values()
        if not children:
            yield path
        pending.extend([*path, child] for child in reversed(children))


def _joined(parts: Iterable[list[list[_Node]]]) -> list[list[_Node]]:
    """All rows at each position, over several sequences."""
    return [
        [node for column in columns for node in column]
        for columns in itertools.zip_longest(*parts, fillvalue=())
    ]


def _distinct(rows: list[Tensor]) -> list[Tensor]:
    """Rows without those that are equal to an earlier one: they were not released anew."""
    kept: list[Tensor] = []
    for row in rows:
        if not any(torch.equal(row, other) for other in kept):
            kept.append(row)
    return kept
