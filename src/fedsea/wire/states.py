"""The states of a session and the events that move it: everything about order is in this file.

Rule 1: a rule that depends on the state alone is a row of `TRANSITIONS`, not an `if` elsewhere.
Rule 2: this file does not know which side we play. Both sides run the same table over the same
events, sent or received, so that peers that disagree find out at the first wrong message.

A client may send Begin, Fork, Rollback, Drop and Append before Opened arrives: they are applied
after it, and the first answer is one round trip earlier. Training waits for Opened, for that says
which step it goes on from. An answer may arrive after Close, because it was on its way.
FAILED is entered only by a peer's mistake; no event leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final, get_args

from fedsea.wire.messages import (
    Activations,
    Append,
    Backward,
    Begin,
    ClientEvent,
    Close,
    Discard,
    Drop,
    Event,
    Fork,
    Forward,
    Gradients,
    Notice,
    Open,
    Opened,
    OpenTraining,
    Output,
    Reset,
    Role,
    Rollback,
    Save,
    Saved,
    ServerEvent,
    Step,
    Stepped,
)


class State(Enum):
    """Where a session is."""

    IDLE = "idle"
    OPENING = "opening"
    ACTIVE = "active"
    JOINING = "joining"
    TRAINING = "training"
    CLOSING = "closing"
    FAILED = "failed"


SENDERS: Final[Mapping[type[Event], Role]] = MappingProxyType(
    dict.fromkeys(get_args(ClientEvent), Role.CLIENT)
    | dict.fromkeys(get_args(ServerEvent), Role.SERVER)
)

TRANSITIONS: Final[Mapping[State, Mapping[type[Event], State]]] = MappingProxyType(
    {
        State.IDLE: {
            Open: State.OPENING,
            OpenTraining: State.JOINING,
        },
        State.OPENING: {
            Begin: State.OPENING,
            Fork: State.OPENING,
            Rollback: State.OPENING,
            Drop: State.OPENING,
            Append: State.OPENING,
            Opened: State.ACTIVE,
        },
        State.ACTIVE: {
            Begin: State.ACTIVE,
            Fork: State.ACTIVE,
            Rollback: State.ACTIVE,
            Drop: State.ACTIVE,
            Append: State.ACTIVE,
            Output: State.ACTIVE,
            Notice: State.ACTIVE,
            Close: State.CLOSING,
        },
        State.JOINING: {
            Opened: State.TRAINING,
        },
        State.TRAINING: {
            Forward: State.TRAINING,
            Activations: State.TRAINING,
            Backward: State.TRAINING,
            Gradients: State.TRAINING,
            Discard: State.TRAINING,
            Reset: State.TRAINING,
            Step: State.TRAINING,
            Stepped: State.TRAINING,
            Save: State.TRAINING,
            Saved: State.TRAINING,
            Notice: State.TRAINING,
            Close: State.CLOSING,
        },
        State.CLOSING: {
            Output: State.CLOSING,
            Activations: State.CLOSING,
            Gradients: State.CLOSING,
            Stepped: State.CLOSING,
            Saved: State.CLOSING,
            Notice: State.CLOSING,
        },
        State.FAILED: {},
    }
)
