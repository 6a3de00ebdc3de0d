"""Describe: the description travels whole, and a wrong one is refused."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsea.errors import LocalProtocolError, RemoteProtocolError
from fedsea.wire import trunk_pb2 as pb
from fedsea.wire.codecs import Codec
from fedsea.wire.description import (
    MAX_DESCRIPTION_BYTES,
    MAX_PROJECTIONS,
    decode_describe_request,
    decode_description,
    encode_describe_request,
    encode_description,
    limits_for,
)
from fedsea.wire.limits import Limits
from fedsea.wire.messages import PROTOCOL_VERSION, Description

GOOD = Description(
    model="clinic",
    family="llama",
    fingerprint="f00d",
    hidden_size=512,
    num_blocks=8,
    first_block=1,
    end_block=7,
    codecs=(Codec.FP32, Codec.INT8),
    max_context=4096,
    max_rows_per_message=1024,
    max_message_bytes=2**20,
    dtype="float32",
    server_version="0.1.0",
    max_sequences=9,
    projections=("ab" * 32, "cd" * 32),
    max_forwards=5,
)

BAD = [
    ({"hidden_size": 0}, "hidden_size"),
    ({"max_context": 0}, "max_context"),
    ({"max_pending": 0}, "max_pending"),
    ({"first_block": 7}, "span"),
    ({"end_block": 9}, "span"),
    ({"model": "a\nb"}, "model"),
    ({"family": "x" * 600}, "family"),
]
BAD_PROJECTIONS = [("",), ("a\nb",), ("x" * 600,), ("p",) * (MAX_PROJECTIONS + 1)]


def test_round_trip():
    """Every field arrives."""
    assert decode_description(encode_description(GOOD)) == GOOD


def test_request_carries_the_protocol_version():
    """A server can log which version asks."""
    assert decode_describe_request(encode_describe_request()) == PROTOCOL_VERSION


@pytest.mark.parametrize(("change", "match"), BAD)
def test_a_wrong_description_is_not_sent(change, match):
    """A server that would describe itself wrongly hears it at once."""
    with pytest.raises(LocalProtocolError, match=match):
        encode_description(replace(GOOD, **change))


@pytest.mark.parametrize(("change", "match"), BAD)
def test_a_wrong_description_is_refused(change, match):
    """A client does not believe a description that cannot be."""
    message = pb.Description.FromString(encode_description(GOOD))
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(RemoteProtocolError, match=match):
        decode_description(message.SerializeToString())


@pytest.mark.parametrize("projections", BAD_PROJECTIONS)
def test_projections_are_few_and_named(projections):
    """A fingerprint is a short text, and there is a bound on how many are named."""
    with pytest.raises(LocalProtocolError, match="projection"):
        encode_description(replace(GOOD, projections=projections))
    message = pb.Description.FromString(encode_description(replace(GOOD, projections=())))
    message.projections.extend(projections)
    with pytest.raises(RemoteProtocolError, match="projection"):
        decode_description(message.SerializeToString())


@pytest.mark.parametrize("change", [{"num_blocks": 2**32}, {"protocol": -1}, {"max_context": 1.5}])
def test_numbers_outside_the_schema_are_local_errors(change):
    """Numbers that the schema cannot carry are refused where they come from."""
    with pytest.raises(LocalProtocolError):
        encode_description(replace(GOOD, **change))


def test_limits_are_the_smaller_of_both_sides():
    """A client keeps to the server's caps and to its own."""
    limits = limits_for(GOOD, Limits(max_rows_per_message=5, max_pending=3))
    assert limits == Limits(
        max_message_bytes=2**20,
        max_rows_per_message=5,
        max_sequences=9,
        max_pending=3,
        max_forwards=5,
    )


def test_a_server_that_trains_nothing_caps_nothing():
    """Its 0 is no cap: a client that has to count keeps its own."""
    assert limits_for(replace(GOOD, max_forwards=0)).max_forwards == Limits().max_forwards


def test_unknown_codecs_are_left_out():
    """A newer server may offer codecs that this version does not know."""
    message = pb.Description.FromString(encode_description(GOOD))
    message.codecs.append(99)  # type: ignore[arg-type]
    assert decode_description(message.SerializeToString()).codecs == GOOD.codecs


def test_a_foreign_protocol_version_is_reported_not_refused():
    """The caller names both versions, so it must see the peer's."""
    assert decode_description(encode_description(replace(GOOD, protocol=7))).protocol == 7


@pytest.mark.parametrize("read", [decode_description, decode_describe_request])
def test_size_is_checked_before_parsing(read):
    """A description is small; more bytes are refused unread."""
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        read(bytes(MAX_DESCRIPTION_BYTES + 1))


@pytest.mark.parametrize("read", [decode_description, decode_describe_request])
@settings(max_examples=100)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(read, data):
    """Nothing but our own error comes out."""
    with suppress(RemoteProtocolError):
        read(data)
