"""The gRPC server: binding, TLS, identities, limits, health, draining."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from grpc import aio
from grpc_health.v1 import health_pb2

from fedsea.errors import (
    BindError,
    Capacity,
    CertificateError,
    ConfigError,
    DeadlineExceeded,
    Draining,
    LocalProtocolError,
    Unauthenticated,
    Unreachable,
)
from fedsea.transport.address import Address
from fedsea.transport.credentials import ClientTLS, Plaintext, fingerprint_of
from fedsea.transport.grpc_client import GrpcChannel
from fedsea.transport.grpc_server import GrpcServer, ServerOptions
from fedsea.transport.tokens import TokenRecord, TokenTable, hash_token

pytestmark = pytest.mark.anyio

LOOPBACK = "127.0.0.1:0"
PLAINTEXT = Plaintext(allow_insecure=True)

Serve = Callable[..., Awaitable[tuple[GrpcServer, str]]]


@pytest.fixture
async def serve(handler, server_tls) -> AsyncIterator[Serve]:
    """Start servers of `handler`; they stop with the test."""
    servers = []

    async def started(credentials=server_tls, **settings) -> tuple[GrpcServer, str]:
        server = GrpcServer(handler, LOOPBACK, credentials, **settings)
        servers.append(server)
        return server, str(await server.start())

    yield started
    for server in servers:
        await server.stop()


async def test_a_port_in_use_is_named(serve, handler, server_tls):
    """The error names the address and what to do; the first server goes on."""
    _, address = await serve()
    with pytest.raises(BindError, match=rf"{address} cannot be listened on: the port is in use"):
        await GrpcServer(handler, address, server_tls).start()


async def test_a_foreign_address_is_named(handler, server_tls):
    """Only an address of this machine can be listened on."""
    with pytest.raises(BindError, match="no address of this machine"):
        await GrpcServer(handler, "203.0.113.1:0", server_tls).start()


async def test_plaintext_is_refused_off_loopback(handler):
    """Before anything is bound."""
    with pytest.raises(ConfigError, match="loopback only"):
        GrpcServer(handler, "0.0.0.0:0", PLAINTEXT)
    with pytest.raises(ConfigError, match="explicit flag"):
        GrpcServer(handler, LOOPBACK, Plaintext())


@pytest.mark.parametrize("name", ["max_streams", "max_message_bytes", "send_timeout"])
def test_limits_are_positive(name):
    """A limit of zero would serve nothing, and says so."""
    with pytest.raises(ConfigError, match=f"{name} must be positive"):
        ServerOptions(**{name: 0})


def handshake(address: str, tls: ClientTLS, version: ssl.TLSVersion, *, certified: bool) -> str:
    """The version agreed on with a client that offers `version` only and reads one byte."""
    context = ssl.create_default_context(cafile=tls.ca)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if certified:
        context.load_cert_chain(tls.certificate, tls.key)
    host, port = address.rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), 5) as raw,
        context.wrap_socket(raw, server_hostname=host) as wrapped,
    ):
        if not wrapped.recv(1):
            raise ConnectionResetError
        return wrapped.version() or ""


async def test_tls_1_3_only(serve, client_tls):
    """A client pinned to TLS 1.3 gets through; one pinned to TLS 1.2 is refused."""
    _, address = await serve()
    newest = ssl.TLSVersion.TLSv1_3
    agreed = await asyncio.to_thread(handshake, address, client_tls, newest, certified=True)
    assert agreed == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.to_thread(
            handshake, address, client_tls, ssl.TLSVersion.TLSv1_2, certified=True
        )


async def test_a_client_without_certificate_is_refused(serve, client_tls):
    """Mutual TLS: no certificate, no connection."""
    _, address = await serve()
    newest = ssl.TLSVersion.TLSv1_3
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.to_thread(handshake, address, client_tls, newest, certified=False)


async def test_the_certificate_is_the_identity(serve, handler, client_tls):
    """The handler sees the tenant and the fingerprint of the client's certificate."""
    _, address = await serve()
    async with GrpcChannel(address, client_tls) as channel:
        await channel.describe()
    certificate = x509.load_pem_x509_certificate(client_tls.certificate.read_bytes())
    assert handler.peers[0].tenant == "acme"
    assert handler.peers[0].fingerprint == fingerprint_of(certificate)
    assert "127.0.0.1" in handler.peers[0].address


async def test_a_certificate_without_tenant_is_no_identity(serve, forge):
    """A certificate of the right CA that names no tenant gets no session and no description."""
    _, address = await serve()
    forged = forge(server=False)
    tls = ClientTLS(forged.ca, forged.certificate, forged.key)
    async with GrpcChannel(address, tls) as channel:
        with pytest.raises(Unauthenticated, match="names no tenant"):
            await channel.describe()
        stream = await channel.open_stream()
        with pytest.raises(Unauthenticated, match="names no tenant"):
            await stream.receive()


def token_table(tenant: str, token: str) -> TokenTable:
    """A table with one live token."""
    expires = datetime.now(UTC) + timedelta(hours=1)
    return TokenTable((TokenRecord(tenant, hash_token(token), expires),))


async def test_tokens_come_on_top_of_certificates(serve, client_tls):
    """With a token table, certificate and token must name the same tenant."""
    _, address = await serve(tokens=token_table("acme", "good"))
    async with GrpcChannel(address, replace(client_tls, token="good")) as channel:
        assert await channel.describe() == b"acme"
    for token in (None, "bad"):
        async with GrpcChannel(address, replace(client_tls, token=token)) as channel:
            with pytest.raises(Unauthenticated, match="token"):
                await channel.describe()
            stream = await channel.open_stream()
            with pytest.raises(Unauthenticated, match="token"):
                await stream.receive()


async def test_a_token_of_another_tenant_is_refused(serve, client_tls):
    """A stolen token does not work with one's own certificate."""
    _, address = await serve(tokens=token_table("other", "stolen"))
    async with GrpcChannel(address, replace(client_tls, token="stolen")) as channel:
        with pytest.raises(Unauthenticated, match="different tenants"):
            await channel.describe()


async def test_in_plaintext_the_tenant_is_local_or_the_tokens(serve):
    """Loopback without TLS still tells tenants apart when tokens are configured."""
    _, address = await serve(PLAINTEXT)
    async with GrpcChannel(address, PLAINTEXT) as channel:
        assert await channel.describe() == b"local"
    _, address = await serve(PLAINTEXT, tokens=token_table("acme", "good"))
    async with GrpcChannel(address, replace(PLAINTEXT, token="good")) as channel:
        assert await channel.describe() == b"acme"


async def test_streams_are_bounded(serve, client_tls):
    """One stream more than allowed is refused with a time to come back, and frees when one ends."""
    _, address = await serve(options=ServerOptions(max_streams=1))
    async with GrpcChannel(address, client_tls) as one, GrpcChannel(address, client_tls) as two:
        first = await one.open_stream()
        await first.send(b"hello")
        assert await first.receive() == b"hello"
        for channel in (one, two):
            refused = await channel.open_stream()
            with pytest.raises(Capacity, match="no free stream") as caught:
                await refused.receive()
            assert caught.value.retry_after == 1.0
        await first.half_close()
        assert [await first.receive(), await first.receive()] == [b"bye", None]
        again = await two.open_stream()
        await again.send(b"hello")
        assert await again.receive() == b"hello"


async def test_a_message_over_the_servers_cap_ends_the_stream(serve, handler, client_tls):
    """A client with a larger cap of its own learns that the server takes less."""
    _, address = await serve(options=ServerOptions(max_message_bytes=1000))
    async with GrpcChannel(address, client_tls) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await stream.send(bytes(1001))
        with pytest.raises(LocalProtocolError, match="takes no message of this size"):
            await stream.receive()
        await asyncio.wait_for(handler.finished.wait(), 5)


async def test_a_client_that_reads_nothing_is_dropped(serve, handler, client_tls):
    """A send waits for a slow client only so long, then the session ends and frees what it held."""
    _, address = await serve(options=ServerOptions(send_timeout=0.2))
    async with GrpcChannel(address, client_tls) as channel:
        stream = await channel.open_stream()
        await stream.send(b"flood")
        await asyncio.wait_for(handler.finished.wait(), 10)
        assert isinstance(handler.send_error, DeadlineExceeded)

        async def read_all() -> None:
            while await stream.receive() is not None:
                pass

        with pytest.raises(DeadlineExceeded, match="reads too slowly"):
            await read_all()


async def health(address: str, tls: ClientTLS) -> str:
    """What the health service says."""
    credentials = grpc.ssl_channel_credentials(
        tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
    )
    async with aio.secure_channel(address, credentials) as channel:
        check: aio.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service="fedsea.v1.Trunk"))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_draining_lets_sessions_finish(serve, client_tls):
    """While draining, the running session goes on, new ones are refused, health says so."""
    server, address = await serve()
    assert await health(address, client_tls) == "SERVING"
    async with GrpcChannel(address, client_tls) as channel:
        running = await channel.open_stream()
        await running.send(b"hello")
        assert await running.receive() == b"hello"
        draining = asyncio.create_task(server.drain(10))
        await asyncio.sleep(0)
        late = await channel.open_stream()
        with pytest.raises(Draining, match="shutting down") as caught:
            await late.receive()
        assert caught.value.retry_after
        assert await health(address, client_tls) == "NOT_SERVING"
        await running.send(b"still here")
        assert await running.receive() == b"still here"
        await running.half_close()
        assert [await running.receive(), await running.receive()] == [b"bye", None]
        await asyncio.wait_for(draining, 5)
        with pytest.raises(Unreachable, match="is the server running"):
            await channel.open_stream()


async def test_a_drain_ends(serve, handler, client_tls):
    """Sessions that outlast the grace end with Draining, and the server stops."""
    server, address = await serve()
    async with GrpcChannel(address, client_tls) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await asyncio.wait_for(server.drain(0.05), 5)
        with pytest.raises(Draining, match="shut down"):
            await stream.receive()
    assert handler.running == 0


async def test_stop_cancels_sessions_and_repeats(serve, handler, client_tls):
    """A stop is immediate, frees the port and may be repeated."""
    server, address = await serve()
    async with GrpcChannel(address, client_tls) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await server.stop()
        await asyncio.wait_for(handler.cancelled.wait(), 5)
    await server.stop()


async def test_own_files_are_checked_first(handler, server_tls, tmp_path):
    """A missing certificate is found when the server is made, not when clients come."""
    with pytest.raises(CertificateError, match="does not exist"):
        GrpcServer(handler, LOOPBACK, replace(server_tls, certificate=tmp_path / "absent.pem"))


async def test_an_ipv6_address_is_served(handler, server_tls, client_tls):
    """Brackets and all."""
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    server = GrpcServer(handler, "[::1]:0", server_tls)
    try:
        address = await server.start()
    except BindError:
        pytest.skip("this machine has no IPv6 loopback")
    assert isinstance(address, Address)
    async with GrpcChannel(str(address), client_tls) as channel:
        assert await channel.describe() == b"acme"
    await server.stop()


async def test_an_error_for_a_client_that_is_gone_goes_nowhere(
    serve, handler, client_tls, caplog, monkeypatch
):
    """A session that answers its own cancellation with an error disturbs nobody."""

    async def stubborn(_peer, stream) -> None:
        await stream.send(b"ready")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Capacity("too late") from None
        finally:
            handler.finished.set()

    monkeypatch.setattr(handler, "session", stubborn)
    server, address = await serve()
    async with GrpcChannel(address, client_tls) as channel:
        stream = await channel.open_stream()
        assert await stream.receive() == b"ready"
        await stream.cancel()
        await asyncio.wait_for(handler.finished.wait(), 5)
    await server.stop()
    assert not caplog.records
