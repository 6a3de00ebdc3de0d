"""The mode `attested`: a channel over which nothing goes to a server that was not accepted.

`AttestedChannel` pins the server's TLS key, asks for a token that is bound to this key and to a
fresh nonce, and lets its verifier decide. Only then does it describe the server or open streams,
all of them over connections to the pinned key. It asks again

* after a connection was lost, before the next stream is opened, with a fresh handshake;
* when the acceptance has expired, before the next message of any stream is sent.

A refusal ends the stream with the verifier's error; what was to be sent stays here. `Attestation`
makes such channels to all servers of a client and knows what was accepted last.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fedsea.errors import AttestationError, FedseaError, Refused, SecurityError, TransportError
from fedsea.privacy.attestation import Attested, Evidence, Verifier
from fedsea.transport.base import Channel, ClientStream, PinnedChannel
from fedsea.wire.attestation import NONCE_BYTES, decode_attestation, encode_attest_request

# A busy server is asked so often in all, each time after the pause that it wants, up to a limit.
_TRIES: Final = 5
_LONGEST_PAUSE: Final = 10.0

Accepted = Callable[[Attested], None]
Clock = Callable[[], float]
Tell = Callable[[str], None]


class Attestation:
    """What a client demands of all of its servers, and what they proved.

    Args:
        verifier: decides about each server.
        tell: called with one line when another server, or another state of one, is accepted.
    """

    def __init__(self, verifier: Verifier, tell: Tell) -> None:
        self._verifier = verifier
        self._tell = tell
        self._latest: Attested | None = None
        self._told: tuple[object, ...] | None = None

    @property
    def latest(self) -> Attested | None:
        """What was accepted last, of whichever server; it may have expired since."""
        return self._latest

    def guard(self, address: str, connect: Callable[[], Channel]) -> AttestedChannel:
        """A channel to the server at `address` that demands proof."""
        accepted = functools.partial(self._accepted, address)
        return AttestedChannel(connect(), self._verifier, address, accepted)

    def _accepted(self, address: str, attested: Attested) -> None:
        found = (address, attested.issuer, attested.measurements)
        if self._told not in (None, found):
            self._tell(f"{address} {attested.describe()}")
        self._told, self._latest = found, attested


@dataclass(slots=True, eq=False)
class _Place:
    """A pinned key, what was accepted about it, and how many streams use it."""

    channel: PinnedChannel
    attested: Attested
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    streams: int = 0
    abandoned: bool = False


class AttestedChannel(Channel):
    """A channel to one server, whoever that is now, as long as `verifier` accepts it.

    Args:
        channel: reaches the server; must have a TLS key to pin.
        verifier: decides; its calls run in a thread.
        address: of the server, for the verifier and for messages.
        accepted: called whenever the server has been accepted, the first time and again.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        channel: Channel,
        verifier: Verifier,
        address: str,
        accepted: Accepted | None = None,
        clock: Clock = time.time,
    ) -> None:
        self._channel = channel
        self._verifier = verifier
        self._address = address
        self._on_accepted = accepted
        self._clock = clock
        self._place: _Place | None = None
        self._open: set[_Place] = set()
        self._entering = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def attested(self) -> Attested | None:
        """What was accepted last and still counts; None before the first time and after a loss."""
        place = self._place
        return None if place is None or self._has_expired(place) else place.attested

    async def describe(self) -> bytes:
        place = await self._accepted()
        try:
            return await place.channel.describe()
        except TransportError:
            self.abandon(place)
            raise

    async def open_stream(self) -> ClientStream:
        place = await self._accepted()
        # Counted before it is there, so that nobody closes the channel in the meantime.
        place.streams += 1
        try:
            stream = await place.channel.open_stream()
        except BaseException as error:
            self.leave(place)
            if isinstance(error, TransportError):
                self.abandon(place)
            raise
        return _AttestedStream(stream, place, self)

    async def close(self) -> None:
        self._place = None
        for place in tuple(self._open):
            await place.channel.close()
        self._open.clear()
        if self._leaving:
            await asyncio.wait(self._leaving)
        await self._channel.close()

    async def renew(self, place: _Place) -> None:
        """Let the server prove itself again, over the same pinned key, if that is due.

        Raises:
            AttestationError: it did not.
            TransportError, Refused: it could not be asked.
        """
        async with place.asking:
            if self._has_expired(place):
                place.attested = await self._ask(place.channel)

    def is_due(self, place: _Place) -> bool:
        """Whether nothing may be sent before the server has proved itself again."""
        return self._has_expired(place)

    def abandon(self, place: _Place) -> None:
        """The connection was lost: whoever comes next makes a new one and asks again."""
        place.abandoned = True
        if self._place is place:
            self._place = None
        self._close_if_unused(place)

    def leave(self, place: _Place) -> None:
        """A stream has ended."""
        place.streams -= 1
        self._close_if_unused(place)

    def _close_if_unused(self, place: _Place) -> None:
        if place.abandoned and not place.streams and place in self._open:
            self._open.remove(place)
            task = asyncio.get_running_loop().create_task(place.channel.close())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def _has_expired(self, place: _Place) -> bool:
        return self._clock() >= place.attested.expires

    async def _accepted(self) -> _Place:
        """A pinned channel to a server that has been accepted."""
        async with self._entering:
            place = self._place
            if place is not None and place.channel.is_lost:
                self.abandon(place)
                place = None
            if place is None:
                place = self._place = await self._enter()
        try:
            await self.renew(place)
        except FedseaError:
            self.abandon(place)
            raise
        return place

    async def _enter(self) -> _Place:
        channel = await self._channel.pin()
        try:
            place = _Place(channel, await self._ask(channel))
        except BaseException:
            await channel.close()
            raise
        self._open.add(place)
        return place

    async def _ask(self, channel: PinnedChannel) -> Attested:
        nonce = secrets.token_bytes(NONCE_BYTES)
        answer = await _patiently(channel, encode_attest_request(nonce))
        evidence = Evidence(decode_attestation(answer), nonce, channel.key_sha256, self._address)
        attested = await asyncio.to_thread(self._verifier.verify, evidence)
        self._check(attested, channel)
        if self._on_accepted is not None:
            self._on_accepted(attested)
        return attested

    def _check(self, attested: Attested, channel: PinnedChannel) -> None:
        """A verifier that returns something else has not accepted this server."""
        if not isinstance(attested, Attested) or attested.key_sha256 != channel.key_sha256:
            raise AttestationError(
                f"the verifier did not accept the TLS key of {self._address}: it must return "
                "Attested with the key of the evidence, or raise; nothing was sent"
            )
        if attested.expires <= self._clock():
            raise AttestationError(
                f"what {self._address} attested has expired already: check the clocks; "
                "nothing was sent"
            )


async def _patiently(channel: PinnedChannel, request: bytes) -> bytes:
    """Ask; a server that is asked too often says when to come back."""
    for _ in range(_TRIES - 1):
        try:
            return await channel.attest(request)
        except Refused as error:
            if error.retry_after is None or error.retry_after > _LONGEST_PAUSE:
                raise
            await asyncio.sleep(error.retry_after)
    return await channel.attest(request)


class _AttestedStream(ClientStream):
    """A stream to an accepted server; each message is sent only while the acceptance holds."""

    def __init__(self, stream: ClientStream, place: _Place, channel: AttestedChannel) -> None:
        self._stream = stream
        self._place = place
        self._channel = channel
        self._refusal: SecurityError | None = None
        self._left = False

    async def send(self, data: bytes) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self._channel.is_due(self._place):
            await self._renew()
        await self._stream.send(data)

    async def receive(self) -> bytes | None:
        try:
            data = await self._stream.receive()
        except BaseException as error:
            self._leave()
            if self._refusal is not None:
                raise self._refusal from None
            if isinstance(error, TransportError):
                self._channel.abandon(self._place)
            raise
        if data is None:
            self._leave()
            if self._refusal is not None:
                raise self._refusal
        return data

    async def half_close(self) -> None:
        await self._stream.half_close()

    async def cancel(self) -> None:
        self._leave()
        await self._stream.cancel()

    async def _renew(self) -> None:
        """Ask again, or end the stream: with the refusal, or as a connection that broke."""
        try:
            await self._channel.renew(self._place)
        except BaseException as error:
            if isinstance(error, SecurityError):
                self._refusal = error
            self._channel.abandon(self._place)
            await self._stream.cancel()
            raise

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._channel.leave(self._place)
