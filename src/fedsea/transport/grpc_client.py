"""The gRPC client: one channel to one server, over TLS 1.3 with a client certificate.

Every error of gRPC becomes one of ours at one seam, `_error_of_status`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio

from fedsea.errors import (
    AttestationError,
    Capacity,
    CertificateError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    FedseaError,
    LocalProtocolError,
    PermissionDenied,
    RemoteProtocolError,
    SecurityError,
    Unauthenticated,
    Unreachable,
)
from fedsea.transport.address import Address, parse_address
from fedsea.transport.base import (
    Channel,
    ClientStream,
    PinnedChannel,
    check_size,
)
from fedsea.transport.credentials import (
    ClientTLS,
    Plaintext,
    key_fingerprint_of,
    load_client,
    require_plaintext_allowed,
)
from fedsea.transport.endings import Ending, error_of, one_line, read_metadata
from fedsea.transport.handshake import accepts_tls12, diagnose, server_certificate
from fedsea.transport.runtime import settle, tls13_enforced
from fedsea.transport.tokens import token_metadata
from fedsea.wire.limits import LARGEST_MESSAGE

DESCRIBE = "/fedsea.v1.Trunk/Describe"
SESSION = "/fedsea.v1.Trunk/Session"
ATTEST = "/fedsea.v1.Trunk/Attest"

CLOSED_MESSAGE = "the channel was closed: connect again"
LOST_MESSAGE = "the connection to the pinned key was lost: pin the key again"
CANCELLED_MESSAGE = "the stream was cancelled: open a new one"

_Call: TypeAlias = "aio.StreamStreamCall[bytes, bytes]"
_Unary: TypeAlias = "aio.UnaryUnaryMultiCallable[bytes, bytes]"
_Stream: TypeAlias = "aio.StreamStreamMultiCallable[bytes, bytes]"

MIN_PING_SECONDS = 5

# What a status without our metadata means: it comes from gRPC itself, a proxy or a stranger.
_FOREIGN_STATUS: dict[grpc.StatusCode, tuple[type[FedseaError], str]] = {
    grpc.StatusCode.CANCELLED: (ConnectionLost, CANCELLED_MESSAGE),
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        DeadlineExceeded,
        "the server did not answer in time: try again",
    ),
    grpc.StatusCode.UNIMPLEMENTED: (
        RemoteProtocolError,
        "the server is no fedsea trunk server: check address and port",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (
        Unauthenticated,
        "the server or a proxy before it refused this identity: check certificate and token",
    ),
    grpc.StatusCode.PERMISSION_DENIED: (
        PermissionDenied,
        "the server or a proxy before it forbids this call: check certificate and token",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Limits of a gRPC channel; times in seconds.

    `connect_timeout` bounds connecting, handshake included. `describe_timeout` bounds the answer to
    `describe`, `attest_timeout` that to `attest`, for which a server may ask others. A silent
    connection is probed every `keepalive` and dropped after `keepalive_timeout`.
    """

    max_message_bytes: int = LARGEST_MESSAGE
    connect_timeout: float = 10.0
    describe_timeout: float = 10.0
    attest_timeout: float = 60.0
    keepalive: float = 10.0
    keepalive_timeout: float = 5.0

    def __post_init__(self) -> None:
        for name in ClientOptions.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive: it is {getattr(self, name)}")
        if self.keepalive < MIN_PING_SECONDS:
            raise ConfigError(
                f"keepalive must be at least {MIN_PING_SECONDS} s: probing more often only costs"
            )


class GrpcChannel(Channel):
    """A channel to the server at `address` (host:port).

    Raises ConfigError and CertificateError for settings and files that cannot work, before
    anything connects.
    """

    def __init__(
        self,
        address: str,
        credentials: ClientTLS | Plaintext,
        *,
        options: ClientOptions | None = None,
    ) -> None:
        self._address = parse_address(address)
        self._options = options or ClientOptions()
        self._tls = credentials if isinstance(credentials, ClientTLS) else None
        self._credentials = _channel_credentials(credentials, self._address)
        self._arguments = _channel_arguments(self._options, self._tls)
        self._metadata = aio.Metadata(*token_metadata(credentials.token))
        self._channel: aio.Channel | None = None
        self._attempt: asyncio.Task[aio.Channel] | None = None

    async def describe(self) -> bytes:
        try:
            return await self._ask(DESCRIBE, b"", self._options.describe_timeout)
        except aio.AioRpcError as error:
            raise _error_of_rpc(error) from None

    async def pin(self) -> PinnedChannel:
        if self._tls is None:
            return await super().pin()
        certificate = await self._server_certificate(self._tls)
        return _PinnedGrpcChannel(self._address, self._tls, self._options, certificate)

    async def open_stream(self) -> ClientStream:
        channel = await self._connected()
        method: _Stream = channel.stream_stream(SESSION)
        try:
            call = method(metadata=self._metadata)
        except aio.UsageError:
            raise ConnectionLost(CLOSED_MESSAGE) from None
        with suppress(aio.AioRpcError):  # the server objects already, which `receive` reports
            await call.wait_for_connection()
        return _GrpcClientStream(call, self._options.max_message_bytes)

    async def close(self) -> None:
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait((self._attempt,))
        await self._disconnect()

    async def _ask(self, method: str, request: bytes, timeout: float) -> bytes:  # noqa: ASYNC109
        channel = await self._connected()
        call: _Unary = channel.unary_unary(method)
        try:
            return await call(request, metadata=self._metadata, timeout=timeout)
        except aio.UsageError:
            raise ConnectionLost(CLOSED_MESSAGE) from None

    async def _server_certificate(self, tls: ClientTLS) -> x509.Certificate:
        timeout = self._options.connect_timeout
        return await asyncio.to_thread(server_certificate, self._address, tls, timeout)

    async def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
            await settle()

    async def _connected(self) -> aio.Channel:
        """The channel, ready for calls; raises what `open_stream` promises.

        Calls that need a connection at the same time share one attempt: a failed one closes the
        channel, which nobody else may be using then.
        """
        channel = self._channel
        if channel is not None and channel.get_state() is grpc.ChannelConnectivity.READY:
            return channel
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._connect())
            self._attempt.add_done_callback(_mark_seen)
        try:
            return await asyncio.shield(self._attempt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ConnectionLost(CLOSED_MESSAGE) from None

    async def _connect(self) -> aio.Channel:
        channel = self._channel or await self._create()
        self._channel = channel
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                ready = await _becomes_ready(channel)
        except TimeoutError:
            ready = False
        if not ready:
            await self._disconnect()
            raise await self._why_not_connected()
        return channel

    async def _create(self) -> aio.Channel:
        if self._credentials is None:
            return aio.insecure_channel(str(self._address), options=self._arguments)
        if not tls13_enforced():
            await self._require_tls13()
        return aio.secure_channel(str(self._address), self._credentials, options=self._arguments)

    async def _require_tls13(self) -> None:
        timeout = self._options.connect_timeout
        if await asyncio.to_thread(accepts_tls12, self._address, timeout):
            raise SecurityError(
                f"{self._address} accepts TLS 1.2, and so does this process because gRPC was "
                "imported before fedsea: import fedsea.transport first"
            )

    async def _why_not_connected(self) -> FedseaError:
        timeout = self._options.connect_timeout
        found = await asyncio.to_thread(diagnose, self._address, self._tls, timeout)
        return found or Unreachable(
            f"{self._address} did not answer as a fedsea server: check the port and try again"
        )


class _PinnedGrpcChannel(GrpcChannel, PinnedChannel):
    """Trusts one certificate instead of a CA.

    The leaf is the only root, so a chain ends at it or nowhere, and in every handshake of TLS 1.3
    the server signs with the leaf's key. Its name is verified as always.
    """

    def __init__(
        self, address: Address, tls: ClientTLS, options: ClientOptions, leaf: x509.Certificate
    ) -> None:
        super().__init__(str(address), tls, options=options)
        own = load_client(tls)
        root = leaf.public_bytes(Encoding.PEM)
        self._client_tls = tls
        self._key_sha256 = key_fingerprint_of(leaf)
        self._credentials = grpc.ssl_channel_credentials(root, own.key, own.certificate)
        self._was_connected = False

    @property
    def key_sha256(self) -> str:
        return self._key_sha256

    @property
    def is_lost(self) -> bool:
        channel, ready = self._channel, grpc.ChannelConnectivity.READY
        return self._was_connected and (channel is None or channel.get_state() is not ready)

    async def attest(self, request: bytes) -> bytes:
        try:
            return await self._ask(ATTEST, request, self._options.attest_timeout)
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise AttestationError(
                    f"{self._address} is too old to attest what it runs: its operator must update"
                ) from None
            raise _error_of_rpc(error) from None

    async def _connected(self) -> aio.Channel:
        if self.is_lost:
            raise ConnectionLost(LOST_MESSAGE)
        channel = await super()._connected()
        self._was_connected = True
        return channel

    async def _why_not_connected(self) -> FedseaError:
        found = await super()._why_not_connected()
        if isinstance(found, CertificateError):
            return found
        try:
            leaf = await self._server_certificate(self._client_tls)
        except FedseaError:
            return found
        if key_fingerprint_of(leaf) == self._key_sha256:
            return found
        return Unreachable(
            f"{self._address} shows another TLS key than the one it was to be attested with: "
            "connect again, and dial each server by an address of its own"
        )


class _GrpcClientStream(ClientStream):
    def __init__(self, call: _Call, max_message_bytes: int) -> None:
        self._call = call
        # The public `write` replaces the server's status by "Internal error from Core" when the
        # server ends the stream during a write; the layer below leaves the status alone.
        self._write: Callable[[bytes], Awaitable[None]] = call._cython_call.send_serialized_message  # type: ignore[attr-defined]
        self._max_message_bytes = max_message_bytes
        self._half_closed = False
        self._sending = asyncio.Lock()

    async def send(self, data: bytes) -> None:
        check_size(data, self._max_message_bytes)
        if self._half_closed:
            raise LocalProtocolError("this side has finished sending: open a new stream")
        if self._call.done():
            raise await self._ended()
        try:
            async with self._sending:
                await self._write(data)
        except aio.InternalError:
            raise await self._ended() from None
        except asyncio.CancelledError:
            self._call.cancel()
            raise

    async def receive(self) -> bytes | None:
        try:
            data = await self._call.read()
        except aio.AioRpcError as error:
            raise _error_of_rpc(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ConnectionLost(CANCELLED_MESSAGE) from None
        return data if isinstance(data, bytes) else None

    async def half_close(self) -> None:
        self._half_closed = True
        with suppress(aio.InternalError):  # the stream has ended, which `receive` reports
            async with self._sending:
                await self._call.done_writing()

    async def cancel(self) -> None:
        self._call.cancel()

    async def _ended(self) -> FedseaError:
        """The error that the ended stream means for a `send`."""
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return ConnectionLost("the server has finished the session: open a new stream")
        details, metadata = await self._call.details(), await self._call.trailing_metadata()
        return _error_of_status(code, details, metadata)


def _mark_seen(attempt: asyncio.Task[aio.Channel]) -> None:
    """Whoever waited may have gone: an error that nobody takes is no defect."""
    if not attempt.cancelled():
        attempt.exception()


async def _becomes_ready(channel: aio.Channel) -> bool:
    """Wait until the channel is connected; False as soon as an attempt to connect has failed."""
    ready, failed = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
    state = channel.get_state(try_to_connect=True)
    while state not in (ready, failed):
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return state is ready


def _error_of_rpc(error: aio.AioRpcError) -> FedseaError:
    return _error_of_status(error.code(), error.details(), error.trailing_metadata())


def _error_of_status(
    status: grpc.StatusCode, details: str | None, metadata: aio.Metadata | None
) -> FedseaError:
    """The seam: what a call's final status means, as one of our errors."""
    text = one_line(details or "")
    code, retry_after_ms = read_metadata(metadata or ())
    if code is not None:
        return error_of(Ending(status.name, code, text, retry_after_ms))
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _exhausted(text)
    if status in _FOREIGN_STATUS:
        cls, message = _FOREIGN_STATUS[status]
        return cls(message)
    return ConnectionLost(f"the connection broke ({status.name.lower()}): reconnect")


def _exhausted(text: str) -> FedseaError:
    """gRPC names the side whose cap on messages was exceeded in the status text only."""
    if "CLIENT: Received message larger" in text:
        return RemoteProtocolError("the server sent a message over this side's cap: raise the cap")
    if "message larger than max" in text:
        return LocalProtocolError("the server takes no message of this size: send it in parts")
    return Capacity("the server or a proxy before it is full: try again later")


def _channel_credentials(
    credentials: ClientTLS | Plaintext, address: Address
) -> grpc.ChannelCredentials | None:
    if isinstance(credentials, Plaintext):
        require_plaintext_allowed(credentials, address.host, is_loopback=address.is_loopback)
        return None
    files = load_client(credentials)
    return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)


def _channel_arguments(
    options: ClientOptions, tls: ClientTLS | None
) -> list[tuple[str, int | str]]:
    arguments: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", round(options.keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", round(options.keepalive_timeout * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # A ping of flow control that is under way holds the keepalive ping back: both count.
        ("grpc.http2.ping_timeout_ms", round(options.keepalive_timeout * 1000)),
        # Each channel connects for itself: none inherits the back-off of another one.
        ("grpc.use_local_subchannel_pool", 1),
        # gRPC would repeat a call on its own; a session is replayed by its owner, who knows how.
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]
    if tls is not None and tls.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", tls.server_name))
    return arguments
