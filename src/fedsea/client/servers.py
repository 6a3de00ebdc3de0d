"""The servers that a client may use, and what it expects of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedsea.errors import ConfigError, FingerprintMismatch, PartitionError, RemoteProtocolError
from fedsea.model.partition import Span
from fedsea.transport.base import Channel
from fedsea.wire.codecs import Codec
from fedsea.wire.description import decode_description
from fedsea.wire.messages import PROTOCOL_VERSION, Description


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
