"""The gRPC server: serves a `Handler` on one address, over TLS 1.3 with client certificates.

Messages pass through unparsed. Next to the trunk it serves the standard health service.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
from cryptography import x509
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedsea.errors import (
    AttestationError,
    BindError,
    Capacity,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    FedseaError,
    SecurityError,
    Unauthenticated,
)
from fedsea.transport.address import Address, parse_address
from fedsea.transport.base import (
    LOCAL_TENANT,
    Attester,
    Handler,
    Peer,
    ServerStream,
    check_size,
)
from fedsea.transport.credentials import (
    Plaintext,
    ServerTLS,
    fingerprint_of,
    load_server,
    require_plaintext_allowed,
    tenant_of,
)
from fedsea.transport.endings import Ending, outcome
from fedsea.transport.handshake import accepts_tls12
from fedsea.transport.runtime import settle
from fedsea.transport.tokens import TokenTable, authorize
from fedsea.wire.limits import DEFAULT_LIMITS, patience_factor

SERVICE = "fedsea.v1.Trunk"
RETRY_WHEN_FULL = 1.0
RETRY_WHEN_DRAINING = 5.0
PROBE_TIMEOUT = 5.0
FLUSH_SECONDS = 1.0  # for the last answers of a drain to reach their clients
UNCOUNTED_STREAMS = 64  # per connection, for Describe and health beside the sessions

_Context: TypeAlias = "aio.ServicerContext[bytes, bytes]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Limits of a gRPC server; times in seconds.

    `max_streams` bounds all session streams together. `send_timeout` bounds how long one message
    waits for a client that reads nothing, a large one in proportion to its size.
    `handshake_timeout` bounds a connection that says nothing. A silent connection is probed every
    `keepalive` and dropped after `keepalive_timeout`.
    """

    max_message_bytes: int = DEFAULT_LIMITS.max_message_bytes
    max_streams: int = 1024
    send_timeout: float = 30.0
    handshake_timeout: float = 10.0
    keepalive: float = 30.0
    keepalive_timeout: float = 10.0

    def __post_init__(self) -> None:
        for name in ServerOptions.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive: it is {getattr(self, name)}")


class GrpcServer:
    """Serves `handler` on `address` (host:port; port 0 takes a free one).

    `attester` answers clients that ask for proof of what runs here.

    Raises ConfigError, CertificateError for settings that cannot work, before anything is bound.
    """

    def __init__(
        self,
        handler: Handler,
        address: str,
        credentials: ServerTLS | Plaintext,
        *,
        tokens: TokenTable | None = None,
        attester: Attester | None = None,
        options: ServerOptions | None = None,
    ) -> None:
        self._handler = handler
        self._attester = attester
        self._address = parse_address(address)
        self._options = options or ServerOptions()
        self._tokens = tokens
        self._tls = isinstance(credentials, ServerTLS)
        self._credentials = _server_credentials(credentials, self._address)
        self._server: aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._sessions: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._expired = False

    async def start(self) -> Address:
        """Bind, serve, and return the address with the port in use.

        Raises BindError, and SecurityError when this process would accept TLS 1.2.
        """
        server = aio.server(options=_channel_arguments(self._options))
        server.add_generic_rpc_handlers((self._methods(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            bound = Address(self._address.host, self._bind(server))
        except BindError as error:
            # gRPC tidies up on the event loop when this object goes. A traceback that keeps it
            # beyond the end of the loop would end in noise about a closed loop.
            del server
            raise error.with_traceback(None) from None
        await server.start()
        self._server = server
        try:
            await self._require_tls13(bound)
        except FedseaError:
            await self.stop()
            raise
        await self._report(serving=True)
        return bound

    async def drain(self, grace: float) -> None:
        """Refuse new sessions, let running ones finish for `grace` seconds, then stop.

        Sessions that are still running then end with `Draining`.
        """
        self._draining = True
        await self._report(serving=False)
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            self._expired = True
            for session in tuple(self._sessions):
                session.cancel()
        await self._stop(FLUSH_SECONDS)

    async def stop(self) -> None:
        """Stop at once; running sessions are cancelled. Safe to repeat."""
        await self._stop(None)

    async def _stop(self, grace: float | None) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace)
            await settle()

    async def _require_tls13(self, bound: Address) -> None:
        if self._tls and await asyncio.to_thread(accepts_tls12, bound.from_here, PROBE_TIMEOUT):
            raise SecurityError(
                "gRPC was imported before fedsea and accepts TLS 1.2: import fedsea.transport first"
            )

    async def _report(self, *, serving: bool) -> None:
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serving else answer.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    def _methods(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self._describe),
                "Attest": grpc.unary_unary_rpc_method_handler(self._attest),
                "Session": grpc.stream_stream_rpc_method_handler(self._session),
            },
        )

    def _bind(self, server: aio.Server) -> int:
        try:
            if self._credentials is None:
                return server.add_insecure_port(str(self._address))
            return server.add_secure_port(str(self._address), self._credentials)
        except RuntimeError:
            raise _bind_error(self._address) from None

    async def _describe(self, _request: bytes, context: _Context) -> bytes:
        answer = await outcome(self._answer(context))
        return await _abort(context, answer) if isinstance(answer, Ending) else answer

    async def _answer(self, context: _Context) -> bytes:
        return await self._handler.describe(self._identify(context))

    async def _attest(self, request: bytes, context: _Context) -> bytes:
        answer = await outcome(self._proof(request, context))
        return await _abort(context, answer) if isinstance(answer, Ending) else answer

    async def _proof(self, request: bytes, context: _Context) -> bytes:
        peer = self._identify(context)
        if self._attester is None:
            raise AttestationError(
                "the server has no proof of what it runs: ask its operator, or another server"
            )
        return await self._attester.attest(peer, request)

    async def _session(self, _requests: AsyncIterator[bytes], context: _Context) -> None:
        ending = await outcome(self._serve(context))
        if ending is not None:
            await _abort(context, ending)

    async def _serve(self, context: _Context) -> None:
        stream = _GrpcServerStream(context, self._options)
        with self._admitted() as task:
            peer = self._identify(context)
            try:
                await self._handler.session(peer, stream)
            except asyncio.CancelledError:
                if not self._expired:
                    raise
                task.uncancel()
                raise Draining("the server has shut down: reconnect", RETRY_WHEN_DRAINING) from None

    @contextmanager
    def _admitted(self) -> Iterator[asyncio.Task[Any]]:
        if self._draining:
            raise Draining("the server is shutting down: try another one", RETRY_WHEN_DRAINING)
        if len(self._sessions) >= self._options.max_streams:
            raise Capacity("the server has no free stream: try again later", RETRY_WHEN_FULL)
        task = asyncio.current_task()
        assert task is not None  # gRPC runs each call in a task
        self._sessions.add(task)
        self._idle.clear()
        try:
            yield task
        finally:
            self._sessions.discard(task)
            if not self._sessions:
                self._idle.set()

    def _identify(self, context: _Context) -> Peer:
        peer = _certified_peer(context) if self._tls else Peer(LOCAL_TENANT, context.peer())
        return authorize(peer, context.invocation_metadata() or (), self._tokens)


class _GrpcServerStream(ServerStream):
    def __init__(self, context: _Context, options: ServerOptions) -> None:
        self._context = context
        self._options = options
        self._sending = asyncio.Lock()

    async def receive(self) -> bytes | None:
        data = await self._context.read()
        return data if isinstance(data, bytes) else None

    async def send(self, data: bytes) -> None:
        check_size(data, self._options.max_message_bytes)
        patience = self._options.send_timeout * patience_factor(len(data))
        try:
            async with self._sending, asyncio.timeout(patience):
                await self._context.write(data)
        except TimeoutError:
            raise DeadlineExceeded("the client reads too slowly: read every answer") from None
        except (aio.InternalError, aio.UsageError):
            raise ConnectionLost("the client is gone") from None


def _server_credentials(
    credentials: ServerTLS | Plaintext, address: Address
) -> grpc.ServerCredentials | None:
    if isinstance(credentials, Plaintext):
        require_plaintext_allowed(credentials, address.host, is_loopback=address.is_loopback)
        return None
    files = load_server(credentials)
    return grpc.ssl_server_credentials(
        [(files.key, files.certificate)], root_certificates=files.ca, require_client_auth=True
    )


def _channel_arguments(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.max_concurrent_streams", options.max_streams + UNCOUNTED_STREAMS),
        ("grpc.server_handshake_timeout_ms", round(options.handshake_timeout * 1000)),
        ("grpc.keepalive_time_ms", round(options.keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", round(options.keepalive_timeout * 1000)),
        # A ping of flow control that is under way holds the keepalive ping back: both count.
        ("grpc.http2.ping_timeout_ms", round(options.keepalive_timeout * 1000)),
        # Probes of flow control behind a large message count as pings too, and on a busy machine they
        # arrive together. Who may send them has shown a certificate: no connection ends for them.
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _certified_peer(context: _Context) -> Peer:
    shown = list(context.auth_context().get("x509_pem_cert", ()))
    if not shown:
        raise Unauthenticated("no client certificate was shown: connect with one")
    certificate = x509.load_pem_x509_certificate(shown[0])
    return Peer(tenant_of(certificate), context.peer(), fingerprint_of(certificate))


async def _abort(context: _Context, ending: Ending) -> NoReturn:
    status = grpc.StatusCode[ending.status]
    await context.abort(status, ending.message, ending.metadata())


def _bind_error(address: Address) -> BindError:
    """Why gRPC could not bind, found by trying once more: it does not say."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            return BindError(f"{address} cannot be listened on: {_bind_fix(error)}")
    return BindError(f"{address} cannot be listened on: choose another address")


def _bind_fix(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use, stop the other process or choose another port"
    if error.errno == errno.EACCES:
        return "ports below 1024 need privileges, choose a higher one"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return "it is no address of this machine, choose one of its own or 0.0.0.0"
    return f"{error.strerror}, choose another address"
