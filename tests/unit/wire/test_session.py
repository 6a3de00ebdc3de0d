"""The rules of a session under random dialogues: both sides agree with each other and with a model."""

from __future__ import annotations

import copy
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.wire.pair import ConnectionPair, zeros

from fedsea.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from fedsea.wire.codecs import VALUE_CODECS, Codec
from fedsea.wire.connection import Connection
from fedsea.wire.framing import encode_event
from fedsea.wire.limits import Limits
from fedsea.wire.messages import (
    Append,
    Begin,
    Close,
    Drop,
    Event,
    Fork,
    Output,
    Rollback,
    Segment,
    Want,
)
from fedsea.wire.states import State

LIMITS = Limits(
    max_rows_per_message=12, max_segments=3, max_sequences=3, max_capacity=16, max_pending=2
)
numbers = st.integers(0, 4)
lengths = st.integers(0, 18)
wants = st.sampled_from(Want)
segments = st.lists(st.builds(Segment, numbers, lengths, st.integers(0, 9), wants), max_size=4)


class Dialogue(RuleBasedStateMachine):
    """Valid events keep client, server and a plain model in step; any event is judged alike."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = ConnectionPair(LIMITS)
        self.lengths: dict[int, int] = {}
        self.capacities: dict[int, int] = {}
        self.unanswered: list[Append] = []
        self.next_id = 0

    @initialize(up=st.sampled_from(Codec), down=st.sampled_from(VALUE_CODECS))
    def open(self, up: Codec, down: Codec) -> None:
        self.up, self.down = up, down
        self.pair.opened(up=up, down=down)

    @precondition(lambda self: len(self.lengths) < LIMITS.max_sequences)
    @rule(data=st.data(), capacity=st.integers(1, 16))
    def begin(self, data: st.DataObject, capacity: int) -> None:
        number = data.draw(numbers.filter(lambda n: n not in self.lengths))
        self.pair.client_sends(Begin(number, capacity))
        self.lengths[number], self.capacities[number] = 0, capacity

    @precondition(lambda self: 0 < len(self.lengths) < LIMITS.max_sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.lengths)))
        target = data.draw(numbers.filter(lambda n: n not in self.lengths))
        length = data.draw(st.integers(0, self.lengths[source]))
        capacity = data.draw(st.integers(max(length, 1), 16))
        self.pair.client_sends(Fork(source, target, length, capacity))
        self.lengths[target], self.capacities[target] = length, capacity

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.lengths)))
        length = data.draw(st.integers(0, self.lengths[number]))
        self.pair.client_sends(Rollback(number, length))
        self.lengths[number] = length

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.lengths)))
        self.pair.client_sends(Drop(number))
        del self.lengths[number], self.capacities[number]

    @precondition(lambda self: len(self.unanswered) < LIMITS.max_pending and self._room())
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        chosen = data.draw(st.permutations(self._room()).map(lambda order: order[:3]))
        parts = []
        for number in chosen:
            room = min(self.capacities[number] - self.lengths[number], 4)
            count = data.draw(st.integers(1, room))
            parts.append(Segment(number, self.lengths[number], count, data.draw(wants)))
            self.lengths[number] += count
        event = Append(self.next_id, tuple(parts), zeros(sum(p.count for p in parts), self.up))
        self.pair.client_sends(event)
        self.unanswered.append(event)
        self.next_id += data.draw(st.integers(1, 3))

    @precondition(lambda self: self.unanswered)
    @rule()
    def answer(self) -> None:
        event = self.unanswered.pop(0)
        answer = event.answer()
        rows = zeros(sum(part.count for part in answer), self.down)
        self.pair.server_sends(Output(event.id, answer, rows))

    @rule(
        event=st.one_of(
            st.builds(Begin, numbers, lengths),
            st.builds(Fork, numbers, numbers, lengths, lengths),
            st.builds(Rollback, numbers, lengths),
            st.builds(Drop, numbers),
            st.builds(
                lambda number, parts, rows: Append(number, tuple(parts), zeros(rows)),
                st.integers(0, 20),
                segments,
                lengths,
            ),
            st.just(Close()),
        )
    )
    def client_event_is_judged_alike(self, event: Event) -> None:
        self._judged_alike(self.pair.client, self.pair.server, event)

    @rule(number=st.integers(0, 20), parts=segments, rows=lengths)
    def output_is_judged_alike(self, number: int, parts: list[Segment], rows: int) -> None:
        event = Output(number, tuple(parts), zeros(rows, self.down))
        self._judged_alike(self.pair.server, self.pair.client, event)

    @invariant()
    def sides_agree_with_the_model(self) -> None:
        for side in (self.pair.client, self.pair.server):
            assert side.sequences == set(self.lengths)
            assert {n: side.length(n) for n in side.sequences} == self.lengths
            assert {n: side.capacity(n) for n in side.sequences} == self.capacities
            assert side.pending == len(self.unanswered)

    def _room(self) -> list[int]:
        return [n for n, length in sorted(self.lengths.items()) if length < self.capacities[n]]

    def _judged_alike(self, sender: Connection, receiver: Connection, event: Event) -> None:
        """Copies accept or refuse `event` together; a refused one changes nothing at the sender."""
        here, there = copy.deepcopy(sender), copy.deepcopy(receiver)
        local = _fault(LocalProtocolError, lambda: here.send(event))
        remote = _fault(RemoteProtocolError, lambda: there.receive(encode_event(event, LIMITS)))
        assert local == remote
        if local is None:
            assert _view(here) == _view(there)
        else:
            assert _view(here) == _view(sender)
            assert there.state is State.FAILED


def _fault(kind: type[ProtocolError], act: Callable[[], object]) -> str | None:
    """The message of the expected error, None when there is none."""
    try:
        act()
    except kind as error:
        return str(error)
    return None


def _view(side: Connection) -> object:
    return side.state, side.pending, {n: (side.length(n), side.capacity(n)) for n in side.sequences}


Dialogue.TestCase.settings = settings(max_examples=60, stateful_step_count=25, derandomize=True)
TestDialogue = Dialogue.TestCase
