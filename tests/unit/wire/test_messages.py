"""Events: what an Append asks back, and that no event shows rows."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from fedsea.wire import trunk_pb2 as pb
from fedsea.wire.messages import (
    Activations,
    AdamW,
    Append,
    Backward,
    Description,
    Event,
    Forward,
    Gradients,
    Lora,
    NoticeKind,
    Output,
    Role,
    Segment,
    Want,
)


def test_answer_holds_only_wanted_rows():
    """LAST brings one row back, ALL every row, NONE nothing."""
    append = Append(
        3,
        (Segment(1, 5, 4, Want.LAST), Segment(2, 0, 2, Want.ALL), Segment(3, 0, 9, Want.NONE)),
        b"",
    )
    assert append.answer() == (Segment(1, 8, 1), Segment(2, 0, 2))
    assert append.count == 15


@pytest.mark.parametrize("kind", [Append, Output])
def test_rows_are_not_in_the_repr(kind):
    """A log line or traceback that shows an event shows no value of a row."""
    assert "secret" not in repr(kind(1, (Segment(0, 0, 1),), b"secret"))


@pytest.mark.parametrize("kind", [Activations, Backward, Gradients])
def test_rows_of_training_are_not_in_the_repr(kind):
    """Neither is a value of an activation or of a gradient."""
    assert "secret" not in repr(kind(1, b"secret"))
    assert "secret" not in repr(Forward(1, (6,), b"secret"))


@pytest.mark.parametrize("kind", [*get_args(Event), Segment, Lora, AdamW, Description])
def test_domain_objects_are_frozen_and_slotted(kind):
    """Events are values: hashable parts, no stray attributes."""
    assert dataclasses.is_dataclass(kind)
    assert vars(kind)["__dataclass_params__"].frozen
    assert "__slots__" in vars(kind)


def test_enum_numbers_are_those_of_the_schema():
    """Names and numbers of enums agree with trunk.proto, unspecified aside."""
    assert {f"WANT_{want.name}": want.value for want in Want} | {"WANT_UNSPECIFIED": 0} == dict(
        pb.Want.items()
    )
    kinds = {f"NOTICE_KIND_{kind.name}": kind.value for kind in NoticeKind}
    assert kinds | {"NOTICE_KIND_UNSPECIFIED": 0} == dict(pb.NoticeKind.items())


def test_roles_are_each_others_peer():
    """The peer of the peer is oneself."""
    assert [role.peer.peer for role in Role] == list(Role)
