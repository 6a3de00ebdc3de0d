"""Fixtures of the transport tests: a private CA, certificates, and a handler with every behaviour."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsea.errors import Capacity
from fedsea.transport.base import Peer, ServerStream
from fedsea.transport.certificates import init_ca, issue_client, issue_server, load_authority
from fedsea.transport.credentials import ClientTLS, ServerTLS

TENANT = "acme"


class Handler:
    """Does what the first message of a session names; anything else is echoed."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.running = 0
        self.cancelled = asyncio.Event()
        self.finished = asyncio.Event()
        self.send_error: BaseException | None = None

    async def describe(self, peer: Peer) -> bytes:
        self.peers.append(peer)
        return peer.tenant.encode()

    async def session(self, peer: Peer, stream: ServerStream) -> None:
        self.peers.append(peer)
        self.running += 1
        try:
            await self._session(stream)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
            self.finished.set()

    async def _session(self, stream: ServerStream) -> None:
        first = await stream.receive()
        if first == b"refuse":
            raise Capacity("the pool is full: try again", retry_after=1.5)
        if first == b"defect":
            raise ValueError("a secret of the handler")
        if first == b"return":
            return
        if first == b"two then refuse":
            await stream.send(b"one")
            await stream.send(b"two")
            raise Capacity("the pool is full: try again")
        if first == b"large":
            await self._send_large(stream)
        if first == b"flood":
            await self._flood(stream)
        while first is not None:
            await stream.send(first)
            first = await stream.receive()
        await stream.send(b"bye")

    async def _send_large(self, stream: ServerStream) -> None:
        size = int(await stream.receive() or b"0")
        await stream.send(bytes(size))

    async def _flood(self, stream: ServerStream) -> None:
        try:
            while True:
                await stream.send(bytes(100_000))
        except Exception as error:
            self.send_error = error
            raise


@pytest.fixture
def anyio_backend() -> str:
    """Our transports are written for asyncio."""
    return "asyncio"


@pytest.fixture
async def handler() -> Handler:
    """A handler that records what happens to it."""
    return Handler()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a private CA."""
    directory = tmp_path_factory.mktemp("authority")
    init_ca(directory)
    return directory


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a CA that nobody here trusts."""
    directory = tmp_path_factory.mktemp("foreign")
    init_ca(directory)
    return directory


@pytest.fixture(scope="session")
def server_tls(authority: Path) -> ServerTLS:
    """A good server certificate for loopback."""
    return issue_server(authority, ["localhost", "127.0.0.1", "::1"])


@pytest.fixture(scope="session")
def client_tls(authority: Path) -> ClientTLS:
    """A good client certificate."""
    return issue_client(authority, TENANT)


@pytest.fixture
def forge(authority: Path, tmp_path: Path) -> Callable[..., ServerTLS]:
    """Make a certificate of the CA that the product itself would not issue."""

    def forged(
        *,
        days: int = 10,
        age: int = 1,
        server: bool = True,
        names: tuple[x509.GeneralName, ...] = (x509.DNSName("localhost"),),
    ) -> ServerTLS:
        ca = load_authority(authority)
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")]))
            .issuer_name(ca.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=age))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(ca.key, hashes.SHA256())
        encoding = serialization.Encoding.PEM
        plain = serialization.NoEncryption()
        path, key_path = tmp_path / "forged.pem", tmp_path / "forged.key"
        path.write_bytes(certificate.public_bytes(encoding))
        key_path.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
        key_path.chmod(0o600)
        return ServerTLS(authority / "ca.pem", path, key_path)

    return forged
