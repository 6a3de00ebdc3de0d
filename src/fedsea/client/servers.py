"""The servers that a client may use, and what it expects of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from fedsea.errors import (
    Capacity,
    ConfigError,
    FedseaError,
    FingerprintMismatch,
    PartitionError,
    QuotaExceeded,
    Refused,
    RemoteProtocolError,
    TransportError,
    Unreachable,
)
from fedsea.model.partition import Span
from fedsea.transport.base import Channel
from fedsea.wire.codecs import Codec
from fedsea.wire.description import decode_description
from fedsea.wire.messages import PROTOCOL_VERSION, Description

_FIRST_PAUSE = 0.1
_SHORTEST_TRY = 0.5
_LONGEST_PAUSE = 2.0


@dataclass(slots=True)
class Endpoint:
    """One server: its address for people, and how to reach it. The channel is made when needed."""

    address: str
    connect: Callable[[], Channel]
    _channel: Channel | None = field(default=None, repr=False)
    _description: Description | None = field(default=None, repr=False)

    def channel(self) -> Channel:
        """The channel to this server."""
        if self._channel is None:
            self._channel = self.connect()
        return self._channel

    async def describe(self, expected: Expectation) -> Description:
        """What the server serves, after checking that it serves what we need.

        Asked again after a break, because another process may answer at the same address.
        """
        if self._description is None:
            description = decode_description(await self.channel().describe())
            expected.check(description, self.address)
            self._description = description
        return self._description

    def forget(self) -> None:
        """The server may have been replaced: ask again before the next session."""
        self._description = None

    async def close(self) -> None:
        """Disconnect."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """The model, trunk, codecs up and down, and projection ("" for none) that this client needs."""

    model: str
    fingerprint: str
    hidden_size: int
    trunk: Span
    codecs: tuple[Codec, Codec]
    projection: str = ""

    def check(self, served: Description, address: str) -> None:
        """Refuse a server that holds another model or not our blocks, by name.

        Raises:
            RemoteProtocolError: the server speaks another protocol version.
            FingerprintMismatch, PartitionError, ConfigError: model, span, codec or projection
                differ.
        """
        if served.protocol != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                f"{address} speaks protocol {served.protocol} and this client {PROTOCOL_VERSION}; "
                "update the older side"
            )
        if served.fingerprint != self.fingerprint or served.hidden_size != self.hidden_size:
            raise FingerprintMismatch(
                f"{address} serves {served.model} ({served.fingerprint[:12]}) and this client "
                f"holds {self.model} ({self.fingerprint[:12]}); use the same checkpoint on both"
            )
        if self.trunk not in Span(served.first_block, served.end_block):
            raise PartitionError(
                f"{address} serves blocks {served.first_block}:{served.end_block} and this "
                f"partition needs {self.trunk}; choose a larger bottom or top"
            )
        for codec in self.codecs:
            if codec not in served.codecs:
                raise ConfigError(
                    f"{address} does not take codec {codec.value}; "
                    f"use one of {', '.join(known.value for known in served.codecs)}"
                )
        if self.projection and self.projection not in served.projections:
            raise ConfigError(
                f"{address} does not serve the projection {self.projection[:12]}; "
                "give its operator the server's half of yours, for `fedsea serve --projection`"
            )


def rotate(endpoints: Sequence[Endpoint], first: int) -> list[Endpoint]:
    """All endpoints, beginning with number `first`."""
    start = first % len(endpoints)
    return [*endpoints[start:], *endpoints[:start]]


async def first_that_takes(
    endpoints: Sequence[Endpoint],
    preferred: int,
    within: float,
    open_at: Callable[[Endpoint, float], Awaitable[None]],
) -> int:
    """Try the servers in turn, beginning with number `preferred`, until one takes a session.

    Args:
        endpoints: the servers.
        preferred: which is asked first.
        within: seconds.
        open_at: opens a session at a server within so many seconds.

    Returns:
        The number of the server that took it.

    Raises:
        Unreachable, Refused: none did in time.
        FedseaError: what a server objected to for good.
    """
    deadline = time.monotonic() + within
    pause = _FIRST_PAUSE
    while True:
        refusals: list[FedseaError] = []
        order = rotate(endpoints, preferred)
        for later, endpoint in zip(reversed(range(len(order))), order, strict=True):
            # One that says nothing must leave time for those after it.
            share = (deadline - time.monotonic()) / (1 + later)
            try:
                await open_at(endpoint, max(_SHORTEST_TRY, share))
            except (TransportError, Refused) as error:
                endpoint.forget()
                refusals.append(error)
            else:
                return endpoints.index(endpoint)
        wait = max(pause, _shortest_wait(refusals)) * random.uniform(0.8, 1.2)
        if time.monotonic() + wait > deadline or not _worth_waiting(refusals):
            raise _gave_up(refusals, within, endpoints)
        await asyncio.sleep(wait)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _shortest_wait(refusals: Sequence[FedseaError]) -> float:
    waits = [
        error.retry_after
        for error in refusals
        if isinstance(error, Refused) and error.retry_after is not None
    ]
    return min(waits, default=0.0)


def _worth_waiting(refusals: Sequence[FedseaError]) -> bool:
    """A full or absent server may come back; a refusal without `retry_after` is final."""
    return any(
        not isinstance(error, Capacity | QuotaExceeded) or error.retry_after is not None
        for error in refusals
    )


def _gave_up(
    refusals: Sequence[FedseaError], within: float, endpoints: Sequence[Endpoint]
) -> FedseaError:
    """The refusal of a server that answered, or that none did."""
    for error in refusals:
        if isinstance(error, Refused):
            return error
    names = ", ".join(endpoint.address for endpoint in endpoints)
    reason = str(refusals[-1]) if refusals else "no address was given"
    return Unreachable(
        f"no server answered within {within:g} s ({names}): {reason}; "
        "start a server or check the address; an open session can be resumed later"
    )
