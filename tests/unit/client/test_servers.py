"""Endpoints and what a client expects of them: every refusal names what differs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fedsea.client.servers import Endpoint, Expectation, rotate
from fedsea.errors import (
    ConfigError,
    FingerprintMismatch,
    PartitionError,
    RemoteProtocolError,
    Unreachable,
)
from fedsea.model.partition import Span
from fedsea.transport.base import Channel, ClientStream
from fedsea.wire.codecs import Codec
from fedsea.wire.description import encode_description
from fedsea.wire.messages import Description

SERVED = Description(
    model="llama-x",
    family="llama",
    fingerprint="a" * 64,
    hidden_size=48,
    num_blocks=5,
    first_block=1,
    end_block=4,
    codecs=(Codec.FP32, Codec.BF16),
    max_context=256,
    max_rows_per_message=64,
    max_message_bytes=2**20,
    dtype="fp32",
)
EXPECTED = Expectation("llama-x", "a" * 64, 48, Span(1, 4), (Codec.FP32, Codec.BF16))


class Described(Channel):
    """A server that only describes itself, and counts how often."""

    def __init__(self, description=SERVED) -> None:
        self.description = description
        self.asked = 0
        self.closed = False

    async def describe(self) -> bytes:
        self.asked += 1
        if self.description is None:
            raise Unreachable("nobody listens")
        return encode_description(self.description)

    async def open_stream(self) -> ClientStream:
        raise Unreachable("it only describes itself")

    async def close(self) -> None:
        self.closed = True


def test_what_fits_is_accepted():
    """The same model, and blocks inside those served, in codecs that are taken."""
    EXPECTED.check(SERVED, "host:1")
    replace(EXPECTED, trunk=Span(2, 3)).check(SERVED, "host:1")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"protocol": 9}, RemoteProtocolError, "protocol 9.*update the older side"),
        ({"fingerprint": "b" * 64}, FingerprintMismatch, "bbbbbbbbbbbb.*aaaaaaaaaaaa.*same"),
        ({"hidden_size": 64}, FingerprintMismatch, "use the same checkpoint"),
        ({"first_block": 2}, PartitionError, "serves blocks 2:4 .* needs 1:4.*larger bottom"),
        ({"end_block": 3}, PartitionError, "serves blocks 1:3"),
        ({"codecs": (Codec.FP32,)}, ConfigError, "codec bf16; use one of fp32"),
    ],
)
def test_a_difference_is_refused_by_name(change, error, words):
    """The message names the server, what differs and what to do."""
    with pytest.raises(error, match=f"^host:1.*{words}"):
        EXPECTED.check(replace(SERVED, **change), "host:1")


def test_a_description_is_asked_for_once():
    """Sessions do not ask again until the server may have been replaced."""
    channel = Described()
    endpoint = Endpoint("host:1", lambda: channel)

    async def dialogue():
        for _ in range(3):
            assert await endpoint.describe(EXPECTED) == SERVED
        assert channel.asked == 1
        endpoint.forget()
        await endpoint.describe(EXPECTED)

    asyncio.run(dialogue())
    assert channel.asked == 2


def test_a_refused_description_is_not_remembered():
    """A server that was put right is taken without a new client."""
    channel = Described(replace(SERVED, fingerprint="b" * 64))
    endpoint = Endpoint("host:1", lambda: channel)

    async def dialogue():
        with pytest.raises(FingerprintMismatch):
            await endpoint.describe(EXPECTED)
        channel.description = SERVED
        await endpoint.describe(EXPECTED)

    asyncio.run(dialogue())


def test_the_channel_is_made_when_it_is_needed():
    """An endpoint that is never used never connects; after a close it connects anew."""
    made = []

    def connect():
        made.append(Described())
        return made[-1]

    endpoint = Endpoint("host:1", connect)

    async def dialogue():
        await endpoint.close()
        assert not made
        await endpoint.describe(EXPECTED)
        await endpoint.close()
        assert made[0].closed
        endpoint.forget()
        await endpoint.describe(EXPECTED)

    asyncio.run(dialogue())
    assert len(made) == 2


def test_rotation_begins_at_the_preferred_server():
    """All servers are tried, beginning with the one that served last."""
    endpoints = [Endpoint(name, Described) for name in "abc"]

    def names(first):
        return [endpoint.address for endpoint in rotate(endpoints, first)]

    assert names(0) == ["a", "b", "c"]
    assert names(2) == ["c", "a", "b"]
    assert names(4) == ["b", "c", "a"]
