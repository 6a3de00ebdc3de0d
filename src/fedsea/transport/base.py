"""The interfaces of every transport: what clients call, what servers are given, what they serve.

Messages are opaque bytes, kept whole and in order within a stream. All methods belong to the event
loop on which the object was first used. At most one `receive` and any number of `send` calls may
wait on a stream at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from fedsea.errors import AttestationError, LocalProtocolError

LOCAL_TENANT = "local"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a stream, as proved to this server.

    `fingerprint` is the SHA-256 of the client certificate in hex, None without TLS.
    """

    tenant: str
    address: str
    fingerprint: str | None = None


def check_size(data: bytes, cap: int) -> None:
    """Raise LocalProtocolError when a message of ours is over the cap of `cap` bytes."""
    if len(data) > cap:
        raise LocalProtocolError(
            f"a message of {len(data)} bytes is over the cap of {cap}: send it in parts"
        )


class ServerStream(ABC):
    """The server's end of one session stream."""

    @abstractmethod
    async def receive(self) -> bytes | None:
        """The client's next message; None when the client has finished sending."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send one message; waits while the client is slow.

        Raises LocalProtocolError over the message cap, ConnectionLost when the client is gone,
        DeadlineExceeded when it takes nothing for too long.
        """


class Handler(Protocol):
    """What a transport serves.

    A FedseaError raised here reaches the client as the same class with the same message. Any other
    exception reaches it as an internal error without details. When the client cancels or its
    connection breaks, the running `session` is cancelled.
    """

    async def describe(self, peer: Peer) -> bytes:
        """Answer what this server serves."""
        ...

    async def session(self, peer: Peer, stream: ServerStream) -> None:
        """Serve one stream; returning ends it cleanly."""
        ...


class Attester(Protocol):
    """Answers requests for proof of what this server runs; errors travel as those of `Handler`."""

    async def attest(self, peer: Peer, request: bytes) -> bytes:
        """Answer one request; both are messages of `fedsea.wire.attestation`."""
        ...


class ClientStream(ABC):
    """The client's end of one session stream."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send one message; waits while the server is slow.

        Raises LocalProtocolError over the message cap or after `half_close`, and what `receive`
        raises when the stream has ended.
        """

    @abstractmethod
    async def receive(self) -> bytes | None:
        """The server's next message; None when the server ended the stream cleanly.

        Raises the error with which the server ended the stream, or ConnectionLost. Cancelling this
        call cancels the stream: gRPC cannot give a message back that nobody waits for.
        """

    @abstractmethod
    async def half_close(self) -> None:
        """Say that nothing more will be sent; the server may still answer."""

    @abstractmethod
    async def cancel(self) -> None:
        """End the stream at once in both directions; safe to repeat."""


class Channel(ABC):
    """A client's connection to one server; connects when it is first used."""

    @abstractmethod
    async def describe(self) -> bytes:
        """What the server says about itself."""

    @abstractmethod
    async def open_stream(self) -> ClientStream:
        """Start a session stream.

        Raises Unreachable, CertificateError or DeadlineExceeded when there is no connection. What
        the server itself objects to is raised by the first `receive`. A connection that broke a
        moment ago may not be known to be broken: then the first use of the stream raises
        ConnectionLost.
        """

    @abstractmethod
    async def close(self) -> None:
        """Cancel all streams and disconnect; safe to repeat."""

    async def pin(self) -> PinnedChannel:
        """Another channel, which talks to nobody but the holder of the server's present TLS key.

        Raises AttestationError where the transport has no such key, and what `open_stream` raises.
        """
        raise AttestationError(
            "this connection has no TLS key that an attestation could be bound to: use certificates"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class PinnedChannel(Channel):
    """A channel of one connection, to the holder of one TLS key.

    It makes no second connection: once that one is lost, all calls raise ConnectionLost.
    """

    @property
    @abstractmethod
    def key_sha256(self) -> str:
        """SHA-256 of that key's SubjectPublicKeyInfo, in hex."""

    @property
    @abstractmethod
    def is_lost(self) -> bool:
        """Whether there was a connection and it is gone."""

    @abstractmethod
    async def attest(self, request: bytes) -> bytes:
        """Ask the server for proof of what it runs.

        Raises AttestationError when it has none, and what `open_stream` raises.
        """
