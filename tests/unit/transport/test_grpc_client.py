"""The gRPC client: why a connection cannot be made, and what happens when one breaks."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from grpc import aio
from tests.ports import free_port

from fedsea.errors import (
    Capacity,
    CertificateError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    PermissionDenied,
    RemoteProtocolError,
    SecurityError,
    Unauthenticated,
    Unreachable,
)
from fedsea.transport import credentials, grpc_client
from fedsea.transport.certificates import issue_client, issue_server
from fedsea.transport.credentials import ClientTLS, Plaintext, ServerTLS
from fedsea.transport.grpc_client import ClientOptions, GrpcChannel
from fedsea.transport.grpc_server import GrpcServer

pytestmark = pytest.mark.anyio

LOOPBACK = "127.0.0.1:0"
PLAINTEXT = Plaintext(allow_insecure=True)
QUICK = ClientOptions(connect_timeout=0.5)


@dataclass
class Proxy:
    """A TCP proxy whose connections a test can cut."""

    target: str
    address: str = ""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    server: asyncio.Server | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, port: int = 0) -> None:
        """Listen on `port`."""
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.rsplit(":", 1)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        self.writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        sink.close()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def stop(self) -> None:
        """Listen no more and cut everything."""
        if self.server is not None:
            self.server.close()
        self.cut()
        await asyncio.gather(*self.tasks)


@pytest.fixture
async def address(handler, server_tls) -> AsyncIterator[str]:
    """The address of a running TLS server."""
    server = GrpcServer(handler, LOOPBACK, server_tls)
    yield str(await server.start())
    await server.stop()


@pytest.fixture
async def proxy(address) -> AsyncIterator[Proxy]:
    """A proxy in front of the TLS server."""
    proxy = Proxy(address)
    await proxy.start()
    yield proxy
    await proxy.stop()


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """Let either side load files that it would refuse, as a foreign implementation might."""
    monkeypatch.setattr(credentials, "_check_dates", lambda *_: None)
    monkeypatch.setattr(credentials, "_check_usage", lambda *_: None)


async def why_refused(address: str, tls: ClientTLS | Plaintext) -> Exception:
    """The error of a connection that cannot be made, the same for both calls."""
    async with GrpcChannel(address, tls, options=ClientOptions(connect_timeout=3)) as channel:
        with pytest.raises((Unreachable, SecurityError)) as described:
            await channel.describe()
        with pytest.raises((Unreachable, SecurityError)) as opened:
            await channel.open_stream()
    assert (type(described.value), str(described.value)) == (type(opened.value), str(opened.value))
    return opened.value


async def test_nobody_listens(client_tls):
    """A refused connection is Unreachable and asks whether the server runs."""
    error = await why_refused(f"127.0.0.1:{free_port()}", client_tls)
    assert type(error) is Unreachable
    assert "refused the connection" in str(error)


async def test_an_unknown_host(client_tls):
    """A name that does not resolve is Unreachable and points at the address."""
    error = await why_refused("no-such-host.invalid:50051", client_tls)
    assert type(error) is Unreachable
    assert "no-such-host.invalid" in str(error)


async def test_a_server_that_says_nothing(client_tls):
    """A listener that never answers the handshake costs the connect timeout, not more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        async with GrpcChannel(address, client_tls, options=QUICK) as channel:
            async with asyncio.timeout(3):
                with pytest.raises(Unreachable, match="did not finish the TLS handshake"):
                    await channel.open_stream()


async def test_a_server_without_tls(handler, client_tls):
    """A TLS client at a plaintext port is told so."""
    server = GrpcServer(handler, LOOPBACK, PLAINTEXT)
    error = await why_refused(str(await server.start()), client_tls)
    await server.stop()
    assert type(error) is SecurityError
    assert "does not speak TLS 1.3" in str(error)


async def test_a_client_without_tls(address):
    """A plaintext client at a TLS port gets an error, not a hang."""
    async with GrpcChannel(address, PLAINTEXT, options=QUICK) as channel:
        async with asyncio.timeout(5):
            with pytest.raises((Unreachable, ConnectionLost)):
                await channel.describe()


async def test_a_server_of_a_foreign_ca(handler, foreign, client_tls):
    """The server is not trusted, and the message names the CA file in use."""
    server = GrpcServer(handler, LOOPBACK, issue_server(foreign, ["127.0.0.1"], force=True))
    error = await why_refused(str(await server.start()), client_tls)
    await server.stop()
    assert type(error) is CertificateError
    assert "was not issued by the CA in" in str(error)


async def test_a_client_of_a_foreign_ca(address, foreign, client_tls, handler):
    """The server rejects the client, and the message says whose certificate is wrong."""
    stranger = issue_client(foreign, "acme", force=True)
    error = await why_refused(address, replace(stranger, ca=client_tls.ca))
    assert type(error) is CertificateError
    assert "rejected this client's certificate" in str(error)
    assert not handler.peers


@pytest.mark.usefixtures("unchecked")
async def test_an_expired_server(handler, forge, client_tls):
    """A server that does not check its own date is refused by the client."""
    server = GrpcServer(handler, LOOPBACK, forge(age=10, days=-1))
    address = (await server.start()).port
    error = await why_refused(f"localhost:{address}", client_tls)
    await server.stop()
    assert type(error) is CertificateError
    assert "expired" in str(error)


@pytest.mark.usefixtures("unchecked")
async def test_an_expired_client(address, forge, handler):
    """A client that does not check its own date is refused by the server."""
    forged = forge(age=10, days=-1, server=False)
    error = await why_refused(address, ClientTLS(forged.ca, forged.certificate, forged.key))
    assert type(error) is CertificateError
    assert "rejected this client's certificate" in str(error)
    assert not handler.peers


@pytest.mark.usefixtures("unchecked")
async def test_a_server_certificate_is_no_client(address, server_tls, handler):
    """Nobody becomes a client with the server's files."""
    stolen = ClientTLS(server_tls.ca, server_tls.certificate, server_tls.key)
    error = await why_refused(address, stolen)
    assert type(error) is CertificateError
    assert not handler.peers


@pytest.mark.usefixtures("unchecked")
async def test_a_client_certificate_is_no_server(handler, client_tls, authority):
    """A tenant cannot pose as the server with its own certificate."""
    posing = ServerTLS(authority / "ca.pem", client_tls.certificate, client_tls.key)
    server = GrpcServer(handler, LOOPBACK, posing)
    error = await why_refused(str(await server.start()), client_tls)
    await server.stop()
    assert type(error) is CertificateError


async def test_a_certificate_for_another_name(handler, authority, client_tls, tmp_path):
    """The name dialled must be in the certificate; `server_name` says which name to look for."""
    shutil.copytree(authority, tmp_path, dirs_exist_ok=True)
    tls = issue_server(tmp_path, ["trunk.example.org"], force=True)
    server = GrpcServer(handler, LOOPBACK, tls)
    address = str(await server.start())
    error = await why_refused(address, client_tls)
    assert type(error) is CertificateError
    assert "is not for 127.0.0.1" in str(error)
    named = replace(client_tls, server_name="trunk.example.org")
    async with GrpcChannel(address, named) as channel:
        assert await channel.describe() == b"acme"
    await server.stop()


async def test_own_files_are_checked_before_connecting(client_tls, tmp_path):
    """A broken file is found when the channel is made, wherever it points."""
    with pytest.raises(CertificateError, match="does not exist"):
        GrpcChannel("127.0.0.1:1", replace(client_tls, key=Path(tmp_path / "absent.key")))


async def test_plaintext_never_leaves_the_machine():
    """A client does not send rows in the clear to another machine."""
    with pytest.raises(ConfigError, match="loopback only"):
        GrpcChannel("10.0.0.1:50051", PLAINTEXT)
    with pytest.raises(ConfigError, match="explicit flag"):
        GrpcChannel("127.0.0.1:50051", Plaintext())


async def test_a_probe_rate_that_servers_refuse():
    """It would cut every connection after some seconds."""
    with pytest.raises(ConfigError, match="keepalive must be at least"):
        ClientOptions(keepalive=1)


async def echo_over_a_new_stream(channel: GrpcChannel) -> bytes | None:
    """What comes back; a stream that began before gRPC had noticed a cut is lost like the others."""
    while True:
        with suppress(ConnectionLost):
            stream = await channel.open_stream()
            await stream.send(b"hello")
            return await stream.receive()


async def test_a_cut_connection(proxy, client_tls, handler):
    """A cut wakes the waiting client and frees the server; the same channel connects again."""
    async with GrpcChannel(proxy.address, client_tls) as channel:
        stream = await channel.open_stream()
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        waiting = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        proxy.cut()
        with pytest.raises(ConnectionLost, match="the connection broke"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(ConnectionLost):
            await stream.send(b"more")
        await asyncio.wait_for(handler.cancelled.wait(), 5)
        async with asyncio.timeout(5):
            assert await echo_over_a_new_stream(channel) == b"hello"


async def test_a_server_that_comes_back(proxy, client_tls, monkeypatch):
    """After a failed attempt the next one is made at once, without waiting out a back-off."""
    arguments = grpc_client._channel_arguments
    backoff = [(f"grpc.{name}_reconnect_backoff_ms", 60_000) for name in ("initial", "min", "max")]
    monkeypatch.setattr(
        grpc_client, "_channel_arguments", lambda *given: arguments(*given) + backoff
    )
    port = int(proxy.address.rsplit(":", 1)[1])
    async with GrpcChannel(proxy.address, client_tls) as channel:
        stream = await channel.open_stream()
        await proxy.stop()
        with pytest.raises(ConnectionLost):
            await stream.receive()
        for _ in range(3):
            with pytest.raises((ConnectionLost, Unreachable)):
                await channel.describe()
        await proxy.start(port)
        async with asyncio.timeout(10):
            assert await channel.describe() == b"acme"


async def test_describe_has_a_deadline(address, client_tls, handler, monkeypatch):
    """A server that does not answer costs the stated time."""
    monkeypatch.setattr(handler, "describe", lambda _: asyncio.Event().wait())
    options = ClientOptions(describe_timeout=0.1)
    async with GrpcChannel(address, client_tls, options=options) as channel:
        with pytest.raises(DeadlineExceeded, match="did not answer in time"):
            await channel.describe()


async def test_a_message_over_this_sides_cap(address, client_tls):
    """A server that sends more than this side takes breaks the protocol, nothing more."""
    options = ClientOptions(max_message_bytes=1000)
    async with GrpcChannel(address, client_tls, options=options) as channel:
        stream = await channel.open_stream()
        await stream.send(b"large")
        await stream.send(b"5000")
        with pytest.raises(RemoteProtocolError, match="over this side's cap"):
            await stream.receive()


async def status_server(code: grpc.StatusCode, text: str) -> tuple[aio.Server, str]:
    """A server that ends every call with `code`, as proxies and strangers do."""

    async def end(_request, context) -> None:
        await context.abort(code, text)

    server = aio.server()
    describe: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(end)
    methods = grpc.method_handlers_generic_handler("fedsea.v1.Trunk", {"Describe": describe})
    server.add_generic_rpc_handlers((methods,))
    port = server.add_insecure_port(LOOPBACK)
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("code", "expected", "message"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, RemoteProtocolError, "no fedsea trunk server"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Capacity, "is full"),
        (grpc.StatusCode.UNAVAILABLE, ConnectionLost, "broke"),
        (grpc.StatusCode.INTERNAL, ConnectionLost, "broke"),
        (grpc.StatusCode.CANCELLED, ConnectionLost, "cancelled"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded, "in time"),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated, "refused this identity"),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied, "forbids this call"),
    ],
)
async def test_a_status_without_our_metadata(code, expected, message):
    """What others than fedsea answer becomes a fitting error of ours."""
    server, address = await status_server(code, "\x1b[31mtext\n")
    async with GrpcChannel(address, PLAINTEXT) as channel:
        with pytest.raises(expected, match=message) as caught:
            await channel.describe()
        assert str(caught.value).isprintable()
    await server.stop(None)


async def test_a_server_of_something_else():
    """Another gRPC service at the address is told apart from a broken connection."""
    server = aio.server()
    port = server.add_insecure_port(LOOPBACK)
    await server.start()
    async with GrpcChannel(f"127.0.0.1:{port}", PLAINTEXT) as channel:
        stream = await channel.open_stream()
        with pytest.raises(RemoteProtocolError, match="no fedsea trunk server"):
            await stream.receive()
    await server.stop(None)


async def test_a_channel_works_again_after_close(address, client_tls):
    """Closing disconnects; using the channel again connects again."""
    channel = GrpcChannel(address, client_tls)
    await channel.close()
    assert await channel.describe() == b"acme"
    await channel.close()
    await channel.close()
    assert await channel.describe() == b"acme"
    await channel.close()
