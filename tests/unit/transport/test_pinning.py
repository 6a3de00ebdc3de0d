"""Pinned channels: bytes go to the holder of one TLS key, whoever else has a certificate."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpc import aio

from fedsea.errors import (
    AttestationError,
    CertificateError,
    ConnectionLost,
    QuotaExceeded,
    Unauthenticated,
    Unreachable,
)
from fedsea.transport.certificates import issue_server
from fedsea.transport.credentials import Plaintext, ServerTLS, load_server
from fedsea.transport.grpc_client import ClientOptions, GrpcChannel
from fedsea.transport.grpc_server import GrpcServer
from fedsea.transport.memory import MemoryChannel
from fedsea.transport.recording import Direction, Recorder, RecordingChannel

pytestmark = pytest.mark.anyio

LOOPBACK = "127.0.0.1:0"
QUICK = ClientOptions(connect_timeout=3)
PLAINTEXT = Plaintext(allow_insecure=True)


class Attester:
    """Answers every request with itself and the tenant."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def attest(self, peer, request):
        if self.error is not None:
            raise self.error
        return request + peer.tenant.encode()


@pytest.fixture
def attester() -> Attester:
    """What the server attests."""
    return Attester()


@pytest.fixture
async def server(handler, attester, server_tls):
    """A running server with a proof."""
    server = GrpcServer(handler, LOOPBACK, server_tls, attester=attester)
    server.address = str(await server.start())  # type: ignore[attr-defined]
    yield server
    await server.stop()


@pytest.fixture
async def pinned(server, client_tls):
    """A channel to the key of that server."""
    channel = GrpcChannel(server.address, client_tls, options=QUICK)
    async with channel, await channel.pin() as found:
        yield found


async def test_the_key_is_that_of_the_certificate(pinned, server_tls):
    """The hash is of the DER form of the server's public key."""
    certificate = x509.load_pem_x509_certificate(server_tls.certificate.read_bytes())
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert pinned.key_sha256 == hashlib.sha256(key).hexdigest()


async def test_everything_goes_through_a_pinned_channel(pinned):
    """It describes, attests and streams like any other."""
    assert await pinned.describe() == b"acme"
    assert await pinned.attest(b"nonce of ") == b"nonce of acme"
    stream = await pinned.open_stream()
    await stream.send(b"hello")
    assert await stream.receive() == b"hello"
    await stream.cancel()


async def swapped(server, pinned, handler, tls: ServerTLS) -> Exception:
    """What the pinned channel raises when another server has taken the address."""
    await server.stop()
    other = GrpcServer(handler, server.address, tls)
    await other.start()
    try:
        with pytest.raises(Unreachable) as described:
            await pinned.describe()
        with pytest.raises(Unreachable):
            await pinned.open_stream()
        with pytest.raises(Unreachable):
            await pinned.attest(b"nonce")
    finally:
        await other.stop()
    assert not handler.peers
    return described.value


async def test_another_key_of_the_same_authority(server, pinned, handler, authority, tmp_path):
    """A certificate of the right CA for the right name does not help without the pinned key."""
    for name in ("ca.pem", "ca.key"):
        shutil.copy(authority / name, tmp_path)
    other = issue_server(tmp_path, ["localhost", "127.0.0.1"])
    error = await swapped(server, pinned, handler, other)
    assert "shows another TLS key" in str(error)


async def test_the_pinned_certificate_without_its_key(
    server, pinned, handler, server_tls, authority, tmp_path
):
    """Another key whose chain has the pinned certificate and the CA in it: still refused."""
    for name in ("ca.pem", "ca.key"):
        shutil.copy(authority / name, tmp_path)
    other = issue_server(tmp_path, ["localhost", "127.0.0.1"])
    for more in (server_tls.certificate, authority / "ca.pem"):
        with other.certificate.open("ab") as file:
            file.write(more.read_bytes())
    error = await swapped(server, pinned, handler, other)
    assert "shows another TLS key" in str(error)


async def test_a_lost_connection_is_not_made_again(server, pinned, handler, server_tls):
    """Not even to the same key: whoever pins again can ask for a new proof first."""
    assert not pinned.is_lost
    await pinned.describe()
    assert not pinned.is_lost
    await server.stop()
    again = GrpcServer(handler, server.address, server_tls)
    await again.start()
    try:
        with pytest.raises(ConnectionLost):
            await pinned.describe()
        assert pinned.is_lost
        with pytest.raises(ConnectionLost, match="pin the key again"):
            await pinned.open_stream()
        assert len(handler.peers) == 1
    finally:
        await again.stop()


async def test_the_name_is_still_verified(server, client_tls):
    """Pinning is asked of a server under a name that its certificate has."""
    wrong = replace(client_tls, server_name="elsewhere.test")
    async with GrpcChannel(server.address, wrong, options=QUICK) as channel:
        with pytest.raises(CertificateError, match=r"is not for elsewhere\.test"):
            await channel.pin()


async def test_a_foreign_authority(server, client_tls, foreign):
    """The chain of the certificate that is pinned was verified first."""
    wrong = replace(client_tls, ca=foreign / "ca.pem")
    async with GrpcChannel(server.address, wrong, options=QUICK) as channel:
        with pytest.raises(CertificateError, match="was not issued by the CA"):
            await channel.pin()


async def test_nobody_listens(server, client_tls):
    """The error is that of any connection."""
    await server.stop()
    async with GrpcChannel(server.address, client_tls, options=QUICK) as channel:
        with pytest.raises(Unreachable, match="refused the connection"):
            await channel.pin()


async def test_no_key_without_tls(handler):
    """Plaintext and memory have nothing to pin."""
    for channel in (GrpcChannel(LOOPBACK, PLAINTEXT), MemoryChannel(handler)):
        with pytest.raises(AttestationError, match="no TLS key"):
            await channel.pin()


async def test_a_server_without_proof(handler, server_tls, client_tls):
    """It says so, and the client raises it by name."""
    server = GrpcServer(handler, LOOPBACK, server_tls)
    address = str(await server.start())
    async with GrpcChannel(address, client_tls) as channel, await channel.pin() as pinned:
        with pytest.raises(AttestationError, match="has no proof of what it runs"):
            await pinned.attest(b"nonce")
    await server.stop()


async def test_a_server_that_does_not_know_the_call(server_tls, client_tls):
    """A server of an earlier version is named as what is missing, not as a stranger."""
    files = load_server(server_tls)
    credentials = grpc.ssl_server_credentials(
        [(files.key, files.certificate)], files.ca, require_client_auth=True
    )
    server = aio.server()
    address = f"127.0.0.1:{server.add_secure_port(LOOPBACK, credentials)}"
    await server.start()
    async with GrpcChannel(address, client_tls) as channel, await channel.pin() as pinned:
        with pytest.raises(AttestationError, match="too old to attest"):
            await pinned.attest(b"nonce")
    await server.stop(None)


async def test_errors_of_the_attester(pinned, attester):
    """They come as those of a session do, with the time to come back."""
    attester.error = QuotaExceeded("too often", retry_after=0.5)
    with pytest.raises(QuotaExceeded, match="too often") as caught:
        await pinned.attest(b"nonce")
    assert caught.value.retry_after == 0.5


async def test_a_stranger_gets_no_proof(handler, attester, server_tls, client_tls):
    """Who shows no tenant is refused before anything is attested."""
    from fedsea.transport.tokens import TokenTable

    server = GrpcServer(handler, LOOPBACK, server_tls, attester=attester, tokens=TokenTable())
    address = str(await server.start())
    async with GrpcChannel(address, client_tls) as channel, await channel.pin() as pinned:
        with pytest.raises(Unauthenticated):
            await pinned.attest(b"nonce")
    await server.stop()


async def test_a_recorder_sees_what_a_pinned_channel_sends(server, client_tls):
    """Recording goes on behind `pin`."""
    recorder = Recorder()
    channel = RecordingChannel(GrpcChannel(server.address, client_tls), recorder)
    async with channel, await channel.pin() as pinned:
        assert len(pinned.key_sha256) == 64
        assert await pinned.attest(b"nonce of ") == b"nonce of acme"
        stream = await pinned.open_stream()
        await stream.send(b"hello")
        await stream.receive()
        await stream.cancel()
    assert [m.data for m in recorder.messages if m.direction is Direction.UP] == [b"hello"]
