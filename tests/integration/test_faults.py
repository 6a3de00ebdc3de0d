"""Connections that break or crawl, tenants over their quota, and certificates that are no good."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tests.integration.conftest import tls_of
from tests.ports import free_port

from fedsea.client.link import Patience
from fedsea.client.sessions import Session
from fedsea.errors import QuotaExceeded, SecurityError, Unreachable
from fedsea.transport.certificates import init_ca, issue_client, load_authority
from fedsea.transport.credentials import ClientTLS
from fedsea.transport.grpc_client import GrpcChannel

PROMPT = "The patient came in on Monday and"
OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(shared_server, tiny_model, certificates):
    """The answer over an undisturbed connection."""
    from tests.integration.conftest import Clients

    made = Clients(tiny_model, certificates)
    tokens = made.connect(shared_server.address).generate(PROMPT, **OPTIONS).token_ids
    made.close()
    return tokens


# Bytes of the server's side: of the handshake, the description, the greeting, the prompt's rows,
# and of many single rows.
@pytest.mark.parametrize(
    "cut_after", [1, 700, 1800, 2300, 2900, 4000, 8000, 9500, 11_000, 14_000, 17_000, 20_000]
)
def test_a_connection_cut_after_so_many_bytes(
    shared_server, make_proxy, clients, expected, cut_after
):
    """TLS records cut anywhere, in the middle of a message too: the tokens are the same."""
    proxy = make_proxy(shared_server.address, cut_after=cut_after)
    llm = connect_again(clients, proxy.address)
    assert llm.generate(PROMPT, **OPTIONS).token_ids == expected
    assert llm.generate(PROMPT, **OPTIONS).token_ids == expected
    assert proxy.cuts == 1


def connect_again(clients, address):
    """A client; a connection that breaks in its very first question is tried once more."""
    try:
        return clients.connect(address)
    except Unreachable:
        return clients.connect(address)


def test_a_slow_connection_is_only_slow(shared_server, make_proxy, clients, expected):
    """Answers that crawl are waited for; nothing is lost and nobody reconnects."""
    proxy = make_proxy(shared_server.address, throttle=0.01)
    llm = clients.connect(proxy.address)
    assert llm.generate(PROMPT, **OPTIONS).token_ids == expected
    assert not clients.notices


def test_nobody_listens(clients):
    """A wrong port is one clear line, at once."""
    began = time.monotonic()
    with pytest.raises(Unreachable, match="is the server running"):
        clients.connect(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 15


def test_many_calls_find_nobody_at_once(certificates):
    """Calls that share a channel all get the clear error: none disturbs the attempt of another."""

    async def call_together():
        async with GrpcChannel(f"127.0.0.1:{free_port()}", tls_of(certificates, "acme")) as channel:
            calls: list[Any] = [channel.open_stream() for _ in range(8)]
            calls += [channel.describe() for _ in range(8)]
            return await asyncio.gather(*calls, return_exceptions=True)

    errors = asyncio.run(call_together())
    assert {type(error) for error in errors} == {Unreachable}


def test_a_tenant_over_its_quota(shared_server, clients):
    """The third session of a tenant with two is refused by name; other tenants notice nothing."""
    patience = Patience(open=0.5)
    globex = clients.connect(shared_server.address, tenant="globex", patience=patience)
    acme = clients.connect(shared_server.address, tenant="acme", patience=patience)
    with Session.open(globex, 64) as one, Session.open(globex, 64) as two:
        with pytest.raises(QuotaExceeded, match="2 sessions open, which is its quota"):
            Session.open(globex, 64)
        assert acme.generate(PROMPT, max_new_tokens=5).token_ids
        for session in (one, two):
            assert session.generate(PROMPT, max_new_tokens=5).token_ids
    with Session.open(globex, 64):
        began = time.monotonic()
        with pytest.raises(QuotaExceeded, match="over its quota of 512"):
            Session.open(globex, 1024)
        assert time.monotonic() - began < 5


def test_a_tenant_waits_for_its_own_quota(shared_server, clients):
    """With patience, requests over the quota of sessions are answered one after the other."""
    llm = clients.connect(shared_server.address, tenant="globex")
    pending = [llm.submit([PROMPT], max_new_tokens=30, ignore_eos=True) for _ in range(6)]
    answers = {one.result(60)[0].token_ids for one in pending}
    assert len(answers) == 1


def forged(certificates, folder, *, days):
    """A client certificate of the right CA that runs from two days ago for so many days."""
    ca = load_authority(certificates)
    key = ec.generate_private_key(ec.SECP256R1())
    begins = datetime.now(UTC) - timedelta(days=2)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "acme")]))
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=days))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (folder / "client.pem").write_bytes(certificate.public_bytes(encoding))
    key_file = folder / "client.key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ClientTLS(certificates / "ca.pem", folder / "client.pem", key_file)


def test_an_expired_certificate(shared_server, certificates, clients, tmp_path):
    """A certificate that has run out is refused by name before it is used."""
    tls = forged(certificates, tmp_path, days=1)
    with pytest.raises(SecurityError, match="expired"):
        clients.connect(shared_server.address, tls=tls)


def test_a_foreign_client(shared_server, certificates, clients, tmp_path):
    """A certificate of another CA does not get in, and the error says what to look at."""
    init_ca(tmp_path)
    issue_client(tmp_path, "acme")
    foreign = tls_of(tmp_path, "acme")
    stranger = ClientTLS(certificates / "ca.pem", foreign.certificate, foreign.key)
    began = time.monotonic()
    with pytest.raises(SecurityError, match="certificate"):
        clients.connect(shared_server.address, tls=stranger)
    assert time.monotonic() - began < 15


def test_a_foreign_server(shared_server, clients, tmp_path):
    """A server that our CA did not sign is not talked to."""
    init_ca(tmp_path)
    issue_client(tmp_path, "acme")
    with pytest.raises(SecurityError, match="certificate"):
        clients.connect(shared_server.address, tls=tls_of(tmp_path, "acme"))
