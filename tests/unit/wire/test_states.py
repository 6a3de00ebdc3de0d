"""The table of states is complete, and docs/protocol.md shows it."""

from __future__ import annotations

from typing import get_args

from scripts.protocol_tables import PROTOCOL_PAGE, with_tables

from fedsea.wire.messages import Close, Event, Open, OpenTraining, Role
from fedsea.wire.states import SENDERS, TRANSITIONS, State


def test_every_state_and_event_is_in_the_table():
    """No state without a row, no event that can never happen, no event without a sender."""
    assert set(TRANSITIONS) == set(State)
    events = {event for row in TRANSITIONS.values() for event in row}
    assert events == set(get_args(Event)) == set(SENDERS)


def test_every_state_is_reached_from_idle_and_failed_is_final():
    """The table has no island; FAILED is entered by a mistake, not by an event, and left by nothing."""
    reached, pending = set(), [State.IDLE]
    while pending:
        state = pending.pop()
        reached.add(state)
        pending.extend(set(TRANSITIONS[state].values()) - reached)
    assert reached == set(State) - {State.FAILED}
    assert not TRANSITIONS[State.FAILED]


def test_the_client_opens_and_closes():
    """A session is begun and ended by the data owner."""
    assert SENDERS[Open] is SENDERS[OpenTraining] is SENDERS[Close] is Role.CLIENT
    assert list(TRANSITIONS[State.IDLE]) == [Open, OpenTraining]


def test_training_and_inference_share_only_the_end():
    """A session is of one kind: what belongs to the other kind is refused in it."""
    both = set(TRANSITIONS[State.ACTIVE]) & set(TRANSITIONS[State.TRAINING])
    assert {event.__name__ for event in both} == {"Close", "Notice"}


def test_the_page_shows_this_table():
    """docs/protocol.md is in step; `python scripts/protocol_tables.py` brings it there."""
    text = PROTOCOL_PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text
