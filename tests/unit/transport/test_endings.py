"""Errors to and from the end of a stream."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsea.errors import (
    Capacity,
    FedseaError,
    OutOfMemory,
    PermissionDenied,
    PromptTooLong,
    Refused,
    SessionLost,
    error_classes,
)
from fedsea.transport.endings import (
    INTERNAL,
    MAX_MESSAGE_CHARACTERS,
    Ending,
    ending_of,
    error_of,
    one_line,
    read_metadata,
)

ALL = sorted(error_classes().items())


@pytest.mark.parametrize(("code", "cls"), ALL)
def test_every_error_survives_the_way(code, cls):
    """Class, message and retry time of each error in the tree come out as they went in."""
    error = cls("what happened: what to do", 2.5) if issubclass(cls, Refused) else cls("what: do")
    ending = ending_of(error)
    assert ending.status in grpc.StatusCode.__members__
    assert read_metadata(ending.metadata()) == (code, ending.retry_after_ms)
    back = error_of(ending)
    assert type(back) is cls
    assert str(back) == str(error)
    assert getattr(back, "retry_after", None) == getattr(error, "retry_after", None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Capacity("x"), "RESOURCE_EXHAUSTED"),
        (OutOfMemory("x"), "RESOURCE_EXHAUSTED"),
        (SessionLost("x"), "ABORTED"),
        (PermissionDenied("x"), "PERMISSION_DENIED"),
        (PromptTooLong("x"), "INVALID_ARGUMENT"),
    ],
)
def test_statuses_mean_what_grpc_means_by_them(error, status):
    """Peers in other languages see a fitting status without our metadata."""
    assert ending_of(error).status == status


def test_an_unknown_code_becomes_the_base_error():
    """A newer server may use codes that this side does not know."""
    assert type(error_of(Ending("INTERNAL", "from the future", "text"))) is FedseaError
    assert read_metadata([("fedsea-error", "from the future")]) == (None, None)


@pytest.mark.parametrize("value", ["", "-5", "1e9", "9" * 40, "٣", b"\x00", "NaN"])
def test_a_bad_retry_time_is_no_retry_time(value):
    """A peer cannot make us wait for nonsense."""
    assert read_metadata([("retry-after-ms", value)]) == (None, None)


def test_a_retry_time_is_bounded():
    """A peer cannot make us wait for years."""
    assert read_metadata([("retry-after-ms", "999999999")]) == (None, 3_600_000)


@given(st.text(max_size=2000))
def test_a_peers_text_is_one_bounded_printable_line(text):
    """No control characters, no line breaks, no terminal escapes, no flood."""
    cleaned = one_line(text)
    assert len(cleaned) <= MAX_MESSAGE_CHARACTERS
    assert cleaned.isprintable()
    assert one_line(cleaned) == cleaned


def test_the_internal_ending_has_no_details():
    """What a defect looks like from outside."""
    assert type(error_of(INTERNAL)) is FedseaError
